"""``casemate why`` on a large fleet: seconds until the answer, and how long the writer's loop is held up meanwhile.

Usage: python tests/bench/why.py [--hosts 10000] [--rounds 3]      (or HOSTS=… in the environment)

The fleet is that of ``placement.py``, about 75 % full, as records of the manager's state. Each question is one that no host
answers with yes: too many GPUs, more whole cores on one cell than are free, pages of a size that has run out, a GPU group
beside a closed host, a gang. ``warming`` is what keeps the columns in line between questions, in rounds; after a start it
has all hosts to write. ``stall`` is the longest time that a task which wakes each millisecond was late, on the loop on which the writer works. The last line is
JSON.
"""

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one core: the figure is per core
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from placement import GIB_KIB, Stream

from casemate_core.claims import HostClaims
from casemate_core.fit import CellPolicy, CpuPolicy, CpuRequest, GpuRequest, MemoryRequest, Request, ThreadPolicy
from casemate_core.spec.environment import Cpu, Environment, EnvironmentSpec, Memory
from casemate_core.spec.fleet import Host, HostSpec
from casemate_core.spec.meta import Meta
from casemate_manager.api.why import PlacerWhy
from casemate_manager.fleet.observed import HostSeen, Observed
from casemate_manager.fleet.records import EnvironmentRecord, HostRecord, InstanceRecord, InventoryRecord
from casemate_manager.fleet.state import State
from casemate_manager.policy.cel import Cel
from casemate_manager.scheduler.placer import FleetPlacer

QUESTIONS = {
    "gpus": Request(CpuRequest(8, policy=CpuPolicy.DEDICATED), MemoryRequest(65536), 1, (GpuRequest(9),)),
    "cores": Request(
        CpuRequest(70, policy=CpuPolicy.DEDICATED, threads=ThreadPolicy.REQUIRE),
        MemoryRequest(65536, cells=CellPolicy.ONE),
        1,
    ),
    "pages": Request(CpuRequest(4), MemoryRequest(400 * 1024, page_kib=GIB_KIB, cells=CellPolicy.ONE), 1),
    "model": Request(CpuRequest(4), MemoryRequest(4096), 1, (GpuRequest(1, "B300"),)),
    "gang": Request(CpuRequest(64, policy=CpuPolicy.DEDICATED), MemoryRequest(400_000), 1, (GpuRequest(8),)),
}
GANG = 16


class AskingPlacer(FleetPlacer):
    """The production placer, asked for what an environment's spec cannot say yet, by the environment's name."""

    def request_for(self, environment: Environment, spec: EnvironmentSpec) -> Request:
        """See `FleetPlacer`."""
        return QUESTIONS.get(environment.meta.name) or super().request_for(environment, spec)


def fleet(hosts: int) -> tuple[State, Observed]:
    """The state of a manager of so many hosts, with one environment that waits for each question."""
    stream = Stream(hosts)
    state, observed = State(1, 1), Observed()
    for row in stream.scheduler.columns.live_rows():
        view = row.view
        state.hosts[view.name] = HostRecord(Host(Meta(view.name), HostSpec()))
        state.inventories[view.name] = InventoryRecord(view.name, "digest", view.topology)
        state.claims[view.name] = HostClaims.of(view.claims, 1)
        observed.hosts[view.name] = HostSeen(True, 1, True)
    for name in QUESTIONS:
        gang = name == "gang"
        spec = EnvironmentSpec(Cpu(1), Memory(512), "debian", replicas=GANG if gang else 1, gang=gang)
        environment = Environment(Meta(name, "default", uid=f"e-{name}"), spec)
        state.environments[f"default/{name}"] = EnvironmentRecord(environment, 1, 1)
        state.environment_keys[f"e-{name}"] = f"default/{name}"
        for n in range(spec.replicas):
            uid = f"i-{name}-{n}"
            meta = Meta(f"{name}-{n}", "default", uid=uid)
            state.instances[uid] = InstanceRecord(meta, name, f"e-{name}", n, (), 1, 1)
            state.environment_instances.setdefault(f"e-{name}", {})[n] = uid
            state.pending[uid] = None
    return state, observed


class Heart:
    """Wakes each millisecond and remembers by how much it was late."""

    def __init__(self) -> None:
        self.late_s = 0.0

    async def beat(self) -> None:
        """Until cancelled."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            self.late_s = max(self.late_s, time.perf_counter() - before - 0.001)


async def ask(why: PlacerWhy, state: State, observed: Observed, name: str) -> tuple[float, float, int]:
    """(seconds, the longest stall of the loop meanwhile, suggestions)."""
    heart = Heart()
    beating = asyncio.create_task(heart.beat())
    await asyncio.sleep(0.02)
    heart.late_s = 0.0
    begin = time.perf_counter()
    answer = await why.why(state, observed, state.instances[f"i-{name}-0"], "")
    took = time.perf_counter() - begin
    await asyncio.sleep(0.005)
    beating.cancel()
    assert not answer.placed and answer.reasons, answer
    return took, heart.late_s, len(answer.suggestions)


async def run(hosts: int, rounds: int) -> dict[str, object]:
    """The table, and what is printed as JSON."""
    state, observed = fleet(hosts)
    why = PlacerWhy(AskingPlacer(Cel()))
    result: dict[str, object] = {"hosts": hosts}
    gc.collect()
    gc.freeze()  # as the manager does when it has loaded its state
    heart = Heart()
    beating = asyncio.create_task(heart.beat())
    begin, cpu, rounds_needed = time.perf_counter(), time.process_time(), 1
    while not await why.warm(state, observed):
        rounds_needed += 1
    warm, cpu = time.perf_counter() - begin, time.process_time() - cpu
    beating.cancel()
    print(f"{'question':8} {'s':>8} {'stall ms':>9} {'suggestions':>12}")
    print(f"{'warming':8} {warm:8.3f} {heart.late_s * 1000:9.1f} in {rounds_needed} rounds, {cpu:.1f} s of CPU")
    result |= {"warming_s": round(warm, 3), "warming_stall_ms": round(heart.late_s * 1000, 1)}
    worst, worst_stall = 0.0, 0.0
    for name in QUESTIONS:
        slowest = latest = 0.0
        for number in range(rounds):
            # something moves between two questions, as it does
            host = f"h{number}"
            state.claims[host] = HostClaims.of(list(state.claims[host])[1:], 1)
            observed.hosts[host] = replace(observed.hosts[host], heard_s=float(number))
            state.revision += 1
            took, stall, suggestions = await ask(why, state, observed, name)
            slowest, latest = max(slowest, took), max(latest, stall)
        print(f"{name:8} {slowest:8.3f} {latest * 1000:9.1f} {suggestions:12}", flush=True)
        worst, worst_stall = max(worst, slowest), max(worst_stall, latest)
    return result | {"worst_s": round(worst, 3), "worst_stall_ms": round(worst_stall * 1000, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=int(os.environ.get("HOSTS", "10000")))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(asyncio.run(run(options.hosts, options.rounds))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
