"""Which cells: where the CPUs and the memory of an instance lie, together.

What may live here: layouts, that is, parts of CPU and memory assigned to cells. GPUs, NICs and devices come after
(``functions``).

Theory of operation. No subset of cells is ever enumerated; the work grows with the number of cells, at most with its
square for SPREAD::

    ONE      each cell is tried alone: every one that has room is a layout
    PREFER   as ONE; only when no cell has room, CPUs fill the cells that carry most (so they lie on the fewest), and
             memory goes beside them in proportion, what does not fit there to the nearest other cells, memory cells last
    SPREAD   equal parts (they differ by one vCPU or page at most); parts are matched to cells by augmenting paths

A pool gives up its last thread on no host without housekeeping threads. Several cells share that rule, so where they
would break it together, each in turn is allowed one thread less: if any choice keeps it, one of these does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from casemate_core.fit.cores import Plan, capacity, plan_cell
from casemate_core.fit.request import CellPolicy, Request
from casemate_core.fit.view import Need, View
from casemate_core.topology import CellIndex


class CpuChoice(NamedTuple):
    """Dedicated vCPUs in one cell, counted. ``isolated_use``: 0 none of the threads is isolated, 1 all are, 2 some."""

    plans: tuple[Plan, ...]
    isolated_use: int
    emulator_isolated: bool = False
    """The emulator's own thread, where there is one, is an isolated one."""

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Smaller is better: (isolated_use, caches, a, b); see ``cores``."""
        plans = self.plans
        if len(plans) == 1:
            only = plans[0]
            return (self.isolated_use, only.caches, only.a, only.b)
        return (
            self.isolated_use,
            sum(p.caches for p in plans),
            sum(p.a for p in plans),
            sum(p.b for p in plans),
        )

    @property
    def taken(self) -> int:
        """Threads of vCPUs and held siblings."""
        return sum(p.taken for p in self.plans)


class Part(NamedTuple):
    """What one cell gives, growth room counted. ``vcpus`` 0: no CPU, so memory or the emulator's thread only."""

    cell: CellIndex
    vcpus: int = 0
    cpu: CpuChoice | None = None
    emulator: bool = False
    """The emulator's own thread is in this cell."""
    shared_milli: int = 0
    size_mib: int = 0
    """Plain memory of the guest, before overcommit."""
    overhead_mib: int = 0
    pages: int = 0


class Layout(NamedTuple):
    """Parts in the order of the guest's own cells; ``cell_mask`` has the positions of those with CPUs."""

    parts: tuple[Part, ...]
    cell_mask: int
    cpu_cells: int

    @classmethod
    def of(cls, parts: Sequence[Part]) -> "Layout":
        """From parts; those with CPUs first."""
        mask = 0
        for part in parts:
            if part.vcpus:
                mask |= 1 << part.cell.position
        return cls(tuple(parts), mask, mask.bit_count())


def choose_cpu(
    view: View, need: Need, cell: CellIndex, vcpus: int, limit: int, *, emulator: bool, realtime: bool
) -> CpuChoice | None:
    """Threads of one cell for so many dedicated vCPUs, and one more for the emulator where it has its own.

    From the pool, at most ``limit`` threads; else isolated ones; else both together. Real time: isolated ones only.
    """
    index = view.index
    width, mode = index.smt_width, need.mode
    free = view.free & view.kind
    isolated = cell.isolated & free
    isolated_left = (cell.isolated & view.free).bit_count()
    if not realtime:
        found = plan_cell(cell, cell.pool & free, vcpus, mode, width, limit)
        if found is not None:
            if not emulator or found.taken < limit:
                return CpuChoice((found,), 0)
            if isolated_left:
                return CpuChoice((found,), 0, True)
    if not isolated:
        return None
    found = plan_cell(cell, isolated, vcpus, mode, width, isolated_left)
    if found is not None:
        if not emulator or limit > 0:
            return CpuChoice((found,), 1)
        if found.taken < isolated_left:
            return CpuChoice((found,), 1, True)
    if realtime:
        return None
    for spare in (0, 1) if emulator else (0,):
        first = capacity(cell.classes, cell.pool & free, mode, width, limit - spare)
        if not 0 < first < vcpus:
            continue
        pooled = plan_cell(cell, cell.pool & free, first, mode, width, limit - spare)
        rest = plan_cell(cell, isolated, vcpus - first, mode, width, isolated_left)
        if pooled is None or rest is None:
            continue
        if not emulator or pooled.taken < limit:
            return CpuChoice((pooled, rest), 2)
        if rest.taken < isolated_left:
            return CpuChoice((pooled, rest), 2, True)
    return None


