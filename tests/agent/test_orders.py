"""What is done once to an instance: restart, reboot, reset, rebuild, stop; and an agent that is killed at any step of it."""

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from casemate_agent.execute.executor import MEASURE, Step
from casemate_core.claims import SharedCpu
from casemate_core.spec.instance import InstanceState, Phase, Run
from casemate_core.spec.operation import ENDED, Order, OrderPhase, OrderState, Verb
from support.agents import Rig, instance, uid
from support.virtual import VirtualLoop, run_virtual

ME = uid(1)
ORDER = "00000000-0000-4000-9000-00000000000{}"


def order(verb: Verb, number: int = 1, deadline_s: float = 1e12, **more: Any) -> Order:
    return Order(ORDER.format(number), verb, deadline_s, **more)


async def prepared(loop: VirtualLoop) -> Rig:
    rig = Rig(loop)
    await rig.start()
    await rig.want(instance(1), instance(2))
    await rig.settle()
    return rig


async def ask(rig: Rig, what: Order, **changes: Any) -> None:
    """The manager orders it; ``changes`` are to the instance."""
    await rig.want(replace(rig.wanted[ME], order=what, **changes))


def told(rig: Rig) -> OrderState | None:
    state = rig.states().get(ME)
    return state.order if state is not None else None


async def ended(rig: Rig, within_s: float = 300.0) -> OrderState:
    """Wait for the order's end; a kill ends the wait too."""
    end = rig.loop.time() + within_s
    while not ((state := told(rig)) is not None and state.phase in ENDED):
        assert not rig.dead
        assert rig.loop.time() < end, (rig.states(), rig.active())
        await asyncio.sleep(0.1)
    return state


def boot(rig: Rig) -> str:
    guest = rig.host.domains[ME].guest
    return guest.boot_id if guest is not None else ""


async def state(rig: Rig) -> InstanceState:
    await rig.settle()
    return rig.states()[ME]


CHANGES = {
    # verb: (another process, another boot of the guest, another disk)
    Verb.RESTART: (True, True, False),
    Verb.REBOOT: (False, True, False),
    Verb.RESET: (False, True, False),
    Verb.REBUILD: (True, True, True),
}


@pytest.mark.parametrize("verb", CHANGES)
def test_each_verb_changes_what_it_should_and_nothing_else(verb: Verb) -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await prepared(loop)
        pid, guest, disks = rig.active()[ME], boot(rig), rig.host.disks[ME].copy()
        other = rig.active()[uid(2)]
        changes = {"disk": 1} if verb is Verb.REBUILD else {}
        await ask(rig, order(verb), **changes)
        done = await ended(rig)
        assert (done.phase, done.reason) == (OrderPhase.DONE, ""), done
        assert 0 < done.started_s <= done.finished_s
        await rig.settle()
        seen = (rig.active()[ME] != pid, boot(rig) != guest, rig.host.disks[ME] != disks)
        assert seen == CHANGES[verb]
        assert len(rig.host.disks[ME]) == 1, "the disk that was replaced is still there"
        assert rig.active()[uid(2)] == other
        await rig.want(replace(rig.wanted[ME], order=None))
        await asyncio.sleep(1)
        await rig.settle()
        assert told(rig) is None
        assert rig.broken == []
        await rig.kill()

    run_virtual(story)


def test_a_stop_takes_the_grace_that_it_is_given() -> None:
    async def story(loop: VirtualLoop) -> None:
        for grace_s, least, most in ((0.0, 0, 2), (3.0, 3, 6), (None, 10, 14)):
            rig = await prepared(loop)
            rig.host.faults.stubborn.add(ME)
            began = loop.time()
            await ask(rig, order(Verb.STOP, grace_s=grace_s), run=Run.STOPPED)
            done = await ended(rig)
            assert done.phase is OrderPhase.DONE
            assert least <= loop.time() - began <= most
            await rig.kill()

    run_virtual(story)


def test_a_grace_of_the_environment_is_kept() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await prepared(loop)
        rig.host.faults.stubborn.add(ME)
        began = loop.time()
        await rig.want(instance(1, run=Run.STOPPED, stop_grace_s=25.0))
        await rig.settle()
        assert 25 <= loop.time() - began <= 28
        await rig.kill()

    run_virtual(story)


