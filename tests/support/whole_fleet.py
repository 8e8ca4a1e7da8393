"""A whole fleet in one event loop: the manager as it runs, by gRPC on loopback, and agents on simulated hosts."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from casemate_agent.agent import Agent
from casemate_agent.drivers.simulated import SimulatedHost, SimulatedPace
from casemate_agent.ledger.files import OsFiles
from casemate_agent.ledger.store import Ledger, inline
from casemate_agent.metrics.scrape import AgentMetrics
from casemate_agent.plan.converge import Settings
from casemate_agent.uplink.link import Link
from casemate_agent.uplink.support import HostSupport
from casemate_agent.uplink.transport import GrpcTransport
from casemate_core.topology_loaders import from_line
from casemate_manager.app import Manager, running
from casemate_manager.fleet.commands import ApplyAnswer, ApplyResources, Object
from casemate_manager.fleet.placing import says_not_ready
from casemate_manager.store.sqlite import SqliteStore
from support.small_fleet import environment, image, network

__all__ = ["WholeFleet", "WholeHost", "environment", "until", "whole_fleet"]
PACE = SimulatedPace(call_s=0.0, fetch_s=0.01, boot_s=0.02, pod_start_s=0.01, power_off_s=0.01)


@dataclass(slots=True)
class WholeHost:
    """A simulated host with its agent."""

    host: SimulatedHost
    agent: Agent
    link: Link
    metrics: AgentMetrics


@dataclass(slots=True)
class WholeFleet:
    """The manager and its hosts by name."""

    manager: Manager
    hosts: dict[str, WholeHost] = field(default_factory=dict)
    _keys: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.manager.port}"

    async def apply(self, *objects: Object, key: str = "") -> ApplyAnswer:
        command = ApplyResources(key or f"key-{next(self._keys)}", objects, f"seed-{next(self._keys)}")
        answer = await self.manager.writer.submit(command)
        assert isinstance(answer, ApplyAnswer)
        return answer

    def phases(self) -> list[str]:
        """Of all instances."""
        from casemate_manager import views

        state, observed = self.manager.writer.state, self.manager.writer.observed
        return [views.instance_phase(state, observed, record) for record in state.instances.values()]

    async def until_ready(self, count: int) -> None:
        """Wait until there are so many instances, all of them Ready."""
        await until(lambda: self.phases() == ["Ready"] * count)


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Wait for it, on real time."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def whole_fleet(folder: Path, lines: dict[str, str], *, metrics_listen: str = "") -> AsyncIterator[WholeFleet]:
    """A fleet with an image and a network, and these hosts (name -> line) joined and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = (f"seed-{number}" for number in itertools.count())
    async with AsyncExitStack() as stack:
        manager = await stack.enter_async_context(
            running(
                SqliteStore(folder / "fleet.db"), "127.0.0.1:0", time.time, lambda: next(seeds),
                version="test", metrics_listen=metrics_listen,
            )
        )  # fmt: skip
        fleet = WholeFleet(manager)
        await fleet.apply(image(), network())
        group = await stack.enter_async_context(_Group())
        for name, line in lines.items():
            host = SimulatedHost(name, replace(from_line(line), name=name), time.time, PACE)
            ledger = await Ledger.load(OsFiles(folder / name / "ledger"), inline)
            agent = Agent(name, host.drivers(), ledger, time.time, Settings(stop_grace_s=1.0))
            link = Link(agent, GrpcTransport(fleet.address), time.time, Random(1), "test")
            group.start(agent.run(), link.run())
            metrics = AgentMetrics(agent, link, "test")
            link.support = HostSupport(agent.drivers, ledger, metrics.rows, "test")
            fleet.hosts[name] = WholeHost(host, agent, link, metrics)
        # A host that has not had its first snapshot yet says that it is not ready, and is given nothing.
        seen = manager.writer.observed.host
        await until(lambda: all(seen(name).whole and not says_not_ready(seen(name)) for name in lines), 60.0)
        yield fleet


class _Group:
    """Tasks that end with the context."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, *work: object) -> None:
        self._tasks += [asyncio.ensure_future(each) for each in work]  # type: ignore[arg-type]

    async def __aenter__(self) -> "_Group":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
