"""The agent's end of the stream: what is told, what is acknowledged, and how it comes back."""

import asyncio
from dataclasses import replace
from random import Random

import pytest

from casemate_agent.agent import Agent
from casemate_agent.drivers.simulated import SimulatedHost
from casemate_agent.drivers.simulated_disk import SimulatedDisk
from casemate_agent.ledger.store import Ledger, inline
from casemate_agent.uplink.link import GATHER_S, Link
from casemate_agent.uplink.transport import NotLoopback, checked_address
from casemate_core.spec.instance import Phase
from casemate_core.topology_loaders import from_line
from casemate_wire.channel import Eof, ExitCode, Failed, LogLine, Output, Stdin
from casemate_wire.stream import OpenChannel
from support.agents import HOST_LINE, NETWORK, SETTINGS, instance, uid
from support.managers import SmallManager, down
from support.virtual import VirtualLoop, run_virtual


class Connected:
    """An agent on a simulated host, linked to a manager in memory."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.host = SimulatedHost("box", from_line(HOST_LINE), loop.wall)
        self.disk = SimulatedDisk()
        self.manager = SmallManager()
        self.manager.networks = (NETWORK,)
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        ledger = await Ledger.load(self.disk, inline)
        self.agent = Agent("box", self.host.drivers(), ledger, self.loop.wall, SETTINGS)
        link = Link(self.agent, self.manager, self.loop.wall, Random(7), "1.2.3")
        self.tasks = [asyncio.ensure_future(self.agent.run()), asyncio.ensure_future(link.run())]

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def until(self, condition: object, within_s: float = 60.0) -> None:
        assert callable(condition)
        async with asyncio.timeout(within_s):
            while not condition():
                assert not any(task.done() for task in self.tasks), self.tasks
                await asyncio.sleep(0.05)

    def phase(self, number: int) -> Phase | None:
        state = self.manager.states.get(uid(number))
        return state.phase if state is not None else None


def test_desired_state_comes_down_and_facts_go_up() -> None:
    async def story(loop: VirtualLoop) -> None:
        it = Connected(loop)
        it.manager.want(instance(1))
        await it.start()
        await it.until(lambda: it.phase(1) is Phase.READY)
        assert it.manager.acked == it.manager.revision
        assert {event.reason for event in it.manager.events.values()} >= {"Started"}
        it.manager.want(instance(2))
        await it.until(lambda: it.phase(2) is Phase.READY)
        it.manager.unwant(uid(1))
        await it.until(lambda: uid(1) in it.manager.gone)
        assert uid(1) not in it.manager.states
        it.manager.unwant(uid(77))
        await it.until(lambda: uid(77) in it.manager.gone)
        await it.stop()

    run_virtual(story)


def test_changes_that_crowd_go_up_together() -> None:
    async def story(loop: VirtualLoop) -> None:
        it = Connected(loop)
        await it.start()
        await it.until(lambda: it.manager.facts)
        await asyncio.sleep(10)  # it rests
        before, begun_s = it.manager.facts, loop.time()
        report = it.agent.feed.report
        for number in range(200):
            it.agent.feed.tell(replace(report, disk_free_mib=number))
            await asyncio.sleep(0.001)
        took_s = loop.time() - begun_s
        await asyncio.sleep(1)
        assert 2 <= it.manager.facts - before <= took_s / GATHER_S + 2
        assert it.manager.report == it.agent.feed.report  # and the last word is told
        await it.stop()

    run_virtual(story)


def test_a_lost_session_is_dialled_again_and_resumed() -> None:
    async def story(loop: VirtualLoop) -> None:
        it = Connected(loop)
        it.manager.want(instance(1))
        await it.start()
        await it.until(lambda: it.phase(1) is Phase.READY)
        it.manager.away = True
        it.manager.cut()
        it.host.crash_domain(uid(1))
        await asyncio.sleep(60)
        it.manager.away = False
        it.manager.want(instance(2))
        await it.until(lambda: it.phase(2) is Phase.READY)
        assert it.phase(1) is Phase.READY
        assert len(it.manager.hellos) == 2
        first, second = it.manager.hellos
        assert second.session > first.session
        assert first.revision == 0
        assert second.revision > 0
        # what happened while nobody listened was kept
        assert any(event.reason == "Exited" for event in it.manager.events.values())
        await it.stop()

    run_virtual(story)


def test_reconnects_are_spread_over_the_window() -> None:
    async def story(loop: VirtualLoop) -> None:
        it = Connected(loop)
        it.manager.window_s = 40.0
        await it.start()
        await it.until(lambda: bool(it.manager.hellos))
        gaps = []
        for count in range(1, 9):
            await asyncio.sleep(0.5)
            began = loop.time()
            it.manager.cut()
            await it.until(lambda count=count: len(it.manager.hellos) > count)
            gaps.append(loop.time() - began)
        assert all(0 <= gap <= 40.1 for gap in gaps)
        assert max(gaps) > 20
        assert min(gaps) < 15
        await it.stop()

    run_virtual(story)


def test_a_lost_ledger_is_told_to_the_manager_by_asking_for_everything() -> None:
    async def story(loop: VirtualLoop) -> None:
        it = Connected(loop)
        it.manager.want(instance(1))
        await it.start()
        await it.until(lambda: it.phase(1) is Phase.READY)
        pid = it.manager.states[uid(1)].pid
        await it.stop()
        it.disk.erase()
        await asyncio.sleep(5)
        await it.start()
        await it.until(lambda: len(it.manager.hellos) >= 2 and it.agent.ledger.host.complete)
        await it.until(lambda: it.phase(1) is Phase.READY)
        assert it.manager.hellos[-1].revision == 0
        assert it.manager.hellos[-1].session > it.manager.hellos[0].session
        assert it.manager.states[uid(1)].pid == pid
        await it.stop()

    run_virtual(story)


def test_logs_go_over_a_channel() -> None:
    async def story(loop: VirtualLoop) -> None:
        it = Connected(loop)
        it.manager.want(instance(1))
        await it.start()
        await it.until(lambda: it.phase(1) is Phase.READY)
        it.manager.open_channel(OpenChannel("t1", "logs", uid(1), {"pod": "hello", "container": "", "tail": 0}))
        await it.until(lambda: "t1" in it.manager.channels)
        pipe = it.manager.channels["t1"]
        line = await pipe.up.get()
        assert isinstance(line, LogLine)
        assert (line.pod, line.container, line.sequence, line.text) == ("hello", "main", 1, "main started")
        assert isinstance(await pipe.up.get(), Eof)
        pipe.down.put_nowait(None)
        assert await pipe.up.get() is None
        it.manager.open_channel(OpenChannel("t2", "logs", uid(1), {"pod": "nothing"}))
        await it.until(lambda: "t2" in it.manager.channels)
        failed = await it.manager.channels["t2"].up.get()
        assert isinstance(failed, Failed)
        assert failed.message == "GuestRefused: no pod nothing"
        await it.stop()

    run_virtual(story)


def test_a_command_goes_over_a_channel() -> None:
    async def story(loop: VirtualLoop) -> None:
        it = Connected(loop)
        it.manager.want(instance(1))
        await it.start()
        await it.until(lambda: it.phase(1) is Phase.READY)
        it.manager.open_channel(OpenChannel("t1", "exec", uid(1), {"pod": "hello", "argv": ["cat"]}))
        await it.until(lambda: "t1" in it.manager.channels)
        pipe = it.manager.channels["t1"]
        await down(pipe, Stdin(b"both ways\n"), Eof())
        assert await pipe.up.get() == Output("stdout", b"both ways\n")
        assert await pipe.up.get() == ExitCode(0)
        it.manager.open_channel(OpenChannel("t2", "exec", uid(1), {"pod": "hello", "argv": "cat"}))
        await it.until(lambda: "t2" in it.manager.channels)
        assert isinstance(await it.manager.channels["t2"].up.get(), Failed)
        await it.stop()

    run_virtual(story)


@pytest.mark.parametrize("address", ["10.0.0.1:7000", "manager.example:7000", "127.0.0.1", "0.0.0.0:1", ":7000"])
def test_without_tls_only_loopback_is_dialled(address: str) -> None:
    with pytest.raises(NotLoopback):
        checked_address(address)


@pytest.mark.parametrize("address", ["127.0.0.1:7000", "[::1]:7000", "localhost:7000"])
def test_loopback_is_dialled(address: str) -> None:
    assert checked_address(address) == address
