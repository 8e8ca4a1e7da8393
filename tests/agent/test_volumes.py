"""Volumes on a simulated host: whatever dies and wherever, data is made once, kept, and deleted when somebody says so."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import pytest

from casemate_agent.drivers.simulated_volumes import SimulatedVolume
from casemate_agent.execute.executor import Step
from casemate_core.spec.instance import Phase, Run, VolumeRef
from support.agents import Rig, instance, pod, uid
from support.virtual import VirtualLoop, run_virtual

V = "00000000-0000-4000-9000-000000000001"
DATA = VolumeRef(V, "data", 1024)
MADE = replace(DATA, made=True)
GROWN = replace(MADE, size_mib=4096)

Stage = Callable[[Rig], Awaitable[None]]


async def _create(rig: Rig) -> None:
    await rig.want(instance(1, volumes=(DATA,)))


async def _told_it_is_made(rig: Rig) -> None:
    rig.host.volumes[V].written = "precious"
    await rig.want(instance(1, volumes=(MADE,)))


async def _grow(rig: Rig) -> None:
    await rig.want(instance(1, volumes=(GROWN,)))


async def _stop(rig: Rig) -> None:
    await rig.want(instance(1, volumes=(GROWN,), run=Run.STOPPED, disk=1))


async def _rebuild(rig: Rig) -> None:
    await rig.want(instance(1, volumes=(GROWN,), disk=1))


async def _end(rig: Rig) -> None:
    await rig.unwant(uid(1))


async def _again(rig: Rig) -> None:
    await rig.want(instance(2, volumes=(GROWN,)))


async def _end_again(rig: Rig) -> None:
    await rig.unwant(uid(2))


async def _delete(rig: Rig) -> None:
    await rig.delete_volume(V)


STAGES: tuple[Stage, ...] = (
    _create,
    _told_it_is_made,
    _grow,
    _stop,
    _rebuild,
    _end,
    _again,
    _end_again,
    _delete,
)


def _there(rig: Rig, stage: Stage) -> bool:
    """Whether a stage has come to its end: the host is as it was asked to be, and the volume too."""
    at = STAGES.index(stage)
    if not rig.settled():
        return False
    volume = rig.host.volumes.get(V)
    if stage is _delete:
        return volume is None
    return volume is not None and (at < STAGES.index(_grow) or volume.size_mib == GROWN.size_mib)


async def _reach(rig: Rig, stage: Stage) -> bool:
    """Wait for a stage's end; False where the agent died."""
    ends = rig.loop.time() + 600
    while not _there(rig, stage):
        if rig.dead:
            return False
        assert rig.loop.time() < ends, (stage.__name__, rig.states(), rig.host.volumes, rig.leaks())
        if rig.agent is not None and rig.agent.resync.is_set():
            await rig.sync()
        await asyncio.sleep(0.1)
    return True


def _check(rig: Rig, stage: Stage) -> None:
    assert rig.host.check() == [] and rig.broken == []
    if stage is not _create and stage is not _delete:
        assert rig.host.volumes[V].written == "precious"
    assert rig.host.volumes_made[V] == 1


async def _walk(rig: Rig, revive: Callable[[Rig], Awaitable[None]]) -> None:
    """All stages; an agent that dies in one is brought back, and goes on to the end of it."""
    for stage in STAGES:
        await stage(rig)
        while not await _reach(rig, stage):
            await rig.kill()
            await revive(rig)
        _check(rig, stage)


async def _restart(rig: Rig) -> None:
    await rig.start()


async def _reboot(rig: Rig) -> None:
    rig.host.reboot()
    rig.disk.power_cut()
    await rig.start()


async def _lose_the_ledger(rig: Rig) -> None:
    before = dict(rig.host.volumes)
    rig.disk.erase()
    rig.connected = False
    await rig.start()
    await asyncio.sleep(30)
    assert rig.host.volumes == before, "without a manager nothing of a volume is made or deleted"
    rig.connected = True
    await rig.sync()


