"""The ways a request fits a host, best first; or why none does.

What may live here: ``fit`` and ``fits``, the order between ways, and the making of the claim. The choices are made in
``cores``, ``cells`` and ``functions``; refusals are worded in ``refuse``.

The order, smaller is better, compared as a tuple. It is the documented preference, and a test compares it with an
exhaustive search on small hosts::

    cells           cells with CPUs of the instance
    functions       GPUs beside the CPUs, near to each other, NICs near to GPUs, devices beside the CPUs,
                    fabric partitions not broken, the tightest place (``functions.FunctionKey``)
    cpu             isolated threads not wasted, fewest caches, then what the thread policy minds (``cores``)
    gpus_beside     free GPUs in the cells of an instance that asks for none: leave those cells to others
    threads_left    free threads left in those cells: the tightest place
    memory_left     free memory left there, in MiB
    position        of the first cell
"""

from dataclasses import dataclass

from casemate_core.claims import Claim, HostClaims, Pages, PlainMemory, SharedCpu
from casemate_core.claims.model import split_within
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.fit.cells import Layout, layouts
from casemate_core.fit.cores import take
from casemate_core.fit.functions import NOTHING, FreeFunctions, Functions
from casemate_core.fit.refuse import refuse, volumes_elsewhere
from casemate_core.fit.request import Overcommit, Request
from casemate_core.fit.view import Need, View
from casemate_core.reasons import Reason
from casemate_core.topology import Topology

Key = tuple[int, ...]
NO_OVERCOMMIT = Overcommit()
#: The part of the order that is about dedicated threads, where there are none.
_SHARED = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Fit:
    """A way that fits. ``key`` is the documented order; keys of fits of one request on one host compare."""

    claim: Claim
    key: Key


@dataclass(frozen=True, slots=True)
class Refusal:
    """No way fits; all the reasons that were found, the most telling first. Never empty."""

    reasons: tuple[Reason, ...]

    @property
    def sentence(self) -> str:
        """All reasons, in words."""
        return "; ".join(reason.sentence for reason in self.reasons)


def fit(
    topology: Topology,
    claims: HostClaims,
    request: Request,
    *,
    owner: str = "",
    epoch: int = 0,
    generation: int = 0,
    overcommit: Overcommit = NO_OVERCOMMIT,
) -> Fit | Refusal:
    """The best way that ``request`` fits beside ``claims``, as an exact claim for ``owner``; or why there is none.

    Deterministic: the same arguments give the same claim, at the manager and at the agent.
    """
    view = View(topology, claims, request)
    need = Need.of(request, overcommit)
    best: tuple[Key, Layout, Functions] | None = None
    free: FreeFunctions | None = None
    if claims.usage.disk_mib + request.room_mib <= topology.disk_mib and not volumes_elsewhere(claims, request):
        functions: Functions | None = NOTHING
        if request.gpus or request.nics or request.devices:
            free = FreeFunctions(view, request)
        for layout in layouts(view, request, need):
            if free is not None:
                bound = None if best is None or best[1].cpu_cells != layout.cpu_cells else best[2].key
                functions = free.best(layout.cell_mask, bound)
            if functions is None:
                continue
            key = _key(view, request, layout, functions)
            if best is None or key < best[0]:
                best = (key, layout, functions)
    if best is None:
        return Refusal(refuse(view, request, need))
    return Fit(_claim(view, request, need, best[1], best[2], free, owner, epoch, generation), best[0])


def fits(
    topology: Topology,
    claims: HostClaims,
    request: Request,
    *,
    limit: int = 8,
    owner: str = "",
    epoch: int = 0,
    generation: int = 0,
    overcommit: Overcommit = NO_OVERCOMMIT,
) -> list[Fit]:
    """Up to ``limit`` ways, best first, that differ in cells or in functions. Empty: ``fit`` says why.

    The first one is what ``fit`` gives.
    """
    view = View(topology, claims, request)
    need = Need.of(request, overcommit)
    if claims.usage.disk_mib + request.room_mib > topology.disk_mib or limit < 1 or volumes_elsewhere(claims, request):
        return []
    free = FreeFunctions(view, request)
    ways: list[tuple[Key, int, Layout, Functions]] = []
    for layout in layouts(view, request, need):
        for count, functions in enumerate(free.ranked(layout.cell_mask)):
            if count == limit:
                break
            ways.append((_key(view, request, layout, functions), len(ways), layout, functions))
    ways.sort(key=lambda way: way[:2])
    return [
        Fit(_claim(view, request, need, layout, functions, free, owner, epoch, generation), key)
        for key, _, layout, functions in ways[:limit]
    ]


def _key(view: View, request: Request, layout: Layout, functions: Functions) -> Key:
    first = layout.parts[0]
    if first.cpu is None:
        cpu = _SHARED
    elif layout.cpu_cells == 1:
        cpu = first.cpu.key
    else:
        keys = [part.cpu.key for part in layout.parts if part.cpu is not None]
        cpu = (sum(k[0] for k in keys), sum(k[1] for k in keys), sum(k[2] for k in keys), sum(k[3] for k in keys))
    gpus_beside = threads = memory = 0
    gpus_of_cell = view.topology.functions.gpus_of_cell if not request.gpus and view.topology.gpus else None
    for part in layout.parts:
        cell = part.cell
        threads += (cell.mask & view.free).bit_count()
        memory += view.plain_free(cell)
        if gpus_of_cell is not None:
            gpus_beside += (gpus_of_cell.get(cell.position, 0) & ~view.gpus_held).bit_count()
    return (layout.cpu_cells, *functions.key, *cpu, gpus_beside, threads, memory, first.cell.position)


