"""Fit on named machines: what is preferred, what is promised, and the numbers of a refusal."""

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from casemate_core import reasons
from casemate_core.claims import Claim, HostClaims, verify_claim, volume_claim
from casemate_core.cpuset import CpuSet
from casemate_core.fit import (
    BadRequest,
    CellPolicy,
    CoreChoice,
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
    Overcommit,
    Refusal,
    Request,
    ThreadPolicy,
    VolumeRequest,
    fit,
    fits,
)
from casemate_core.topology import Topology
from casemate_core.topology_loaders import from_line
from support.hosts import host

GIB = 1024
ONE = MemoryRequest(GIB, cells=CellPolicy.ONE)


def pinned(count: int, threads: ThreadPolicy = ThreadPolicy.ANY, **more: object) -> CpuRequest:
    return replace(CpuRequest(count, policy=CpuPolicy.DEDICATED, threads=threads), **more)  # type: ignore[arg-type]


def place(topology: Topology, request: Request, claims: HostClaims | None = None, owner: str = "a") -> Claim:
    beside = claims or HostClaims.empty()
    found = fit(topology, beside, request, owner=owner)
    assert isinstance(found, Fit), found.sentence
    assert verify_claim(topology, beside, found.claim) == []
    return found.claim


def refused(topology: Topology, request: Request, claims: HostClaims | None = None) -> tuple[reasons.Reason, ...]:
    found = fit(topology, claims or HostClaims.empty(), request, owner="a")
    assert isinstance(found, Refusal), found
    assert all(reason.sentence and reason.remedies for reason in found.reasons)
    return found.reasons


def cores_of(topology: Topology, claim: Claim) -> set[int]:
    return {topology.index.core_of[thread] for thread in claim.vcpus}


# --- CPUs


def test_siblings_go_together() -> None:
    nps1 = host("epyc-nps1")
    for threads in (ThreadPolicy.REQUIRE, ThreadPolicy.PREFER):
        claim = place(nps1, Request(pinned(8, threads), ONE))
        assert len(cores_of(nps1, claim)) == 4
        assert all(
            nps1.index.core_of[a] == nps1.index.core_of[b]
            for a, b in zip(claim.vcpus[::2], claim.vcpus[1::2], strict=True)
        )


def test_isolate_holds_the_siblings() -> None:
    nps1 = host("epyc-nps1")
    claim = place(nps1, Request(pinned(4, ThreadPolicy.ISOLATE), ONE))
    assert len(cores_of(nps1, claim)) == 4
    assert claim.held == CpuSet.from_ids(thread + 128 for thread in claim.vcpus)


def test_require_with_an_odd_count_holds_one_sibling() -> None:
    claim = place(host("epyc-nps1"), Request(pinned(3, ThreadPolicy.REQUIRE), ONE))
    assert (len(claim.vcpus), len(claim.held)) == (3, 1)


def test_any_fills_broken_cores_first() -> None:
    small = from_line("1s 4k/c 2t 8G hk=1 name=s")
    claims = HostClaims.of([Claim("x", vcpus=(1,), vcpus_online=1, vcpus_max=1)])
    assert place(small, Request(pinned(1), ONE), claims).vcpus == (5,)
    assert place(small, Request(pinned(2, ThreadPolicy.PREFER), ONE), claims).vcpus == (2, 6)


def test_one_cache_where_one_has_room() -> None:
    nps4 = host("epyc-nps4")
    claim = place(nps4, Request(pinned(16, ThreadPolicy.REQUIRE), ONE))
    assert len({nps4.cores[nps4.index.core_of[t]].l3 for t in claim.vcpus}) == 1
    both = place(nps4, Request(pinned(24, ThreadPolicy.REQUIRE), ONE))
    assert len({nps4.cores[nps4.index.core_of[t]].l3 for t in both.vcpus}) == 2


def test_offlined_sibling() -> None:
    odd = host("offlined")
    claim = place(odd, Request(pinned(15), ONE))  # cell 1 has 7 x 2 + 1 threads, cell 0 has 14
    assert 14 in claim.vcpus
    assert 30 not in claim.owned
    require = refused(odd, Request(pinned(15, ThreadPolicy.REQUIRE), ONE))
    assert {(r.cell, r.available) for r in require if isinstance(r, reasons.CoresShort)} == {(0, 14), (1, 14)}