def layouts(view: View, request: Request, need: Need) -> Iterator[Layout]:
    """Every layout that the request's policy on cells allows; none when nothing fits."""
    if view.floor and not view.pool_left:
        return
    policy = CellPolicy.ONE if must_be_one_cell(request) else request.memory.cells
    if policy is CellPolicy.SPREAD:
        spread = _spread(view, request, need)
        if spread is not None:
            yield spread
        return
    found = False
    for cell in view.index.cpu_cells:
        part = part_in(view, need, cell, need.vcpus, need.size_mib, need.pages, need.overhead_mib)
        if part is not None:
            found = True
            yield Layout((part,), 1 << cell.position, 1)
    if not found and policy is CellPolicy.PREFER:
        split = _split(view, need)
        if split is not None:
            yield split


def must_be_one_cell(request: Request) -> bool:
    """Real time and functions beside the CPUs ask for one cell, whatever the policy says."""
    if request.cpu.realtime or request.memory.cells is CellPolicy.ONE:
        return True
    if not request.gpus and not request.devices:
        return False
    return any(g.local for g in request.gpus) or any(d.local for d in request.devices)


def part_in(
    view: View,
    need: Need,
    cell: CellIndex,
    vcpus: int,
    size_mib: int,
    pages: int,
    overhead_mib: int,
    *,
    emulator: bool | None = None,
    limit: int | None = None,
    shared_milli: int | None = None,
) -> Part | None:
    """That much of one cell, or None. ``None`` for the keywords: as the whole request says."""
    if view.plain_free(cell) < need.overcommit.memory_charge(size_mib) + overhead_mib:
        return None
    if pages and view.pages_free(cell, need.page_kib) < pages:
        return None
    if not need.dedicated:
        milli = need.shared_milli if shared_milli is None else shared_milli
        if view.shared_free(cell) < milli:
            return None
        return Part(cell, vcpus, None, False, milli, size_mib, overhead_mib, pages)
    if need.realtime and not cell.reserved and not need.emulator_thread:
        return None
    with_emulator = need.emulator_thread if emulator is None else emulator
    cpu = choose_cpu(
        view,
        need,
        cell,
        vcpus,
        view.limit(cell) if limit is None else limit,
        emulator=with_emulator,
        realtime=need.realtime,
    )
    if cpu is None:
        return None
    return Part(cell, vcpus, cpu, with_emulator, 0, size_mib, overhead_mib, pages)


# --- PREFER, when no single cell has room ---------------------------------------------------------------------------


def _split(view: View, need: Need) -> Layout | None:
    if not need.dedicated:
        parts = _split_shared(view, need)
        return None if parts is None else _split_memory(view, need, parts)
    for limits in _limits(view):
        parts = _split_dedicated(view, need, limits)
        if parts is not None and not _breaks_floor(view, parts):
            return _split_memory(view, need, parts)
    return None


def _limits(view: View) -> Iterator[list[int]]:
    """Threads that may be taken from the pool of each CPU cell; then, for the floor, each cell with one less."""
    limits = [view.limit(cell) for cell in view.index.cpu_cells]
    yield limits
    if view.floor:
        for i, limit in enumerate(limits):
            if limit > 0:
                yield [*limits[:i], limit - 1, *limits[i + 1 :]]


def _breaks_floor(view: View, parts: Sequence[Part]) -> bool:
    if not view.floor:
        return False
    taken = 0
    for part in parts:
        if part.cpu is None:
            continue
        if part.cpu.plans and part.cpu.isolated_use != 1:
            taken += part.cpu.plans[0].taken  # of two plans the first is the pool's
        taken += part.emulator and not part.cpu.emulator_isolated
    return taken >= view.pool_left > 0


