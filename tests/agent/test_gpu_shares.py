"""Instances that are given slices of GPUs: made before the start, kept, destroyed with the claim; killed at each step."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pytest

from casemate_agent.execute.executor import Point, Step
from casemate_agent.gpu.records import Response
from casemate_agent.gpu.shares import ShareFacts, share_id
from casemate_core.claims import GpuShare, HostClaims
from casemate_core.fit import Fit, GpuRequest, Refusal, Request, fit
from casemate_core.gpu import GpuOrder, GpuVerb
from casemate_core.reasons import GpuLabelsAbsent, GpuShareBare, GpuShareShort
from casemate_core.spec.instance import DesiredInstance, Placement, Run
from casemate_core.topology import ShareProfile, Topology
from casemate_core.topology_loaders import from_line
from casemate_wire.stream import Desired
from support.agents import Rig, uid
from support.gpus import GPU_SETTINGS, gpu_states, told_of, with_gpus
from support.virtual import VirtualLoop, run_virtual

PROFILES = (ShareProfile("A100-10C", 250, 10240), ShareProfile("A100-20C", 500, 20480))


def cut_in_vgpus(topology: Topology) -> Topology:
    return replace(topology, gpus=tuple(replace(g, share_profiles=PROFILES, share_alike=True) for g in topology.gpus))


HOST = cut_in_vgpus(from_line("1s 8k/c 2t 64G disk=1T gpu=2xA100:40G name=box"))
GPU, SPARE = (gpu.uuid for gpu in HOST.gpus)


def with_slice(number: int, gpu: str = GPU, profile: int = 0, **changes: Any) -> DesiredInstance:
    """An instance that has a slice of a GPU."""
    plain, kind = with_gpus(number, **changes), PROFILES[profile]
    claim = replace(plain.placement.claim, shares=(GpuShare(gpu, kind.milli, kind.name),))
    return replace(plain, placement=Placement(claim, 1, plain.placement.generation))


async def until(rig: Rig, condition: Callable[[], object], within_s: float = 600.0) -> None:
    end = rig.loop.time() + within_s
    while not condition():
        assert rig.loop.time() < end, (gpu_states(rig), rig.host.vgpus)
        await asyncio.sleep(0.2)


async def clean(rig: Rig) -> None:
    await until(rig, lambda: set(gpu_states(rig).values()) == {"HostOwned"} and len(gpu_states(rig)) == 2)


async def rig_of(loop: VirtualLoop, broken: Response = Response.QUARANTINE) -> Rig:
    rig = Rig(loop, HOST, settings=replace(GPU_SETTINGS, gpu=replace(GPU_SETTINGS.gpu, broken=broken)))
    await rig.start()
    await clean(rig)
    return rig


def holders(rig: Rig) -> set[str]:
    return {facts.owner for facts in rig.host.vgpus.values()}


def test_a_slice_is_made_before_the_start_and_destroyed_with_the_claim() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        await rig.want(with_slice(1))
        await rig.want(with_slice(2))
        await rig.settle()
        assert {uid(1), uid(2)} <= set(rig.active()) and holders(rig) == {uid(1), uid(2)}
        name = share_id(uid(1), GPU)
        assert rig.host.vgpus[name] == ShareFacts(name, GPU, "A100-10C", uid(1))
        # through a stop and a start, and the agent's death
        await rig.want(replace(with_slice(1), run=Run.STOPPED))
        await rig.settle()
        assert uid(1) not in rig.active() and name in rig.host.vgpus
        await rig.kill()
        await rig.start()
        await rig.want(with_slice(1))
        await rig.settle()
        assert uid(1) in rig.active() and gpu_states(rig)[GPU] == "HostOwned"
        await rig.unwant(uid(1))
        await until(rig, lambda: holders(rig) == {uid(2)})
        # another one of the same size has its place
        await rig.want(with_slice(3, generation=2))
        await rig.settle()
        assert holders(rig) == {uid(2), uid(3)} and rig.broken == [] and rig.host.check() == []
        await rig.kill()

    run_virtual(story)


def test_after_a_reboot_of_the_host_it_is_made_anew() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        await rig.want(with_slice(1))
        await rig.settle()
        rig.host.reboot()
        await rig.kill()
        assert rig.host.vgpus == {}
        await rig.start()
        await rig.settle()
        assert uid(1) in rig.active() and holders(rig) == {uid(1)}
        await rig.kill()

    run_virtual(story)


def test_a_gpu_that_carries_slices_is_neither_reset_nor_held_back_under_them() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        await rig.want(with_slice(1))
        await rig.settle()
        assert rig.agent is not None
        passports = len(rig.agent.ledger.gpu(GPU).passports)  # type: ignore[union-attr]
        for number, verb in enumerate((GpuVerb.SANITISE, GpuVerb.QUARANTINE)):
            rig.revision += 1
            order = GpuOrder(GPU, f"order-{number}", verb, "its fan is loud" if number else "")
            await rig.agent.accept(Desired(rig.epoch, rig.revision, gpu_orders=(order,)))
            await asyncio.sleep(60)
            assert gpu_states(rig)[GPU] == "HostOwned" and uid(1) in rig.active()
        assert told_of(rig, GPU).held == "held back: its fan is loud", "nobody is placed there any more"
        assert len(rig.agent.ledger.gpu(GPU).passports) == passports  # type: ignore[union-attr]
        await rig.want(with_slice(2))
        await asyncio.sleep(30)
        assert uid(2) not in rig.active()
        assert "takes nobody any more: its fan is loud" in rig.agent.feed.states[uid(2)].message
        await rig.unwant(uid(2))
        await rig.unwant(uid(1))
        await until(rig, lambda: gpu_states(rig)[GPU] == "Quarantined")
        assert rig.host.vgpus == {}
        await rig.kill()

    run_virtual(story)


def test_a_slice_that_somebody_else_has_made_counts_and_is_left() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        stranger = ShareFacts("11111111-2222-3333-4444-555555555555", GPU, "A100-20C")
        rig.host.vgpus[stranger.id] = stranger
        await rig.want(with_slice(1, profile=1))
        await rig.settle()
        assert rig.agent is not None and uid(1) in rig.active()
        drift = [line for line in rig.agent.feed.report.drift if line.startswith("ShareUnknown")]
        assert drift == [
            f"ShareUnknown: vGPU {stranger.id} (A100-20C of {GPU}) was made by somebody else; it is left alone"
        ]
        (told,) = (c for c in rig.agent.feed.report.foreign_claims if c.shares)
        assert told.shares == (GpuShare(GPU, 500, "A100-20C"),)
        held = HostClaims.of([told, with_slice(1, profile=1).placement.claim])
        assert fit(HOST, held, Request(gpus=(GpuRequest(2, share_profile="A100-20C"),)), owner="x").reasons  # type: ignore[union-attr]
        await rig.unwant(uid(1))
        await until(rig, lambda: set(rig.host.vgpus) == {stranger.id})
        await rig.kill()

    run_virtual(story)


def test_what_runs_without_its_slice_is_said() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        await rig.want(with_slice(1))
        await rig.settle()
        rig.host.vgpus.clear()
        assert rig.agent is not None
        agent = rig.agent
        agent.wake()
        await until(rig, lambda: any(line.startswith("ShareGone: vGPU") for line in agent.feed.report.drift))
        assert len(rig.host.check()) == 1
        await rig.kill()

    run_virtual(story)


def test_while_nobody_tells_of_slices_nothing_is_made_or_forgotten() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        await rig.want(with_slice(1))
        await rig.settle()
        rig.host.faults.hung.add("shares")
        await rig.unwant(uid(1))
        await rig.want(with_slice(2))
        await asyncio.sleep(120)
        assert rig.agent is not None and rig.agent.ledger.get(uid(1)) is not None
        assert uid(2) not in rig.active() and holders(rig) == {uid(1)}
        assert gpu_states(rig) == {GPU: "HostOwned", SPARE: "HostOwned"}
        rig.host.faults.hung.clear()
        await until(rig, lambda: holders(rig) == {uid(2)} and uid(2) in rig.active())
        await rig.kill()

    run_virtual(story)


async def killed_at(point: Point, action: str, loop: VirtualLoop) -> None:
    rig = await rig_of(loop)
    passed = 0

    def trace(step: Step) -> None:
        nonlocal passed
        if step.point is point and type(step.action).__name__ == action:
            passed += 1
            if passed == 1:
                rig.kill_at = rig.steps

    rig.trace = trace
    try:
        await rig.want(with_slice(1, profile=1))
        await rig.settle()
        await rig.unwant(uid(1))
        await rig.want(with_slice(2, generation=2))
    except AssertionError:
        if not rig.dead:
            raise
    for _ in range(3000):
        if rig.dead:
            await rig.kill()
            rig.kill_at = 0
            rig.wanted.pop(uid(1), None)
            rig.wanted.setdefault(uid(2), with_slice(2, generation=2))
            await rig.start()
            break
        await asyncio.sleep(0.1)
    assert rig.deaths == 1, "it was never passed"
    await until(rig, lambda: holders(rig) == {uid(2)} and uid(2) in rig.active())
    await rig.settle()
    assert (rig.broken, rig.host.check()) == ([], []) and gpu_states(rig)[GPU] == "HostOwned"
    await rig.kill()


@pytest.mark.parametrize("point", [Point.BEFORE_ACTION, Point.AFTER_ACTION])
@pytest.mark.parametrize("action", ["GiveShares", "Define", "Start", "Undefine", "TakeShares", "ForgetClaim"])
def test_killed_around_each_act(point: Point, action: str) -> None:
    run_virtual(partial(killed_at, point, action))


def test_what_fits_beside_what_and_why_not() -> None:
    none = HostClaims.empty()
    asked = Request(gpus=(GpuRequest(1, share_profile="A100-20C"),))
    on_gpu = HostClaims.of([with_slice(1).placement.claim])
    found = fit(HOST, on_gpu, asked, owner="x")
    assert isinstance(found, Fit) and found.claim.shares[0].gpu == SPARE, "a GPU carries slices of one size at a time"
    both = HostClaims.of([with_slice(1).placement.claim, with_slice(2, SPARE).placement.claim])
    refused = fit(HOST, both, asked, owner="x")
    assert isinstance(refused, Refusal) and isinstance(refused.reasons[0], GpuShareShort)
    mixed = HostClaims.of([with_slice(1).placement.claim, with_slice(2, profile=1).placement.claim])
    assert any("A100-10C and A100-20C at once" in str(violation) for violation in mixed.check(HOST))
    # a MIG instance by itself is no function that a VM could be given
    mig = tuple(replace(g, share_profiles=(replace(PROFILES[0], bare=True),)) for g in HOST.gpus)
    bare = fit(replace(HOST, gpus=mig), none, Request(gpus=(GpuRequest(1, share_milli=200),)), owner="x")
    assert isinstance(bare, Refusal)
    assert bare.reasons == (GpuShareBare(0, "200", 2),)
    assert "a MIG instance without a vGPU: it has no PCI function, and goes to no VM" in bare.reasons[0].sentence


def test_gpus_are_asked_for_by_label() -> None:
    first, second = HOST.gpus
    labels = (("pool", "training"), ("tray", "2"))
    host = replace(HOST, gpus=(first, replace(second, labels=labels)))
    wanted = Request(gpus=(GpuRequest(1, labels=(("pool", "training"),)),))
    found = fit(host, HostClaims.empty(), wanted, owner="x")
    assert isinstance(found, Fit) and found.claim.gpus == (SPARE,)
    for pool, count in (("inference", 1), ("training", 2)):
        more = fit(host, HostClaims.empty(), Request(gpus=(GpuRequest(count, labels=(("pool", pool),)),)), owner="x")
        assert isinstance(more, Refusal)
        if pool == "inference":
            assert more.reasons == (GpuLabelsAbsent(0, (("pool", "inference"),), "*", 2, labels),)
            assert more.reasons[0].sentence == (
                "GPUs pool=inference asked, none of 2 of model * is; they are pool=training,tray=2"
            )


ASKED = (
    GpuRequest(1, share_profile="A100-10C"),
    GpuRequest(1, share_profile="A100-10C"),
    GpuRequest(1, share_profile="A100-20C"),
    GpuRequest(2, share_profile="A100-10C"),
    GpuRequest(1),
)
KILLS = 200


async def random_story(seed: int, loop: VirtualLoop) -> int:
    """Instances with slices and with whole GPUs come and go on two boards, by the books of a manager; deaths of the agent."""
    random = Random(seed)
    rig = await rig_of(loop)
    number = 0
    for generation in range(2, 7):
        for owner in list(rig.wanted):
            if random.random() < 0.4:
                await rig.unwant(owner)
            elif random.random() < 0.3:
                await rig.want(replace(rig.wanted[owner], run=random.choice((Run.STARTED, Run.STOPPED))))
        for _ in range(random.randrange(1, 4)):
            # what a former owner has let go of by the books is given at once, whatever is left of it on the host
            books = HostClaims.of([d.placement.claim for d in rig.wanted.values()])
            found = fit(HOST, books, Request(gpus=(random.choice(ASKED),)), owner="x")
            if isinstance(found, Fit):
                number += 1
                wanted = with_gpus(number, *found.claim.gpus, generation=generation)
                claim = replace(wanted.placement.claim, shares=found.claim.shares)
                await rig.want(replace(wanted, placement=Placement(claim, 1, generation)))
        await asyncio.sleep(random.choice((0.0, 0.05, 0.3, 1.0, 5.0, 20.0)) * random.random())
        fault = random.random()
        if fault < 0.8:
            await rig.kill()
            if fault < 0.2:
                rig.host.reboot()
                rig.disk.power_cut()
            await rig.start()
        elif fault < 0.9:
            rig.host.faults.hung.add("shares")
            await asyncio.sleep(random.random() * 15)
            rig.host.faults.hung.clear()
    await rig.settle(900)
    claims = [d.placement.claim for d in rig.wanted.values()]
    asked = {share_id(claim.owner, share.gpu) for claim in claims for share in claim.shares}

    def as_wanted() -> bool:
        # a stopped instance keeps what it was given, and is given nothing before its first start
        mine = {name for name, facts in rig.host.vgpus.items() if facts.owner in rig.wanted}
        states, whole = gpu_states(rig), {gpu for claim in claims for gpu in claim.gpus}
        clean = all(states[gpu] == "HostOwned" for gpu in states if gpu not in whole)
        return set(rig.host.vgpus) == mine <= asked and clean

    await until(rig, as_wanted, 900)
    for owner, wanted in rig.wanted.items():
        if wanted.run is Run.STARTED:
            assert owner in rig.active(), (seed, rig.states()[owner])
            assert all(share_id(owner, s.gpu) in rig.host.vgpus for s in wanted.placement.claim.shares)
    assert (rig.broken, rig.host.check()) == ([], []), seed
    deaths = rig.deaths
    await rig.kill()
    return deaths


@pytest.mark.timeout(600)
def test_slices_and_whole_gpus_come_and_go_under_two_hundred_kills() -> None:
    kills = seed = 0
    while kills < KILLS:
        kills += run_virtual(partial(random_story, seed))
        seed += 1
        assert seed < KILLS, "nobody is killed any more"
