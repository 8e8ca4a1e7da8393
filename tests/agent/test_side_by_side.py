"""What an agent does side by side, and how soon: steps of one plan, and rounds one after the other."""

import asyncio
from dataclasses import replace

from casemate_agent import actions as act
from casemate_agent.agent import Pace
from casemate_agent.execute.executor import Point, Step
from casemate_core.spec.instance import Phase
from support.agents import NETWORK, Rig, instance, uid
from support.virtual import VirtualLoop, run_virtual

ONE = instance(1)
PLAN: tuple[act.Action, ...] = (
    act.FetchImage(ONE.image, ""),
    act.EnsureNetwork(NETWORK, ""),
    act.CreateOverlay(ONE, ""),
    act.WriteSeed(ONE, ""),
    act.Guard(ONE, ""),
    act.Define(ONE, ""),
    act.Guard(ONE, ""),
    act.Start(ONE.uid, ""),
)


def test_disk_and_seed_are_made_side_by_side_and_all_else_in_its_order() -> None:
    names = [[[act.name(action) for action in lane] for lane in stage] for stage in act.stages(PLAN)]
    assert names == [
        [["FetchImage"]],
        [["EnsureNetwork"]],
        [["CreateOverlay"], ["WriteSeed", "Guard"]],
        [["Define"]],
        [["Guard"]],
        [["Start"]],
    ]
    assert act.stages(()) == []


def test_what_is_side_by_side_overlaps_and_what_follows_waits_for_all_of_it() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        rig.host.pace = replace(rig.host.pace, call_s=1.0)
        seen: list[tuple[str, str, float]] = []

        def trace(step: Step) -> None:
            if step.action is not None and step.uid == uid(1):
                seen.append((step.point.value, act.name(step.action), loop.time()))

        rig.trace = trace
        await rig.start()
        await rig.want(instance(1))
        await rig.settle()
        at = {(point, name): at_s for point, name, at_s in seen}
        before, after = Point.BEFORE_ACTION.value, Point.AFTER_ACTION.value
        assert at[before, "CreateOverlay"] == at[before, "WriteSeed"]
        assert at[before, "Guard"] >= at[after, "WriteSeed"]
        assert at[before, "Define"] >= max(at[after, name] for name in ("CreateOverlay", "WriteSeed", "Guard"))
        assert at[before, "Start"] >= at[after, "Define"]
        await rig.kill()

    run_virtual(story)


def test_of_two_that_fail_side_by_side_the_first_is_what_is_backed_off_from() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        await rig.start()
        rig.host.faults.failing.update(create_overlay=4, write_seed=4)
        tries: list[str] = []

        def trace(step: Step) -> None:
            if step.point is Point.BEFORE_ACTION and step.action is not None:
                tries.append(act.name(step.action))

        rig.trace = trace
        await rig.want(instance(1))
        while tries.count("CreateOverlay") < 4:
            await asyncio.sleep(0.1)
            state = rig.states().get(uid(1))
        assert state is not None and state.message.startswith("CreateOverlay: "), state
        assert tries.count("WriteSeed") <= 4, "the other is held back with it"
        assert "Guard" not in tries and "Define" not in tries
        await rig.settle()
        assert rig.states()[uid(1)].phase is Phase.READY
        await rig.kill()

    run_virtual(story)


def test_what_is_asked_of_a_quiet_host_is_begun_at_once() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        rig.host.pace = replace(rig.host.pace, call_s=0.0)
        begun: list[float] = []
        rig.trace = lambda step: begun.append(loop.time()) if step.point is Point.BEFORE_INTENT else None
        await rig.start()
        await rig.want(instance(1))
        await rig.settle()
        await asyncio.sleep(1.0)
        # One after the other, as a job ends and the next wish comes: none of them waits for a rest.
        for number in (2, 3):
            begun.clear()
            asked = loop.time()
            await rig.want(instance(number))
            await asyncio.sleep(Pace().least_s / 2)
            assert begun and begun[0] == asked
        await rig.settle()
        await rig.kill()

    run_virtual(story)


def test_a_host_that_is_woken_without_end_is_looked_at_no_more_often_than_its_pace() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        rig.host.pace = replace(rig.host.pace, call_s=0.0)
        await rig.start()
        await asyncio.sleep(5.0)
        agent, pace = rig.agent, Pace()
        assert agent is not None
        rounds, began = agent.rounds, loop.time()
        while loop.time() - began < 10.0:
            agent.wake()
            await asyncio.sleep(0.001)
        assert 10.0 / pace.least_s - 1 <= agent.rounds - rounds <= 10.0 / pace.least_s + pace.burst + 1
        await rig.kill()

    run_virtual(story)