def test_hybrid_cores_by_choice() -> None:
    laptop = host("laptop")
    for choice, threads in ((CoreChoice.PERFORMANCE, range(12)), (CoreChoice.EFFICIENCY, range(12, 20))):
        assert set(place(laptop, Request(pinned(6, cores=choice))).vcpus) <= set(threads)
    short = refused(laptop, Request(pinned(9, cores=CoreChoice.EFFICIENCY)))
    assert short == (reasons.ThreadsShort(9, 8),)


def test_realtime_lies_on_isolated_cores_with_housekeeping_beside() -> None:
    ran = host("ran-edge")
    claim = place(ran, Request(pinned(6, realtime=True), MemoryRequest(8 * GIB, page_kib=1 << 20)))
    assert claim.owned <= ran.isolated
    assert claim.emulator == ran.reserved
    assert not claim.emulator_owned
    assert claim.one_cell
    assert claim.exclusive_cores
    assert refused(host("epyc-nps1"), Request(pinned(2, realtime=True)))[0] == reasons.IsolatedShort(2, 0)


def test_dedicated_vcpus_leave_isolated_cores_to_realtime() -> None:
    ran = host("ran-edge")
    assert place(ran, Request(pinned(4))).owned.isdisjoint(ran.isolated)
    assert place(ran, Request(pinned(8))).owned <= ran.isolated  # the pool has only four threads


def test_emulator_of_its_own() -> None:
    nps1 = host("epyc-nps1")
    claim = place(nps1, Request(pinned(2, emulator=EmulatorPolicy.ISOLATE), ONE))
    assert claim.emulator_owned
    assert len(claim.emulator) == 1
    assert claim.emulator.isdisjoint(CpuSet.from_ids(claim.vcpus))
    full = from_line("1s 3k/c 4G hk=1 name=f")
    assert refused(full, Request(pinned(2, emulator=EmulatorPolicy.ISOLATE), ONE)) == (reasons.EmulatorShort(),)


def test_shared_cpus_are_charged_after_overcommit_and_keep_their_pool() -> None:
    small = from_line("1s 4k/c 8G hk=1 name=s")
    twelve = Request(CpuRequest(12), MemoryRequest(GIB))
    assert refused(small, twelve) == (reasons.SharedCpuShort(12000, 3000, 12),)
    found = fit(small, HostClaims.empty(), twelve, owner="a", overcommit=Overcommit(400))
    assert isinstance(found, Fit)
    assert [s.milli for s in found.claim.shared] == [3000]
    claims = HostClaims.of([found.claim])
    assert refused(small, Request(pinned(1)), claims) == (reasons.ThreadsShort(1, 0),)


def test_growth_room_is_reserved() -> None:
    small = from_line("1s 4k/c 8G 2M=512 hk=1 name=s")
    claim = place(small, Request(pinned(1, max=3), MemoryRequest(512, 1024, page_kib=2048)))
    assert (claim.vcpus_online, len(claim.vcpus)) == (1, 3)
    assert (claim.pages[0].count, claim.pages[0].growth) == (256, 256)
    assert refused(small, Request(pinned(1)), HostClaims.of([claim])) == (reasons.ThreadsShort(1, 0),)


# --- cells


def test_one_cell_is_kept_and_the_tightest_taken() -> None:
    uneven = host("uneven")
    claim = place(uneven, Request(pinned(2), MemoryRequest(8 * GIB, cells=CellPolicy.ONE)))
    assert claim.cells == (2,)
    assert claim.one_cell
    assert place(uneven, Request(pinned(2), MemoryRequest(20 * GIB, cells=CellPolicy.ONE))).cells == (0,)
    short = refused(uneven, Request(pinned(2), MemoryRequest(100 * GIB, cells=CellPolicy.ONE)))
    assert short == (
        reasons.MemoryShort(100 * GIB, 62 * GIB, 0),
        reasons.MemoryShort(100 * GIB, 16 * GIB, 2),
    )


def test_prefer_splits_over_the_fewest_cells_and_reaches_memory_cells_last() -> None:
    uneven = host("uneven")
    claim = place(uneven, Request(pinned(18), MemoryRequest(70 * GIB)))
    assert {uneven.cores[uneven.index.core_of[t]].cell for t in claim.vcpus} == {0, 2}
    assert claim.cells == (0, 2)
    far = place(uneven, Request(pinned(18), MemoryRequest(100 * GIB)))
    assert far.cells == (0, 2, 5)
    assert far.memory_mib == 100 * GIB


