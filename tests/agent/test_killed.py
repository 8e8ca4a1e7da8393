"""An agent that is killed at any step, with or without its host: one VM or none, nothing leaked, no other VM noticed."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from casemate_agent.drivers.simulated_disk import SimulatedDisk
from casemate_agent.execute.executor import Step
from casemate_core.spec.instance import Phase, Run
from support.agents import Killed, Rig, instance, uid
from support.virtual import VirtualLoop, run_virtual


async def _settled_or_dead(rig: Rig) -> None:
    while not rig.settled() and not rig.dead:
        await asyncio.sleep(0.2)


async def _story(rig: Rig) -> None:
    """Make a second instance, stop it, start it, and take it away; a kill breaks it off where it stands."""
    for wanted in (instance(2), instance(2, run=Run.STOPPED), instance(2), None):
        await (rig.want(wanted) if wanted is not None else rig.unwant(uid(2)))
        await _settled_or_dead(rig)
        if rig.dead:
            return


async def _prepared(loop: VirtualLoop) -> Rig:
    rig = Rig(loop)
    rig.host.add_foreign("neighbour")
    await rig.start()
    await rig.want(instance(1))
    await rig.settle()
    return rig


def _steps() -> int:
    async def count(loop: VirtualLoop) -> int:
        rig = await _prepared(loop)
        before = rig.steps
        await _story(rig)
        after = rig.steps
        await rig.kill()
        return after - before

    return run_virtual(count)


STEPS = _steps()


def test_the_story_has_every_step_of_making_and_ending() -> None:
    async def names(loop: VirtualLoop) -> set[str]:
        rig = await _prepared(loop)
        seen: set[str] = set()

        def trace(step: Step) -> None:
            if step.action is not None:
                seen.add(type(step.action).__name__)

        rig.trace = trace
        rig.host.images.clear()  # so that there is something to fetch
        rig.host.images["sha256:other"] = "x"
        await rig.kill()
        rig.host.reboot()
        await rig.start()
        await rig.settle()
        await _story(rig)
        await rig.kill()
        return seen

    assert run_virtual(names) == {
        "FetchImage",
        "EnsureNetwork",
        "CreateOverlay",
        "WriteSeed",
        "Guard",
        "Define",
        "Start",
        "AttachGuest",
        "ApplyPods",
        "Shutdown",
        "DetachGuest",
        "Undefine",
        "Unguard",
        "RemoveFiles",
        "ForgetClaim",
    }
    assert STEPS > 40


async def _check(rig: Rig, pid: int, foreign: set[str]) -> None:
    await rig.settle()
    assert rig.host.check() == []
    assert rig.active()[uid(1)] == pid, "a running VM was touched"
    assert {u for u, d in rig.host.domains.items() if not d.facts.owned} == foreign
    assert rig.disk.listing("instances") == sorted(f"{name}.json" for name in rig.wanted)


@pytest.mark.parametrize("manager_there", [True, False], ids=["manager-there", "manager-away"])
def test_killed_at_every_step_it_ends_where_it_should(manager_there: bool) -> None:
    async def story(step: int, loop: VirtualLoop) -> None:
        rig = await _prepared(loop)
        pid, foreign = rig.active()[uid(1)], {u for u, d in rig.host.domains.items() if not d.facts.owned}
        rig.kill_at = rig.steps + step
        await _story(rig)
        assert rig.dead, f"step {step} was not reached"
        await rig.kill()
        rig.connected = manager_there  # what was accepted is on the disk: the manager is not needed
        await rig.start()
        await _check(rig, pid, foreign)
        await rig.kill()

    for step in range(1, STEPS + 1, 1 if manager_there else 2):
        run_virtual(partial(story, step))


def test_rebooted_at_every_step_what_should_run_is_started() -> None:
    async def story(step: int, loop: VirtualLoop) -> None:
        rig = await _prepared(loop)
        rig.kill_at = rig.steps + step
        await _story(rig)
        await rig.kill()
        rig.host.reboot()
        rig.disk.power_cut()
        rig.connected = False
        await rig.start()
        await rig.settle()
        assert rig.host.check() == []
        assert rig.states()[uid(1)].phase is Phase.READY
        await rig.kill()

    for step in range(1, STEPS + 1, 3):
        run_virtual(partial(story, step))


def test_ledger_lost_at_every_step_is_rebuilt_from_the_domains() -> None:
    async def story(step: int, loop: VirtualLoop) -> None:
        rig = await _prepared(loop)
        pid, foreign = rig.active()[uid(1)], {u for u, d in rig.host.domains.items() if not d.facts.owned}
        rig.kill_at = rig.steps + step
        await _story(rig)
        await rig.kill()
        rig.disk.erase()
        rig.connected = False
        await rig.start()
        await asyncio.sleep(30)
        # without a manager nobody knows what else is wanted: what runs goes on, and nothing is cleaned away
        assert rig.active()[uid(1)] == pid
        assert rig.agent is not None
        assert not rig.agent.ledger.host.complete
        rig.connected = True
        await rig.sync()
        await _check(rig, pid, foreign)
        await rig.kill()

    for step in range(1, STEPS + 1, 2):
        run_virtual(partial(story, step))


class _MortalDisk(SimulatedDisk):
    """The process dies at one of the disk's operations."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def _operate(self, writes: bool = False) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed
        super()._operate(writes)


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power-cut"])
def test_dead_within_any_write_of_the_ledger_nothing_accepted_is_lost(power_cut: bool) -> None:
    async def until_dead(rig: Rig, work: Callable[[], Awaitable[None]]) -> bool:
        try:
            await work()
            return rig.dead
        except Killed:
            return True

    async def story(operation: int, loop: VirtualLoop) -> bool:
        rig = Rig(loop)
        rig.disk = disk = _MortalDisk(operation)
        accepted: list[str] = []

        async def work() -> None:
            await rig.start()
            for number in (1, 2):
                await rig.want(instance(number))
                accepted.append(uid(number))
                await _settled_or_dead(rig)
                if rig.dead:
                    return

        died = await until_dead(rig, work)
        await rig.kill()
        if power_cut:
            rig.host.reboot()
            disk.power_cut()
        disk.left = 0
        rig.connected = False
        await rig.start()
        assert rig.agent is not None
        # what the host says it has, it has: the manager will not tell it again
        told = {uid(number) for number in (1, 2) if rig.agent.ledger.host.revision >= number + 1}
        assert told <= set(rig.agent.ledger.book.instances)
        await asyncio.sleep(60)
        for name in accepted:
            assert rig.states()[name].phase is Phase.READY, f"{name} was accepted, and lost"
        rig.connected = True
        await rig.sync()
        await rig.settle()
        assert rig.host.check() == []
        await rig.kill()
        return died

    operation = 1
    while run_virtual(partial(story, operation)):
        operation += 2
    assert operation > 40
