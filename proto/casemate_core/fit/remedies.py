"""What would make a refused request fit: remedies applied, and proved by fitting again.

What may live here: how a remedy changes a request or a host, and the search over what the reasons of a refusal propose.
Moving other instances and changing other hosts is the scheduler's part; it uses ``apply`` and asks the same question.

Theory of operation. Reasons name remedies (``casemate_core.reasons``): each would satisfy that reason alone. The search
tries each of them, then pairs, then all the smallest together, and keeps what a new fit accepts: nothing is promised that
was not tried. Suggestions with fewer changes come first; of those the ones that take less away from the request.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from casemate_core.claims import HostClaims
from casemate_core.fit.request import (
    CellPolicy,
    CpuPolicy,
    EmulatorPolicy,
    GpuLink,
    Near,
    Overcommit,
    Request,
    ThreadPolicy,
)
from casemate_core.fit.solve import NO_OVERCOMMIT, Fit, Refusal, fits
from casemate_core.reasons import (
    AnyGpuLabels,
    AnyModel,
    DropNic,
    FewerCpus,
    FewerDevices,
    FewerGpus,
    LessDisk,
    LessMemory,
    MorePages,
    NoGrowth,
    OtherHost,
    PlainPages,
    RelaxCells,
    RelaxDeviceLocality,
    RelaxEmulator,
    RelaxGpuLocality,
    RelaxLink,
    RelaxNear,
    RelaxRealtime,
    RelaxThreads,
    Remedy,
    SmallerShare,
)
from casemate_core.topology import PagePool, Topology

MAX_TRIED = 200
"""Fits that one search may run; at some 50 µs each it stays well within a second for the few nearest hosts."""
MAX_CHANGES = 3


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Changes that together make it fit: tried, on this host as it is."""

    remedies: tuple[Remedy, ...]
    request: Request
    topology: Topology
    fit: Fit

    @property
    def sentence(self) -> str:
        """All of them, in words."""
        return " and ".join(remedy.sentence for remedy in self.remedies)


def apply(remedy: Remedy, request: Request, topology: Topology) -> tuple[Request, Topology] | None:
    """Request and host with the remedy; None where it changes nothing, or would leave nothing to ask for."""
    if isinstance(remedy, MorePages):
        changed = _with_more_pages(topology, remedy)
        return None if changed is None else (request, changed)
    asked = _relaxed(remedy, request)
    return None if asked is None or asked == request else (asked, topology)


def apply_request(remedy: Remedy, request: Request) -> Request | None:
    """As ``apply``, of a remedy that changes no host."""
    asked = _relaxed(remedy, request)
    return None if asked == request else asked


def suggestions(
    topology: Topology,
    claims: HostClaims,
    request: Request,
    refusal: Refusal,
    *,
    overcommit: Overcommit = NO_OVERCOMMIT,
    limit: int = 5,
) -> list[Suggestion]:
    """Up to ``limit`` ways out of a refusal on this host, smallest change first. Empty: none of what was tried fits.

    A way that contains a smaller one that works is left out.
    """
    proposed = list(dict.fromkeys(r for reason in refusal.reasons for r in reason.remedies if r != OtherHost()))
    found: list[Suggestion] = []
    for tried, chosen in enumerate(_choices(proposed)):
        if tried >= MAX_TRIED or len(found) >= limit:
            break
        if any(set(smaller.remedies) <= set(chosen) for smaller in found):
            continue
        changed = apply_all(chosen, request, topology)
        if changed is None:
            continue
        ways = fits(changed[1], claims, changed[0], limit=1, overcommit=overcommit)
        # pages set aside must not be taken from under those who are there
        if ways and (changed[1] is topology or not claims.check(changed[1])):
            found.append(Suggestion(chosen, changed[0], changed[1], ways[0]))
    return found


def _choices(proposed: list[Remedy]) -> Iterator[tuple[Remedy, ...]]:
    for count in range(1, MAX_CHANGES + 1):
        yield from combinations(proposed, count)


def apply_all(remedies: tuple[Remedy, ...], request: Request, topology: Topology) -> tuple[Request, Topology] | None:
    """As ``apply`` for several. Remedies name positions of the request as it was, so those that remove one come last."""
    for remedy in sorted(remedies, key=_removes):
        changed = apply(remedy, request, topology)
        if changed is None:
            return None
        request, topology = changed
    return request, topology


def _removes(remedy: Remedy) -> tuple[bool, int]:
    match remedy:
        case DropNic(position) | FewerGpus(position, 0) | FewerDevices(position, 0):
            return True, -position
        case _:
            return False, 0


