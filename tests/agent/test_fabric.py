"""Fabric partitions: module ids are no PCI order, versions must match, and an agent killed at any step comes to the same end."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from casemate_agent.drivers.fabricports import FabricBusy, FabricVersionMismatch
from casemate_agent.drivers.simulated_fabric import SimulatedFabric
from casemate_agent.execute.fabrickeeper import keep
from casemate_agent.hardware.fabric import FabricFacts, PartitionState, plan, sight
from casemate_core.claims import HostClaims
from casemate_core.errors import NotFound, Unavailable
from casemate_core.fit import CpuRequest, Fit, GpuLink, GpuRequest, MemoryRequest, Refusal, Request, fit
from casemate_core.spec.instance import DesiredInstance
from support.agents import Rig, instance, uid
from support.hosts import host
from support.virtual import VirtualLoop, run_virtual

HGX = host("hgx-h200")


class Killed(BaseException):
    """The agent's process is gone."""


class Mortal:
    """A fabric that lives, behind an agent that is killed before or after its nth act."""

    def __init__(self, real: SimulatedFabric, dies_at: int) -> None:
        self.real, self.left = real, dies_at

    def _step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed

    async def observe(self, deadline_s: float) -> FabricFacts:
        return await self.real.observe(deadline_s)

    async def activate(self, partition: int, deadline_s: float) -> None:
        self._step()
        await self.real.activate(partition, deadline_s)
        self._step()

    async def deactivate(self, partition: int, deadline_s: float) -> None:
        self._step()
        await self.real.deactivate(partition, deadline_s)
        self._step()


async def test_partitions_are_told_by_module_and_known_by_uuid() -> None:
    fabric = SimulatedFabric.of(HGX)
    modules = [gpu.module_id for gpu in HGX.gpus]
    assert modules != sorted(modules), "module ids follow no PCI order"
    seen = sight(await fabric.observe(1), HGX.gpus)
    assert seen.partitions == tuple(sorted(HGX.partitions, key=lambda p: p.id)) and seen.problems == ()


async def test_a_partition_is_what_a_claim_of_linked_gpus_gets_and_the_manager_can_activate() -> None:
    fabric = SimulatedFabric.of(HGX)
    claims = HostClaims.empty()
    wanted = []
    for count in (4, 2, 2):
        found = fit(HGX, claims, Request(gpus=(GpuRequest(count, link=GpuLink.NVLINK),)), owner=f"vm-{len(wanted)}")
        assert isinstance(found, Fit) and found.claim.partition is not None
        claims = claims.add(found.claim)
        wanted.append(found.claim.partition)
    kept = await keep(fabric, wanted, (), 1)
    assert kept.active == set(wanted) and kept.problems == {}
    refused = fit(HGX, claims, Request(gpus=(GpuRequest(2, link=GpuLink.NVLINK),)))
    assert isinstance(refused, Refusal), "all modules are in a partition that somebody has"


async def test_a_manager_of_another_version_is_believed_nothing() -> None:
    fabric = SimulatedFabric.of(HGX)
    fabric.version = "560.35.03"
    facts = await fabric.observe(1)
    seen = sight(facts, HGX.gpus)
    assert seen.partitions == ()
    assert seen.problems == (
        "FabricVersion: fabric manager 560.35.03 beside driver 570.86.15: install the same version of both",
    )
    kept = await keep(fabric, [1], (), 1)
    assert kept.active == frozenset() and "fabric manager 560.35.03" in kept.problems[1]
    with pytest.raises(FabricVersionMismatch):
        await fabric.activate(1, 1)


async def test_modules_that_nobody_tells_or_two_tell() -> None:
    facts = FabricFacts("1", "1", (PartitionState(0, (1, 2)), PartitionState(1, (2, 9)), PartitionState(2, ())))
    seen = sight(facts, HGX.gpus)
    assert [p.id for p in seen.partitions] == [0]
    assert seen.problems[0] == "FabricModule: partition 1: no GPU is told for modules [9]"
    twice = (HGX.gpus[0], replace(HGX.gpus[1], module_id=HGX.gpus[0].module_id))
    seen = sight(facts, twice)
    assert seen.partitions == () and "and GPU-hgx-h200-0-01" in seen.problems[0]


async def test_both_acts_have_one_effect_however_often_and_refuse_what_cannot_be() -> None:
    fabric = SimulatedFabric({0: (1, 2, 3, 4), 1: (1, 2), 2: (3, 4)})
    for _ in range(2):
        await fabric.activate(1, 1)
    assert fabric.calls == [("activate", 1)]
    with pytest.raises(FabricBusy, match="1 is active and has GPUs of it"):
        await fabric.activate(0, 1)
    for _ in range(2):
        await fabric.deactivate(1, 1)
    assert fabric.calls == [("activate", 1), ("deactivate", 1)]
    with pytest.raises(NotFound):
        await fabric.activate(7, 1)
    fabric.answers = False
    with pytest.raises(Unavailable):
        await keep(fabric, [1], (), 1)