def test_spread_is_even() -> None:
    nps4 = host("epyc-nps4")
    claim = place(
        nps4,
        Request(pinned(16, max=20), MemoryRequest(16 * GIB, cells=CellPolicy.SPREAD, cell_count=4, page_kib=1 << 20)),
    )
    cells = [nps4.cores[nps4.index.core_of[t]].cell for t in claim.vcpus]
    assert sorted(cells.count(c) for c in set(cells)) == [5] * 4
    online = cells[:16]
    assert max(online.count(c) for c in set(cells)) - min(online.count(c) for c in set(cells)) <= 2
    assert [p.count for p in claim.pages] == [4] * 4
    assert refused(nps4, Request(pinned(4), MemoryRequest(GIB, cells=CellPolicy.SPREAD, cell_count=9))) == (
        reasons.CellsShort(9, 0, 8),
    )


def test_pages_short_on_the_whole_host_and_in_each_cell() -> None:
    nps4 = host("epyc-nps4")
    huge = MemoryRequest(20 * GIB, page_kib=1 << 20, cells=CellPolicy.ONE)
    short = refused(nps4, Request(pinned(2), huge))
    assert short == tuple(reasons.PagesShort(20, 16, 1 << 20, cell) for cell in range(8))
    assert short[0].remedies[0] == reasons.MorePages(0, 1 << 20, 4)
    total = refused(nps4, Request(pinned(2), replace(huge, size_mib=200 * GIB)))
    assert total == (reasons.PagesShort(200, 128, 1 << 20),)
    none = refused(nps4, Request(pinned(2), replace(huge, page_kib=2048)))
    assert none[0] == reasons.NoPagePool(2048, (1 << 20,))


def test_overhead_is_counted_beside_huge_pages() -> None:
    tight = from_line("1s 4k/c 2G 2M=960 name=t")  # 128 MiB of plain memory
    request = Request(CpuRequest(1), MemoryRequest(1024, page_kib=2048, overhead_mib=128))
    claim = place(tight, request)
    assert claim.memory[0].charged_mib == 128
    assert isinstance(refused(tight, request, HostClaims.of([replace(claim, pages=())]))[0], reasons.MemoryShort)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CpuRequest(0),
        lambda: CpuRequest(1, shared_milli=-1),
        lambda: CpuRequest(1, cores=CoreChoice.EFFICIENCY),
        lambda: MemoryRequest(0),
        lambda: MemoryRequest(1, page_kib=-4),
        lambda: GpuRequest(0),
        lambda: GpuRequest(share_milli=1000),
        lambda: GpuRequest(share_milli=500, link=GpuLink.NVLINK),
        lambda: DeviceRequest((), 0),
        lambda: Request(disk_mib=-1),
        lambda: Request(nics=(NicRequest("a", Near.CELL),)),
        lambda: Overcommit(0),
    ],
)
def test_senseless_requests_cannot_be_made(make: Callable[[], object]) -> None:
    with pytest.raises(BadRequest):
        make()


def test_disk() -> None:
    assert refused(host("offlined"), Request(disk_mib=600 * GIB)) == (reasons.DiskShort(600 * GIB, 500 * GIB),)


def test_a_volume_that_is_nowhere_needs_room_and_one_that_is_here_does_not() -> None:
    machine, claims = host("offlined"), HostClaims.empty()
    new = Request(disk_mib=10 * GIB, volumes=(VolumeRequest("v", "data", 495 * GIB),))
    assert refused(machine, new) == (reasons.DiskShort(505 * GIB, 500 * GIB),)
    smaller = replace(new, volumes=(VolumeRequest("v", "data", 490 * GIB),))
    found = fit(machine, claims, smaller, owner="i")
    assert isinstance(found, Fit) and found.claim.disk_mib == 10 * GIB, "the room of the volume is the volume's own"
    here = claims.add(volume_claim("v", 490 * GIB, 0))
    bound = replace(smaller, volumes=(VolumeRequest("v", "data", 490 * GIB, "box"),))
    assert isinstance(fit(machine, here, bound, owner="i"), Fit)
    assert fits(machine, here, bound)


