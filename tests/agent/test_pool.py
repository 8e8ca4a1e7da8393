"""The pool of shared threads leaves what has an owner before it starts, and takes it back: at every step, with any death between."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pytest

from casemate_agent import actions as act
from casemate_agent.drivers.ports import DomainFacts, DomainPhase, MachineFacts, NetworkFacts, QemuThreads, StoredFiles
from casemate_agent.execute.executor import Point, Step
from casemate_agent.hardware.functions import FunctionFacts
from casemate_agent.ledger.records import Book, HostRecord, InstanceRecord, Observation, to_metadata
from casemate_agent.plan.drafting import Settings
from casemate_agent.plan.pool import Pool, moves, pool_of
from casemate_agent.plan.reconcile import plan
from casemate_core.claims import Claim, PlainMemory
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.spec.instance import DesiredInstance, Phase, Run
from casemate_core.topology_loaders import from_line
from support.agents import IMAGE, NETWORK, Rig, instance, uid
from support.virtual import VirtualLoop, run_virtual

NOW_S = 1_800_000_000.0
MACHINE = MachineFacts("box", "boot-1", "6.12", from_line("1s 8k/c 2t 64G disk=1T"))
WITH_HOUSEKEEPING = from_line("2s 4k/c 2t 64G disk=1T hk=1 name=box")


def owner(number: int, *threads: int, held: str = "", emulator: str = "") -> DesiredInstance:
    """An instance with threads of its own."""
    claim = Claim(
        owner=uid(number),
        vcpus=threads,
        vcpus_online=len(threads),
        vcpus_max=len(threads),
        held=CpuSet.parse(held),
        emulator=CpuSet.parse(emulator),
        memory=(PlainMemory(0, 1024, 0, 1024),),
        disk_mib=4096,
    )
    return instance(number, claim=claim, cpus=len(threads), cpu_policy="dedicated")


def record_of(desired: DesiredInstance, **changes: Any) -> InstanceRecord:
    held = InstanceRecord(desired, claim=desired.placement.claim, claim_epoch=1, claim_generation=1)
    return replace(held, **changes)


def book(*records: InstanceRecord) -> Book:
    return Book(HostRecord(1, 1, networks=(NETWORK,), complete=True), {r.uid: r for r in records})


def runs(desired: DesiredInstance, pid: int) -> DomainFacts:
    return DomainFacts(
        desired.uid, desired.name, DomainPhase.RUNNING, owned=True, pid=pid, record=to_metadata(desired), vcpus=1
    )


def seen(*domains: DomainFacts, **changes: Any) -> Observation:
    everyone = [uid(number) for number in range(10)]
    files = StoredFiles(
        images={IMAGE.file.digest: "/i"},
        overlays=dict.fromkeys(everyone, "/o"),
        seeds=dict.fromkeys(everyone, "/s"),
        free_mib=500_000,
        total_mib=1_000_000,
    )
    observation = Observation(
        time_s=NOW_S,
        machine=MACHINE,
        domains={d.uuid: d for d in domains},
        files=files,
        networks=NetworkFacts({"default": "cmbr0"}, {}),
        guarded=dict.fromkeys(everyone, ("cm1",)),
        functions=FunctionFacts(),
        virtualisation="kvm",
    )
    return replace(observation, **changes)


def threads_of(rig: Rig, number: int) -> QemuThreads:
    return rig.host.domains[uid(number)].threads


def test_the_sets_of_a_host_with_housekeeping_threads() -> None:
    reserved = CpuSet(WITH_HOUSEKEEPING.index.reserved)
    shared = instance(1).placement.claim
    pool = Pool(WITH_HOUSEKEEPING)
    cell = CpuSet(WITH_HOUSEKEEPING.index.cells[0].pool)
    assert reserved and pool.floating(shared) == cell == pool.rest(shared), (
        "the cell that it is charged to, without the host's own"
    )
    taken = Pool(WITH_HOUSEKEEPING, dict.fromkeys(cell, uid(9)), cell)
    assert taken.floating(shared) == CpuSet(WITH_HOUSEKEEPING.index.pool) - cell, "where its own cell is full, another"
    all_taken = CpuSet(WITH_HOUSEKEEPING.index.pool)
    assert Pool(WITH_HOUSEKEEPING, dict.fromkeys(all_taken, uid(9)), all_taken).floating(shared) == reserved
    mine = owner(2, 4, 5, emulator=str(reserved)).placement.claim
    assert pool.vcpus(mine) == (CpuSet.of(4), CpuSet.of(5)) and pool.rest(mine) == reserved


def test_a_definition_says_nothing_where_everybody_may_be_anywhere() -> None:
    plain = from_line("1s 2k/c 2t 8G name=plain")
    shared = instance(1).placement.claim
    assert Pool(plain).defined(shared) == EMPTY
    assert Pool(plain, {3: uid(2)}, CpuSet.of(3)).defined(shared) == CpuSet.parse("0-2")
    assert Pool(plain).defined(owner(2, 3).placement.claim) == CpuSet.parse("0-3"), (
        "of one that is pinned it is said always"
    )


def test_threads_are_in_use_from_the_wish_to_run_to_the_end() -> None:
    wanted = owner(1, 4, 5, held="6")
    held, up = record_of(wanted), runs(wanted, 77)

    def used(record: InstanceRecord, *domains: DomainFacts, **changes: Any) -> str:
        return str(pool_of(book(record), seen(*domains, **changes), {}).in_use)

    off = replace(wanted, run=Run.STOPPED)
    assert used(held) == "4-6", "it is to run"
    assert used(replace(held, desired=off)) == "", "it is off, and may be"
    assert used(replace(held, desired=off), up) == "4-6", "it runs still"
    assert used(replace(held, removed=True), up) == "4-6" and used(replace(held, removed=True)) == ""
    assert used(replace(held, desired=off), busy=frozenset({uid(1)})) == "4-6", "what is under way may be either"
    assert used(replace(held, desired=off), domains=None) == "4-6", "what is not seen may be either"


def test_a_start_waits_until_the_kernel_says_that_nobody_else_is_there() -> None:
    wanted = owner(1, 4, 5)
    other = instance(2)
    records = book(record_of(wanted), record_of(other))

    def decided(**changes: Any) -> tuple[list[str], str, list[str]]:
        found = plan(records, seen(runs(other, 9), **changes), Settings())
        mine = found.instances[uid(1)]
        return [act.name(a) for a in mine.actions][-1:], mine.state.message, sorted(found.pins)

    assert decided() == (["Define"], f"it is not known yet where {uid(2)} may run", [])
    everywhere = QemuThreads((CpuSet.parse("0-15"),), CpuSet.parse("0-15"))
    assert decided(affinities={9: everywhere}) == (["Define"], f"{uid(2)} may still run on 4-5", [uid(2)])
    off = CpuSet.parse("0-3,6-15")
    assert decided(affinities={9: QemuThreads((off,), off)}) == (["Start"], "", [])
    assert decided(affinities={9: QemuThreads((off,), off)}, unsure=frozenset({uid(3)})) == (
        ["Define"],
        f"{uid(3)} may be starting",
        [],
    )


def test_what_the_kernel_keeps_narrower_is_asked_for_once() -> None:
    other = instance(2)
    confined = {9: QemuThreads((CpuSet.of(0, 1),), CpuSet.of(0, 1))}
    observed = seen(runs(other, 9), affinities=confined)
    pool = pool_of(book(record_of(other)), observed, {})
    pin = moves(pool, observed, Settings()).pins[uid(2)]
    again = replace(observed, pinned={9: (pin.vcpus, pin.rest)})
    assert moves(pool, again, Settings()).pins == {} and moves(pool, again, Settings()).drift == ()


def test_held_by_policy_what_was_moved_is_told_and_left() -> None:
    wanted = owner(1, 4, 5)
    everywhere = CpuSet.parse("0-15")
    observed = seen(runs(wanted, 77), affinities={77: QemuThreads((CpuSet.of(4), everywhere), everywhere)})
    pool = pool_of(book(record_of(wanted)), observed, {})
    repaired, left = (moves(pool, observed, Settings(repair_affinities=repair)) for repair in (True, False))
    assert repaired.drift == left.drift == (f"AffinityChanged: vCPU 1 may run on 0-15, should be on 5 ({uid(1)})",)
    assert list(repaired.pins) == [uid(1)] and left.pins == {}


def test_the_pool_leaves_before_a_start_and_comes_back_after_the_end() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        seen_at_start: list[CpuSet] = []

        def trace(step: Step) -> None:
            if isinstance(step.action, act.Start) and step.uid == uid(9) and step.point is Point.BEFORE_ACTION:
                seen_at_start.extend(threads_of(rig, number).all for number in (1, 2))

        rig.trace = trace
        await rig.start()
        await rig.want(instance(1), instance(2))
        await rig.settle()
        pids = rig.active()
        everywhere = threads_of(rig, 1)
        assert everywhere.all == CpuSet.parse("0-15")
        await rig.want(owner(9, 4, 5, held="12-13"))
        await rig.settle()
        assert seen_at_start == [CpuSet.parse("0-3,6-11,14-15")] * 2
        assert threads_of(rig, 9).vcpus == (CpuSet.of(4), CpuSet.of(5))
        await rig.want(instance(3))  # and whoever comes meanwhile floats beside it from the beginning
        await rig.settle()
        assert threads_of(rig, 3).all == CpuSet.parse("0-3,6-11,14-15")
        await rig.want(replace(owner(9, 4, 5, held="12-13"), run=Run.STOPPED))
        await rig.settle()
        await asyncio.sleep(1)
        assert [threads_of(rig, number) for number in (1, 2, 3)] == [everywhere] * 3
        assert {name: pid for name, pid in rig.active().items() if name in pids} == pids, "nobody was restarted for it"
        assert rig.broken == []
        await rig.kill()

    run_virtual(story)


def _asked_at(at: str) -> Callable[[Step], bool]:
    return lambda step: (
        step.uid == uid(1) and step.action is not None and f"{act.name(step.action)}/{step.point.value}" == at
    )


@pytest.mark.parametrize("point", ["before-action", "after-action"])
@pytest.mark.parametrize("action", ["FetchImage", "CreateOverlay", "Define", "Start"])
def test_one_that_is_starting_meanwhile_never_runs_on_them(action: str, point: str) -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        when, asked = _asked_at(f"{action}/{point}"), asyncio.Event()
        rig.trace = lambda step: asked.set() if when(step) else None
        await rig.start()
        await rig.want(instance(1))
        await asked.wait()
        await rig.want(owner(9, 4, 5))
        await rig.settle()
        assert rig.broken == [] and not threads_of(rig, 1).all & CpuSet.of(4, 5)
        await rig.kill()

    run_virtual(story)


async def _story(rig: Rig) -> None:
    for wanted in (owner(9, 4, 5), replace(owner(9, 4, 5), run=Run.STOPPED), owner(8, 6, 7), None):
        await (rig.want(wanted) if wanted is not None else rig.unwant(uid(8), uid(9)))
        for _ in range(1500):  # five minutes
            if rig.settled() or rig.dead:
                break
            await asyncio.sleep(0.2)
        if rig.dead:
            return
        assert rig.settled(), rig.states()


async def _prepared(loop: VirtualLoop) -> Rig:
    rig = Rig(loop)
    await rig.start()
    await rig.want(instance(1), instance(2))
    await rig.settle()
    return rig


def _steps() -> int:
    async def count(loop: VirtualLoop) -> int:
        rig = await _prepared(loop)
        before = rig.steps
        await _story(rig)
        taken = rig.steps - before
        await rig.kill()
        return taken

    return run_virtual(count)


def test_killed_at_every_step_nobody_runs_on_threads_of_another() -> None:
    steps = _steps()
    assert steps > 40

    async def story(step: int, loop: VirtualLoop) -> None:
        rig = await _prepared(loop)
        pids = rig.active()
        rig.kill_at = rig.steps + step
        await _story(rig)
        assert rig.dead, f"step {step} was not reached"
        await rig.kill()
        assert rig.host.check() == [], "killed there it leaves a safe state"
        rig.connected = step % 2 == 1
        await rig.start()
        await rig.settle()
        await asyncio.sleep(1)
        rig.broken += rig.host.check()
        assert rig.broken == []
        assert {name: pid for name, pid in rig.active().items() if name in pids} == pids
        await rig.kill()

    for step in range(1, steps + 1, 3):
        run_virtual(partial(story, step))


@pytest.mark.parametrize("seed", range(12))
def test_whoever_comes_and_goes_no_two_run_on_a_thread_of_one(seed: int) -> None:
    """Owners and floating VMs are made, stopped and ended at random, threads are moved by hand, and the agent dies."""

    async def story(loop: VirtualLoop) -> None:
        random = Random(seed)
        rig = Rig(loop)
        await rig.start()
        for _ in range(25):
            number = random.randrange(1, 7)
            # each owner has two threads of its own, whatever else there is
            wanted = owner(number, 2 * number, 2 * number + 1) if number % 2 else instance(number)
            match random.randrange(6):
                case 0 if uid(number) in rig.wanted:
                    await rig.unwant(uid(number))
                case 1:
                    await rig.want(replace(wanted, run=Run.STOPPED))
                case 2:
                    await rig.kill()
                    await rig.start()
                case _:
                    await rig.want(wanted)
            await asyncio.sleep(random.random() * 3)
        await rig.settle()
        await asyncio.sleep(5)
        assert rig.broken == [] and rig.host.check() == []
        pool = CpuSet.parse("0-15")
        for name in rig.active():
            pool -= rig.wanted[name].placement.claim.owned
        floating = [
            d.threads.all for name, d in rig.host.domains.items() if name in rig.active() and not d.facts.vcpu_pins
        ]
        assert all(threads == pool for threads in floating), "all of what is left is theirs"
        await rig.kill()

    run_virtual(story)


def test_a_pool_that_cannot_leave_holds_the_start_and_says_so() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        await rig.start()
        await rig.want(instance(1))
        await rig.settle()
        rig.host.faults.failing["pin"] = 3
        await rig.want(owner(9, 4, 5))
        await asyncio.sleep(4)
        state = rig.states()[uid(9)]
        assert (state.phase, state.reason) == (Phase.PREPARING, "ThreadsInUse")
        assert state.message == f"{uid(1)} may still run on 4-5"
        assert uid(9) not in rig.active()
        assert rig.host.faults.failing["pin"] == 2, "it is tried again after a while, not at once"
        await rig.settle()
        assert rig.broken == []
        await rig.kill()

    run_virtual(story)
