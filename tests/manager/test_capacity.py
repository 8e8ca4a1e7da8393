"""What a host has left, and what of that is stranded: against a dumb twin on small hosts, and on named machines."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from casemate_core.claims import Claim, HostClaims, PlainMemory, SharedCpu, VfClaim
from casemate_core.cpuset import CpuSet
from casemate_core.fit import CpuPolicy, CpuRequest, Fit, GpuRequest, MemoryRequest, Request, ThreadPolicy, fit
from casemate_core.topology import Topology
from casemate_core.topology_loaders import from_line
from casemate_manager.scheduler.capacity import LEAST_MEMORY_MIB, Cause, HostCapacity, capacity
from support.hosts import host, names
from support.small_hosts import requests, topologies

GIB = 1024
NONE = HostClaims.empty()


def filled(topology: Topology, wanted: list[Request]) -> HostClaims:
    """The host with those of the requests that fit, one after the other."""
    claims = NONE
    for i, request in enumerate(wanted):
        found = fit(topology, claims, request, owner=f"i{i}")
        if isinstance(found, Fit):
            claims = claims.add(found.claim)
    return claims


def lavish(topology: Topology) -> Topology:
    """The same host with MiB turned into so many that a cell with any is not short of memory by the least of all."""
    cells = tuple(
        replace(c, memory_mib=c.memory_mib * LEAST_MEMORY_MIB, reserved_mib=0, pools=()) for c in topology.cells
    )
    return replace(topology, cells=cells)


def homes(topology: Topology) -> dict[int, int]:
    """Cell to the cell with usable CPUs that is beside it, by looking at all of them."""
    usable = {core.cell for core in topology.cores for t in core.threads if is_usable(topology, t)}
    found = {-1: -1}
    for i, cell in enumerate(topology.cells):
        near = [(cell.distances[j] if cell.distances else 10 if i == j else 20, j) for j in range(len(topology.cells))]
        with_cpus = [(d, j) for d, j in near if topology.cells[j].id in usable]
        found[cell.id] = cell.id if cell.id in usable else topology.cells[min(with_cpus)[1]].id if with_cpus else -1
    return found


def is_usable(topology: Topology, thread: int) -> bool:
    if thread in topology.reserved:
        return False
    core = next(core for core in topology.cores if thread in core.threads)
    isolated = [t in topology.isolated for t in core.threads]
    return thread not in topology.isolated or all(isolated)


def twin(topology: Topology, claims: HostClaims, set_aside: set[int]) -> Counter[tuple[str, Cause]]:
    """What is stranded, straight from the definitions, thing by thing. Which threads are set aside is given, for it is a
    choice; that it is a right one has a test of its own."""
    owned = {t for claim in claims for t in claim.owned}
    free = {t for core in topology.cores for t in core.threads if is_usable(topology, t)} - owned - set_aside
    home = homes(topology)
    cell_of = {t: core.cell for core in topology.cores for t in core.threads}
    left: dict[int, int] = {}
    found: Counter[tuple[str, Cause]] = Counter()
    cpus = {core.cell for core in topology.cores for t in core.threads if is_usable(topology, t)}
    busy = {cell for cell in cpus if not any(cell_of[t] == cell for t in free)}
    for cell in topology.cells:
        plain = cell.memory_mib - cell.reserved_mib - sum(p.size_mib for p in cell.pools)
        plain -= sum(m.charged_mib for claim in claims for m in claim.memory if m.cell == cell.id)
        left[cell.id] = plain
        if cell.id in busy:
            found["memory_mib", Cause.NO_CPU] += plain
        for pool in cell.pools:
            held = sum(
                p.count + p.growth
                for claim in claims
                for p in claim.pages
                if (p.cell, p.page_kib) == (cell.id, pool.page_kib)
            )
            left[cell.id] += (pool.count - held) * pool.page_kib // 1024
            if cell.id in busy:
                found[f"pages:{pool.page_kib}", Cause.NO_CPU] += pool.count - held
    for core in topology.cores:
        for t in core.threads:
            if t in free and left[core.cell] < LEAST_MEMORY_MIB:
                found["threads", Cause.NO_MEMORY] += 1
            elif t in free and any(other in owned for other in core.threads):
                found["threads", Cause.ODD_CORE] += 1
    held_groups = set()
    sliced = {share.gpu for claim in claims for share in claim.shares}
    whole = {uuid for claim in claims for uuid in claim.gpus}
    devices = {d for claim in claims for d in claim.devices}
    vfs = {(v.pf, v.index) for claim in claims for v in claim.vfs}
    for gpu in topology.gpus:
        held_groups |= {gpu.place.iommu_group} if gpu.uuid in whole | sliced else set()
    for device in topology.devices:
        held_groups |= {device.place.iommu_group} if device.id in devices else set()
    for pf in topology.pfs:
        held_groups |= {vf.iommu_group for vf in pf.vfs if (pf.mac, vf.index) in vfs}
    held_groups.discard(-1)
    free_gpus = {g.uuid for g in topology.gpus if g.uuid not in whole | sliced}
    givable = {g.uuid for g in topology.gpus if g.uuid in free_gpus and g.place.iommu_group not in held_groups}
    active = {claim.partition for claim in claims}
    for gpu in topology.gpus:
        around = [p for p in topology.partitions if gpu.uuid in p.gpus and len(p.gpus) > 1]
        where = home[gpu.place.cell]
        if gpu.uuid not in free_gpus:
            continue
        if gpu.uuid not in givable:
            found["gpus", Cause.IOMMU_GROUP] += 1
        elif where in busy:
            found["gpus", Cause.NO_CPU] += 1
        elif where >= 0 and left[where] < LEAST_MEMORY_MIB:
            found["gpus", Cause.NO_MEMORY] += 1
        elif around and not any(set(p.gpus) <= givable and p.id not in active for p in around):
            found["gpus", Cause.PARTITION_HOLE] += 1
    for pf in topology.pfs:
        for vf in pf.vfs:
            if (pf.mac, vf.index) not in vfs:
                if vf.iommu_group in held_groups:
                    found["vfs", Cause.IOMMU_GROUP] += 1
                elif home[pf.place.cell] in busy:
                    found["vfs", Cause.NO_CPU] += 1
    for device in topology.devices:
        if device.id not in devices:
            if device.place.iommu_group in held_groups:
                found["devices", Cause.IOMMU_GROUP] += 1
            elif home[device.place.cell] in busy:
                found["devices", Cause.NO_CPU] += 1
    return +found


def told(found: HostCapacity) -> Counter[tuple[str, Cause]]:
    counted: Counter[tuple[str, Cause]] = Counter()
    for entry in found.stranded:
        assert entry.amount > 0
        counted[entry.dimension, entry.cause] += entry.amount
    return counted


@settings(max_examples=80)
@given(topologies(), st.lists(requests(), max_size=5), st.booleans())
def test_the_numbers_against_the_twin(topology: Topology, wanted: list[Request], rich: bool) -> None:
    topology = lavish(topology) if rich else topology
    claims = filled(topology, wanted)
    found = capacity(topology, claims)
    assert told(found) == twin(topology, claims, set(CpuSet(found.set_aside)))
    by_dimension: Counter[str] = Counter()
    for entry in found.stranded:
        by_dimension[entry.dimension] += entry.amount
    for name, amount in found.totals().items():
        assert amount.used + amount.free == amount.total, name
        assert 0 <= amount.stranded <= amount.free, name
        assert amount.used >= 0, name
        if name != "cores" and not name.startswith("vfs:"):
            assert amount.stranded == by_dimension[name], name
    assert set(by_dimension) <= set(found.totals())


@settings(max_examples=50)
@given(topologies(), st.lists(requests(), max_size=5))
def test_threads_are_set_aside_as_shared_cpus_need_them(topology: Topology, wanted: list[Request]) -> None:
    claims = filled(topology, wanted)
    found = capacity(topology, claims)
    owned = {t for claim in claims for t in claim.owned}
    aside = set(CpuSet(found.set_aside))
    everything = {t for core in topology.cores for t in core.threads if is_usable(topology, t)}
    pool = {t for t in everything if t not in topology.isolated}
    assert aside <= pool - owned
    assert set(CpuSet(found.free)) == everything - owned - aside
    assert set(CpuSet(found.stranded_threads)) <= set(CpuSet(found.free))
    for cell in topology.cells:
        charge = sum(s.milli for claim in claims for s in claim.shared if s.cell == cell.id)
        here = {t for core in topology.cores if core.cell == cell.id for t in core.threads} & aside
        if charge:
            assert len(here) == -(-charge // 1000)
        elif here:
            assert not topology.reserved
            assert len(aside) == 1, "the one thread that emulators need"
    if not topology.reserved and pool - owned:
        assert aside


@settings(max_examples=30)
@given(topologies(), st.lists(requests(), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_releasing_claims_gives_the_numbers_back(topology: Topology, wanted: list[Request], chance: object) -> None:
    claims = filled(topology, wanted)
    owners = [claim.owner for claim in claims]
    chance.shuffle(owners)  # type: ignore[attr-defined]
    for owner in owners:
        claim = claims[owner]
        before, without = capacity(topology, claims), claims.remove(owner)
        assert capacity(topology, without.add(claim)) == before
        claims = without
    assert capacity(topology, claims) == capacity(topology, NONE)


def test_an_idle_machine_has_nothing_stranded() -> None:
    for name in names():
        found = capacity(host(name), NONE)
        assert found.stranded == (), name
        for dimension, amount in found.totals().items():
            kept = not host(name).reserved and dimension in ("threads", "cores")
            assert amount.used == kept, (name, dimension)


def of(found: HostCapacity, dimension: str) -> list[tuple[Cause, int, int]]:
    return [(s.cause, s.amount, s.cell) for s in found.stranded if s.dimension == dimension]


def test_an_odd_core() -> None:
    topology = from_line("1s 4k/c 2t 16G hk=1 disk=10G")
    core = topology.cores[2]
    one = HostClaims.of([Claim("a", vcpus=(core.threads.first,), vcpus_online=1, vcpus_max=1)])
    found = capacity(topology, one)
    sibling = next(t for t in core.threads if t != core.threads.first)
    assert found.stranded[0].where == (str(sibling),)
    assert of(found, "threads") == [(Cause.ODD_CORE, 1, 0)]
    assert found.totals()["cores"].free == 2
    shared = one.add(Claim("b", vcpus_online=1, vcpus_max=1, shared=(SharedCpu(0, 700),)))
    assert capacity(topology, shared).stranded == (), "shared CPUs are first given what nobody else wants"


def test_memory_pages_gpus_and_vfs_of_a_cell_without_free_cpus() -> None:
    topology = host("hgx-h200")
    free = topology.index.cells[0].pool
    taken = tuple(CpuSet(free))
    claims = HostClaims.of([Claim("a", vcpus=taken, vcpus_online=len(taken), vcpus_max=len(taken))])
    found = capacity(topology, claims)
    assert of(found, "pages:1048576") == [(Cause.NO_CPU, 768, 0)]
    assert of(found, "memory_mib") == [(Cause.NO_CPU, topology.index.cells[0].plain_mib, 0)]
    assert of(found, "gpus") == [(Cause.NO_CPU, 4, 0)]
    assert of(found, "vfs") == [(Cause.NO_CPU, 16, 0)] * 4
    assert found.totals()["vfs:compute"].stranded == 64


def test_cpus_and_gpus_of_a_cell_without_memory() -> None:
    topology = from_line("2s 8k/c 2t 64G rmem=0M hk=1 gpu=2xL40S:48G vf=2x4@dc disk=1T")
    plain = topology.index.cells[1].plain_mib
    taken = plain - LEAST_MEMORY_MIB + 1
    claims = HostClaims.of([Claim("a", memory=(PlainMemory(1, taken, 0, taken),))])
    found = capacity(topology, claims)
    assert of(found, "threads") == [(Cause.NO_MEMORY, 14, 1)]
    assert of(found, "gpus") == [(Cause.NO_MEMORY, 1, 1)]
    assert of(found, "vfs") == []
    assert found.totals()["cores"].stranded == 7


def test_a_hole_in_the_partitions() -> None:
    topology = host("hgx-h200")
    by_module = {gpu.module_id: gpu.uuid for gpu in topology.gpus}
    claims = HostClaims.of([Claim("a", gpus=(by_module[1],))])
    found = capacity(topology, claims)
    assert of(found, "gpus") == [(Cause.PARTITION_HOLE, 1, found.gpus[topology.functions.gpu_bit[by_module[3]]].home)]
    hole = next(s for s in found.stranded if s.dimension == "gpus")
    assert hole.where == (by_module[3],), "modules 1 and 3 are a pair, and the two groups around them are broken"
    pairs = [p for p in found.partitions if p.gpus == 2]
    assert [p.free for p in pairs] == [False, True, True, True]


def test_functions_that_share_a_group_with_a_held_one() -> None:
    base = host("ran-edge")
    devices = tuple(replace(d, place=replace(d.place, iommu_group=7)) for d in base.devices)
    pf = base.pfs[0]
    vfs = tuple(replace(vf, iommu_group=7 if vf.index in (1, 2) else -1) for vf in pf.vfs)
    topology = replace(base, devices=devices, pfs=(replace(pf, vfs=vfs), *base.pfs[1:]))
    claims = HostClaims.of([Claim("a", vfs=(VfClaim(pf.mac, 1),))])
    found = capacity(topology, claims)
    assert of(found, "devices") == [(Cause.IOMMU_GROUP, 2, 0)]
    assert of(found, "vfs") == [(Cause.IOMMU_GROUP, 1, 0)]
    found = capacity(topology, HostClaims.of([Claim("a", devices=(devices[0].id,))]))
    assert of(found, "devices") == [(Cause.IOMMU_GROUP, 1, 0)]
    assert of(found, "vfs") == [(Cause.IOMMU_GROUP, 2, 0)]


def test_claims_that_promise_more_than_there_is() -> None:
    topology = from_line("1s 4k/c 1t 8G disk=10G")
    claims = HostClaims.of(
        [
            Claim(
                "foreign:1",
                shared=(SharedCpu(0, 90_000),),
                memory=(PlainMemory(0, 1 << 20, 0, 1 << 20),),
                disk_mib=1 << 30,
            )
        ]
    )
    for name, amount in capacity(topology, claims).totals().items():
        assert (amount.used, amount.free) == (amount.total, 0), name


def test_what_is_free_can_be_had() -> None:
    """The free threads of a cell are what a dedicated request can still get there, no more and no less."""
    topology = host("epyc-nps4")
    claims = filled(
        topology,
        [
            Request(CpuRequest(5, policy=CpuPolicy.DEDICATED), MemoryRequest(GIB)),
            Request(CpuRequest(7, policy=CpuPolicy.SHARED), MemoryRequest(GIB)),
            Request(CpuRequest(3, policy=CpuPolicy.DEDICATED, threads=ThreadPolicy.ISOLATE), MemoryRequest(GIB)),
        ],
    )
    free = capacity(topology, claims).totals()["threads"].free
    for count, fits in ((free, True), (free + 1, False)):
        request = Request(CpuRequest(count, policy=CpuPolicy.DEDICATED), MemoryRequest(GIB))
        assert isinstance(fit(topology, claims, request, owner="x"), Fit) is fits
    gpus = Request(CpuRequest(1), MemoryRequest(GIB), gpus=(GpuRequest(1),))
    assert not isinstance(fit(topology, claims, gpus, owner="x"), Fit)
    assert "gpus" not in capacity(topology, claims).totals()