def test_a_volume_is_where_its_room_is_held() -> None:
    machine = host("offlined")
    bound = Request(volumes=(VolumeRequest("v", "data", GIB, "box"), VolumeRequest("w", "logs", GIB, "attic")))
    here = HostClaims.empty().add(volume_claim("v", GIB, 0))
    refusal = fit(machine, here, bound)
    assert isinstance(refusal, Refusal)
    assert refusal.reasons == (reasons.VolumeElsewhere("logs", "attic"),)
    assert refusal.sentence == "volume logs is on host attic, and its instance runs there alone"
    assert fits(machine, here, bound) == []


# --- functions


def test_gpus_come_as_a_partition_that_breaks_least() -> None:
    hgx = host("hgx-h200")
    two = Request(pinned(8), MemoryRequest(GIB), gpus=(GpuRequest(2, "H200", GpuLink.NVLINK),))
    first = place(hgx, two)
    assert first.partition is not None
    claims = HostClaims.of([first])
    second = place(hgx, two, claims, "b")
    quads = [set(p.gpus) for p in hgx.partitions if len(p.gpus) == 4]
    assert any(set(first.gpus) | set(second.gpus) == quad for quad in quads)
    claims = claims.add(second)
    four = replace(two, gpus=(GpuRequest(4, link=GpuLink.NVLINK),))
    assert set(place(hgx, four, claims, "c").gpus) in quads
    eight = refused(hgx, replace(two, gpus=(GpuRequest(8, link=GpuLink.NVLINK),)), claims)
    assert eight == (reasons.GpusShort(0, 8, 4, "*", 8),)
    three = refused(hgx, replace(two, gpus=(GpuRequest(3, link=GpuLink.NVLINK),)))
    assert three == (reasons.PartitionsTaken(0, 3, 0, 0),)
    broken = HostClaims.of([Claim("x", gpus=(hgx.gpus[0].uuid,)), Claim("y", gpus=(hgx.gpus[7].uuid,))])
    assert refused(hgx, four, broken) == (reasons.PartitionsTaken(0, 4, 2, 1),)


def test_nic_shares_the_switch_of_the_gpu_and_the_cell_is_theirs() -> None:
    hgx = host("hgx-h200")
    near = Request(pinned(8), ONE, gpus=(GpuRequest(1),), nics=(NicRequest("compute", Near.SWITCH, ("vlan",)),))
    claims = HostClaims.empty()
    for number in range(8):
        claim = place(hgx, near, claims, f"i{number}")
        gpu = next(g for g in hgx.gpus if g.uuid == claim.gpus[0])
        port = next(p for p in hgx.pfs if p.mac == claim.vfs[0].pf)
        assert gpu.place.path == port.place.path
        assert claim.cells == (gpu.place.cell,)
        claims = claims.add(claim)
    assert refused(hgx, near, claims)[0] == reasons.GpusShort(0, 1, 0, "*", 8)


def test_nic_too_far() -> None:
    apart = from_line("2s 4k/c 16G hk=1 gpu=1xL4 vf=2x1 name=apart")
    near = Request(gpus=(GpuRequest(1),), nics=(NicRequest("physnet0", Near.CELL),))
    port = next(pf for pf in apart.pfs if pf.place.cell == 0)
    claim = place(apart, near)
    assert claim.vfs[0].pf == port.mac
    assert refused(apart, replace(near, nics=near.nics * 2)) == (reasons.NicTooFar(0, "physnet0", "cell"),)


def test_networks_and_capabilities() -> None:
    ran = host("ran-edge")
    assert refused(ran, Request(nics=(NicRequest("moon"),))) == (
        reasons.NetworkUnreached(0, "moon", ("fronthaul", "mgmt", "midhaul")),
    )
    assert refused(ran, Request(nics=(NicRequest("mgmt", needs=("qinq",)),))) == (
        reasons.CapabilityMissing(0, "mgmt", ("qinq",)),
    )
    many = refused(ran, Request(nics=(NicRequest("mgmt"),) * 65))
    assert many[0] == reasons.VfsShort(0, "mgmt", 65, 64)
    claim = place(ran, Request(nics=(NicRequest("midhaul"), NicRequest("midhaul"), NicRequest("fronthaul"))))
    assert [v.nic for v in claim.vfs] == [0, 1, 2]