def _steps() -> tuple[int, set[str]]:
    async def count(loop: VirtualLoop) -> tuple[int, set[str]]:
        rig, seen = Rig(loop), set[str]()

        def trace(step: Step) -> None:
            if step.action is not None:
                seen.add(type(step.action).__name__)

        rig.trace = trace
        await rig.start()
        await _walk(rig, _restart)
        steps = rig.steps
        await rig.kill()
        return steps, seen

    return run_virtual(count)


STEPS, ACTIONS = _steps()


def test_the_walk_has_every_step_of_a_volume() -> None:
    assert {"CreateVolume", "GrowVolume", "RemoveVolume", "Define", "Start", "RemoveDisks", "ForgetClaim"} <= ACTIONS
    assert STEPS > 60


@pytest.mark.parametrize(
    ("revive", "stride"),
    [(_restart, 4), (_reboot, 9), (_lose_the_ledger, 9)],
    ids=["killed", "rebooted", "ledger-lost"],
)
def test_an_agent_that_dies_at_any_step_loses_no_data_and_leaves_none(
    revive: Callable[[Rig], Awaitable[None]], stride: int
) -> None:
    async def story(step: int, loop: VirtualLoop) -> None:
        rig = Rig(loop)
        await rig.start()
        rig.kill_at = step
        await _walk(rig, revive)
        died = rig.deaths > 0 or rig.dead
        await rig.kill()
        assert died, f"step {step} was not reached"

    for step in range(1, STEPS + 1, stride):
        run_virtual(partial(story, step))


@pytest.mark.parametrize("steps", [13, 14, 15, 17])
def test_an_agent_that_dies_again_and_again_gets_there(steps: int) -> None:
    """Between them these walks die at nearly every step, many times each."""

    async def restart(rig: Rig) -> None:
        rig.kill_at = rig.steps + steps
        await rig.start()

    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        await restart(rig)
        await _walk(rig, restart)
        assert rig.deaths > STEPS // steps // 2
        await rig.kill()

    run_virtual(story)