def _split_dedicated(view: View, need: Need, limits: list[int]) -> list[Part] | None:
    width, mode = view.index.smt_width, need.mode
    free = view.free & view.kind
    rooms: list[tuple[int, int, CellIndex]] = []
    for cell, limit in zip(view.index.cpu_cells, limits, strict=True):
        isolated = cell.isolated & free
        room = capacity(cell.classes, cell.pool & free, mode, width, limit)
        room += capacity(cell.classes, isolated, mode, width, isolated.bit_count())
        if room:
            rooms.append((room, limit, cell))
    rooms.sort(key=lambda r: (-r[0], r[2].position))
    parts: list[Part] = []
    left, emulator = need.vcpus, need.emulator_thread
    for i, (room, limit, cell) in enumerate(rooms):
        if room >= left:  # the tightest cell that holds the rest
            room, limit, cell = min((r for r in rooms[i:] if r[0] >= left), key=lambda r: (r[0], r[2].position))
        count = min(room, left)
        cpu = None
        if emulator:
            cpu = choose_cpu(view, need, cell, count, limit, emulator=True, realtime=False)
        with_emulator = cpu is not None
        if cpu is None:
            cpu = choose_cpu(view, need, cell, count, limit, emulator=False, realtime=False)
        if cpu is None:
            return None
        emulator = emulator and not with_emulator
        parts.append(Part(cell, count, cpu, with_emulator))
        left -= count
        if not left:
            break
    if left:
        return None
    return _emulator_apart(view, parts, limits) if emulator else parts


def _emulator_apart(view: View, parts: list[Part], limits: list[int]) -> list[Part] | None:
    """The cells of the vCPUs are full to the last thread: the emulator's own lies in another."""
    used = {part.cell.position for part in parts}
    for cell, limit in zip(view.index.cpu_cells, limits, strict=True):
        if cell.position not in used and (limit > 0 or cell.isolated & view.free):
            return [*parts, Part(cell, 0, CpuChoice((), 0, limit <= 0), True)]
    return None


def _split_shared(view: View, need: Need) -> list[Part] | None:
    """Charges on the fewest pools. vCPUs float over all of them, so each part counts as one."""
    rooms = [(view.shared_free(cell), cell) for cell in view.index.cpu_cells]
    rooms = sorted((r for r in rooms if r[0] > 0), key=lambda r: (-r[0], r[1].position))
    parts: list[Part] = []
    left = need.shared_milli
    for i, (room, cell) in enumerate(rooms):
        if room >= left:
            room, cell = min((r for r in rooms[i:] if r[0] >= left), key=lambda r: (r[0], r[1].position))
        parts.append(Part(cell, 1, shared_milli=min(room, left)))
        left -= min(room, left)
        if not left:
            return parts
    return None


