"""Masks and tables derived from a topology, made once and shared by every fit on it.

What may live here: whatever follows from the records alone. Nothing that depends on who holds what.

Theory of operation. Threads are bits of one integer. Cores are grouped into *classes* by shape: those of one class
have the same number of threads at the same offsets from the first one (``(1,)`` for siblings 2k and 2k+1, ``(64,)`` for
k and k+64, ``()`` for a core with one thread). Then "which cores of this class are entirely free" is
``free & (free >> offset) & first`` whatever the count of cores, and an offlined sibling or an efficiency core is just
a class of its own. All questions about cores in ``fit`` are asked this way.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from casemate_core.cpuset import bits
from casemate_core.topology.model import CoreKind

if TYPE_CHECKING:
    from casemate_core.topology.model import Core, Topology


@dataclass(frozen=True, slots=True)
class CoreClass:
    """Cores of one shape. ``first`` has the lowest thread of each; its siblings are at ``first << offset``."""

    first: int
    offsets: tuple[int, ...]

    @property
    def width(self) -> int:
        """Threads per core."""
        return len(self.offsets) + 1

    def whole(self, free: int) -> int:
        """First threads of the cores of which every thread is in ``free``."""
        mask = self.first & free
        for offset in self.offsets:
            mask &= free >> offset
        return mask

    def threads(self, first: int) -> int:
        """All threads of the cores whose first threads are given."""
        mask = first
        for offset in self.offsets:
            mask |= first << offset
        return mask


@dataclass(frozen=True, slots=True)
class L3Index:
    """Cores under one last-level cache within one cell; ``classes`` widest first."""

    id: int
    mask: int
    classes: tuple[CoreClass, ...]


@dataclass(frozen=True, slots=True)
class CellIndex:
    """One cell. Masks of threads: ``pool``, ``isolated`` and ``reserved`` are disjoint parts of ``mask``."""

    id: int
    position: int
    mask: int
    pool: int
    isolated: int
    reserved: int
    l3: tuple[L3Index, ...]
    classes: tuple[CoreClass, ...]
    plain_mib: int
    """Memory outside huge-page pools and the host's reserve."""
    pages: dict[int, int]
    """Page size in KiB to the number of pages in the pool."""


@dataclass(frozen=True, slots=True)
class TopologyIndex:
    """Everything that ``fit`` and ``check`` look up."""

    cells: tuple[CellIndex, ...]
    """All cells, in the order of the topology."""
    cpu_cells: tuple[CellIndex, ...]
    """Those with a thread that may be given away."""
    cell_by_id: dict[int, CellIndex]
    core_of: dict[int, int]
    """Thread to the position of its core in Topology.cores."""
    siblings: dict[int, int]
    """Thread to the mask of its core's online threads."""
    online: int
    reserved: int
    pool: int
    isolated: int
    kinds: dict[CoreKind, int]
    """Threads per kind of core."""
    smt_width: int
    """Threads of the widest core."""
    distance: tuple[tuple[int, ...], ...]
    """Between cells by position; 10 at home, 20 elsewhere where the topology does not say."""
    page_sizes: frozenset[int]
    """In KiB, of the pools of all cells."""
    group_of: dict[str, int]
    """IOMMU group of each function that can be given away: by GPU UUID, device id, or ``MAC/index`` of a VF."""
    shared_groups: dict[int, tuple[str, ...]]
    """IOMMU groups with more than one such function, which must go to one owner together."""

    @classmethod
    def of(cls, topology: "Topology") -> Self:
        """Derive it. Expects a topology that ``rules.check`` finds nothing wrong with."""
        core_of: dict[int, int] = {}
        siblings: dict[int, int] = {}
        kinds = dict.fromkeys(CoreKind, 0)
        online = unusable = 0
        isolated = topology.isolated.mask
        for position, core in enumerate(topology.cores):
            mask = core.threads.mask
            online |= mask
            kinds[core.kind] |= mask
            if mask & isolated and mask & ~isolated:
                unusable |= mask & isolated
            for thread in core.threads:
                core_of[thread] = position
                siblings[thread] = mask
        isolated &= online & ~unusable
        reserved = topology.reserved.mask & online
        pool = online & ~topology.isolated.mask & ~reserved
        cells = tuple(
            _cell_index(topology, position, pool, isolated & ~reserved, reserved)
            for position in range(len(topology.cells))
        )
        groups = _iommu_groups(topology)
        members: dict[int, list[str]] = {}
        for name, group in groups.items():
            members.setdefault(group, []).append(name)
        return cls(
            cells=cells,
            cpu_cells=tuple(cell for cell in cells if cell.pool | cell.isolated),
            cell_by_id={cell.id: cell for cell in cells},
            core_of=core_of,
            siblings=siblings,
            online=online,
            reserved=reserved,
            pool=pool,
            isolated=isolated & ~reserved,
            kinds=kinds,
            smt_width=max((len(core.threads) for core in topology.cores), default=1),
            distance=_distances(topology),
            page_sizes=frozenset(pool.page_kib for cell in topology.cells for pool in cell.pools),
            group_of=groups,
            shared_groups={group: tuple(names) for group, names in members.items() if len(names) > 1},
        )


def _cell_index(topology: "Topology", position: int, pool: int, isolated: int, reserved: int) -> CellIndex:
    cell = topology.cells[position]
    cores = [core for core in topology.cores if core.cell == cell.id]
    mask = 0
    groups: dict[int, list[Core]] = {}
    for core in cores:
        mask |= core.threads.mask
        groups.setdefault(core.l3, []).append(core)
    return CellIndex(
        id=cell.id,
        position=position,
        mask=mask,
        pool=pool & mask,
        isolated=isolated & mask,
        reserved=reserved & mask,
        l3=tuple(
            L3Index(group, _mask(members), _classes(members, reserved)) for group, members in sorted(groups.items())
        ),
        classes=_classes(cores, reserved),
        plain_mib=max(0, cell.memory_mib - cell.reserved_mib - sum(p.size_mib for p in cell.pools)),
        pages={p.page_kib: p.count for p in cell.pools},
    )


def _mask(cores: "list[Core]") -> int:
    mask = 0
    for core in cores:
        mask |= core.threads.mask
    return mask


def _classes(cores: "list[Core]", reserved: int) -> tuple[CoreClass, ...]:
    """By shape, widest first. Cores that are reserved entirely are nobody's and left out."""
    firsts: dict[tuple[int, ...], int] = {}
    for core in cores:
        if core.threads.mask & ~reserved == 0:
            continue
        first = core.threads.first
        shape = tuple(thread - first for thread in bits(core.threads.mask) if thread != first)
        firsts[shape] = firsts.get(shape, 0) | 1 << first
    return tuple(
        CoreClass(first, shape) for shape, first in sorted(firsts.items(), key=lambda item: (-len(item[0]), item[0]))
    )


def _iommu_groups(topology: "Topology") -> dict[str, int]:
    groups = {gpu.uuid: gpu.place.iommu_group for gpu in topology.gpus}
    groups |= {device.id: device.place.iommu_group for device in topology.devices}
    groups |= {f"{pf.mac}/{vf.index}": vf.iommu_group for pf in topology.pfs for vf in pf.vfs}
    return {name: group for name, group in groups.items() if group >= 0}


def _distances(topology: "Topology") -> tuple[tuple[int, ...], ...]:
    count = len(topology.cells)
    return tuple(
        cell.distances if len(cell.distances) == count else tuple(10 if i == j else 20 for j in range(count))
        for i, cell in enumerate(topology.cells)
    )