def test_what_cannot_be_done_is_refused_in_words() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await prepared(loop)
        cases = [
            (order(Verb.STOP, 1), {}, "ShouldRun"),
            (order(Verb.RESTART, 2, deadline_s=1.0), {}, "TooLate"),
            (order(Verb.REBOOT, 3), {"run": Run.STOPPED}, "NotStarted"),
        ]
        for what, changes, reason in cases:
            await ask(rig, what, **changes)
            end = loop.time() + 60
            while (s := told(rig)) is None or s.uid != what.uid or s.phase not in ENDED:
                assert loop.time() < end
                await asyncio.sleep(0.1)
            assert (s.phase, s.reason) == (OrderPhase.FAILED, reason)
        await rig.kill()

    run_virtual(story)


def test_a_guest_that_does_not_reboot_is_told_at_the_deadline() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await prepared(loop)
        rig.host.faults.stubborn.add(ME)
        await ask(rig, order(Verb.REBOOT, deadline_s=loop.wall() + 30))
        done = await ended(rig)
        assert (done.phase, done.reason) == (OrderPhase.FAILED, "NotBooted")
        await rig.kill()

    run_virtual(story)


def test_an_order_that_has_come_true_before_does_nothing() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await prepared(loop)
        pid, guest = rig.active()[ME], boot(rig)
        for number, what in enumerate(
            (
                order(Verb.RESTART, 1, pid=pid + 1000),
                order(Verb.REBOOT, 2, guest_boot_id="an earlier one"),
                order(Verb.RESET, 3, guest_boot_id="an earlier one"),
            )
        ):
            await ask(rig, what)
            await asyncio.sleep(5)
            done = told(rig)
            assert done is not None, number
            assert (done.uid, done.phase, done.reason) == (what.uid, OrderPhase.DONE, "Already")
        assert (rig.active()[ME], boot(rig)) == (pid, guest)
        await rig.kill()

    run_virtual(story)


def test_an_order_that_was_begun_and_forgotten_is_unknown_and_not_repeated() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await prepared(loop)
        pid = rig.active()[ME]
        await rig.kill()
        rig.disk.erase()
        rig.wanted[ME] = replace(rig.wanted[ME], order=order(Verb.RESTART, begun=True))
        rig.revision += 1
        await rig.start()
        done = await ended(rig)
        assert (done.phase, done.reason) == (OrderPhase.UNKNOWN, "RecordLost")
        assert rig.active()[ME] == pid
        await rig.kill()

    run_virtual(story)


def _asked(verb: Verb) -> dict[str, Any]:
    return {"disk": 1} if verb is Verb.REBUILD else {}


async def _story(rig: Rig, verb: Verb) -> None:
    # as a manager gives it: with the process and the boot that it knows
    await ask(rig, order(verb, pid=rig.active()[ME], guest_boot_id=boot(rig)), **_asked(verb))
    while not rig.dead and not ((s := told(rig)) is not None and s.phase in ENDED and rig.settled()):
        await asyncio.sleep(0.2)


def _steps(verb: Verb) -> int:
    async def count(loop: VirtualLoop) -> int:
        rig = await prepared(loop)
        before = rig.steps
        await _story(rig, verb)
        after = rig.steps
        await rig.kill()
        return after - before

    return run_virtual(count)


