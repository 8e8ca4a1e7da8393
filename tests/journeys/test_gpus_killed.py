"""An agent killed at any moment of a GPU's way between tenants, its host rebooted, its hypervisor hanging: 1,000 kills.

Never: a GPU with two domains, a domain with a GPU that another tenant had and that was not reset and overwritten since. In the
end: what is wanted runs with its GPUs, and all others are clean and known to be.
"""

import asyncio
from dataclasses import replace
from functools import partial
from random import Random

import pytest

from casemate_agent.execute.executor import Point, Step
from casemate_core.gpu import GpuOrder, GpuVerb
from casemate_core.spec.instance import Run
from casemate_wire.stream import Desired
from support.agents import Rig, uid
from support.gpus import GPU_SETTINGS, GPUS, HOST, gpu_states, told_of, with_gpus
from support.virtual import VirtualLoop, run_virtual

KILLS = 1000
CLEAN = {"Free", "HostOwned"}


class Watched(Rig):
    """A rig that holds each start against what is left on the boards."""

    dirty_given: list[str]

    def _step(self, step: Step) -> None:
        for name, domain in self.host.domains.items():
            for gpu in domain.gpus if name in self.active() else ():
                if self.host.board(gpu).memory - {name}:
                    self.dirty_given.append(f"{name} has GPU {gpu} with {self.host.board(gpu).memory}")
        super()._step(step)


def rig_of(loop: VirtualLoop) -> Watched:
    rig = Watched(loop, HOST, settings=GPU_SETTINGS)
    rig.dirty_given = []
    return rig


async def quiet(rig: Rig, within_s: float = 900.0) -> None:
    """Until what is wanted runs and every GPU is where it should be."""
    await rig.settle(within_s)
    taken = {gpu for d in rig.wanted.values() for gpu in d.placement.claim.gpus}
    end = rig.loop.time() + within_s
    while True:
        states = gpu_states(rig)
        if set(states) == set(GPUS) and all(states[gpu] in CLEAN for gpu in set(GPUS) - taken):
            return
        assert rig.loop.time() < end, states
        await asyncio.sleep(0.2)


async def story(seed: int, loop: VirtualLoop) -> int:
    """Deaths of the agent before the end."""
    random = Random(seed)
    rig = rig_of(loop)
    await rig.start()
    generation, live = 1, [1, 2]
    for _ in range(random.randrange(2, 5)):
        generation += 1
        for slot in (0, 1):
            old = rig.wanted.get(uid(live[slot]))
            if random.random() < 0.35:
                await rig.unwant(uid(live[slot]))
            elif old is None:
                # The manager gives at once what a former owner has let go of by its books, clean or not.
                taken = {gpu for d in rig.wanted.values() for gpu in d.placement.claim.gpus}
                free = [gpu for gpu in GPUS if gpu not in taken]
                random.shuffle(free)
                live[slot] += 2
                await rig.want(with_gpus(live[slot], *sorted(free[: random.randrange(1, 3)]), generation=generation))
            elif random.random() < 0.5:
                await rig.want(replace(old, run=random.choice((Run.STARTED, Run.STOPPED))))
        await asyncio.sleep(random.choice((0.0, 0.01, 0.05, 0.3, 1.0, 5.0, 20.0)) * random.random())
        fault = random.random()
        if fault < 0.75:
            await rig.kill()
            if fault < 0.2:
                rig.host.reboot()
                rig.disk.power_cut()
            await rig.start()
        elif fault < 0.85:
            rig.host.faults.hung.add(random.choice(("hypervisor", "cards")))
            await asyncio.sleep(random.random() * 15)
            rig.host.faults.hung.clear()
    # whatever a hang has led into quarantine an operator lets out
    rig.revision += 1
    orders = tuple(GpuOrder(gpu, f"order-{gpu}", GpuVerb.RELEASE) for gpu in GPUS)
    assert rig.agent is not None
    await rig.sync()
    await rig.agent.accept(Desired(rig.epoch, rig.revision, gpu_orders=orders))
    await quiet(rig)
    assert rig.broken == [] and rig.host.check() == [] and rig.dirty_given == [], (
        seed,
        rig.broken[:3],
        rig.dirty_given[:3],
    )
    taken = {gpu for d in rig.wanted.values() for gpu in d.placement.claim.gpus}
    for gpu in set(GPUS) - taken:
        assert not rig.host.board(gpu).memory and not rig.host.board(gpu).registers, (seed, "left something")
        assert told_of(rig, gpu).passport.clean
    deaths = rig.deaths
    await rig.kill()
    return deaths


@pytest.mark.timeout(600)
def test_a_thousand_kills() -> None:
    kills = seed = 0
    while kills < KILLS:
        kills += run_virtual(partial(story, seed))
        seed += 1
        assert seed < KILLS, "nobody is killed any more"


async def hand_over(rig: Rig) -> None:
    """One tenant after the other with the same GPU."""
    await rig.want(with_gpus(1, GPUS[0]))
    await rig.settle()
    await rig.unwant(uid(1))
    await rig.want(with_gpus(2, GPUS[0], generation=2))


async def killed_at(point: Point, action: str, number: int, loop: VirtualLoop) -> bool:
    """The story with a death at the number-th passage of a point; whether it was passed so often."""
    rig = rig_of(loop)
    await rig.start()
    await quiet(rig)
    passed = 0

    def trace(step: Step) -> None:
        nonlocal passed
        if step.point is point and type(step.action).__name__ == action:
            passed += 1
            if passed == number:
                rig.kill_at = rig.steps

    rig.trace = trace
    try:
        await hand_over(rig)
    except AssertionError:
        if not rig.dead:
            raise
    for _ in range(3000):
        if rig.dead:
            await rig.kill()
            rig.kill_at = 0
            rig.wanted.pop(uid(1), None)
            rig.wanted.setdefault(uid(2), with_gpus(2, GPUS[0], generation=2))
            await rig.start()
            break
        if passed < number and rig.settled() and uid(2) in rig.active():
            break
        await asyncio.sleep(0.1)
    await quiet(rig)
    assert (rig.broken, rig.dirty_given, rig.host.check()) == ([], [], [])
    assert told_of(rig, GPUS[0]).owner == uid(2)
    await rig.kill()
    return passed >= number


@pytest.mark.parametrize("point", [Point.BEFORE_ACTION, Point.AFTER_ACTION])
@pytest.mark.parametrize("action", ["PrepareGpus", "AttachGpus", "ReturnGpu", "SanitiseGpu", "KeepGpu"])
def test_killed_around_each_act(point: Point, action: str) -> None:
    assert run_virtual(partial(killed_at, point, action, 1))


@pytest.mark.parametrize("point", [Point.BEFORE_RUNG, Point.AFTER_RUNG])
def test_killed_at_each_rung(point: Point) -> None:
    rungs = 0
    while run_virtual(partial(killed_at, point, "SanitiseGpu", rungs + 1)):
        rungs += 1
    assert rungs == 5, "released, reset, proved, scrub, checks"
