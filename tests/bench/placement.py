"""Exact placements a second on one core: threads, cells, pages, GPUs and VFs by their ids, in a stream with departures.

Usage: python tests/bench/placement.py [--hosts 1000] [--count 5000] [--no-durable]      (or HOSTS=10000 in the environment)

A host has 2 cells of 32 cores with 2 threads, 1 TiB with 512 pages of 1 GiB, 8 GPUs on NVSwitches, 32 VFs on two networks. The
fleet is filled to about 75 % of its threads with a mix of eight shapes; then each step ends a random instance and places a new
one. Every decision is an exact claim and is applied. "durable": the same, each placement and each end a record in the store,
committed with fsync in groups, one group being written while the next is decided. The last lines are the time of one decision
on the machines with many cells, and JSON.
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one core: the figure is per core
sys.path.insert(0, str(Path(__file__).parent.parent))

from casemate_core.claims import Claim, HostClaims
from casemate_core.fit import (
    CellPolicy,
    CpuPolicy,
    CpuRequest,
    GpuLink,
    GpuRequest,
    MemoryRequest,
    NicRequest,
    Request,
    ThreadPolicy,
)
from casemate_core.topology_loaders import from_line
from casemate_manager.columns import HostView
from casemate_manager.fleet.records import Drop, PlacementRecord, Put, RecordChange, key_of
from casemate_manager.scheduler.place import Scheduler
from casemate_manager.scheduler.request import Decision, PlacementRequest
from casemate_manager.store.ports import Transaction
from casemate_manager.store.sqlite import SqliteStore
from casemate_manager.writer import GROUP
from support.hosts import host

LINE = "2s 32k/c 2t 1T 1G=512 hk=1 iso=4 gpu=8xH200:141G@fabric vf=4x8@fronthaul+mgmt disk=8T name=h"
GIB_KIB = 1024 * 1024
DEDICATED, ONE = CpuPolicy.DEDICATED, CellPolicy.ONE
DISK = 20_000
#: (weight, shape)
MIX = (
    (30, Request(CpuRequest(2), MemoryRequest(4096), DISK)),
    (15, Request(CpuRequest(4, policy=DEDICATED), MemoryRequest(16384), DISK)),
    (
        10,
        Request(
            CpuRequest(8, policy=DEDICATED, threads=ThreadPolicy.REQUIRE),
            MemoryRequest(16384, page_kib=GIB_KIB, cells=ONE),
            DISK,
            nics=(NicRequest("fronthaul"),),
        ),
    ),
    (20, Request(CpuRequest(8, policy=DEDICATED), MemoryRequest(65536), DISK, (GpuRequest(1),))),
    (
        8,
        Request(
            CpuRequest(16, policy=DEDICATED, threads=ThreadPolicy.PREFER),
            MemoryRequest(131072),
            DISK,
            (GpuRequest(2),),
            (NicRequest("mgmt"),),
        ),
    ),
    (3, Request(CpuRequest(32, policy=DEDICATED), MemoryRequest(131072), DISK, (GpuRequest(4, link=GpuLink.NVLINK),))),
    (1, Request(CpuRequest(64, policy=DEDICATED), MemoryRequest(262144), DISK, (GpuRequest(8, link=GpuLink.NVLINK),))),
    (
        5,
        Request(
            CpuRequest(4, policy=DEDICATED, threads=ThreadPolicy.ISOLATE, realtime=True),
            MemoryRequest(8192, page_kib=GIB_KIB, cells=ONE),
            DISK,
            nics=(NicRequest("fronthaul"),),
        ),
    ),
)
FULL = 0.75
#: Hosts filled one decision at a time; larger fleets are copies of them, so that setting up ends.
FILLED_BY_HAND = 250


class Stream:
    """A fleet at work."""

    def __init__(self, hosts: int, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.number = 0
        self.live: list[tuple[str, Claim]] = []
        self.refused = 0
        topology = from_line(LINE)
        self.threads = (topology.index.pool | topology.index.isolated).bit_count()
        self.scheduler = Scheduler()
        by_hand = min(hosts, FILLED_BY_HAND)
        for i in range(by_hand):
            self._add_host(i, HostClaims.empty(), topology)
        while self.full() < FULL:
            for _ in range(by_hand):
                self.arrive()
        filled = [row.view.claims for row in self.scheduler.columns.live_rows()]
        for i in range(by_hand, hosts):
            copied = [replace(c, owner=f"{c.owner}@{i}") for c in filled[i % by_hand]]
            self._add_host(i, HostClaims.of(copied), topology)
            self.live += [(f"h{i}", claim) for claim in copied]
        # As in a manager that has been up for a while: every host was looked at once, and what was loaded is no garbage.
        for row in self.scheduler.columns.live_rows():
            _ = row.view.topology.functions
        gc.collect()
        gc.freeze()

    def _add_host(self, number: int, claims: HostClaims, topology: object) -> None:
        # An object of its own for each host, as inventories are, so that none is in a cache because of another.
        own = replace(topology, name=f"h{number}")  # type: ignore[type-var]
        self.scheduler.upsert_host(HostView(f"h{number}", own, claims))  # type: ignore[arg-type]

    def full(self) -> float:
        """Part of all threads that is held."""
        free = self.scheduler.columns.hosts.free[1]
        return 1 - float(free[free > 0].sum()) / 1000 / self.threads / len(self.scheduler.columns)

    def arrive(self) -> Decision | None:
        """One request, placed and applied."""
        self.number += 1
        (request,) = self.rng.choices([r for _, r in MIX], [w for w, _ in MIX])
        found = self.scheduler.place(PlacementRequest(f"i{self.number}", request), epoch=1, generation=1)
        if not isinstance(found, Decision):
            self.refused += 1
            return None
        self.scheduler.apply_claim(found.host, found.claim)
        self.live.append((found.host, found.claim))
        return found

    def depart(self) -> tuple[str, Claim]:
        """A random instance ends."""
        at = self.rng.randrange(len(self.live))
        self.live[at], self.live[-1] = self.live[-1], self.live[at]
        name, claim = self.live.pop()
        self.scheduler.release(name, claim.owner)
        return name, claim

    def step(self) -> list[RecordChange]:
        """One end and one arrival, as records."""
        gone, claim = self.depart()
        changes: list[RecordChange] = [Drop("Placement", key_of(_record(gone, claim)))]
        found = self.arrive()
        if found is not None:
            changes.append(Put(_record(found.host, found.claim)))
        return changes


def _record(name: str, claim: Claim) -> PlacementRecord:
    return PlacementRecord(claim.owner, name, claim, 1, 1)


class Measured(NamedTuple):
    """``rate``: decisions a second, ends included in the time; ``cpu_rate`` the same of CPU time, ``best_cpu_rate`` of the
    part of the run that was disturbed least. ``times`` and ``cpu_times``: seconds of each decision, applied, ascending."""

    rate: float
    cpu_rate: float
    best_cpu_rate: float
    times: list[float]
    cpu_times: list[float]


#: Decisions of one part of a run. Others on the machine take the caches from us, which costs CPU time as well.
PART = 250


def measure(stream: Stream, count: int) -> Measured:
    """A run of so many ends and decisions."""
    times, cpu_times, parts = [], [], []
    begin, cpu = time.perf_counter(), time.process_time()
    part = cpu
    for number in range(1, count + 1):
        stream.depart()
        start, start_cpu = time.perf_counter(), time.process_time()
        stream.arrive()
        times.append(time.perf_counter() - start)
        now = time.process_time()
        cpu_times.append(now - start_cpu)
        if number % PART == 0:
            parts.append(PART / (now - part))
            part = now
    rate, cpu_rate = count / (time.perf_counter() - begin), count / (time.process_time() - cpu)
    return Measured(rate, cpu_rate, max(parts, default=cpu_rate), sorted(times), sorted(cpu_times))


def measure_durable(stream: Stream, count: int, folder: Path) -> tuple[float, float]:
    """Decisions a second until the last group is on disk, and of CPU time, the store's thread included."""
    store = SqliteStore(folder / "fleet.db")
    stored = store.lead()
    revision = stored.revision
    # Those that run already are in the store, as they would be.
    for part in _parts([Put(_record(name, claim)) for name, claim in stream.live], 5000):
        revision += 1
        store.commit(stored.epoch, [Transaction(revision, tuple(part))])
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(0, count, GROUP):
            group = []
            for _ in range(GROUP):
                revision += 1
                group.append(Transaction(revision, tuple(stream.step())))
            if pending is not None:
                pending.result()
            pending = writer.submit(store.commit, stored.epoch, group)
        if pending is not None:
            pending.result()
        took, cpu = time.perf_counter() - begin, time.process_time() - cpu
        writer.submit(store.close).result()
    made = -(-count // GROUP) * GROUP
    return made / took, made / cpu


def _parts(items: list[RecordChange], size: int) -> Iterator[list[RecordChange]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


def many_cells() -> dict[str, float]:
    """CPU milliseconds of the slowest of 200 decisions on one machine with many cells, by machine."""
    worst = {}
    for name in ("gb200", "epyc-nps4"):
        topology = host(name)
        scheduler = Scheduler()
        scheduler.upsert_host(HostView(name, topology, HostClaims.empty()))
        big = topology.memory_mib // 3
        shapes = (
            Request(CpuRequest(8), MemoryRequest(big)),
            Request(CpuRequest(16, policy=DEDICATED), MemoryRequest(4096)),
            Request(CpuRequest(32, policy=DEDICATED), MemoryRequest(8192, cells=CellPolicy.SPREAD)),
        )
        times = []
        for i in range(200):
            request = PlacementRequest(f"i{i}", shapes[i % len(shapes)])
            scheduler.place(request)
            start = time.process_time()
            found = scheduler.place(replace(request, uid=f"j{i}"))
            times.append((time.process_time() - start) * 1000)
            if isinstance(found, Decision) and i % 5 == 0:
                scheduler.apply_claim(found.host, found.claim)
        worst[name] = round(max(times), 2)
    return worst


def _at(ascending: list[float], part: float) -> float:
    """Milliseconds of a quantile."""
    return ascending[int(len(ascending) * part)] * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=int(os.environ.get("HOSTS", "1000")))
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--no-durable", action="store_true")
    parser.add_argument("--profile", action="store_true", help="Print where the time goes.")
    options = parser.parse_args()
    stream = Stream(options.hosts)
    measure(stream, min(1000, options.count))
    if options.profile:
        import cProfile
        import pstats

        profile = cProfile.Profile()
        profile.runcall(measure, stream, options.count)
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
    stream.refused = 0
    run = measure(stream, options.count)
    rate, times = run.rate, run.times
    p50, p99 = (_at(times, part) for part in (0.5, 0.99))
    cpu_p50, cpu_p99 = (_at(run.cpu_times, part) for part in (0.5, 0.99))
    print(f"{options.hosts} hosts, {len(stream.live)} instances, {stream.full():.0%} of the threads held")
    print(
        f"placements/s {rate:.0f}   p50 {p50:.3f} ms   p99 {p99:.3f} ms   refused {stream.refused} of {options.count}"
    )
    print(
        f"of CPU time  {run.cpu_rate:.0f}   p50 {cpu_p50:.3f} ms   p99 {cpu_p99:.3f} ms   the best {PART}: {run.best_cpu_rate:.0f}/s"
    )
    result: dict[str, object] = {
        "hosts": options.hosts,
        "placements_per_s": round(rate),
        "durable_placements_per_s": None,
        "placements_per_cpu_s": round(run.cpu_rate),
        "best_placements_per_cpu_s": round(run.best_cpu_rate),
        "p50_ms": round(p50, 3),
        "p99_ms": round(p99, 3),
        "cpu_p50_ms": round(cpu_p50, 3),
        "cpu_p99_ms": round(cpu_p99, 3),
    }
    if not options.no_durable:
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
            durable, of_cpu = measure_durable(stream, options.count, Path(folder))
        result["durable_placements_per_s"] = round(durable)
        result["durable_placements_per_cpu_s"] = round(of_cpu)
        print(
            f"durable      {durable:.0f} ({durable / rate:.0%})   of CPU time {of_cpu:.0f} ({of_cpu / run.cpu_rate:.0%})"
        )
    broken = sum(len(row.view.claims.check(row.view.topology)) for row in stream.scheduler.columns.live_rows())
    print(f"claims broken {broken}   mean decision {statistics.mean(times) * 1000:.3f} ms")
    result["many_cells_ms"] = many_cells()
    result["claims_broken"] = broken
    print(json.dumps(result))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
