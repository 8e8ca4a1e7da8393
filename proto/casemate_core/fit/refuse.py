"""Why no way fits: the reasons, with their numbers.

What may live here: the asking again, part by part, once ``solve`` has found nothing. It may be slow, since it runs for
the few hosts that come close; the scheduler counts the others by its own columns.

Order of the reasons: what the host lacks altogether, then what is short on it as a whole, then what is short per cell. When
each part alone would fit, that is said (``NothingTogether``): a refusal always has a reason.
"""

from casemate_core.claims import HostClaims
from casemate_core.claims.model import volume_owner
from casemate_core.cpuset import bits
from casemate_core.fit.cells import choose_cpu, must_be_one_cell, spread_room
from casemate_core.fit.cores import Mode, capacity
from casemate_core.fit.functions import FreeFunctions
from casemate_core.fit.request import CellPolicy, GpuLink, GpuRequest, Near, Request, VolumeRequest
from casemate_core.fit.view import Need, View
from casemate_core.gpu import held_because
from casemate_core.reasons import (
    CapabilityMissing,
    CellsShort,
    CoresShort,
    DeviceNotLocal,
    DevicesShort,
    DiskShort,
    EmulatorShort,
    GpuLabelsAbsent,
    GpuLinkShort,
    GpuModelAbsent,
    GpuNotLocal,
    GpuShareBare,
    GpuShareShort,
    GpusShort,
    HousekeepingMissing,
    IsolatedShort,
    MemoryShort,
    NetworkUnreached,
    NicTooFar,
    NoPagePool,
    NoSmt,
    NothingTogether,
    PagesShort,
    PartitionsTaken,
    Reason,
    SharedCpuShort,
    ThreadsShort,
    VfsShort,
    VolumeElsewhere,
)
from casemate_core.topology import CellIndex, Gpu


def volumes_elsewhere(claims: HostClaims, request: Request) -> tuple[VolumeRequest, ...]:
    """Volumes of the request whose data is on another host: a host holds the room of each that it has."""
    if not request.volumes:
        return ()
    return tuple(v for v in request.volumes if v.host and volume_owner(v.uid) not in claims)


def refuse(view: View, request: Request, need: Need) -> tuple[Reason, ...]:
    """The reasons; never empty."""
    free = FreeFunctions(view, request)
    found = _absent(view, request, need)
    # First of all: of where its data is nothing on this host can make up for.
    found[:0] = [VolumeElsewhere(volume.name, volume.host) for volume in volumes_elsewhere(view.claims, request)]
    disk_free = view.topology.disk_mib - view.usage.disk_mib
    if request.room_mib > disk_free:
        found.append(DiskShort(request.room_mib, disk_free))
    found += _functions(view, request, free)
    policy = CellPolicy.ONE if must_be_one_cell(request) else request.memory.cells
    if policy is CellPolicy.SPREAD:
        asked, room = spread_room(view, request, need)
        if room < asked:
            found.append(CellsShort(asked, room, len(view.index.cpu_cells)))
        elif not found:
            found += _whole_host(view, need)
    else:
        whole = _whole_host(view, need)
        found += whole
        if policy is CellPolicy.ONE and not whole:
            for cell in view.index.cpu_cells:
                found += _cell(view, need, cell)
    if not found:
        found += _locality(view, request, need, free)
    return tuple(found) or (NothingTogether(_parts(request)),)


def _absent(view: View, request: Request, need: Need) -> list[Reason]:
    found: list[Reason] = []
    if view.floor and not view.pool_left:
        found.append(HousekeepingMissing())
    if need.pages and need.page_kib not in view.index.page_sizes:
        found.append(NoPagePool(need.page_kib, tuple(sorted(view.index.page_sizes))))
    if need.dedicated and need.mode is Mode.REQUIRE and view.index.smt_width < 2:
        found.append(NoSmt())
    return found


def _whole_host(view: View, need: Need) -> list[Reason]:
    """What is short even if any number of cells would do."""
    found: list[Reason] = []
    cells = view.index.cpu_cells
    if need.dedicated:
        carried = sum(_carries(view, need, cell) for cell in cells)
        if carried < need.vcpus:
            found.append(_cpu_short(view, need, carried, None))
        elif need.emulator_thread and _dedicated_threads(view) <= need.vcpus:
            found.append(EmulatorShort())
    else:
        pooled = sum(max(0, view.shared_free(cell)) for cell in cells)
        if pooled < need.shared_milli:
            found.append(_shared_short(need, pooled, None))
    plain = sum(max(0, view.plain_free(cell)) for cell in view.index.cells)
    asked = need.overcommit.memory_charge(need.size_mib) + need.overhead_mib
    if plain < asked:
        found.append(MemoryShort(asked, plain))
    pages = sum(view.pages_free(cell, need.page_kib) for cell in view.index.cells) if need.pages else 0
    if pages < need.pages and need.page_kib in view.index.page_sizes:
        found.append(PagesShort(need.pages, pages, need.page_kib))
    return found


