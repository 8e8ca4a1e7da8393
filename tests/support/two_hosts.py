"""A fleet of two simulated hosts on virtual time, with everything between them and the manager that may go wrong.

The manager is the pure state machine with the records that it would have on disk; each host is a whole agent. A link is a
session of the stream: in order, late by as much as the chance says, and lost with all that is in flight when it breaks.
"""

import asyncio
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from random import Random

from casemate_agent.agent import Agent, Pace
from casemate_agent.drivers.ports import DomainPhase
from casemate_agent.drivers.simulated import SimulatedHost, SimulatedPace
from casemate_agent.drivers.simulated_disk import SimulatedDisk
from casemate_agent.execute.executor import Step
from casemate_agent.ledger.store import Ledger, inline
from casemate_agent.plan.drafting import Settings
from casemate_core.spec.instance import InstanceState
from casemate_core.topology_loaders import from_line
from casemate_manager.fleet import desired
from casemate_manager.fleet.commands import Answer, Command, Due, HostFacts, HostGone, HostHello, HostInventory
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import OperationRecord
from casemate_manager.fleet.state import State
from casemate_wire.stream import Desired, Facts, Hello, HostReport, Inventory
from support.agents import Killed
from support.small_fleet import SmallFleet
from support.virtual import VirtualLoop

LINE = "1s 4k/c 1t 8G disk=100G name="
PACE = SimulatedPace(call_s=0.002, fetch_s=0.2, boot_s=0.5, pod_start_s=0.2, power_off_s=0.2, move_s=1.0)
SETTINGS = Settings(stop_grace_s=2.0, backoff_cap_s=4.0)