def test_what_a_guest_may_still_use_is_left_and_keeps_others_waiting() -> None:
    facts = FabricFacts(
        "1", "1", (PartitionState(0, (1, 2, 3, 4)), PartitionState(1, (1, 2), True), PartitionState(2, (3, 4)))
    )
    todo = plan(facts, wanted=[0, 2, 8], held=[1])
    assert todo.end == () and todo.begin == (2,)
    assert todo.waits == {0: "partition 1 is active and has GPUs of it", 8: "the fabric manager has no partition 8"}
    assert plan(facts, wanted=[0]).end == (1,) and plan(facts, wanted=[0]).begin == (0,)
    assert not plan(facts, wanted=[1]), "as it should be"


@pytest.mark.parametrize("seed", range(200))
async def test_an_agent_killed_at_any_act_leaves_what_the_next_one_mends(seed: int) -> None:
    """Safety at every instant: no GPU in two active partitions. Liveness: the next round ends as an undisturbed one does."""
    draw = random.Random(seed)
    fabric = SimulatedFabric.of(HGX)
    for _ in range(6):
        wanted: list[int] = []
        for number in draw.sample(sorted(fabric.partitions), len(fabric.partitions)):
            taken = {m for w in wanted for m in fabric.partitions[w]}
            if not taken & set(fabric.partitions[number]) and draw.random() < 0.6:
                wanted.append(number)
        try:
            await keep(Mortal(fabric, draw.randint(1, 8)), wanted, (), 1)
        except Killed:
            pass
        modules = [m for n in fabric.active for m in fabric.partitions[n]]
        assert len(modules) == len(set(modules))
        kept = await keep(fabric, wanted, (), 1)
        assert kept.active == set(wanted) and kept.problems == {}


# --- an agent's own ---------------------------------------------------------------------------------------------------


async def until(rig: Rig, met: Callable[[], object]) -> None:
    """Wait in virtual time; fails with what the instances say."""
    for _ in range(1200):
        if met():
            return
        await asyncio.sleep(0.5)
    told = {name: (s.phase.value, s.reason, s.message) for name, s in rig.states().items()}
    raise AssertionError(f"in vain: {told}; active {rig.active()}; fabric {rig.host.fabric}")


def linked(number: int, count: int, claims: HostClaims) -> DesiredInstance:
    request = Request(CpuRequest(1), MemoryRequest(1024), 4096, gpus=(GpuRequest(count, link=GpuLink.NVLINK),))
    found = fit(HGX, claims, request, owner=uid(number), epoch=1, generation=1)
    assert isinstance(found, Fit) and found.claim.partition is not None
    return instance(number, claim=found.claim)


def test_an_agent_has_partitions_active_while_their_instances_are_wanted() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop, HGX)
        fabric = rig.host.fabric
        assert fabric is not None
        one = linked(1, 4, HostClaims.empty())
        two = linked(2, 4, HostClaims.empty().add(one.placement.claim))
        ids = [d.placement.claim.partition for d in (one, two)]
        fabric.active.add(0)  # all eight: left by whoever was here before
        await rig.start()
        await rig.want(one, two)
        await rig.settle()
        assert fabric.active == set(ids)
        assert fabric.calls[0] == ("deactivate", 0), "what is nobody's is ended first"
        await rig.kill()
        await rig.start()
        await rig.settle()
        assert len(fabric.calls) == 3, "an agent that is started anew changes nothing"
        rig.host.reboot()
        await rig.kill()
        assert fabric.active == set()
        await rig.start()
        await rig.settle()
        assert fabric.active == set(ids), "they are made again before their VMs are started"
        await rig.unwant(two.uid)
        await rig.settle()
        await until(rig, lambda: fabric.active == {ids[0]})
        await rig.kill()

    run_virtual(story)


@pytest.mark.parametrize("trouble", ["silent", "version"])
def test_without_its_links_an_instance_is_not_started_and_says_why(trouble: str) -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop, HGX)
        fabric = rig.host.fabric
        assert fabric is not None
        fabric.answers, fabric.version = trouble != "silent", "1" if trouble == "version" else fabric.driver
        await rig.start()
        await rig.want(linked(1, 2, HostClaims.empty()), instance(2))
        told = "does not answer" if trouble == "silent" else "fabric manager 1, driver 570.86.15"
        await until(rig, lambda: (state := rig.states().get(uid(1))) and told in state.message)
        assert rig.states()[uid(1)].reason == "FabricNotReady"
        await until(rig, lambda: uid(2) in rig.active())
        assert uid(1) not in rig.active(), "others go on"
        fabric.answers, fabric.version = True, fabric.driver
        await rig.settle()
        await rig.kill()

    run_virtual(story)
