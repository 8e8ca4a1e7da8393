"""A guest that counts is moved between two real libvirtds on one machine, and goes on counting.

Two agents, each with a private libvirtd of its own; what runs between them is libvirt's migration through TLS streams whose
certificates the manager has signed. QEMU is real.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from casemate_agent import sandbox as sandboxes
from support.counting_guest import counted, counting_image
from support.realfleet import (
    Daemon,
    RealFleet,
    agent_argv,
    empty_environment,
    fleet_in,
    tail,
    traces_of_scope,
)

pytestmark = pytest.mark.libvirt


class Pair:
    """The fleet of `fleet_in`, whose host is ``box``, and a second host, ``far``."""

    def __init__(self, fleet: RealFleet, far: RealFleet) -> None:
        self.fleet = fleet
        self.hosts = {"box": fleet, "far": far}

    def console(self, host: str, uid: str) -> Path:
        return self.hosts[host].state / "instances" / uid / "console.log"

    def numbers(self, host: str, uid: str) -> list[int]:
        return counted(self.console(host, uid))[1]

    def host_of(self, environment: str) -> str:
        return str(self.fleet.instance(environment).get("spec", {}).get("host", ""))

    def tails(self) -> str:
        return "\n".join(
            (self.fleet.tails(), tail(self.hosts["far"].agent.log), tail(self.hosts["far"].folder / "v/libvirtd.log"))
        )


def with_passage(fleet: RealFleet) -> list[str]:
    argv = list(fleet.agent.argv)
    return [*argv, "--passage", "127.0.0.1", "--moves-dir", f"{fleet.sandbox.directory}/lib/qemu/casemate"]


@pytest.fixture
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with fleet_in(tmp_path_factory.mktemp("j")) as fleet:
        fleet.agent.end()
        fleet.agent = replace(fleet.agent, argv=with_passage(fleet), process=None)
        fleet.agent.start()
        folder = tmp_path_factory.mktemp("f")
        sandbox = sandboxes.up(folder / "v")
        port = int(fleet.environ["CASEMATE_MANAGER"].rpartition(":")[2])
        argv = agent_argv(folder, sandbox, port)
        argv[argv.index("box")] = "far"
        argv[argv.index("--image-folder") + 1] = str(fleet.folder / "src")
        far = RealFleet(
            folder, sandbox, fleet.manager, Daemon(argv, folder / "agent.log", fleet.environ), fleet.environ
        )
        far.agent = replace(far.agent, argv=with_passage(far))
        try:
            far.agent.start()
            both = Pair(fleet, far)
            for name in both.hosts:

                def ready(name: str = name) -> bool:
                    done = fleet.run("get", "host", name, "-o", "json")
                    return done.code == 0 and json.loads(done.out)["status"]["phase"] == "Ready"

                fleet.until(f"{name} is Ready", ready, 90)
            fleet.apply(counting_image(fleet.folder / "src"))
            yield both
        finally:
            try:
                far.agent.end()
            finally:
                sandboxes.down(folder / "v")
    left = [trace for trace in traces_of_scope(sandbox.scope, folder) if trace != str(folder)]
    assert left == []


def counting(name: str) -> dict[str, Any]:
    """Without an interface: two hosts on one machine cannot both have the bridge of one network."""
    made = empty_environment(name, isolated=True)
    made["spec"]["image"] = "counting"
    return made


def disk_counts(path: Path) -> int:
    """The number in the second sector of a root disk that is in use."""
    done = subprocess.run(
        ["qemu-io", "-r", "-U", "-f", "qcow2", "-c", "read -v 512 4", str(path)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    words = done.stdout.split()[1:5]
    return int.from_bytes(bytes.fromhex("".join(words)), "little")


@pytest.mark.timeout(900)
def test_a_guest_that_counts_is_moved_and_goes_on_counting(pair: Pair) -> None:
    fleet = pair.fleet
    fleet.apply(counting("count"))
    before = fleet.until_running("count")
    uid, here = before["metadata"]["uid"], pair.host_of("count")
    there = "far" if here == "box" else "box"
    fleet.until("it counts", lambda: len(pair.numbers(here, uid)) > 20)
    moved = fleet.run("migrate", "inst/count-0", timeout_s=300)
    assert moved.code == 0, f"{moved.err}\n{pair.tails()}"
    assert moved.out.startswith(f"instance/count-0: migrate done: moved from {here} to {there} in "), moved.out
    after = fleet.instance("count")
    assert after["metadata"]["uid"] == uid
    assert pair.host_of("count") == there
    mark = len(pair.numbers(there, uid))
    fleet.until("it goes on counting", lambda: len(pair.numbers(there, uid)) > mark + 20)
    boots, numbers = counted(pair.console(there, uid))
    assert boots == 0, "it has not booted there"
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "not a number is missing"
    assert set(pair.hosts[there].qemus()) == {uid}
    fleet.until("nothing is left of it", lambda: not pair.hosts[here].traces_of(uid))
    (disk,) = (pair.hosts[there].state / "instances" / uid).glob("*.qcow2")
    was = disk_counts(disk)
    assert was > 20
    fleet.until("its disk goes on too", lambda: disk_counts(disk) > was)
    # and back
    fleet.run("migrate", "inst/count-0", "--to", here, timeout_s=300).ok()
    last = numbers[-1]
    fleet.until("it goes on where it began", lambda: (pair.numbers(here, uid) or [0])[-1] > last + 10)
    assert counted(pair.console(here, uid))[0] == 0
    fleet.run("delete", "env", "count").ok()
    fleet.until_gone("count")
    assert not pair.hosts[here].traces_of(uid) and not pair.hosts[there].traces_of(uid)