def _with_more_pages(topology: Topology, remedy: MorePages) -> Topology | None:
    """The host with a larger pool on one cell, if the cell has so much memory outside its pools."""
    cells = []
    for cell in topology.cells:
        if cell.id == remedy.cell:
            count = next((p.count for p in cell.pools if p.page_kib == remedy.page_kib), 0)
            others = tuple(p for p in cell.pools if p.page_kib != remedy.page_kib)
            pools = tuple(sorted((*others, PagePool(remedy.page_kib, count + remedy.count)), key=lambda p: p.page_kib))
            cell = replace(cell, pools=pools)
            if sum(p.size_mib for p in pools) + cell.reserved_mib > cell.memory_mib:
                return None
        cells.append(cell)
    changed = tuple(cells)
    return None if changed == topology.cells else replace(topology, cells=changed)


def _relaxed(remedy: Remedy, request: Request) -> Request | None:
    cpu, memory = request.cpu, request.memory
    match remedy:
        case FewerCpus(count):
            if not 1 <= count < cpu.reserved_count:
                return None
            return replace(request, cpu=replace(cpu, count=min(cpu.count, count), max=min(cpu.max, count)))
        case RelaxThreads():
            return replace(request, cpu=replace(cpu, threads=ThreadPolicy.ANY))
        case RelaxEmulator():
            emulator = EmulatorPolicy.ISOLATE if cpu.realtime else EmulatorPolicy.SHARE
            return replace(request, cpu=replace(cpu, emulator=emulator))
        case RelaxRealtime():
            return replace(request, cpu=replace(cpu, realtime=False, policy=CpuPolicy.DEDICATED))
        case RelaxCells():
            return replace(request, memory=replace(memory, cells=CellPolicy.PREFER, cell_count=0))
        case LessMemory(size_mib):
            if not 1 <= size_mib < memory.reserved_mib:
                return None
            smaller = replace(memory, size_mib=min(memory.size_mib, size_mib), max_mib=min(memory.max_mib, size_mib))
            return replace(request, memory=smaller)
        case PlainPages():
            return replace(request, memory=replace(memory, page_kib=0))
        case NoGrowth():
            return replace(request, cpu=replace(cpu, max=0), memory=replace(memory, max_mib=0))
        case LessDisk(size_mib):
            own_mib = size_mib - (request.room_mib - request.disk_mib)
            return replace(request, disk_mib=own_mib) if 0 <= own_mib < request.disk_mib else None
        case _:
            return _relaxed_functions(remedy, request)


def _relaxed_functions(remedy: Remedy, request: Request) -> Request | None:
    match remedy:
        case FewerGpus(group, count):
            if count < 1:
                return _without_gpus(request, group)
            return _with_gpus(request, group, count=count) if count < request.gpus[group].count else None
        case AnyModel(group):
            return _with_gpus(request, group, model="*")
        case AnyGpuLabels(group):
            return _with_gpus(request, group, labels=())
        case RelaxLink(group):
            return _with_gpus(request, group, link=GpuLink.ANY)
        case RelaxGpuLocality(group):
            return _with_gpus(request, group, local=False)
        case SmallerShare(group, milli):
            if not 1 <= milli < 1000 or (request.gpus[group].share_milli and milli >= request.gpus[group].share_milli):
                return None
            return _with_gpus(request, group, share_profile="", share_milli=milli)
        case RelaxNear(nic):
            nics = tuple(replace(n, near=Near.ANY) if i == nic else n for i, n in enumerate(request.nics))
            return replace(request, nics=nics)
        case DropNic(nic):
            return replace(request, nics=tuple(n for i, n in enumerate(request.nics) if i != nic))
        case FewerDevices(group, count):
            if count >= request.devices[group].count:
                return None
            kept = tuple(
                replace(d, count=count) if i == group else d
                for i, d in enumerate(request.devices)
                if i != group or count
            )
            return replace(request, devices=kept)
        case RelaxDeviceLocality(group):
            devices = tuple(replace(d, local=False) if i == group else d for i, d in enumerate(request.devices))
            return replace(request, devices=devices)
        case _:
            return None


def _with_gpus(request: Request, group: int, **changes: object) -> Request:
    gpus = tuple(
        replace(g, **changes) if i == group else g  # type: ignore[arg-type]
        for i, g in enumerate(request.gpus)
    )
    return replace(request, gpus=gpus)


def _without_gpus(request: Request, group: int) -> Request:
    gpus = tuple(g for i, g in enumerate(request.gpus) if i != group)
    nics = request.nics if gpus else tuple(replace(n, near=Near.ANY) for n in request.nics)
    return replace(request, gpus=gpus, nics=nics)
