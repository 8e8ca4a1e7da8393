"""An agent on a simulated host, with a manager's side that is a variable: what tests of the agent stand on."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from casemate_agent.agent import Agent, Pace
from casemate_agent.drivers.simulated import ACTIVE, SimulatedHost, SimulatedPace
from casemate_agent.drivers.simulated_disk import SimulatedDisk
from casemate_agent.execute.executor import Step
from casemate_agent.ledger.store import Ledger, inline
from casemate_agent.plan.converge import Settings
from casemate_core.claims import Claim, PlainMemory, SharedCpu
from casemate_core.spec.instance import (
    DesiredInstance,
    File,
    HostNetwork,
    ImageRef,
    InstanceState,
    Nic,
    Phase,
    Placement,
    Run,
)
from casemate_core.topology import Topology
from casemate_core.topology_loaders import from_line
from casemate_wire.stream import Desired
from support.virtual import VirtualLoop

HOST_LINE = "1s 8k/c 2t 64G disk=1T name=box"
SETTINGS = Settings(stop_grace_s=10.0, stop_ask_again_s=4.0, backoff_cap_s=20.0, stable_s=100.0)
NETWORK = HostNetwork("default", "nat", "10.1.0.0/24", "10.1.0.1")
IMAGE = ImageRef("debian-13", "disk", File("file:///images/debian.raw", "sha256:" + "a1" * 32), "raw")


def uid(number: int) -> str:
    """The uid of the number-th instance."""
    return f"00000000-0000-4000-8000-{number:012d}"


def pod(name: str, image: str = "localhost/hello:1") -> dict[str, Any]:
    """A small v1 Pod."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {"containers": [{"name": "main", "image": image}]},
    }


def instance(number: int, **changes: Any) -> DesiredInstance:
    """An instance with a pod and a network interface; ``changes`` replace fields. ``memory_mib`` sizes the claim too."""
    name = uid(number)
    memory_mib = changes.get("memory_mib", 1024)
    claim = changes.pop(
        "claim",
        Claim(
            owner=name,
            vcpus_online=1,
            vcpus_max=1,
            shared=(SharedCpu(0, 1000),),
            memory=(PlainMemory(0, memory_mib, 0, memory_mib),),
            disk_mib=4096,
        ),
    )
    base = DesiredInstance(
        uid=name,
        tenant="acme",
        environment=f"env-{number}",
        name=f"env-{number}-0",
        ordinal=0,
        generation=1,
        run=Run.STARTED,
        cpus=1,
        memory_mib=memory_mib,
        disk_mib=4096,
        image=IMAGE,
        placement=Placement(claim, epoch=1, generation=1),
        nics=(Nic("default", f"52:54:00:00:00:{number:02x}", f"10.1.0.{number + 10}", 24, "10.1.0.1"),),
        pods=(pod("hello"),),
    )
    return replace(base, **changes)


class Killed(BaseException):
    """SIGKILL, at a step of execution."""


