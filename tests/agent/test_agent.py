"""An agent on a simulated host: the way of an instance, from wanted to gone, with everything that comes between."""

import asyncio

from casemate_core.spec.instance import Phase, Run
from support.agents import Rig, instance, uid
from support.virtual import VirtualLoop, run_virtual


def test_a_wanted_instance_is_made_and_becomes_ready() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        await rig.start()
        await rig.want(instance(1))
        await rig.settle()
        state = rig.states()[uid(1)]
        assert state.phase is Phase.READY
        assert state.pods[0].containers[0].state == "running"
        assert state.starts == 1
        assert state.pid == rig.active()[uid(1)]
        assert rig.host.check() == []
        await rig.kill()

    run_virtual(story)


def test_what_is_no_longer_wanted_is_ended_without_a_trace() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        foreign = rig.host.add_foreign("neighbour")
        await rig.start()
        await rig.want(instance(1), instance(2))
        await rig.settle()
        await rig.unwant(uid(1))
        await rig.settle()
        assert set(rig.host.domains) == {uid(2), foreign}
        assert rig.agent is not None
        assert uid(1) in rig.agent.feed.gone
        assert rig.disk.listing("instances") == [f"{uid(2)}.json"]
        await rig.kill()

    run_virtual(story)


def test_a_stubborn_guest_is_ended_after_its_grace() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        await rig.start()
        await rig.want(instance(1))
        await rig.settle()
        rig.host.faults.stubborn.add(uid(1))
        began = loop.time()
        await rig.want(instance(1, run=Run.STOPPED))
        await asyncio.sleep(5)
        assert rig.states()[uid(1)].phase is Phase.STOPPING
        await rig.settle()
        assert 10 <= loop.time() - began < 15
        assert uid(1) in rig.host.overlays
        await rig.kill()

    run_virtual(story)