class TimedFleet(SmallFleet):
    """The manager, by the loop's clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self.loop = loop

    def do(self, command: Command) -> Answer:
        self.now_s = self.loop.wall() - 1.0
        return super().do(command)

    def die(self) -> None:
        """It is killed, and another takes over what is on disk; what hosts have said is gone."""
        old = self.reload()
        self.state = State.of(self.state.epoch + 1, old.revision, self._all(old))
        self.observed = Observed()

    @staticmethod
    def _all(state: State) -> list[object]:
        tables = (
            state.environments, state.specs, state.instances, state.placements, state.hosts, state.inventories,
            state.requests, state.images, state.networks, state.events, state.operations, state.gpus,
        )  # fmt: skip
        return [record for table in tables for record in table.values()]  # type: ignore[attr-defined]


@dataclass
class Box:
    """One host, its disk, its agent, and its session with the manager."""

    name: str
    world: "TwoHosts"
    disk: SimulatedDisk = field(default_factory=SimulatedDisk)
    agent: Agent | None = None
    session: int = 0
    linked: bool = False
    #: Steps that its agent may still make before it is killed; below 0: as many as it likes.
    left: int = -1
    deaths: int = 0
    _task: "asyncio.Task[None] | None" = None
    _link: "asyncio.Task[None] | None" = None

    def __post_init__(self) -> None:
        self.host = SimulatedHost(self.name, from_line(LINE + self.name), self.world.loop.wall, PACE)
        self.host.neighbours = self.world.neighbours
        self.world.neighbours[self.name] = self.host

    def _step(self, step: Step) -> None:
        self.world.look()
        if self.left > 0:
            self.left -= 1
        if self.left == 0:
            self.left = -1
            self.host.sever()
            raise Killed

    async def start(self) -> None:
        ledger = await Ledger.load(self.disk, inline)
        wall = self.world.loop.wall
        self.agent = Agent(self.name, self.host.drivers(), ledger, wall, SETTINGS, Pace(resync_s=5.0), self._step)
        self._task = asyncio.ensure_future(self.agent.run())
        self._link = asyncio.ensure_future(self._session())

    async def kill(self) -> None:
        """SIGKILL."""
        self.host.sever()
        tasks = [t for t in (self._task, self._link) if t is not None]
        self._task = self._link = self.agent = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.unlink("killed")
        self.deaths += 1

    @property
    def dead(self) -> bool:
        if self._task is None or not self._task.done():
            return False
        error = self._task.exception()
        if not isinstance(error, BaseExceptionGroup) or error.split(Killed)[1] is not None:
            raise AssertionError("the agent ended by itself") from error
        return True

    def unlink(self, why: str) -> None:
        """The stream breaks; the manager may hear of it."""
        if self.linked:
            self.linked = False
            self.world.fleet.do(HostGone(self.name, self.session, why))

    async def _session(self) -> None:
        """Sessions, one after the other, while the agent lives."""
        while True:
            try:
                await self._one_session()
            finally:
                self.unlink("broke off")
            await asyncio.sleep(self.world.chance.uniform(0.05, 0.5))

    async def _one_session(self) -> None:
        world, agent = self.world, self.agent
        assert agent is not None
        while not agent.feed.whole or agent.machine is None:
            await asyncio.sleep(0.05)
        self.session = await agent.ledger.next_session(world.loop.wall())
        agent.resync.clear()
        boot = agent.machine.boot_id
        world.fleet.do(HostHello(Hello(self.name, boot, 0, 0, "d", self.session, virtualisation="simulated"), "s"))
        world.fleet.do(HostInventory(self.name, self.session, Inventory("d", self.host.topology)))
        self.linked, epoch, sent = True, world.fleet.state.epoch, -1
        agent.feed.take()
        first = True
        while not world.breaks() and world.fleet.state.epoch == epoch and not agent.resync.is_set():
            states, gone, report = agent.feed.take()
            every: list[InstanceState] = list(agent.feed.states.values())
            if first or states or gone or report is not None:
                await world.late()
                self._facts(every if first else states, gone, first, agent.feed.report)
            first = False
            state = world.fleet.state
            if state.revision != sent:
                keep, end = desired.whole(state, self.name)
                message = Desired(
                    state.epoch, state.revision, sent < 0, keep, end, networks=desired.networks(state, self.name)
                )
                sent = state.revision
                await world.late()
                await agent.accept(message)
            await asyncio.sleep(0.05)

    def _facts(self, states: list[InstanceState], gone: list[str], first: bool, report: HostReport) -> None:
        told = Facts(1, first, tuple(states), tuple(gone), report)
        self.world.fleet.do(HostFacts(self.name, self.session, told))
        self.world.fleet.settle()

    def traces(self, uid: str) -> list[str]:
        """What there is of an instance."""
        host = self.host
        found = [f"domain {host.domains[uid].facts.phase}"] if uid in host.domains else []
        found += ["overlay"] if uid in host.overlays else []
        found += ["seed"] if uid in host.seeds else []
        found += (
            ["passage"]
            if self.agent and self.agent.drivers.passages and uid in self.agent.drivers.passages.opened()
            else []
        )
        return found


class TwoHosts:
    """The whole of it."""

    def __init__(self, loop: VirtualLoop, seed: int, *, trouble: float = 0.0) -> None:
        self.loop = loop
        self.chance = Random(seed)
        self.trouble = trouble
        self.neighbours: MutableMapping[str, SimulatedHost] = {}
        self.fleet = TimedFleet(loop)
        self.boxes = {name: Box(name, self) for name in ("h1", "h2")}
        #: Where the instance ran twice, or otherwise was what it must never be.
        self.broken: list[str] = []

    def breaks(self) -> bool:
        """Whether a stream breaks now."""
        return self.chance.random() < self.trouble / 20

    async def late(self) -> None:
        """What is sent arrives after a while."""
        await asyncio.sleep(self.chance.uniform(0, 2.0) if self.chance.random() < self.trouble else 0.002)

    def look(self) -> None:
        """The one thing that must never be, at this instant."""
        running: dict[str, list[str]] = {}
        for box in self.boxes.values():
            for uid, domain in box.host.domains.items():
                if domain.facts.phase is DomainPhase.RUNNING:
                    running.setdefault(uid, []).append(box.name)
            self.broken += box.host.check()
        self.broken += [f"{uid} runs on {' and '.join(names)}" for uid, names in running.items() if len(names) > 1]

    async def watch(self) -> None:
        """Look at all times; start what has died; let time pass at the manager."""
        while True:
            self.look()
            for box in self.boxes.values():
                if box.dead:
                    await box.kill()
                    await asyncio.sleep(self.chance.uniform(0, 2.0))
                    if box.agent is None:
                        await box.start()
            await asyncio.sleep(0.02)

    async def clock(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.fleet.do(Due())
            self.fleet.settle()

    async def until(self, what: str, met: Callable[[], bool], within_s: float = 120.0) -> None:
        """Wait on virtual time."""
        end_s = self.loop.time() + within_s
        while not met():
            assert self.loop.time() < end_s, f"{what}: {self.story()}"
            await asyncio.sleep(0.05)

    def operation(self) -> OperationRecord:
        """The last operation."""
        return max(self.fleet.state.operations.values(), key=lambda r: r.meta.created_s)

    def story(self) -> str:
        """What there is, for a failure."""
        lines = [
            f"{r.meta.name}: {r.stage} {r.phase} {r.reason} {r.message}" for r in self.fleet.state.operations.values()
        ]
        lines += [f"{p.instance_uid} on {p.host}: {p.role}" for p in self.fleet.state.placements.values()]
        for box in self.boxes.values():
            lines += [f"{box.name}: {uid}: {box.traces(uid)}" for uid in self.fleet.state.instances]
            lines += [
                f"{box.name}: {s.phase} {s.reason} {s.message} {s.order}"
                for s in (box.agent.feed.states.values() if box.agent else ())
            ]
        return "\n".join(lines)


__all__ = ["Box", "TwoHosts"]
