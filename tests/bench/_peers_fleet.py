"""The made fleet that all placers of ``peers.py`` start from, and ours on it.

May live here: shapes, the filled fleet, its description as plain data (JSON, for programs that know nothing of ours), and the
timing of our own placer. What the others do is in ``_peers_openstack.py`` and ``_peers_hail.py``.

Theory of operation. Our scheduler fills a few hosts, and random ends make holes; larger fleets are copies of these hosts. Each
held instance is described by its exact threads, cell and pages, so that every placer begins from the very same state. Then
all are asked for the same arrivals.
"""

import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from casemate_core.claims import Claim, HostClaims
from casemate_core.fit import CellPolicy, CpuPolicy, CpuRequest, MemoryRequest, Request, ThreadPolicy
from casemate_core.topology import Topology
from casemate_core.topology_loaders import from_line
from casemate_manager.columns import HostView
from casemate_manager.fleet.records import PlacementRecord, Put
from casemate_manager.scheduler.place import Scheduler
from casemate_manager.scheduler.request import Decision, PlacementRequest
from casemate_manager.store.ports import Transaction
from casemate_manager.store.sqlite import SqliteStore

LINE = "2s 32k/c 2t 1T 1G=512 hk=1 disk=8T name=h"
DISK_MIB = 20 * 1024
GIB_KIB = 1024 * 1024
#: Filled to this part of the threads, then emptied at random to the second.
FULL, WORKING = 0.85, 0.70
FILLED_BY_HAND = 100
#: Rounds of the same arrivals that ours is timed over: one is too short to time.
ROUNDS = 30


@dataclass(frozen=True, slots=True)
class PeerShape:
    """A request in words that all placers have, or ignore: dedicated threads and memory of one cell.

    ``page_kib`` 0: ordinary pages. ``require``: whole cores.
    """

    weight: int
    vcpus: int
    memory_mib: int
    page_kib: int = 0
    require: bool = False

    def request(self) -> Request:
        """In our words."""
        threads = ThreadPolicy.REQUIRE if self.require else ThreadPolicy.PREFER
        memory = MemoryRequest(self.memory_mib, cells=CellPolicy.ONE)
        if self.page_kib:
            memory = replace(memory, page_kib=self.page_kib)
        return Request(CpuRequest(self.vcpus, policy=CpuPolicy.DEDICATED, threads=threads), memory, DISK_MIB)


SHAPES = (
    PeerShape(30, 2, 4 * 1024),
    PeerShape(25, 4, 16 * 1024),
    PeerShape(20, 8, 32 * 1024, GIB_KIB, True),
    PeerShape(15, 8, 32 * 1024),
    PeerShape(8, 16, 64 * 1024, GIB_KIB),
    PeerShape(2, 32, 96 * 1024),
)
REQUESTS = tuple(shape.request() for shape in SHAPES)