def _split_memory(view: View, need: Need, parts: list[Part]) -> Layout | None:
    """Memory beside the CPUs in proportion; what does not fit there on the nearest cells with room, memory cells last."""
    distance = view.index.distance[parts[0].cell.position]
    used = {part.cell.position for part in parts}
    others = sorted(
        (cell for cell in view.index.cells if cell.position not in used),
        key=lambda cell: (not cell.mask, distance[cell.position], cell.position),
    )
    parts = [*parts, *(Part(cell) for cell in others)]
    weights = [part.cpu.taken if part.cpu else part.shared_milli for part in parts]
    none = [0] * len(parts)
    room_mib = [max(0, view.plain_free(part.cell)) for part in parts]
    overhead = _fill(need.overhead_mib, room_mib, none)
    if overhead is None:
        return None
    ratio = need.overcommit.memory_percent
    # sizes are split and charges follow, so that the charge of each cell, rounded up, still fits there
    room_mib = [(room - taken) * ratio // 100 for room, taken in zip(room_mib, overhead, strict=True)]
    sizes = _fill(need.size_mib, room_mib, weights)
    rooms = [max(0, view.pages_free(part.cell, need.page_kib)) for part in parts] if need.pages else none
    pages = _fill(need.pages, rooms, weights)
    if sizes is None or pages is None:
        return None
    return Layout.of(
        [
            part._replace(size_mib=size, overhead_mib=extra, pages=count)
            for part, size, extra, count in zip(parts, sizes, overhead, pages, strict=True)
            if part.vcpus or part.emulator or size or extra or count
        ]
    )


def _fill(total: int, rooms: list[int], weights: list[int]) -> list[int] | None:
    """``total`` over places with so much room: by weight first, then in order. None where the rooms are too small."""
    weight = sum(weights)
    given = [min(room, total * w // weight) if weight else 0 for room, w in zip(rooms, weights, strict=True)]
    left = total - sum(given)
    for i, room in enumerate(rooms):
        more = min(left, room - given[i])
        given[i] += more
        left -= more
    return given if left == 0 else None


# --- SPREAD -------------------------------------------------------------------------------------------------------------


class _Share(NamedTuple):
    """What one of the parts of a spread instance asks of its cell."""

    vcpus: int
    shared_milli: int
    size_mib: int
    pages: int
    overhead_mib: int
    emulator: bool


def _spread(view: View, request: Request, need: Need) -> Layout | None:
    cells = view.index.cpu_cells
    count = request.memory.cell_count or len(cells)
    if not 0 < count <= min(len(cells), need.vcpus):
        return None
    for shares in _spread_shares(need, count):
        for limits in _limits(view) if need.dedicated else [[0] * len(cells)]:
            parts = _match(view, need, shares, limits)
            if parts is not None and not _breaks_floor(view, parts):
                return Layout.of(parts)
    return None


def _spread_shares(need: Need, count: int) -> Iterator[list[_Share]]:
    """Equal shares; those that carry one more come first. An emulator's thread may go with a share of any size."""
    vcpus, milli = _even(need.vcpus, count), _even(need.shared_milli, count)
    sizes, pages, extra = _even(need.size_mib, count), _even(need.pages, count), _even(need.overhead_mib, count)
    plain = [_Share(*row, False) for row in zip(vcpus, milli, sizes, pages, extra, strict=True)]
    if not need.emulator_thread:
        yield plain
        return
    tried: set[_Share] = set()
    for i, share in enumerate(plain):
        if share not in tried:
            tried.add(share)
            yield [*plain[:i], share._replace(emulator=True), *plain[i + 1 :]]


def _even(total: int, places: int) -> list[int]:
    each, more = divmod(total, places)
    return [each + (i < more) for i in range(places)]


def _match(view: View, need: Need, shares: list[_Share], limits: list[int]) -> list[Part] | None:
    """A cell for every share, by augmenting paths (Kuhn); cells with the least room are tried first."""
    cells = view.index.cpu_cells
    order = sorted(range(len(cells)), key=lambda i: ((cells[i].pool & view.free).bit_count(), i))
    fitting: dict[_Share, dict[int, Part]] = {}
    for share in shares:
        if share not in fitting:
            found = {i: _share_in(view, need, cells[i], share, limits[i]) for i in order}
            fitting[share] = {i: part for i, part in found.items() if part is not None}
    holder: dict[int, int] = {}

    def seat(k: int, seen: set[int]) -> bool:
        for i in fitting[shares[k]]:
            if i not in seen:
                seen.add(i)
                if i not in holder or seat(holder[i], seen):
                    holder[i] = k
                    return True
        return False

    for k in range(len(shares)):
        if not seat(k, set()):
            return None
    return [fitting[shares[k]][i] for i, k in sorted(holder.items())]


def _share_in(view: View, need: Need, cell: CellIndex, share: _Share, limit: int) -> Part | None:
    return part_in(
        view,
        need,
        cell,
        share.vcpus,
        share.size_mib,
        share.pages,
        share.overhead_mib,
        emulator=share.emulator,
        limit=limit,
        shared_milli=share.shared_milli,
    )


def spread_room(view: View, request: Request, need: Need) -> tuple[int, int]:
    """Cells asked, and cells with room for the smallest share: for the refusal."""
    cells = view.index.cpu_cells
    count = request.memory.cell_count or len(cells)
    if not 0 < count <= need.vcpus:
        return count, 0
    smallest = next(_spread_shares(replace(need, emulator_thread=False), count))[-1]
    room = sum(
        _share_in(view, need, cell, smallest, view.limit(cell) if need.dedicated else 0) is not None for cell in cells
    )
    return count, room
