"""Migrations between two agents on simulated hosts, with everything between them that may go wrong."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from casemate_agent.drivers.ports import DomainPhase
from casemate_manager.fleet.commands import OperateInstances
from support.small_fleet import environment, image, network
from support.two_hosts import TwoHosts
from support.virtual import VirtualLoop, run_virtual


def played(story: Callable[[TwoHosts], Awaitable[None]], seed: int = 1, trouble: float = 0.0) -> TwoHosts:
    """A story from where one instance is Ready on h1."""

    async def main(loop: VirtualLoop) -> TwoHosts:
        world = TwoHosts(loop, seed)
        watching = [asyncio.ensure_future(world.watch()), asyncio.ensure_future(world.clock())]
        try:
            for box in world.boxes.values():
                await box.start()
            await world.until("hosts are whole", lambda: all(b.linked for b in world.boxes.values()))
            world.fleet.apply(image(), network(), environment())
            await world.until("it runs", lambda: bool(on(world)))
            await world.until("it is heard", lambda: bool(heard(world)))
            world.trouble = trouble
            await story(world)
            world.look()
            assert world.broken == [], (seed, world.broken[:3])
            return world
        finally:
            for task in watching:
                task.cancel()
            for box in world.boxes.values():
                await box.kill()
            await asyncio.gather(*watching, return_exceptions=True)

    return run_virtual(main)


def uid_of(world: TwoHosts) -> str:
    (uid,) = world.fleet.state.instances
    return uid


def on(world: TwoHosts) -> str:
    """Where it runs."""
    found = [
        b.name for b in world.boxes.values() for d in b.host.domains.values() if d.facts.phase is DomainPhase.RUNNING
    ]
    return found[0] if len(found) == 1 else ""


def heard(world: TwoHosts) -> str:
    """What the manager knows of it."""
    seen = world.fleet.observed.instances.get(uid_of(world))
    return seen.state.phase.value if seen is not None and seen.state is not None and seen.state.guest_ready else ""


def migrate(world: TwoHosts, to: str = "", timeout_s: float = 60.0) -> None:
    world.fleet.do(
        OperateInstances(world.fleet.next(), "default", "hello-0", "migrate", "seed", None, timeout_s, to_host=to)
    )
    world.fleet.settle()


async def settled(world: TwoHosts) -> None:
    """The operation is over, one host has it, and the other nothing of it."""
    uid = uid_of(world)

    def met() -> bool:
        placements = list(world.fleet.state.instance_placements[uid].values())
        if world.fleet.state.open_operation(uid) is not None or len(placements) != 1 or not on(world):
            return False
        (placement,) = placements
        other = next(b for b in world.boxes.values() if b.name != placement.host)
        return (
            placement.role == "active" and on(world) == placement.host and not other.traces(uid) and bool(heard(world))
        )

    await world.until("it is settled", met, 300.0)


def boot(world: TwoHosts) -> str:
    """The boot of its guest, wherever it is."""
    return next(
        (d.guest.boot_id for b in world.boxes.values() for d in b.host.domains.values() if d.guest is not None), ""
    )


def test_a_running_instance_moves_and_its_guest_goes_on() -> None:
    async def story(world: TwoHosts) -> None:
        here, before = on(world), boot(world)
        nics = [i.nics for i in world.fleet.state.instances.values()]
        migrate(world)
        await settled(world)
        assert on(world) != here and boot(world) == before
        assert [i.nics for i in world.fleet.state.instances.values()] == nics
        record = world.operation()
        assert record.phase == "Done" and record.message.startswith(f"moved from {here} to {on(world)} in ")
        migrate(world, to=here)
        await settled(world)
        assert on(world) == here and boot(world) == before

    played(story)


@pytest.mark.parametrize("trouble", [0.2, 0.6])
@pytest.mark.parametrize("part", range(4))
@pytest.mark.timeout(600)
def test_whatever_goes_wrong_it_runs_once_and_is_not_lost(part: int, trouble: float) -> None:
    ends: list[str] = []
    for seed in range(100 * part, 100 * part + 20):

        async def story(world: TwoHosts) -> None:
            chance, before = world.chance, boot(world)
            migrate(world, timeout_s=chance.choice([3.0, 20.0, 60.0]))
            for _ in range(chance.randint(1, 5)):
                await asyncio.sleep(chance.uniform(0, 2.5))
                box = chance.choice(list(world.boxes.values()))
                match chance.randrange(5):
                    case 0:
                        box.left = chance.randint(1, 12)
                    case 1 if not box.dead and box.agent is not None:
                        await box.kill()
                        await asyncio.sleep(chance.uniform(0, 3.0))
                        if box.agent is None:
                            await box.start()
                    case 2:
                        world.fleet.die()
                    case 3:
                        box.host.faults.failing["send"] += 1
                    case _:
                        box.host.faults.failing[
                            chance.choice(["finish", "confirm", "open", "expect", "create_overlay"])
                        ] += 1
            world.trouble = 0.0
            for box in world.boxes.values():
                box.left = -1
            await settled(world)
            record = world.operation()
            ends.append(record.phase)
            if record.phase == "Done":
                assert boot(world) == before, "the guest is the same one"

        played(story, seed, trouble)
    assert {"Done", "Failed"} <= set(ends), ends