def _claim(
    view: View,
    request: Request,
    need: Need,
    layout: Layout,
    functions: Functions,
    free: FreeFunctions | None,
    owner: str,
    epoch: int,
    generation: int,
) -> Claim:
    vcpus, held, emulator = _threads(view, layout) if need.dedicated else ((), 0, 0)
    owned_emulator = emulator != 0
    if need.dedicated and not owned_emulator:
        emulator = _housekeeping(view, layout)
    whole = need.dedicated and need.mode.takes_whole_cores
    gpus: tuple[str, ...] = ()
    partition = None
    if free is not None and functions.gpus:
        gpus = tuple(gpu.uuid for gpu in free.whole_of(functions.gpus))
        partition = next((c.partition for c in functions.gpus if c.partition is not None), None)
    parts = layout.parts
    return Claim(
        owner=owner,
        epoch=epoch,
        generation=generation,
        vcpus=vcpus,
        vcpus_online=request.cpu.count,
        vcpus_max=need.vcpus,
        held=CpuSet(held) if held else EMPTY,
        emulator=CpuSet(emulator) if emulator else EMPTY,
        emulator_owned=owned_emulator,
        shared=() if need.dedicated else tuple([SharedCpu(p.cell.id, p.shared_milli) for p in parts if p.shared_milli]),
        memory=_memory(request, need, layout),
        pages=_pages(request, need, layout) if need.pages else (),
        disk_mib=request.disk_mib,
        gpus=gpus,
        partition=partition,
        shares=free.shares_of(functions.gpus) if free is not None and functions.gpus else (),
        vfs=free.vfs_of(functions.ports) if free is not None and functions.ports else (),
        devices=tuple([view.topology.devices[i].id for i in functions.devices]),
        exclusive_cores=whole,
        one_cell=layout.cpu_cells == 1 and len(parts) == 1,
        realtime=need.realtime,
    )


def _threads(view: View, layout: Layout) -> tuple[tuple[int, ...], int, int]:
    """(thread per vCPU, held siblings, the emulator's own thread). vCPUs of several cells take turns, so that those that
    are online now lie over all cells; siblings stay side by side."""
    held = emulator = 0
    chosen: list[list[int]] = []
    for part in layout.parts:
        if part.cpu is None:
            continue
        mine: list[int] = []
        for plan in part.cpu.plans:
            vcpus, idle = take(plan)
            mine += vcpus
            held |= idle
        chosen.append(mine)
    if len(chosen) == 1:
        vcpus = chosen[0]
    else:
        vcpus = _take_turns(view, chosen)
    taken = held
    for thread in vcpus:
        taken |= 1 << thread
    for part in layout.parts:
        if part.emulator and part.cpu is not None:
            source = part.cell.isolated if part.cpu.emulator_isolated else part.cell.pool
            emulator = _one_thread(view, part.cell.position, source & view.free & ~taken)
    return tuple(vcpus), held, emulator


def _take_turns(view: View, chosen: list[list[int]]) -> list[int]:
    """One core of each cell after the other."""
    siblings = view.index.siblings
    queues = [list(reversed(threads)) for threads in chosen]
    vcpus: list[int] = []
    while any(queues):
        for queue in queues:
            if queue:
                core = siblings[queue[-1]]
                while queue and core >> queue[-1] & 1:
                    vcpus.append(queue.pop())
    return vcpus


def _one_thread(view: View, position: int, mask: int) -> int:
    """A thread of a core that is broken already, else the last one: low threads go to vCPUs."""
    loose = mask
    for shape in view.index.cells[position].classes:
        loose &= ~shape.threads(shape.whole(mask))
    return loose & -loose if loose else 1 << (mask.bit_length() - 1)


def _housekeeping(view: View, layout: Layout) -> int:
    """Housekeeping threads in the cells of the vCPUs, else all of the host's; none: the emulator floats."""
    mask = 0
    for part in layout.parts:
        if part.vcpus:
            mask |= part.cell.reserved
    return mask or view.index.reserved


def _memory(request: Request, need: Need, layout: Layout) -> tuple[PlainMemory, ...]:
    charge = need.overcommit.memory_charge
    parts = [part for part in layout.parts if part.size_mib or part.overhead_mib]
    if len(parts) == 1:
        part = parts[0]
        size = request.memory.size_mib if part.size_mib else 0
        charged = charge(part.size_mib) + part.overhead_mib
        return (PlainMemory(part.cell.id, size, part.size_mib - size, charged),)
    rooms = [part.size_mib for part in parts]
    sizes = split_within(request.memory.size_mib, rooms) if need.size_mib else rooms
    return tuple(
        PlainMemory(part.cell.id, size, part.size_mib - size, charge(part.size_mib) + part.overhead_mib)
        for part, size in zip(parts, sizes, strict=True)
    )


def _pages(request: Request, need: Need, layout: Layout) -> tuple[Pages, ...]:
    now = -(-request.memory.size_mib * 1024 // need.page_kib)
    parts = [part for part in layout.parts if part.pages]
    counts = split_within(now, [part.pages for part in parts])
    return tuple(
        Pages(part.cell.id, need.page_kib, count, part.pages - count) for part, count in zip(parts, counts, strict=True)
    )