def _on_a_rig(story: Callable[[Rig], Awaitable[None]]) -> None:
    async def run(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        await rig.start()
        await story(rig)
        assert rig.broken == []
        await rig.kill()

    run_virtual(run)


async def _until(rig: Rig, condition: Callable[[], bool]) -> None:
    ends = rig.loop.time() + 300
    while not condition():
        assert rig.loop.time() < ends, rig.states()
        await asyncio.sleep(0.1)


def _says(rig: Rig, number: int) -> tuple[str, str]:
    """Phase and reason of an instance; empty where the host has not spoken of it yet."""
    state = rig.states().get(uid(number))
    return (state.phase.value, state.reason) if state is not None else ("", "")


def test_data_that_was_there_and_is_not_is_never_made_anew() -> None:
    async def story(rig: Rig) -> None:
        await rig.want(instance(1, volumes=(MADE,)))
        await _until(rig, lambda: _says(rig, 1)[0] == Phase.FAILED)
        state = rig.states()[uid(1)]
        assert state.reason == "VolumeLost" and "data" in state.message and "not made anew" in state.message
        assert not rig.host.volumes and not rig.active()
        # somebody mounts the disk that it is on
        rig.host.volumes[V] = SimulatedVolume(DATA.size_mib, "precious")
        await _until(rig, rig.settled)

    _on_a_rig(story)


def test_volumes_that_nobody_names_are_left_as_they_are() -> None:
    async def story(rig: Rig) -> None:
        rig.host.volumes[V] = SimulatedVolume(16, "of somebody")
        await rig.want(instance(1))
        await rig.settle()
        await asyncio.sleep(120)
        assert rig.host.volumes[V].written == "of somebody"
        assert rig.agent is not None
        told = rig.agent.feed.report.volumes
        assert told is not None and [v.uid for v in told] == [V]

    _on_a_rig(story)


def test_a_store_of_volumes_that_hangs_holds_up_only_what_needs_one() -> None:
    async def story(rig: Rig) -> None:
        rig.host.faults.hung.add("volumes")
        await rig.want(instance(1), instance(2, volumes=(DATA,)))
        await _until(rig, lambda: _says(rig, 1)[0] == Phase.READY)
        await _until(rig, lambda: _says(rig, 2)[1] == "Waiting")
        assert "volumes" in rig.states()[uid(2)].message
        assert rig.agent is not None and rig.agent.feed.report.volumes is None, "unknown, and not none"
        rig.host.faults.hung.clear()
        await rig.settle()

    _on_a_rig(story)


def test_a_volume_that_another_domain_holds_is_waited_for() -> None:
    async def story(rig: Rig) -> None:
        await rig.want(instance(1, volumes=(DATA,)))
        await rig.settle()
        await rig.want(instance(2, volumes=(MADE,)))
        await _until(rig, lambda: _says(rig, 2)[1] == "VolumeInUse")
        assert "env-1-0" in rig.states()[uid(2)].message
        await rig.delete_volume(V)
        await asyncio.sleep(60)
        assert V in rig.host.volumes, "deleted by a manager that is wrong: what runs on it keeps it"
        rig.volumes_removed = ()
        await rig.unwant(uid(1))
        await rig.settle()

    _on_a_rig(story)


def test_a_change_of_volumes_waits_for_the_next_start_and_growth_does_not() -> None:
    async def story(rig: Rig) -> None:
        await rig.want(instance(1))
        await rig.settle()
        pid = rig.active()[uid(1)]
        await rig.want(instance(1, volumes=(DATA,), generation=2))
        await _until(rig, lambda: _says(rig, 1)[1] == "RestartPending")
        assert not rig.host.volumes
        await rig.want(instance(1, volumes=(DATA,), run=Run.STOPPED, generation=3))
        await rig.settle()
        await rig.want(instance(1, volumes=(DATA,), generation=4))
        await rig.settle()
        pid = rig.active()[uid(1)]
        await rig.want(instance(1, volumes=(GROWN,), generation=5))
        await _until(rig, lambda: rig.host.volumes[V].size_mib == GROWN.size_mib)
        await rig.settle()
        assert rig.active()[uid(1)] == pid and rig.states()[uid(1)].reason == ""

    _on_a_rig(story)


def test_a_volume_that_is_attached_for_reading_grows_at_the_next_start() -> None:
    async def story(rig: Rig) -> None:
        reading = replace(DATA, read_only=True)
        await rig.want(instance(1, volumes=(reading,)))
        await rig.settle()
        larger = replace(reading, size_mib=2048, made=True)
        await rig.want(instance(1, volumes=(larger,)))
        await asyncio.sleep(60)
        assert rig.host.volumes[V].size_mib == DATA.size_mib
        await rig.want(instance(1, volumes=(larger,), run=Run.STOPPED))
        await rig.settle()
        await rig.want(instance(1, volumes=(larger,)))
        await rig.settle()
        assert rig.host.volumes[V].size_mib == 2048

    _on_a_rig(story)


def test_what_cannot_be_deleted_is_tried_again_and_not_without_a_pause() -> None:
    async def story(rig: Rig) -> None:
        rig.host.volumes[V] = SimulatedVolume(16)
        rig.host.faults.failing["remove"] = 3
        await rig.want(instance(1, pods=(pod("hello"),)))
        await rig.settle()
        rounds = rig.agent.rounds  # type: ignore[union-attr]
        await rig.delete_volume(V)
        began = rig.loop.time()
        await _until(rig, lambda: V not in rig.host.volumes)
        assert rig.loop.time() - began > 10
        assert rig.agent is not None and rig.agent.rounds - rounds < 60

    _on_a_rig(story)