@pytest.mark.parametrize("lost", ["kept", "ledger-lost"])
@pytest.mark.parametrize("verb", CHANGES)
def test_killed_at_every_step_it_is_done_once(verb: Verb, lost: str) -> None:
    """After the death the order is done, or told as not known; never done twice, and the other VM notices nothing."""
    steps = _steps(verb)
    assert steps >= 4

    async def story(step: int, loop: VirtualLoop) -> OrderPhase:
        rig = await prepared(loop)
        other, acts = rig.active()[uid(2)], [0]

        def trace(step: Step) -> None:
            acts[0] += step.outcome is not None and type(step.action).__name__ in ("Start", "Reboot", "Reset")

        rig.trace = trace
        boots = rig.host._guest_boots
        rig.kill_at = rig.steps + step
        await _story(rig, verb)
        assert rig.dead, f"step {step} was not reached"
        heard = told(rig) is not None
        await rig.kill()
        if lost == "ledger-lost":
            rig.disk.erase()
        await rig.start()
        if lost == "ledger-lost":
            # The manager has heard that it began; where processes tell it apart, it may as well not have.
            begun = heard and (step % 2 == 0 or not CHANGES[verb][0])
            rig.wanted[ME] = replace(rig.wanted[ME], order=replace(rig.wanted[ME].order or order(verb), begun=begun))
        # a deadline, so that what cannot be told ends
        rig.wanted[ME] = replace(
            rig.wanted[ME], order=replace(rig.wanted[ME].order or order(verb), deadline_s=loop.wall() + 60)
        )
        rig.revision += 1
        await rig.sync()
        done = await ended(rig)
        await rig.settle()
        assert rig.host._guest_boots - boots <= 1, f"step {step}: {done}: the guest booted twice"
        if done.phase is OrderPhase.DONE:
            assert rig.host._guest_boots - boots == 1, f"step {step}: {done}: and the guest did not boot"
        if done.phase is OrderPhase.FAILED:
            assert rig.host._guest_boots - boots == 0, f"step {step}: {done}: and yet the guest booted"
        assert rig.active()[uid(2)] == other
        assert rig.broken == []
        assert rig.host.check() == []
        await rig.kill()
        return done.phase

    ends = [run_virtual(partial(story, step)) for step in range(1, steps + 1)]
    if lost == "ledger-lost":
        assert set(ends) <= {OrderPhase.DONE, OrderPhase.UNKNOWN}
    else:
        assert OrderPhase.DONE in ends
    if lost == "kept" and CHANGES[verb][0]:
        assert set(ends) == {OrderPhase.DONE}


def test_frozen_and_let_go_on_in_the_same_process() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await prepared(loop)
        pid, guest = rig.active()[ME], boot(rig)
        await rig.want(instance(1, run=Run.PAUSED))
        await asyncio.sleep(5)
        assert rig.states()[ME].phase is Phase.PAUSED
        assert rig.active()[ME] == pid
        await rig.kill()
        await rig.start()  # a new agent knows why it stands still
        await asyncio.sleep(5)
        assert rig.states()[ME].phase is Phase.PAUSED
        await rig.want(instance(1))
        await rig.settle()
        assert (rig.active()[ME], boot(rig)) == (pid, guest)
        await rig.want(instance(1, run=Run.PAUSED))
        await asyncio.sleep(5)
        await rig.want(instance(1, run=Run.STOPPED))
        began = loop.time()
        await rig.settle()
        assert loop.time() - began < 9, "a frozen guest was not asked to power off"
        await rig.want(instance(1, run=Run.PAUSED))
        await asyncio.sleep(5)
        assert rig.states()[ME].phase is Phase.STOPPED
        await rig.kill()

    run_virtual(story)


@pytest.mark.parametrize(
    ("changes", "starts", "reason"),
    [({"on_crash": "leave"}, 1, "Left"), ({"crash_limit": 3}, 3, "GivenUp")],
    ids=["leave", "give-up"],
)
def test_a_vm_that_ends_by_itself_is_left_or_given_up(changes: dict[str, Any], starts: int, reason: str) -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        await rig.start()
        await rig.want(instance(1, **changes))
        await rig.settle()
        for _ in range(starts):
            while ME not in rig.active():
                await asyncio.sleep(0.1)
            rig.host.crash_domain(ME)
            await asyncio.sleep(0.5)
        await asyncio.sleep(100)
        state = rig.states()[ME]
        assert (state.phase, state.reason, state.starts) == (Phase.FAILED, reason, starts)
        # Nor does a change start it that nothing of the VM is made from: its environment's lifetime, say.
        await rig.want(instance(1, generation=2, **changes))
        await asyncio.sleep(100)
        state = rig.states()[ME]
        assert (state.generation, state.phase, state.reason, state.starts) == (2, Phase.FAILED, reason, starts)
        await ask(rig, order(Verb.RESTART))
        assert (await ended(rig)).phase is OrderPhase.DONE
        await rig.settle()
        await rig.kill()

    run_virtual(story)


