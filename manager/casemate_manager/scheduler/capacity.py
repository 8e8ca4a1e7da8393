"""What one host has, has given away, and has left that nobody can use well: by dimension, and by cause. PURE.

May live here: numbers about one host (``capacity``). Sums over a fleet are in ``headroom``; nothing here chooses or changes.

Theory of operation. Every thread that may be given away is in one of three states, every other resource in one of two::

    held        one claim owns it
    set aside   pool threads that shared CPUs need: as many as the cell's charge, rounded up. Shared CPUs float over all that
                the dedicated left, so *which* threads are set aside is our choice: first those beside a held sibling, then
                those of the highest cores. On a host without housekeeping threads one pool thread is set aside in any case
                (beside a held sibling, or in the cell with most of them free), for emulators must have a place
    free        the rest

so that used + free = total everywhere. Housekeeping, unusable and offline threads are in no total.

*Stranded* is the part of what is free that a request which wants its resources beside each other cannot use. Each unit is
counted under one cause, the first of these that holds; "home" is the cell that a thread, page or function hangs off, for a
function of a memory cell the nearest cell with CPUs, and a function of which the cell is not known is never stranded by one::

    iommu-group     GPU, VF, device: another function of its IOMMU group is held, so nobody else can have it
    no-cpu          memory, pages, GPU, VF, device: its home has CPUs, but no free thread. (Memory cells have none to miss.)
    no-memory       thread, GPU: its home has less than ``LEAST_MEMORY_MIB`` free in plain memory and page pools together
    odd-core        thread: a claim holds another thread of its core, so it goes to nobody who wants whole cores
    partition-hole  GPU: it is of a fabric partition of two or more, and none of those is free: it can be given alone only

Being stranded is about what is *beside* each other: a request that takes what it wants from several cells may still use it.
Claims that promise more than there is (a foreign VM found after the fact) make what is used at most the total.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from casemate_core.claims import HostClaims, Usage
from casemate_core.cpuset import CpuSet, bits
from casemate_core.topology import CellIndex, PciPlace, Topology, TopologyIndex

LEAST_MEMORY_MIB = 256
"""Less than this is no memory: no guest boots in it."""


class Cause(StrEnum):
    """Why something that is free is stranded; see the module."""

    IOMMU_GROUP = "iommu-group"
    NO_CPU = "no-cpu"
    NO_MEMORY = "no-memory"
    ODD_CORE = "odd-core"
    PARTITION_HOLE = "partition-hole"


@dataclass(frozen=True, slots=True)
class Amount:
    """One dimension: ``used + free == total`` and ``stranded <= free``, in the units of the dimension."""

    total: int = 0
    used: int = 0
    free: int = 0
    stranded: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.total + other.total,
            self.used + other.used,
            self.free + other.free,
            self.stranded + other.stranded,
        )


@dataclass(frozen=True, slots=True)
class Stranded:
    """Some of a dimension that is free and stranded, in one place.

    ``dimension`` is a key of ``HostCapacity.totals``; ``cell`` is -1 where the cell is not known or not the point; ``where``
    names the things: a CPU list, GPU UUIDs, the MAC of a PF, device ids; empty for amounts.
    """

    dimension: str
    cause: Cause
    amount: int
    cell: int
    where: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CellCapacity:
    """One cell.

    ``threads``: those that may be dedicated; used are held or set aside. ``cores``: those of which every thread may be
    dedicated; free are those of which every thread is free; a free core is stranded where its threads are for want of memory.
    ``shared_milli``: of what the dedicated left of the pool; used is the charge, in thousandths of a thread.
    ``memory_mib``: plain memory. ``pages``: (page size in KiB, amount), ascending.
    """

    id: int
    threads: Amount
    cores: Amount
    shared_milli: Amount
    memory_mib: Amount
    pages: tuple[tuple[int, Amount], ...]
    has_cpus: bool
    has_gpus: bool


@dataclass(frozen=True, slots=True)
class FunctionUse:
    """One GPU or device. ``used_milli``: thousandths that are held, 1000 for a whole one. ``home``: cell id or -1."""

    id: str
    home: int
    used_milli: int
    stranded: Cause | None = None


@dataclass(frozen=True, slots=True)
class PortUse:
    """One PF: its virtual functions."""

    mac: str
    home: int
    networks: tuple[str, ...]
    vfs: Amount


@dataclass(frozen=True, slots=True)
class PartitionUse:
    """One fabric partition. ``free``: nobody holds it nor any of its GPUs."""

    id: int
    gpus: int
    free: bool


@dataclass(frozen=True, slots=True)
class HostCapacity:
    """Everything about one host. Masks of threads: ``set_aside``, ``free`` and ``stranded_threads`` (a part of ``free``)."""

    cells: tuple[CellCapacity, ...]
    gpus: tuple[FunctionUse, ...]
    ports: tuple[PortUse, ...]
    devices: tuple[FunctionUse, ...]
    partitions: tuple[PartitionUse, ...]
    disk_mib: Amount
    stranded: tuple[Stranded, ...]
    set_aside: int
    free: int
    stranded_threads: int

    def totals(self) -> dict[str, Amount]:
        """The host's sums: ``threads``, ``cores``, ``shared_milli``, ``memory_mib``, ``pages:KIB``, ``gpus`` (one that is cut
        into slices is used), ``vfs``, ``vfs:NETWORK`` (a VF counts for each network it reaches), ``devices``,
        ``partitions`` (one is used where it or a GPU of it is held), ``disk_mib``. What the host has none of is left out."""
        found: dict[str, Amount] = {}

        def add(name: str, amount: Amount) -> None:
            if amount.total:
                found[name] = found[name] + amount if name in found else amount

        for cell in self.cells:
            add("threads", cell.threads)
            add("cores", cell.cores)
            add("shared_milli", cell.shared_milli)
            add("memory_mib", cell.memory_mib)
            for page_kib, amount in cell.pages:
                add(f"pages:{page_kib}", amount)
        add("gpus", _counted(self.gpus))
        for port in self.ports:
            add("vfs", port.vfs)
            for network in port.networks:
                add(f"vfs:{network}", port.vfs)
        add("devices", _counted(self.devices))
        free = sum(p.free for p in self.partitions)
        add("partitions", Amount(len(self.partitions), len(self.partitions) - free, free))
        add("disk_mib", self.disk_mib)
        return found


def capacity(topology: Topology, claims: HostClaims) -> HostCapacity:
    """The numbers of one host. Linear in its cells, functions and claims; claims that conflict are taken as they are."""
    index, usage = topology.index, claims.usage
    free_pool, set_aside = _set_aside(index, usage)
    free = free_pool | (index.isolated & ~usage.owned)
    stranded: list[Stranded] = []
    cells = []
    stranded_threads = 0
    gpu_cells = topology.functions.gpus_of_cell
    with_cpu, with_memory = set(), set()
    for cell in index.cells:
        found, lost = _cell(cell, usage, free, bool(gpu_cells.get(cell.position)), stranded)
        cells.append(found)
        stranded_threads |= lost
        if found.threads.free:
            with_cpu.add(cell.id)
        if _memory_mib(found.memory_mib.free, [(kib, amount.free) for kib, amount in found.pages]) >= LEAST_MEMORY_MIB:
            with_memory.add(cell.id)
    homes = _Homes(index)
    blocked = _blocked_groups(topology, usage)
    partitions, whole = _partitions(topology, usage, blocked)
    ports = tuple(_ports(topology, usage, blocked, homes, with_cpu, stranded))
    devices = []
    for device in topology.devices:
        home = homes.of(device.place)
        taken = device.id in usage.devices
        cause = None if taken else _function_cause(device.id in blocked, home, with_cpu)
        devices.append(FunctionUse(device.id, home, 1000 * taken, cause))
    gpus = []
    for i, gpu in enumerate(topology.gpus):
        home = homes.of(gpu.place)
        used = 1000 if gpu.uuid in usage.gpus else min(1000, usage.share_milli.get(gpu.uuid, 0))
        cause = None
        if not used:
            cause = _function_cause(gpu.uuid in blocked, home, with_cpu)
            if cause is None and home >= 0 and home not in with_memory:
                cause = Cause.NO_MEMORY
            if cause is None and whole[0] >> i & 1 and not whole[1] >> i & 1:
                cause = Cause.PARTITION_HOLE
        gpus.append(FunctionUse(gpu.uuid, home, used, cause))
    stranded += _of_functions("gpus", gpus)
    stranded += _of_functions("devices", devices)
    return HostCapacity(
        cells=tuple(cells),
        gpus=tuple(gpus),
        ports=ports,
        devices=tuple(devices),
        partitions=partitions,
        disk_mib=_amount(topology.disk_mib, usage.disk_mib),
        stranded=tuple(stranded),
        set_aside=set_aside,
        free=free,
        stranded_threads=stranded_threads,
    )


def _amount(total: int, used: int, *, is_stranded: bool = False) -> Amount:
    used = min(total, used)
    return Amount(total, used, total - used, total - used if is_stranded else 0)


def _counted(functions: tuple[FunctionUse, ...]) -> Amount:
    used = sum(f.used_milli > 0 for f in functions)
    return Amount(len(functions), used, len(functions) - used, sum(f.stranded is not None for f in functions))


def _memory_mib(plain_mib: int, pages: list[tuple[int, int]]) -> int:
    return plain_mib + sum(page_kib * count for page_kib, count in pages) // 1024


# --- threads ----------------------------------------------------------------------------------------------------------


def _beside_held(cell: CellIndex, owned: int) -> int:
    """Threads of the cell's cores of which a claim owns at least one."""
    mask = 0
    for shape in cell.classes:
        touched = owned
        for offset in shape.offsets:
            touched |= owned >> offset
        mask |= shape.threads(shape.first & touched)
    return mask


