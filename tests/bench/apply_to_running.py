"""From `apply` to a running domain, over a plain define and start of the same XML.

    python tests/bench/apply_to_running.py [--runs 8]

As root, with the Debian packages of [run]. One run of one manager, one agent and a private libvirtd: small VMs are applied one
after the other over gRPC, each timed from the call until libvirt says that its domain runs. Then, with the agent stopped
(SIGSTOP), the same domain is undefined, and its own XML defined and started by libvirt alone, on the same disk, seed and
bridge; the VM is deleted before the next one. QEMU starts and nothing boots. Prints both times and their ratio (median,
lowest, highest), and what of the first the agent's own steps took.
"""

import argparse
import json
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import libvirt

from casemate_agent.drivers.virtlines import EventLoop
from casemate_cli.client import Client, request_key
from casemate_cli.manifests import parse
from casemate_cli.settings import Settings
from support.realfleet import RealFleet, empty_environment, fleet_in

STEP = re.compile(r"agent\.execute: (\w+) \S+ done in ([0-9.]+) s")
WAIT_S = 120.0


class Starts:
    """When each domain began to run, as libvirt tells it."""

    def __init__(self, connection: Any) -> None:
        self._at_s: dict[str, float] = {}
        self._more = threading.Condition()
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_event, None)

    def _on_event(self, _connection: Any, domain: Any, event: int, _detail: int, _opaque: Any) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STARTED:
            with self._more:
                self._at_s[domain.UUIDString()] = time.perf_counter()
                self._more.notify_all()

    def forget(self) -> None:
        with self._more:
            self._at_s.clear()

    def first(self) -> tuple[str, float]:
        """The only domain that started since `forget`, and when."""
        with self._more:
            if not self._more.wait_for(lambda: self._at_s, WAIT_S):
                raise SystemExit(f"no domain ran within {WAIT_S:g} s")
            return next(iter(self._at_s.items()))


def once(fleet: RealFleet, client: Client, connection: Any, starts: Starts, name: str) -> tuple[float, float]:
    """Seconds from the call to a running domain, and of a plain define and start of the same XML."""
    objects = parse(json.dumps(empty_environment(name)).encode(), "bench", tenant="default")
    starts.forget()
    began_s = time.perf_counter()
    client.apply(objects, key=request_key())
    uid, ran_s = starts.first()
    ours_s = ran_s - began_s
    time.sleep(1.0)  # what follows the start, the guest's connection, is no part of either
    assert fleet.agent.process is not None
    fleet.agent.process.send_signal(signal.SIGSTOP)
    try:
        domain = connection.lookupByUUIDString(uid)
        xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        domain.destroy()
        domain.undefine()
        time.sleep(0.2)
        starts.forget()
        began_s = time.perf_counter()
        connection.defineXML(xml).create()
        theirs_s = starts.first()[1] - began_s
    finally:
        fleet.agent.process.send_signal(signal.SIGCONT)
    fleet.run("delete", "env", name, timeout_s=330).ok()
    return ours_s, theirs_s


def row(name: str, values: list[float], unit: float, form: str) -> str:
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{name:<34}" + "".join(f"{v * unit:>10{form}}" for v in (median, low, high))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    runs = parser.parse_args().runs
    EventLoop.ensure()
    with tempfile.TemporaryDirectory(prefix="cb") as temporary, fleet_in(Path(temporary) / "f") as fleet:
        connection = libvirt.open(fleet.sandbox.uri)
        starts = Starts(connection)
        with Client(Settings(manager=fleet.environ["CASEMATE_MANAGER"], insecure_loopback=True)) as client:
            pairs = [once(fleet, client, connection, starts, f"e-{number}") for number in range(runs + 1)]
        connection.close()
        steps: dict[str, list[float]] = defaultdict(list)
        for name, took in STEP.findall(fleet.agent.log.read_text()):
            steps[name].append(float(took))
    # The first warms caches: the image's copy, the network's bridge, libvirt's own.
    del pairs[0]
    print(f"{'milliseconds':<34}{'median':>10}{'lowest':>10}{'highest':>10}")
    print(row("apply to running", [ours for ours, _ in pairs], 1e3, ".1f"))
    print(row("define and start of the same XML", [theirs for _, theirs in pairs], 1e3, ".1f"))
    print(row("apply less define and start", [ours - theirs for ours, theirs in pairs], 1e3, ".1f"))
    print(row("ratio", [ours / theirs for ours, theirs in pairs], 1.0, ".3f"))
    print("\nof it, steps of the agent")
    for name in ("CreateOverlay", "WriteSeed", "Guard", "Define", "Start"):
        if steps[name]:
            print(row(f"  {name}", steps[name][1:] or steps[name], 1e3, ".1f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