async def _certified(rig: Rig, number: int = 1, **more: Any) -> OrderState:
    await ask(rig, order(Verb.CERTIFY, number, duration_s=20.0, **more))
    return await ended(rig)


def test_a_latency_is_measured_and_kept_with_what_it_was_measured_under() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await prepared(loop)
        pid = rig.active()[ME]
        began = loop.time()
        done = await _certified(rig)
        assert (done.phase, done.reason) == (OrderPhase.DONE, "") and done.certificate is not None, done
        assert loop.time() - began >= 20 and rig.active()[ME] == pid
        found = done.certificate
        assert (found.samples, found.duration_s, found.guest_kernel) == (100, 20.0, "simulated")
        assert "simulated" in found.meaningless and "MEANINGLESS" in done.message, (
            "nothing was measured, and it says so"
        )
        assert rig.states()[ME].certificate == found
        await rig.kill()
        await rig.start()
        await rig.settle()
        assert rig.states()[ME].certificate == found, "it is kept over the agent's death"
        # another placement: what was measured was measured elsewhere
        moved = replace(rig.wanted[ME], order=None, placement=replace(rig.wanted[ME].placement, generation=9))
        await rig.want(moved)
        await asyncio.sleep(2)
        kept = rig.states()[ME].certificate
        assert kept is not None and kept.void == "the instance has another placement since"
        await rig.kill()

    run_virtual(story)


def test_a_guest_without_the_program_is_a_refusal_that_names_the_remedy() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await prepared(loop)
        rig.host.guest_programs.discard("cyclictest")
        done = await _certified(rig)
        assert (done.phase, done.reason) == (OrderPhase.FAILED, "ToolMissing")
        assert "rt-tests" in done.message and "docs/realtime.md" in done.message
        assert rig.states()[ME].certificate is None
        await rig.kill()

    run_virtual(story)


def test_a_measurement_is_given_up_when_the_instance_is_to_stop() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await prepared(loop)
        await ask(rig, order(Verb.CERTIFY, duration_s=600.0))
        await asyncio.sleep(5)
        assert told(rig) is not None and told(rig).phase is OrderPhase.RUNNING  # type: ignore[union-attr]
        began = loop.time()
        await rig.want(replace(rig.wanted[ME], run=Run.STOPPED))
        done = await ended(rig)
        assert (done.phase, done.reason) == (OrderPhase.FAILED, "Overruled")
        await rig.settle()
        assert loop.time() - began < 60, "it does not wait for the end of the measurement"
        assert rig.agent is not None and rig.agent._executor.beside(MEASURE) == frozenset()
        await rig.kill()

    run_virtual(story)


def test_an_agent_that_dies_in_a_measurement_begins_it_anew() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await prepared(loop)
        await ask(rig, order(Verb.CERTIFY, duration_s=20.0))
        await asyncio.sleep(10)
        await rig.kill()
        await rig.start()
        done = await ended(rig)
        assert done.phase is OrderPhase.DONE and done.certificate is not None
        assert done.certificate.order == done.uid
        await rig.kill()

    run_virtual(story)


def test_measurements_keep_nobody_from_his_turn() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        await rig.start()
        claims = [replace(instance(n).placement.claim, shared=(SharedCpu(0, 100),)) for n in range(1, 19)]
        many = [instance(n, claim=claim) for n, claim in enumerate(claims, start=1)]
        await rig.want(*many)
        await rig.settle()
        await rig.want(*(replace(d, order=order(Verb.CERTIFY, n % 10, duration_s=600.0)) for n, d in enumerate(many)))
        await asyncio.sleep(5)
        assert rig.agent is not None and len(rig.agent._executor.beside(MEASURE)) == 18
        await rig.want(instance(30, claim=replace(instance(30).placement.claim, shared=(SharedCpu(0, 100),))))
        await rig.settle(within_s=60)
        assert len(rig.agent._executor.beside(MEASURE)) == 18, "it came up beside them"
        await rig.kill()

    run_virtual(story)