def _cell(view: View, need: Need, cell: CellIndex) -> list[Reason]:
    """What is short in one cell for an instance that must lie in one."""
    found: list[Reason] = []
    if need.dedicated:
        if need.realtime and not cell.reserved and not need.emulator_thread:
            found.append(HousekeepingMissing(cell.id))
        carried = _carries(view, need, cell)
        limit = view.limit(cell)
        if (
            carried < need.vcpus
            or choose_cpu(view, need, cell, need.vcpus, limit, emulator=False, realtime=need.realtime) is None
        ):
            found.append(_cpu_short(view, need, carried, cell))
        elif need.emulator_thread and (
            choose_cpu(view, need, cell, need.vcpus, limit, emulator=True, realtime=need.realtime) is None
        ):
            found.append(EmulatorShort(cell.id))
    elif view.shared_free(cell) < need.shared_milli:
        found.append(_shared_short(need, max(0, view.shared_free(cell)), cell))
    asked = need.overcommit.memory_charge(need.size_mib) + need.overhead_mib
    if view.plain_free(cell) < asked:
        found.append(MemoryShort(asked, max(0, view.plain_free(cell)), cell.id))
    if need.pages and view.pages_free(cell, need.page_kib) < need.pages and need.page_kib in view.index.page_sizes:
        found.append(PagesShort(need.pages, view.pages_free(cell, need.page_kib), need.page_kib, cell.id))
    return found


def _carries(view: View, need: Need, cell: CellIndex) -> int:
    """vCPUs that the cell could carry as asked."""
    free = view.free & view.kind
    width = view.index.smt_width
    isolated = cell.isolated & free
    quiet = capacity(cell.classes, isolated, need.mode, width, isolated.bit_count())
    if need.realtime:
        return quiet
    return quiet + capacity(cell.classes, cell.pool & free, need.mode, width, view.limit(cell))


def _dedicated_threads(view: View) -> int:
    """Threads that dedicated vCPUs and emulators could have on the whole host."""
    return sum(max(0, view.limit(cell)) + (cell.isolated & view.free).bit_count() for cell in view.index.cpu_cells)


def _cpu_short(view: View, need: Need, carried: int, cell: CellIndex | None) -> Reason:
    where = None if cell is None else cell.id
    if need.realtime:
        return IsolatedShort(need.vcpus, carried, where)
    if cell is None:
        threads = _dedicated_threads(view)
    else:
        threads = max(0, view.limit(cell)) + (cell.isolated & view.free).bit_count()
    if need.mode.takes_whole_cores:
        return CoresShort(need.vcpus, carried, need.mode.value, threads, where)
    return ThreadsShort(need.vcpus, carried, where)


def _shared_short(need: Need, free_milli: int, cell: CellIndex | None) -> Reason:
    return SharedCpuShort(need.shared_milli, free_milli, need.vcpus, None if cell is None else cell.id)


def _functions(view: View, request: Request, free: FreeFunctions) -> list[Reason]:
    found: list[Reason] = []
    for group, asked in enumerate(request.gpus):
        if not free.candidates[group]:
            found.append(_gpu_reason(view, free, group, asked))
    if not found and request.gpus and next(free.together(), None) is None:
        found.append(NothingTogether(tuple(f"GPU request {i}" for i in range(len(request.gpus)))))
    topology = view.topology
    for nic, wanted in enumerate(request.nics):
        reach = topology.functions.ports(topology, wanted.network, ())
        able = topology.functions.ports(topology, wanted.network, wanted.needs)
        left = sum(free.vfs[port].bit_count() for port in able)
        rivals = sum(1 for other in request.nics if other.network == wanted.network)
        if not reach:
            networks = tuple(sorted({n for pf in topology.pfs for n in pf.networks}))
            found.append(NetworkUnreached(nic, wanted.network, networks))
        elif not able:
            found.append(CapabilityMissing(nic, wanted.network, wanted.needs))
        elif left < rivals:
            found.append(VfsShort(nic, wanted.network, rivals, left))
    for group, wish in enumerate(request.devices):
        fitting = [i for i, d in enumerate(topology.devices) if set(wish.labels) <= set(d.labels)]
        there = sum(i in set(free.devices) for i in fitting)
        if there < wish.count:
            found.append(DevicesShort(group, wish.labels, wish.count, there, len(fitting)))
    return found


