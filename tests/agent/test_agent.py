"""An agent on a simulated host: the way of an instance, from wanted to gone, with everything that comes between."""

import asyncio
from dataclasses import replace

from casemate_core.spec.instance import Phase, Run
from casemate_wire.codec.views import boot_word
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


def test_firmware_and_kernel_are_told_apart_while_a_guest_boots() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        rig.host.pace = replace(rig.host.pace, boot_s=60.0)  # the kernel begins in the middle of it
        await rig.start()
        words: list[str] = []
        await rig.want(instance(1))
        while not words or words[-1] != "up":
            state = rig.states().get(uid(1))
            word = boot_word(state) if state is not None else "off"
            words += [word] if [word] != words[-1:] else []
            await asyncio.sleep(0.5)
        assert words == ["off", "firmware", "kernel", "pods", "up"]
        await rig.kill()
        # A new agent, which was not there, sees it too; and a new process begins with its firmware.
        await rig.start()
        await rig.settle()
        rig.host.crash_domain(uid(1))
        await asyncio.sleep(20)
        assert boot_word(rig.states()[uid(1)]) == "firmware"
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