def _set_aside(index: TopologyIndex, usage: Usage) -> tuple[int, int]:
    """(pool threads that are free, pool threads set aside)"""
    left = index.pool & ~usage.owned
    aside = 0
    for cell in index.cpu_cells:
        need = -(-usage.shared_milli.get(cell.id, 0) // 1000)
        if need:
            here = cell.pool & left
            aside |= _choose(index, here & _beside_held(cell, usage.owned), here, need)
    if not index.reserved and not aside and left:
        # not the last one of a cell: what lies beside it would count as stranded for a thread that is needed anywhere
        roomy = [cell for cell in index.cpu_cells if (cell.pool & left).bit_count() > 1]
        beside = sum(_beside_held(cell, usage.owned) & cell.pool for cell in roomy) & left
        cell = max(index.cpu_cells, key=lambda c: ((c.pool & left).bit_count(), -c.position))
        aside = _choose(index, beside, cell.pool & left, 1)
    return left & ~aside, aside


def _choose(index: TopologyIndex, first: int, then: int, count: int) -> int:
    """``count`` threads: of ``first`` the highest, then of ``then`` core by core from the top; all where there are fewer."""
    chosen = 0
    while count and first:
        high = 1 << (first.bit_length() - 1)
        chosen |= high
        first ^= high
        count -= 1
    then &= ~chosen
    while count and then:
        high = then.bit_length() - 1
        core = then & index.siblings[high]
        then &= ~core
        while count and core:
            top = 1 << (core.bit_length() - 1)
            chosen |= top
            core ^= top
            count -= 1
    return chosen


def _cell(
    cell: CellIndex, usage: Usage, all_free: int, has_gpus: bool, stranded: list[Stranded]
) -> tuple[CellCapacity, int]:
    """The numbers of a cell, and the mask of its stranded threads; what is stranded is added to the list."""
    usable = cell.pool | cell.isolated
    free = usable & all_free
    no_cpu = bool(usable) and not free
    memory = _amount(cell.plain_mib, usage.charged_mib.get(cell.id, 0), is_stranded=no_cpu)
    pages = tuple(
        (page_kib, _amount(count, usage.pages.get((cell.id, page_kib), 0), is_stranded=no_cpu))
        for page_kib, count in sorted(cell.pages.items())
    )
    if memory.stranded:
        stranded.append(Stranded("memory_mib", Cause.NO_CPU, memory.stranded, cell.id))
    for page_kib, amount in pages:
        if amount.stranded:
            stranded.append(Stranded(f"pages:{page_kib}", Cause.NO_CPU, amount.stranded, cell.id))
    lost = 0
    no_memory = _memory_mib(memory.free, [(kib, amount.free) for kib, amount in pages]) < LEAST_MEMORY_MIB
    if free:
        lost = free if no_memory else free & _beside_held(cell, usage.owned)
        if lost:
            cause = Cause.NO_MEMORY if no_memory else Cause.ODD_CORE
            stranded.append(Stranded("threads", cause, lost.bit_count(), cell.id, (str(CpuSet(lost)),)))
    cores = sum([shape.whole(usable).bit_count() for shape in cell.classes])
    free_cores = sum([shape.whole(free).bit_count() for shape in cell.classes]) if free else 0
    pool_left = (cell.pool & ~usage.owned).bit_count()
    count, free_count = usable.bit_count(), free.bit_count()
    return (
        CellCapacity(
            cell.id,
            Amount(count, count - free_count, free_count, lost.bit_count()),
            Amount(cores, cores - free_cores, free_cores, free_cores if no_memory else 0),
            _amount(1000 * pool_left, usage.shared_milli.get(cell.id, 0)),
            memory,
            pages,
            bool(usable),
            has_gpus,
        ),
        lost,
    )


# --- functions --------------------------------------------------------------------------------------------------------


class _Homes:
    """Cell to the cell whose CPUs are beside it."""

    def __init__(self, index: TopologyIndex) -> None:
        self._index = index
        self._homes: dict[int, int] = {cell.id: cell.id for cell in index.cpu_cells}

    def of(self, place: PciPlace) -> int:
        """Id of the home of a function there, -1 where it is not known."""
        home = self._homes.get(place.cell)
        if home is None:
            index = self._index
            there = index.cell_by_id.get(place.cell)
            home = -1
            if there is not None and index.cpu_cells:
                distance = index.distance[there.position]
                home = min(index.cpu_cells, key=lambda cell: distance[cell.position]).id
            self._homes[place.cell] = home
        return home


def _function_cause(is_blocked: bool, home: int, with_cpu: set[int]) -> Cause | None:
    if is_blocked:
        return Cause.IOMMU_GROUP
    return Cause.NO_CPU if home >= 0 and home not in with_cpu else None


def _blocked_groups(topology: Topology, usage: Usage) -> frozenset[str]:
    """Functions of an IOMMU group of which one is held: GPU UUIDs, device ids, ``MAC/index``."""
    blocked: set[str] = set()
    for names in topology.index.shared_groups.values():
        for name in names:
            mac, slash, number = name.partition("/")
            held = name in usage.gpus or name in usage.share_milli or name in usage.devices
            if held or (slash and usage.vfs.get(mac, 0) >> int(number) & 1):
                blocked.update(names)
                break
    return frozenset(blocked)


def _partitions(
    topology: Topology, usage: Usage, blocked: frozenset[str]
) -> tuple[tuple[PartitionUse, ...], tuple[int, int]]:
    """The partitions, and of the GPUs in those of two or more: (all of them, those of which such a one is free)."""
    if not topology.partitions:
        return (), (0, 0)
    taken = 0
    for i, gpu in enumerate(topology.gpus):
        if gpu.uuid in usage.gpus or gpu.uuid in usage.share_milli or gpu.uuid in blocked:
            taken |= 1 << i
    found, members, covered = [], 0, 0
    for partition, mask in topology.functions.partitions:
        free = not mask & taken and partition.id not in usage.partitions
        found.append(PartitionUse(partition.id, mask.bit_count(), free))
        if mask.bit_count() > 1:
            members |= mask
            covered |= mask if free else 0
    return tuple(found), (members, covered)


def _ports(
    topology: Topology,
    usage: Usage,
    blocked: frozenset[str],
    homes: _Homes,
    with_cpu: set[int],
    stranded: list[Stranded],
) -> Iterator[PortUse]:
    for pf, all_vfs in zip(topology.pfs, topology.functions.vf_mask, strict=True):
        home = homes.of(pf.place)
        left = all_vfs & ~usage.vfs.get(pf.mac, 0)
        grouped = sum(f"{pf.mac}/{number}" in blocked for number in bits(left)) if blocked else 0
        others = left.bit_count() - grouped
        lonely = others if home >= 0 and home not in with_cpu else 0
        for cause, amount in ((Cause.IOMMU_GROUP, grouped), (Cause.NO_CPU, lonely)):
            if amount:
                stranded.append(Stranded("vfs", cause, amount, home, (pf.mac,)))
        total, free = all_vfs.bit_count(), left.bit_count()
        yield PortUse(pf.mac, home, pf.networks, Amount(total, total - free, free, grouped + lonely))


def _of_functions(dimension: str, functions: list[FunctionUse]) -> list[Stranded]:
    """One entry for each cause and cell, in the order of the functions."""
    found: dict[tuple[Cause, int], list[str]] = {}
    for function in functions:
        if function.stranded is not None:
            found.setdefault((function.stranded, function.home), []).append(function.id)
    return [Stranded(dimension, cause, len(ids), home, tuple(ids)) for (cause, home), ids in found.items()]