@dataclass
class Rig:
    """A simulated host, its disk, an agent that can be killed and started again, and what the manager wants.

    The manager's side is simple: it sends the whole state to an agent that starts or lost its ledger, and each change as it
    is made while an agent runs.
    """

    loop: VirtualLoop
    topology: Topology = field(default_factory=lambda: from_line(HOST_LINE))
    pace: SimulatedPace = field(default_factory=SimulatedPace)
    trace: Callable[[Step], None] | None = None
    settings: Settings = SETTINGS

    def __post_init__(self) -> None:
        self.host = SimulatedHost("box", self.topology, self.loop.wall, self.pace)
        self.disk = SimulatedDisk()
        self.wanted: dict[str, DesiredInstance] = {}
        #: Volumes that the manager has deleted.
        self.volumes_removed: tuple[str, ...] = ()
        self.epoch = 1
        self.revision = 0
        self.agent: Agent | None = None
        self.connected = True
        self.deaths = 0
        self._task: asyncio.Task[None] | None = None
        self.steps = 0
        #: What was broken on the machine at any step.
        self.broken: list[str] = []
        #: Kill the agent when it has made so many steps in all.
        self.kill_at = 0

    def _step(self, step: Step) -> None:
        self.steps += 1
        self.broken += self.host.check()
        if self.trace is not None:
            self.trace(step)
        if self.steps == self.kill_at:
            self.host.sever()
            raise Killed

    # --- the manager ---

    async def want(self, *desired: DesiredInstance) -> None:
        """The manager wants these too, or differently."""
        self.wanted |= {d.uid: d for d in desired}
        self.revision += 1
        await self._send(Desired(self.epoch, self.revision, instances=desired, networks=(NETWORK,)))

    async def delete_volume(self, *uids: str) -> None:
        """The manager wants the data of these volumes deleted."""
        self.volumes_removed += uids
        self.revision += 1
        await self._send(Desired(self.epoch, self.revision))

    async def unwant(self, *uids: str) -> None:
        """The manager no longer wants these."""
        for name in uids:
            self.wanted.pop(name, None)
        self.revision += 1
        await self._send(Desired(self.epoch, self.revision, removed=uids))

    async def _send(self, desired: Desired) -> None:
        if self.agent is not None and self.connected and self.agent.ledger.host.complete:
            await self.agent.accept(replace(desired, volumes_removed=self.volumes_removed))

    async def sync(self) -> None:
        """The manager tells its whole state."""
        if self.agent is not None and self.connected:
            whole = Desired(self.epoch, self.revision, True, tuple(self.wanted.values()), networks=(NETWORK,))
            self.agent.resync.clear()
            await self.agent.accept(replace(whole, volumes_removed=self.volumes_removed))

    # --- the agent ---

    async def start(self) -> None:
        """Start an agent on what is there; it is told the whole state where it is connected."""
        assert self.agent is None
        self.revision = max(self.revision, 1)
        ledger = await Ledger.load(self.disk, inline)
        self.agent = Agent("box", self.host.drivers(), ledger, self.loop.wall, self.settings, Pace(), self._step)
        self._task = asyncio.ensure_future(self.agent.run())
        await self.sync()

    async def kill(self) -> None:
        """SIGKILL: from here on it has no effect, then its tasks go."""
        self.host.sever()
        task, self._task, self.agent = self._task, None, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.deaths += 1

    @property
    def dead(self) -> bool:
        """The agent was killed at a step."""
        if self._task is None or not self._task.done():
            return False
        error = self._task.exception()
        if not isinstance(error, BaseExceptionGroup) or error.split(Killed)[1] is not None:
            raise AssertionError("the agent ended by itself") from error
        return True

    # --- looking ---

    def states(self) -> dict[str, InstanceState]:
        return dict(self.agent.feed.states) if self.agent is not None else {}

    def active(self) -> dict[str, int]:
        """Running domains of ours by uid, with their pids."""
        return {name: d.facts.pid for name, d in self.host.domains.items() if d.facts.owned and d.facts.phase in ACTIVE}

    def settled(self) -> bool:
        """The host is exactly what the manager wants."""
        started = {name for name, d in self.wanted.items() if d.run is Run.STARTED}
        states = self.states()
        return (
            self.agent is not None
            and set(self.active()) == started
            and set(states) == set(self.wanted)
            and all(states[name].phase is Phase.READY for name in started)
            and all(states[name].phase is Phase.STOPPED for name in set(self.wanted) - started)
            and not self.leaks()
        )

    def leaks(self) -> list[str]:
        """What is there of instances that nobody wants."""
        host, known = self.host, set(self.wanted)
        found = [f"domain {name}" for name, d in host.domains.items() if d.facts.owned and name not in known]
        found += [f"overlay {name}" for name in set(host.overlays) - known]
        found += [f"seed {name}" for name in set(host.seeds) - known]
        expected = {tap for name in known for tap in self._taps(name)}
        found += [f"guard {tap}" for tap in set(host.guards) - expected]
        found += [f"stray {name}" for name in host.strays]
        return found

    def _taps(self, name: str) -> list[str]:
        from casemate_agent.drivers.simulated import tap_name

        return [tap_name(name, index) for index in range(len(self.wanted[name].nics))]

    async def settle(self, within_s: float = 300.0) -> None:
        """Wait until the host is what is wanted. Raises AssertionError with what is not."""
        end = self.loop.time() + within_s
        while not self.settled():
            assert not self.dead, "the agent was killed while it was waited for"
            if self.loop.time() >= end:
                states = {name: (s.phase.value, s.reason, s.message) for name, s in self.states().items()}
                raise AssertionError(f"not settled: {states}; active {self.active()}; leaks {self.leaks()}")
            if self.agent is not None and self.agent.resync.is_set():
                await self.sync()
            await asyncio.sleep(0.1)