def _gpu_reason(view: View, free: FreeFunctions, group: int, asked: GpuRequest) -> Reason:
    topology = view.topology
    of_model = topology.functions.model_mask(topology, asked.model, asked.labels)
    if not of_model:
        if asked.labels and (alike := topology.functions.model_mask(topology, asked.model)):
            there = {label for i in bits(alike) for label in topology.gpus[i].labels}
            return GpuLabelsAbsent(group, asked.labels, asked.model, alike.bit_count(), tuple(sorted(there)))
        return GpuModelAbsent(group, asked.model, tuple(sorted({gpu.model for gpu in topology.gpus})))
    eligible = free.eligible(asked)
    if asked.is_share:
        what = asked.share_profile or str(asked.share_milli)
        bare = [i for i in bits(of_model) if _only_bare(topology.gpus[i], asked)]
        if len(bare) == of_model.bit_count():
            return GpuShareBare(group, what, len(bare))
        largest = max((room for i, room in free.room.items() if of_model >> i & 1 and i not in bare), default=0)
        return GpuShareShort(group, what, asked.count, eligible.bit_count(), largest)
    if eligible.bit_count() < asked.count:
        owners = (view.usage.gpus.get(topology.gpus[i].uuid, "") for i in bits(of_model))
        held = tuple(why for owner in owners if (why := held_because(owner)))
        return GpusShort(group, asked.count, eligible.bit_count(), asked.model, of_model.bit_count(), held)
    if asked.link is GpuLink.NVLINK and topology.functions.partitions:
        sized = [mask for _, mask in topology.functions.partitions if mask.bit_count() == asked.count]
        missing = min(((mask & ~eligible).bit_count() for mask in sized), default=0)
        return PartitionsTaken(group, asked.count, len(sized), missing)
    largest = 1
    for count in range(asked.count - 1, 1, -1):
        sets = (s for s in topology.functions.sets(count) if not s.mask & ~eligible)
        if any(s.one_root if asked.link is GpuLink.PCIE else topology.functions.all_linked(s.mask) for s in sets):
            largest = count
            break
    return GpuLinkShort(group, asked.count, largest, asked.link.value)


def _only_bare(gpu: Gpu, asked: GpuRequest) -> bool:
    """Whether all slices of a GPU that would do are such as no VM can be given."""
    enough = [
        profile
        for profile in gpu.share_profiles
        if (profile.name == asked.share_profile if asked.share_profile else profile.milli >= asked.share_milli)
    ]
    return bool(enough) and all(profile.bare for profile in enough)


def _locality(view: View, request: Request, need: Need, free: FreeFunctions) -> list[Reason]:
    """Every kind of thing is there in number: what is in the wrong place?"""
    found: list[Reason] = []
    functions = view.topology.functions
    with_room = [cell for cell in view.index.cpu_cells if not _cell(view, need, cell)]
    for group, asked in enumerate(request.gpus):
        if asked.local:
            eligible = free.eligible(asked)
            best = max(
                ((functions.gpus_of_cell.get(c.position, 0) & eligible).bit_count() for c in with_room), default=0
            )
            if best < asked.count:
                found.append(GpuNotLocal(group, asked.count, best))
    for group, wish in enumerate(request.devices):
        if wish.local:
            fitting = [
                functions.device_cell[i]
                for i in free.devices
                if set(wish.labels) <= set(view.topology.devices[i].labels)
            ]
            best = max((fitting.count(c.position) for c in with_room), default=0)
            if best < wish.count:
                found.append(DeviceNotLocal(group, wish.count, best))
    for nic, wanted in enumerate(request.nics):
        if wanted.near is not Near.ANY and not found:
            found.append(NicTooFar(nic, wanted.network, wanted.near.value))
    return found


def _parts(request: Request) -> tuple[str, ...]:
    parts = ["CPUs and memory"]
    if request.gpus:
        parts.append("GPUs")
    if request.nics:
        parts.append("NICs")
    if request.devices:
        parts.append("devices")
    return tuple(parts)
