"""What one exact fit costs: named host x shape of request, in microseconds; and the commit of its claim.

Run: ``.venv/bin/python tests/bench/fit_cost.py``. Prints a table, and last one JSON line. The hosts are about half full of
small instances, so that masks and sums are not trivial. CPU time of this process, the best of several repetitions, since
other load on the machine only ever adds.
"""

import json
import sys
import time
import timeit
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from casemate_core.claims import HostClaims
from casemate_core.fit import (
    CellPolicy,
    CpuPolicy,
    CpuRequest,
    DeviceRequest,
    EmulatorPolicy,
    Fit,
    GpuLink,
    GpuRequest,
    MemoryRequest,
    Near,
    NicRequest,
    Request,
    ThreadPolicy,
    fit,
)
from casemate_core.topology import Topology
from support.hosts import host, names

PINNED = CpuRequest(4, policy=CpuPolicy.DEDICATED, threads=ThreadPolicy.PREFER)
GIB = 1024
SHAPES: dict[str, Request] = {
    "shared": Request(CpuRequest(2), MemoryRequest(2 * GIB), 10 * GIB),
    "pinned": Request(PINNED, MemoryRequest(4 * GIB, cells=CellPolicy.ONE), 10 * GIB),
    "isolated+1G": Request(
        CpuRequest(4, 6, CpuPolicy.DEDICATED, ThreadPolicy.ISOLATE, EmulatorPolicy.ISOLATE),
        MemoryRequest(4 * GIB, page_kib=1 << 20, cells=CellPolicy.ONE),
    ),
    "realtime": Request(
        CpuRequest(4, policy=CpuPolicy.DEDICATED, threads=ThreadPolicy.REQUIRE, realtime=True),
        MemoryRequest(4 * GIB, page_kib=1 << 20, cells=CellPolicy.ONE),
        nics=(NicRequest("fronthaul", needs=("vlan",)),),
        devices=(DeviceRequest((("type", "fec"),)),),
    ),
    "spread": Request(
        CpuRequest(8, policy=CpuPolicy.DEDICATED), MemoryRequest(8 * GIB, cells=CellPolicy.SPREAD, cell_count=2)
    ),
    "gpu+nic": Request(
        PINNED, MemoryRequest(8 * GIB), gpus=(GpuRequest(1),), nics=(NicRequest("compute", Near.SWITCH),)
    ),
    "2gpu nvlink": Request(PINNED, MemoryRequest(8 * GIB), gpus=(GpuRequest(2, link=GpuLink.NVLINK),)),
    "too large": Request(CpuRequest(500, policy=CpuPolicy.DEDICATED), MemoryRequest(4 * GIB)),
}


def half_full(topology: Topology) -> HostClaims:
    """Small instances until half of the threads are taken or charged, or no more fit."""
    claims = HostClaims.empty()
    threads = len(topology.online)
    for number in range(threads):
        request = SHAPES[("shared", "pinned")[number % 2]]
        found = fit(topology, claims, request, owner=f"i{number}")
        if not isinstance(found, Fit):
            break
        claims = claims.add(found.claim)
        taken = claims.usage.owned.bit_count() + sum(claims.usage.shared_milli.values()) // 1000
        if taken * 2 >= threads:
            break
    return claims


def cost_us(topology: Topology, claims: HostClaims, request: Request) -> tuple[float, bool]:
    """(microseconds of one fit, whether it fits)."""

    def once() -> object:
        return fit(topology, claims, request, owner="bench")

    fits = isinstance(once(), Fit)
    return min(timeit.repeat(once, timer=time.process_time, number=50, repeat=7)) / 50 * 1e6, fits


def main() -> None:
    """Print the table; the last line is JSON: {"us": {host: {shape: microseconds}}, "add_us": ..., "refused": [...]}."""
    figures: dict[str, dict[str, float]] = {}
    refused: list[str] = []
    print(f"{'µs per fit':12}" + "".join(f"{shape:>14}" for shape in SHAPES))
    for name in names():
        topology = host(name)
        claims = half_full(topology)
        row = {}
        cells = [f"{name:12}"]
        for shape, request in SHAPES.items():
            micro, there = cost_us(topology, claims, request)
            row[shape] = round(micro, 1)
            refused += [] if there else [f"{name}: {shape}"]
            cells.append(f"{micro:>12.1f}{'  ' if there else ' -'}")
        figures[name] = row
        print("".join(cells))
    topology = host("hgx-h200")
    claims = half_full(topology)
    found = fit(topology, claims, SHAPES["gpu+nic"], owner="bench")
    assert isinstance(found, Fit)
    claim = found.claim
    add_us = min(timeit.repeat(lambda: claims.add(claim), timer=time.process_time, number=50, repeat=7)) / 50 * 1e6
    print(f"(-: refused, with its reasons)   adding a claim with GPU and VF to {len(claims)} others: {add_us:.1f} µs")
    print(json.dumps({"us": figures, "add_us": round(add_us, 1), "refused": refused}))


if __name__ == "__main__":
    main()