def test_devices_by_label() -> None:
    ran = host("ran-edge")
    want = DeviceRequest((("type", "fec"),), 2)
    assert len(place(ran, Request(devices=(want,))).devices) == 2
    assert refused(ran, Request(devices=(replace(want, count=3),))) == (
        reasons.DevicesShort(0, (("type", "fec"),), 3, 2, 2),
    )
    uneven = host("uneven")
    local = DeviceRequest((("type", "nvme"),), 3, local=True)
    assert refused(uneven, Request(devices=(local,)))[0] == reasons.DeviceNotLocal(0, 3, 2)


def test_local_gpus_ask_for_one_cell() -> None:
    hgx = host("hgx-h200")
    five = Request(pinned(4), MemoryRequest(GIB), gpus=(GpuRequest(5, local=True),))
    assert refused(hgx, five) == (reasons.GpuNotLocal(0, 5, 4),)
    assert len(place(hgx, replace(five, gpus=(GpuRequest(5),))).gpus) == 5


def test_gpu_models_links_and_slices() -> None:
    mixed = from_line("2s 8k/c 32G hk=1 gpu=2xL4 gpu=2xH100/mig gpu=1xA2/100m name=m")
    assert refused(mixed, Request(gpus=(GpuRequest(1, "B200"),))) == (
        reasons.GpuModelAbsent(0, "B200", ("A2", "H100", "L4")),
    )
    assert refused(mixed, Request(gpus=(GpuRequest(2, "L4", GpuLink.NVLINK),))) == (
        reasons.GpuLinkShort(0, 2, 1, "nvlink"),
    )
    assert refused(mixed, Request(gpus=(GpuRequest(2, "L4", GpuLink.PCIE),)))[0] == reasons.GpuLinkShort(
        0, 2, 1, "pcie"
    )
    claims = HostClaims.empty()
    for number in range(4):  # two 3g slices on each of the two GPUs with MIG
        slice_of = Request(gpus=(GpuRequest(1, share_profile="3g.40gb"),))
        claims = claims.add(place(mixed, slice_of, claims, f"m{number}"))
    assert refused(mixed, slice_of, claims)[0] == reasons.GpuShareShort(0, "3g.40gb", 1, 0, 1000)
    tenth = place(mixed, Request(gpus=(GpuRequest(1, share_milli=130),)), claims, "t")
    assert (tenth.shares[0].milli, tenth.shares[0].profile) == (200, "")
    assert refused(mixed, Request(gpus=(GpuRequest(1, "A2", share_milli=900),)), claims.add(tenth))[0] == (
        reasons.GpuShareShort(0, "900", 1, 0, 800)
    )


def test_cpu_instances_leave_gpu_cells_alone() -> None:
    lopsided = from_line("2s 8k/c 64G hk=1 gpu=1xL4 name=l")
    assert place(lopsided, Request(pinned(2), ONE)).cells == (1,)


def test_together_they_do_not_fit() -> None:
    hgx = host("hgx-h200")
    both = Request(gpus=(GpuRequest(5), GpuRequest(4)))
    assert isinstance(refused(hgx, both)[0], reasons.NothingTogether)


def test_fits_lists_other_cells_and_sets() -> None:
    hgx = host("hgx-h200")
    ways = fits(hgx, HostClaims.empty(), Request(pinned(2), ONE, gpus=(GpuRequest(1),)), limit=20)
    assert len({(w.claim.cells, w.claim.gpus) for w in ways}) == len(ways) == 16
    assert fits(hgx, HostClaims.empty(), Request(disk_mib=1 << 40)) == []


@pytest.mark.parametrize("name", ["gb200", "epyc-nps4", "xeon-snc4"])
def test_many_cells_take_no_exponential_time(name: str) -> None:
    """Enumerating subsets of 34 cells would not end. The limit is loose: it is a hundred times the usual cost."""
    topology = host(name)
    request = Request(pinned(4), MemoryRequest(GIB, cells=CellPolicy.SPREAD, cell_count=2))
    everything = Request(pinned(len(topology.online) // 2 + 20), MemoryRequest(topology.memory_mib // 2 + 8 * GIB))
    started = time.process_time()
    for _ in range(10):
        place(topology, request)
        fit(topology, HostClaims.empty(), everything)
    assert time.process_time() - started < 5
