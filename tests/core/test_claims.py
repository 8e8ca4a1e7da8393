"""Claims: the rules one by one, the sums beside them, the plain form, growth, and what catches a corrupted one."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from casemate_core.claims import (
    Claim,
    ClaimRule,
    DoubleOwner,
    GpuShare,
    HostClaims,
    OutsideRoom,
    Pages,
    PlainMemory,
    SharedCpu,
    StaleClaim,
    VfClaim,
    check,
    verify_claim,
)
from casemate_core.cpuset import CpuSet
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
    NicRequest,
    Overcommit,
    Request,
    ThreadPolicy,
    fit,
)
from casemate_core.plain import BadPlain
from casemate_core.topology import PciPlace, Topology
from casemate_core.topology_loaders import from_line
from support.small_hosts import requests, topologies

HOST = from_line(
    "1s 2c/s 8k/c 2t 32G 2M=1024 1G=4 hk=1 iso=3 gpu=4xH200@fabric gpu=1xL4/mig gpu=1xA2/100m vf=2x4 dev=2xfec name=c"
)
RICH = Request(
    CpuRequest(2, 3, CpuPolicy.DEDICATED, ThreadPolicy.ISOLATE, EmulatorPolicy.ISOLATE),
    MemoryRequest(100, 200, 2048, CellPolicy.ONE, overhead_mib=64),
    1024,
    (GpuRequest(2, "H200", GpuLink.NVLINK), GpuRequest(1, share_profile="1g.10gb")),
    (NicRequest("physnet0"),),
    (DeviceRequest((("type", "fec"),)),),
)


def claim_of(request: Request, owner: str = "a", topology: Topology = HOST, claims: HostClaims | None = None) -> Claim:
    found = fit(topology, claims or HostClaims.empty(), request, owner=owner, epoch=3, generation=7)
    assert isinstance(found, Fit), found
    return found.claim


def rules_of(*claims: Claim, topology: Topology = HOST, epoch: int = 3) -> set[ClaimRule]:
    return {violation.rule for violation in check(topology, HostClaims.of(claims, epoch))}


def test_a_rich_claim_names_everything_and_holds() -> None:
    claim = claim_of(RICH)
    assert (claim.owner, claim.epoch, claim.generation) == ("a", 3, 7)
    assert (len(claim.vcpus), claim.vcpus_online, claim.vcpus_max, len(claim.held)) == (3, 2, 3, 3)
    assert claim.emulator_owned
    assert len(claim.emulator) == 1
    assert claim.pages == (Pages(claim.cells[0], 2048, 50, 50),)
    assert claim.memory == (PlainMemory(claim.cells[0], 0, 0, 64),)
    assert (claim.memory_mib, claim.memory_max_mib) == (100, 200)
    assert claim.partition is not None
    assert set(HOST.partitions[claim.partition].gpus) == set(claim.gpus)
    assert [(s.milli, s.slots) for s in claim.shares] == [(142, 1)]
    assert (len(claim.vfs), len(claim.devices)) == (1, 1)
    assert rules_of(claim) == set()
    assert claim.owned == claim.held | claim.emulator | CpuSet.from_ids(claim.vcpus)


def test_plain_form_returns() -> None:
    claim = claim_of(RICH)
    assert Claim.from_dict(json.loads(json.dumps(claim.to_dict()))) == claim
    claims = HostClaims.of([claim, claim_of(Request(), "b")])
    assert HostClaims.from_dict(json.loads(json.dumps(claims.to_dict()))) == claims
    assert HostClaims.from_dict(claims.to_dict()).usage == claims.usage


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"version": 9}, "version"),
        ({"colour": 1}, "colour"),
        ({"vcpus": ["1"]}, "vcpus[0]"),
        ({"held": 3}, ""),
        ({"memory": [{"cell": 0}]}, "memory[0].size_mib"),
        ({"partition": "x"}, "partition"),
        ({"owner": None}, "owner"),
        ({"vcpus": [10**12]}, "vcpus"),
        ({"vcpus": [-1]}, "vcpus"),
        ({"vfs": [{"pf": "a", "index": 10**12}]}, "vfs"),
        ({"shares": [{"gpu": "a", "milli": 1, "slots": 10**12}]}, "shares"),
        ({"shares": [{"gpu": "a", "milli": 1, "slots": 1, "start": -1}]}, "shares"),
    ],
)
def test_plain_form_is_strict(change: dict[str, Any], path: str) -> None:
    with pytest.raises(BadPlain) as caught:
        Claim.from_dict({**claim_of(RICH).to_dict(), **change})
    assert caught.value.path == path


def test_plain_form_of_what_is_no_claim() -> None:
    for data in (None, {}, {"version": 1}):
        with pytest.raises(BadPlain):
            Claim.from_dict(data)
    one = claim_of(Request()).to_dict()
    for ledger in (None, {}, {"epoch": "1", "claims": []}, {"epoch": 1, "claims": [one, one]}):
        with pytest.raises(BadPlain):
            HostClaims.from_dict(ledger)


def other(rich: Claim) -> Claim:
    """A second claim beside a rich one."""
    return claim_of(replace(RICH, memory=replace(RICH.memory, overhead_mib=0)), "b", claims=HostClaims.of([rich]))


def broken_ones() -> dict[ClaimRule, list[tuple[Claim, ...]]]:
    """For each rule sets of claims that break it, and nothing but it."""
    a = claim_of(RICH)
    b = other(a)
    shared = claim_of(Request(), "s")
    cell = shared.memory[0].cell
    realtime = claim_of(
        Request(
            CpuRequest(2, policy=CpuPolicy.DEDICATED, threads=ThreadPolicy.ISOLATE, realtime=True),
            MemoryRequest(64, cells=CellPolicy.ONE),
        ),
        "r",
    )
    pinned = claim_of(Request(CpuRequest(2, policy=CpuPolicy.DEDICATED), MemoryRequest(64, cells=CellPolicy.ONE)), "p")
    home = HOST.index.cell_by_id[pinned.cells[0]]
    away = next(c for c in HOST.index.cells if c.id != home.id)
    slice_of_a2 = GpuShare(next(g.uuid for g in HOST.gpus if g.model == "A2"), 500)
    whole_l4 = next(g.uuid for g in HOST.gpus if g.model == "L4")
    return {
        ClaimRule.SHAPE: [
            (replace(pinned, vcpus=(pinned.vcpus[0],) * 2),),
            (replace(pinned, vcpus_max=5),),
            (replace(pinned, vcpus_online=0),),
            (replace(pinned, vcpus_online=3),),
            (replace(pinned, shared=(SharedCpu(home.id, 10),)),),
            (replace(pinned, emulator=CpuSet(), emulator_owned=True),),
            (replace(a, emulator=CpuSet.of(a.vcpus[0]), exclusive_cores=False),),
            (replace(shared, held=CpuSet.of(a.vcpus[0]), one_cell=False),),
            (replace(shared, disk_mib=-1),),
            (replace(shared, memory=shared.memory * 2),),
            (replace(a, pages=(*a.pages, Pages(a.cells[0], 1 << 20, 1))),),
        ],
        ClaimRule.STAMP: [(replace(a, epoch=-1),), (replace(a, generation=-1),), (replace(a, owner=""),)],
        ClaimRule.EXISTS: [
            (replace(pinned, vcpus=(pinned.vcpus[0], 400)),),
            (replace(a, gpus=("GPU-gone",), partition=None),),
            (replace(a, devices=("gone",)),),
            (replace(a, vfs=(VfClaim("02:00:00:00:00:00", 0),)),),
            (replace(a, vfs=(VfClaim(HOST.pfs[0].mac, 99),)),),
            (replace(a, partition=99),),
            (replace(shared, memory=(PlainMemory(44, 1, 0, 1),), one_cell=False),),
            (replace(a, pages=(Pages(a.cells[0], 64, 1),)),),
        ],
        ClaimRule.THREAD_OWNER: [(pinned, replace(pinned, owner="q"))],
        ClaimRule.THREAD_KIND: [
            (replace(pinned, vcpus=(pinned.vcpus[0], CpuSet(home.reserved).first)),),
            (replace(pinned, emulator=CpuSet(home.isolated)),),
        ],
        ClaimRule.WHOLE_CORES: [(replace(a, held=CpuSet(a.held.mask & (a.held.mask - 1))),)],
        ClaimRule.ONE_CELL: [(replace(pinned, vcpus=(pinned.vcpus[0], CpuSet(away.pool).first)),)],
        ClaimRule.REALTIME: [
            (replace(realtime, emulator=CpuSet()),),
            (replace(pinned, realtime=True),),
            (replace(realtime, exclusive_cores=False),),
        ],
        ClaimRule.POOL: [
            (replace(shared, shared=(SharedCpu(cell, 8001),)),),
            (replace(shared, shared=(SharedCpu(home.id, 8000),), memory=(), one_cell=False), pinned),
        ],
        ClaimRule.MEMORY: [(replace(shared, memory=(PlainMemory(cell, 1, 0, 99_999),)),)],
        ClaimRule.PAGES: [(replace(a, pages=(Pages(a.cells[0], 2048, 1, 512),)),)],
        ClaimRule.DISK: [(replace(shared, disk_mib=HOST.disk_mib + 1),)],
        ClaimRule.GPU_OWNER: [
            (replace(shared, gpus=a.gpus[:1]), replace(shared, owner="t", gpus=a.gpus[:1])),
            (replace(shared, gpus=(whole_l4,)), replace(shared, owner="t", shares=a.shares)),
            (replace(shared, shares=(slice_of_a2,) * 3),),
            (replace(shared, shares=(replace(slice_of_a2, milli=55),)),),
            (replace(shared, shares=a.shares), replace(shared, owner="t", shares=a.shares)),
            (replace(shared, shares=(replace(a.shares[0], start=7),)),),
            (replace(shared, shares=(replace(a.shares[0], profile="9g.90gb"),)),),
        ],
        ClaimRule.PARTITION: [(replace(a, gpus=b.gpus),), (replace(shared, partition=0),)],
        ClaimRule.VF_OWNER: [(replace(shared, vfs=a.vfs), replace(shared, owner="t", vfs=a.vfs))],
        ClaimRule.DEVICE_OWNER: [(replace(shared, devices=a.devices), replace(shared, owner="t", devices=a.devices))],
    }


@pytest.mark.parametrize("rule", [r for r in ClaimRule if r not in (ClaimRule.POOL_FLOOR, ClaimRule.IOMMU_GROUP)])
def test_each_rule_is_enforced(rule: ClaimRule) -> None:
    for claims in broken_ones()[rule]:
        assert rules_of(*claims) == {rule}, claims
        *others, last = claims
        beside = HostClaims.of(others, 3)
        if last.owner:
            assert {violation.rule for violation in verify_claim(HOST, beside, last)} == {rule}
        found = check(HOST, HostClaims.of(claims, 3))
        assert all(rule.value in str(violation) for violation in found)


def test_two_partitions_of_one_gpu() -> None:
    whole, half = HOST.partitions[0], HOST.partitions[1]
    a, b = Claim("a", gpus=whole.gpus, partition=whole.id), Claim("b", gpus=half.gpus, partition=half.id)
    assert rules_of(a, b) == {ClaimRule.PARTITION, ClaimRule.GPU_OWNER}


def test_pool_floor() -> None:
    tiny = from_line("1s 2k/c 1t 1G name=tiny")
    taken = Claim("a", vcpus=(0, 1), vcpus_online=2, vcpus_max=2)
    assert rules_of(taken, topology=tiny) == {ClaimRule.POOL_FLOOR}
    assert isinstance(fit(tiny, HostClaims.empty(), Request(CpuRequest(1, policy=CpuPolicy.DEDICATED))), Fit)
    assert not isinstance(fit(tiny, HostClaims.empty(), Request(CpuRequest(2, policy=CpuPolicy.DEDICATED))), Fit)


def test_iommu_group_goes_to_one_owner() -> None:
    place = PciPlace(iommu_group=5)
    shared_group = replace(HOST, devices=tuple(replace(d, place=place) for d in HOST.devices))
    a, b = (Claim(f"o{i}", devices=(device.id,)) for i, device in enumerate(HOST.devices))
    assert rules_of(a, b, topology=shared_group) == {ClaimRule.IOMMU_GROUP}
    one = Request(devices=(DeviceRequest((("type", "fec"),)),))
    assert not isinstance(fit(shared_group, HostClaims.of([a]), one), Fit)
    both = Request(devices=(DeviceRequest((("type", "fec"),), 2),))
    assert isinstance(fit(shared_group, HostClaims.empty(), both), Fit)


def test_newer_epoch_wins_and_older_is_refused() -> None:
    claims = HostClaims.empty().add(claim_of(Request(), "a"))
    stale = replace(claim_of(Request(), "b", claims=claims), epoch=2)
    with pytest.raises(StaleClaim):
        claims.add(stale)
    assert [v.rule for v in verify_claim(HOST, claims, stale)] == [ClaimRule.STAMP]
    assert claims.add(replace(stale, epoch=4)).remove("b").epoch == 4
    ahead = HostClaims({"a": claims["a"]}, claims.usage, epoch=1)
    assert {v.rule for v in ahead.check(HOST)} == {ClaimRule.STAMP}


def test_add_refuses_a_second_owner() -> None:
    a = claim_of(RICH)
    claims = HostClaims.empty().add(a)
    shared = claim_of(Request(), "s")
    whole_l4 = next(g.uuid for g in HOST.gpus if g.model == "L4")
    for bad in (
        a,
        replace(a, owner="b"),
        replace(shared, gpus=a.gpus),
        replace(shared, gpus=(whole_l4,)),
        replace(shared, shares=a.shares),
        replace(shared, shares=(GpuShare(a.gpus[0], 100),)),
        replace(shared, vfs=a.vfs),
        replace(shared, devices=a.devices),
        replace(shared, partition=a.partition),
    ):
        with pytest.raises(DoubleOwner):
            claims.add(bad)
    with pytest.raises(KeyError):
        claims.remove("nobody")
    assert claims.replace(replace(a, generation=8))["a"].generation == 8
    assert claims.get("nobody") is None
    assert ("a" in claims, len(claims), [c.owner for c in claims]) == (True, 1, ["a"])


def test_growth_stays_within_the_claim() -> None:
    claim = claim_of(RICH)
    grown = claim.resized(vcpus=3, memory_mib=150)
    assert (grown.vcpus_online, grown.memory_mib, grown.memory_max_mib) == (3, 150, 200)
    assert HostClaims.of([grown]).usage == HostClaims.of([claim]).usage
    assert rules_of(grown) == set()
    assert grown.resized(vcpus=2, memory_mib=100) == claim
    assert claim.resized(memory_mib=101).pages[0].count == 51  # whole pages
    for wrong in ({"vcpus": 4}, {"vcpus": 0}, {"memory_mib": 201}, {"memory_mib": 0}):
        with pytest.raises(OutsideRoom):
            claim.resized(**wrong)
    plain = claim_of(Request(CpuRequest(1, 2), MemoryRequest(100, 300)), "p")
    assert plain.resized(memory_mib=300).memory[0] == replace(plain.memory[0], size_mib=300, growth_mib=0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.data())
def test_memory_is_split_within_rooms(rooms: list[int], data: st.DataObject) -> None:
    claim = Claim("a", memory=tuple(PlainMemory(i, 1, room - 1, room) for i, room in enumerate(rooms)))
    target = data.draw(st.integers(len(rooms), sum(rooms)))
    after = claim.resized(memory_mib=target)
    assert after.memory_mib == target
    assert [m.size_mib + m.growth_mib for m in after.memory] == rooms
    assert all(m.growth_mib >= 0 for m in after.memory)


PINNED = Request(
    CpuRequest(4, policy=CpuPolicy.DEDICATED, threads=ThreadPolicy.PREFER), MemoryRequest(64, cells=CellPolicy.ONE)
)


@pytest.mark.parametrize("threads", [ThreadPolicy.ISOLATE, ThreadPolicy.REQUIRE])
def test_one_wrong_core_is_caught_by_tests_and_agent(threads: ThreadPolicy) -> None:
    """Any other thread of the host in the place of one vCPU: ``check`` and ``verify_claim`` both say so."""
    request = replace(PINNED, cpu=replace(PINNED.cpu, threads=threads))
    beside = HostClaims.of([claim_of(PINNED, "b")], 3)
    claim = claim_of(request, claims=beside)
    assert verify_claim(HOST, beside, claim) == []
    for position in range(4):
        for thread in range(34):
            if thread in claim.owned and thread not in claim.held:
                continue
            wrong = replace(claim, vcpus=(*claim.vcpus[:position], thread, *claim.vcpus[position + 1 :]))
            assert verify_claim(HOST, beside, wrong)
            assert HostClaims.of([*beside, wrong], 3).check(HOST)


def test_one_wrong_core_on_shared_cores_is_caught_unless_it_is_as_good() -> None:
    """Without a promise of whole cores another free thread of the same cell is no lie; every other one is."""
    beside = HostClaims.of([claim_of(PINNED, "b")], 3)
    claim = claim_of(PINNED, claims=beside)
    home = HOST.index.cell_by_id[claim.cells[0]]
    as_good = CpuSet((home.pool | home.isolated) & ~beside.usage.owned)
    for thread in range(34):
        wrong = replace(claim, vcpus=(thread, *claim.vcpus[1:]))
        caught = bool(verify_claim(HOST, beside, wrong))
        assert caught == (thread not in as_good or thread in claim.vcpus[1:])
        assert bool(HostClaims.of([*beside, wrong], 3).check(HOST)) == caught


class Life(RuleBasedStateMachine):
    """Place, release, grow, shrink and move in any order: the rules hold after every step, the sums are those of the claims."""

    owners = Bundle("owners")

    def __init__(self) -> None:
        super().__init__()
        self.topology: Topology | None = None
        self.claims = HostClaims.empty()
        self.count = 0

    @rule(topology=topologies())
    def boot(self, topology: Topology) -> None:
        if self.topology is None:
            self.topology = topology

    @rule(target=owners, request=requests(), cpu=st.sampled_from((100, 300)), memory=st.sampled_from((100, 150)))
    def place(self, request: Request, cpu: int, memory: int) -> Any:
        if self.topology is None:
            return multiple()
        owner = f"i{self.count}"
        self.count += 1
        found = fit(self.topology, self.claims, request, owner=owner, overcommit=Overcommit(cpu, memory))
        if not isinstance(found, Fit):
            assert found.reasons
            return multiple()
        assert verify_claim(self.topology, self.claims, found.claim) == []
        self.claims = self.claims.add(found.claim)
        return owner

    @rule(owner=consumes(owners))
    def release(self, owner: str) -> None:
        self.claims = self.claims.remove(owner)

    @rule(owner=owners, data=st.data())
    def resize(self, owner: str, data: st.DataObject) -> None:
        claim = self.claims[owner]
        vcpus = data.draw(st.integers(1, claim.vcpus_max))
        memory_mib = data.draw(st.integers(1, claim.memory_max_mib))
        self.claims = self.claims.replace(claim.resized(vcpus=vcpus, memory_mib=memory_mib))

    @invariant()
    def rules_hold_and_sums_are_true(self) -> None:
        if self.topology is None:
            return
        assert self.claims.check(self.topology) == []
        assert self.claims.usage == HostClaims.of(self.claims).usage


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=25, stateful_step_count=12)