class MadeFleet:
    """The hosts with what they hold."""

    def __init__(self, hosts: int, arrivals: int, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.topology: Topology = from_line(LINE)
        self.scheduler = Scheduler()
        self.shape_of: dict[str, int] = {}
        by_hand = min(hosts, FILLED_BY_HAND)
        for i in range(by_hand):
            self._add_host(i, HostClaims.empty())
        self._fill(by_hand)
        filled = [row.view.claims for row in self.scheduler.columns.live_rows()]
        for i in range(by_hand, hosts):
            copied = []
            for claim in filled[i % by_hand]:
                copied.append(replace(claim, owner=f"{claim.owner}@{i}"))
                self.shape_of[copied[-1].owner] = self.shape_of[claim.owner]
            self._add_host(i, HostClaims.of(copied))
        self.arrivals = self.rng.choices(range(len(SHAPES)), [s.weight for s in SHAPES], k=arrivals)

    def _add_host(self, number: int, claims: HostClaims) -> None:
        self.scheduler.upsert_host(HostView(f"h{number}", replace(self.topology, name=f"h{number}"), claims))

    def full(self) -> float:
        """Part of all threads that is held."""
        rows = list(self.scheduler.columns.live_rows())
        held = sum(row.view.claims.usage.owned.bit_count() for row in rows)
        return held / self.topology.index.pool.bit_count() / len(rows)

    def _fill(self, hosts: int) -> None:
        held: list[tuple[str, Claim]] = []
        threads = hosts * self.topology.index.pool.bit_count()
        taken = 0
        while taken < FULL * threads:
            (shape,) = self.rng.choices(range(len(SHAPES)), [s.weight for s in SHAPES])
            found = self.scheduler.place(PlacementRequest(f"i{len(self.shape_of)}", REQUESTS[shape]))
            if not isinstance(found, Decision):
                raise RuntimeError("the made fleet cannot be filled: no place for a shape at 85 % of its threads")
            self.scheduler.apply_claim(found.host, found.claim)
            self.shape_of[found.uid] = shape
            held.append((found.host, found.claim))
            taken += SHAPES[shape].vcpus
        self.rng.shuffle(held)
        while taken > WORKING * threads:
            host, claim = held.pop()
            self.scheduler.release(host, claim.owner)
            taken -= SHAPES[self.shape_of.pop(claim.owner)].vcpus

    def describe(self) -> dict[str, Any]:
        """The fleet and the arrivals as plain data: exact threads of each held instance, one entry each."""
        index = self.topology.index
        cells = []
        for cell in self.topology.cells:
            cores = [core for core in self.topology.cores if core.cell == cell.id]
            threads = [[t for t in core.threads if index.pool >> t & 1] for core in cores]
            cells.append(
                {
                    "id": cell.id,
                    "siblings": [core for core in threads if core],
                    "memory_mib": cell.memory_mib,
                    "pages_1g": sum(pool.count for pool in cell.pools),
                }
            )
        hosts = [
            {
                "name": row.view.name,
                "held": [
                    {
                        "shape": self.shape_of[claim.owner],
                        "uid": claim.owner,
                        "threads": list(claim.vcpus),
                        "cell": claim.cells[0],
                    }
                    for claim in row.view.claims
                ],
            }
            for row in self.scheduler.columns.live_rows()
        ]
        return {
            "cells": cells,
            "threads": index.online.bit_count(),
            "hosts": hosts,
            "shapes": [asdict(shape) for shape in SHAPES],
            "disk_mib": DISK_MIB,
            "total_disk_mib": self.topology.disk_mib,
            "arrivals": self.arrivals,
        }

    # --- ours ------------------------------------------------------------------------------------------------------------

    def _round(
        self, number: int, store: SqliteStore | None = None, epoch: int = 0, revision: int = 0, *, unseen: bool = False
    ) -> list[tuple[float, float]]:
        """Place all arrivals, then end them in random order. (wall, CPU) seconds of each placement that was found."""
        times, placed = [], []
        for at, shape in enumerate(self.arrivals):
            request = REQUESTS[shape]
            if unseen:
                request = replace(request, disk_mib=DISK_MIB + number * len(self.arrivals) + at)
            wall, cpu = time.perf_counter(), time.process_time()
            found = self.scheduler.place(PlacementRequest(f"r{number}-{at}", request), epoch=1, generation=1)
            if not isinstance(found, Decision):
                continue
            self.scheduler.apply_claim(found.host, found.claim)
            if store is not None:
                record = PlacementRecord(found.claim.owner, found.host, found.claim, 1, 1)
                store.commit(epoch, [Transaction(revision + len(placed) + 1, (Put(record),))])
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
            placed.append(found)
        self.rng.shuffle(placed)
        for found in placed:
            self.scheduler.release(found.host, found.claim.owner)
        return times

    def measure(self) -> dict[str, Any]:
        """Our placements in memory: decided, and applied with exact ids."""
        self._round(0)
        times = [pair for number in range(1, ROUNDS + 1) for pair in self._round(number)]
        broken = sum(len(row.view.claims.check(row.view.topology)) for row in self.scheduler.columns.live_rows())
        return figures(times, ROUNDS * len(self.arrivals) - len(times)) | {"claims_broken": broken}

    def measure_unseen(self) -> dict[str, Any]:
        """The same with a shape that was never asked before, each time: what is kept by shape helps none of them."""
        times = [pair for number in range(1, 6) for pair in self._round(number, unseen=True)]
        return figures(times, 5 * len(self.arrivals) - len(times))

    def measure_durable(self, folder: str | None) -> dict[str, Any]:
        """The same, each one committed with fsync before the next is decided."""
        with tempfile.TemporaryDirectory(dir=folder) as name:
            store = SqliteStore(Path(name) / "fleet.db")
            try:
                stored = store.lead()
                times: list[tuple[float, float]] = []
                for number in range(1, 6):
                    times += self._round(-number, store, stored.epoch, stored.revision + len(times))
            finally:
                store.close()
        return figures(times, 5 * len(self.arrivals) - len(times))


def figures(times: list[tuple[float, float]], refused: int) -> dict[str, Any]:
    """Mean and median milliseconds of (wall, CPU) seconds."""
    if not times:
        return {"placed": 0, "refused": refused, "wall_ms": None, "cpu_ms": None}
    walls = sorted(wall for wall, _ in times)
    return {
        "placed": len(times),
        "refused": refused,
        "wall_ms": walls[len(walls) // 2] * 1000,
        "cpu_ms": sum(cpu for _, cpu in times) / len(times) * 1000,
    }
