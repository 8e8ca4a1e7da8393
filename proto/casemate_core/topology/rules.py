"""The invariants of a true picture of a host, each with a name.

What may live here: ``check`` and its table of rules. Loaders call it before they hand out a topology, agents before
they send one, managers before they believe one.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from casemate_core.cpuset import CpuSet
from casemate_core.topology.model import Topology


class TopologyRule(StrEnum):
    """What must hold of every topology."""

    CELL_IDS = "cells have different ids, ascending"
    CELL_MEMORY = "a cell's pools and reserve lie within its memory"
    CELL_DISTANCES = "a cell states a positive distance to every cell, or none"
    CORE_IDS = "cores have different ids, ascending"
    CORE_THREADS = "a core has at least one thread, and a thread is in one core"
    CORE_CELL = "a core is in a cell that exists"
    CACHE_GROUP = "cores of one cache group are on one socket"
    OFFLINE = "an offline thread is in no core"
    THREAD_SETS = "reserved and isolated threads are online, and none is both"
    IDENTITIES = "GPUs, physical functions, virtual functions, partitions and devices have different identities"
    PLACES = "a function hangs off a cell that exists, or off none that is known"
    FABRIC = "partitions and NVLink peers name GPUs of this host, and peers name each other"
    SHARES = "share profiles are a true part of their GPU"
    AMOUNTS = "no amount is negative"


@dataclass(frozen=True, slots=True)
class TopologyViolation:
    """One broken rule, and where."""

    rule: TopologyRule
    where: str

    def __str__(self) -> str:
        return f"{self.where}: broken: {self.rule.value}"


def check(topology: Topology) -> list[TopologyViolation]:
    """Every broken rule, in the order of the rules. Empty for a sound picture."""
    return [TopologyViolation(rule, where) for rule, find in _RULES.items() for where in find(topology)]


def _ascending(ids: list[int]) -> bool:
    return all(a < b for a, b in pairwise(ids))


def _cell_ids(t: Topology) -> Iterator[str]:
    if not t.cells or not _ascending([c.id for c in t.cells]) or t.cells[0].id < 0:
        yield f"cells {[c.id for c in t.cells]}"


def _cell_memory(t: Topology) -> Iterator[str]:
    for c in t.cells:
        pools = sum(p.size_mib for p in c.pools)
        if pools + c.reserved_mib > c.memory_mib:
            yield f"cell {c.id} with {c.memory_mib} MiB: pools {pools} MiB, reserve {c.reserved_mib} MiB"
        if len({p.page_kib for p in c.pools}) != len(c.pools):
            yield f"cell {c.id}: two pools of one size"


def _cell_distances(t: Topology) -> Iterator[str]:
    for c in t.cells:
        if c.distances and (len(c.distances) != len(t.cells) or min(c.distances) <= 0):
            yield f"cell {c.id}: distances {list(c.distances)} for {len(t.cells)} cells"


def _core_ids(t: Topology) -> Iterator[str]:
    if not _ascending([c.id for c in t.cores]):
        yield "cores"


def _core_threads(t: Topology) -> Iterator[str]:
    seen = 0
    for core in t.cores:
        if not core.threads:
            yield f"core {core.id} has none"
        if seen & core.threads.mask:
            yield f"core {core.id}: threads {CpuSet(seen & core.threads.mask)} are in another core too"
        seen |= core.threads.mask


def _core_cell(t: Topology) -> Iterator[str]:
    ids = {c.id for c in t.cells}
    for core in t.cores:
        if core.cell not in ids:
            yield f"core {core.id} in cell {core.cell}"


def _cache_group(t: Topology) -> Iterator[str]:
    sockets: dict[int, int] = {}
    for core in t.cores:
        if sockets.setdefault(core.l3, core.socket) != core.socket:
            yield f"cache group {core.l3}: core {core.id} on socket {core.socket}"


def _offline(t: Topology) -> Iterator[str]:
    if both := t.offline & t.online:
        yield f"threads {both}"


def _thread_sets(t: Topology) -> Iterator[str]:
    for name, cpus in (("reserved", t.reserved), ("isolated", t.isolated)):
        if stray := cpus - t.online:
            yield f"{name} threads {stray}"
    if both := t.reserved & t.isolated:
        yield f"threads {both}"


def _identities(t: Topology) -> Iterator[str]:
    for what, ids in (
        ("GPU", [g.uuid for g in t.gpus]),
        ("physical function", [p.mac for p in t.pfs]),
        ("partition", [str(p.id) for p in t.partitions]),
        ("device", [d.id for d in t.devices]),
    ):
        for identity, count in Counter(ids).items():
            if count > 1 or not identity:
                yield f"{what} {identity!r}, {count} times"
    for pf in t.pfs:
        indices = [vf.index for vf in pf.vfs]
        if not _ascending(indices) or (indices and indices[0] < 0):
            yield f"virtual functions {indices} of {pf.mac}"


def _places(t: Topology) -> Iterator[str]:
    ids = {c.id for c in t.cells} | {-1}
    for identity, place in (
        *((g.uuid, g.place) for g in t.gpus),
        *((p.mac, p.place) for p in t.pfs),
        *((d.id, d.place) for d in t.devices),
    ):
        if place.cell not in ids:
            yield f"{identity} at cell {place.cell}"


def _fabric(t: Topology) -> Iterator[str]:
    by_uuid = {g.uuid: g for g in t.gpus}
    for p in t.partitions:
        if not p.gpus or len(set(p.gpus)) != len(p.gpus) or any(u not in by_uuid for u in p.gpus):
            yield f"partition {p.id}: {list(p.gpus)}"
    for g in t.gpus:
        for peer in g.peers:
            if peer == g.uuid or peer not in by_uuid or g.uuid not in by_uuid[peer].peers:
                yield f"GPU {g.uuid}: peer {peer}"


def _shares(t: Topology) -> Iterator[str]:
    for g in t.gpus:
        for s in g.share_profiles:
            inside = all(0 <= a <= g.share_slots - s.slots for a in s.starts)
            placed = bool(s.starts) == (s.slots > 0) == (g.share_slots > 0)
            if not (0 < s.milli < 1000 and 0 <= s.memory_mib <= g.memory_mib and inside and placed):
                yield f"GPU {g.uuid}: profile {s.name}"
        if not 0 <= g.share_step_milli < 1000:
            yield f"GPU {g.uuid}: step {g.share_step_milli}"


def _amounts(t: Topology) -> Iterator[str]:
    if t.disk_mib < 0:
        yield f"disk {t.disk_mib} MiB"
    for c in t.cells:
        if c.memory_mib < 0 or c.reserved_mib < 0 or any(p.count < 0 or p.page_kib <= 0 for p in c.pools):
            yield f"cell {c.id}"
    for g in t.gpus:
        if g.memory_mib < 0:
            yield f"GPU {g.uuid}"


_RULES: dict[TopologyRule, Callable[[Topology], Iterator[str]]] = {
    TopologyRule.AMOUNTS: _amounts,
    TopologyRule.CELL_IDS: _cell_ids,
    TopologyRule.CELL_MEMORY: _cell_memory,
    TopologyRule.CELL_DISTANCES: _cell_distances,
    TopologyRule.CORE_IDS: _core_ids,
    TopologyRule.CORE_THREADS: _core_threads,
    TopologyRule.CORE_CELL: _core_cell,
    TopologyRule.CACHE_GROUP: _cache_group,
    TopologyRule.OFFLINE: _offline,
    TopologyRule.THREAD_SETS: _thread_sets,
    TopologyRule.IDENTITIES: _identities,
    TopologyRule.PLACES: _places,
    TopologyRule.FABRIC: _fabric,
    TopologyRule.SHARES: _shares,
}
