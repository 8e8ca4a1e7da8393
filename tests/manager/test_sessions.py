"""Sessions of hosts: the real writer and store on one side, the real host's end of the protocol on the other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from casemate_core.errors import Unavailable
from casemate_core.spec.instance import DesiredInstance, InstanceState, Phase
from casemate_manager.app import make_rules
from casemate_manager.fleet.commands import ApplyResources, DeleteResource
from casemate_manager.sessions import Sessions
from casemate_manager.store.ports import StoreFailed
from casemate_manager.store.sqlite import SqliteStore
from casemate_manager.writer import Writer
from casemate_wire.channel import Eof, Failed, Frame, LogLine, Ticket
from casemate_wire.session import HostEnd, Outbox, ProtocolError, Refused
from casemate_wire.stream import (
    Desired,
    FromHost,
    Hello,
    HostEvent,
    HostReport,
    Inventory,
    OpenChannel,
    ToHost,
    Welcome,
)
from support.small_fleet import environment, image, network, told, topology


class Pipe:
    """A stream in memory, as the manager sees it."""

    def __init__(self) -> None:
        self.up: asyncio.Queue[FromHost | None] = asyncio.Queue()
        self.down: asyncio.Queue[ToHost] = asyncio.Queue()

    async def receive(self) -> FromHost | None:
        return await self.up.get()

    async def send(self, message: ToHost) -> None:
        self.down.put_nowait(message)


class Host:
    """A host that does what it is told, at once."""

    def __init__(self, sessions: Sessions, name: str) -> None:
        self._sessions = sessions
        self.name = name
        self.counter = 0
        self.at = (0, 0)
        self.machines: dict[str, DesiredInstance] = {}
        self.outbox = Outbox()
        self.refused: Refused | None = None
        self.welcomes: list[Welcome] = []
        self.told: list[Desired] = []
        self.tickets: list[OpenChannel] = []
        self.obeys = True
        self._task: asyncio.Task[None] | None = None
        self._serve: asyncio.Task[None] | None = None

    def dial(self, counter: int | None = None) -> None:
        self.counter = self.counter + 1 if counter is None else counter
        self.refused = None
        hello = Hello(self.name, "boot", *self.at, "digest", self.counter)
        self.end = HostEnd(hello, self.outbox)
        self.pipe = Pipe()
        self._serve = asyncio.create_task(self._sessions.serve(self.pipe))
        self._task = asyncio.create_task(self._run(self.end, self.pipe))

    async def cut(self) -> None:
        """The connection breaks."""
        assert self._serve is not None and self._task is not None
        self._serve.cancel()
        self._task.cancel()
        await asyncio.gather(self._serve, self._task, return_exceptions=True)

    def _flush(self) -> None:
        for message in self.end.take():
            self.pipe.up.put_nowait(message)

    async def _run(self, end: HostEnd, pipe: Pipe) -> None:
        self._flush()
        while not end.closed:
            match end.receive(await pipe.down.get()):
                case Welcome() as welcome:
                    self.welcomes.append(welcome)
                    if welcome.send_inventory:
                        end.tell_inventory(Inventory("digest", topology()))
                    end.whole(self.states(), HostReport())
                case Desired() as desired:
                    self.take(desired)
                case OpenChannel() as ticket:
                    self.tickets.append(ticket)
                    end.consumed()
                case Refused() as refused:
                    self.refused = refused
                case _:
                    pass
            self._flush()

    def take(self, desired: Desired) -> None:
        self.told.append(desired)
        new = {i.uid: i for i in desired.instances}
        lost = [u for u in self.machines if desired.snapshot and u not in new]
        self.machines = new if desired.snapshot else {**self.machines, **new}
        for uid in desired.removed:
            self.machines.pop(uid, None)
        self.at = (desired.epoch, desired.revision)
        self.end.persisted(desired.revision)
        self.end.consumed()
        if self.obeys:
            self.end.changed(self.states(), [*desired.removed, *lost])

    def states(self) -> list[InstanceState]:
        return [told(uid, Phase.READY) for uid in self.machines]

    def say(self, *names: str) -> None:
        for name in names:
            self.outbox.add(HostEvent(name, "", "", "Said", name))
        self._flush()


@asynccontextmanager
async def manager(path: Path, store: SqliteStore | None = None) -> AsyncIterator[tuple[Writer, Sessions]]:
    clock = iter(range(1_800_000_000, 1_900_000_000))
    writer = Writer(
        store or SqliteStore(path / "fleet.db"),
        make_rules(),
        lambda: float(next(clock)),
        lambda: "seed",
        retry_s=0.01,
    )
    await writer.open()
    sessions = Sessions(writer, lambda: "seed")
    task = asyncio.create_task(writer.run())
    try:
        yield writer, sessions
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await writer.close()


async def until(condition) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def start(writer: Writer) -> None:
    await writer.submit(ApplyResources("start", (image(), network()), "seed"))


async def test_from_apply_to_desired_to_facts_to_delete(tmp_path: Path) -> None:
    async with manager(tmp_path) as (writer, sessions):
        await start(writer)
        host = Host(sessions, "h1")
        host.dial()
        await until(lambda: writer.observed.host("h1").whole)
        await writer.submit(ApplyResources("k", (environment(replicas=2),), "seed"))
        await until(lambda: len(host.machines) == 2)
        await until(lambda: {s.state.phase for s in writer.observed.instances.values() if s.state} == {Phase.READY})
        assert [n.name for n in host.told[-1].networks] == ["default"]
        await writer.submit(DeleteResource("d", "Environment", "default", "hello"))
        await until(lambda: not writer.state.environments)
        assert not host.machines and not writer.state.placements and not writer.observed.instances
        await host.cut()


async def test_a_cut_makes_the_host_unknown_and_a_redial_resumes(tmp_path: Path) -> None:
    async with manager(tmp_path) as (writer, sessions):
        await start(writer)
        host = Host(sessions, "h1")
        host.dial()
        await until(lambda: writer.observed.host("h1").whole)
        await writer.submit(ApplyResources("a", (environment("a"),), "seed"))
        await until(lambda: len(host.machines) == 1)
        await host.cut()
        await until(lambda: not writer.observed.host("h1").connected)
        await writer.submit(ApplyResources("b", (environment("a", run="stopped"),), "seed"))
        host.dial()
        await until(lambda: len(host.welcomes) == 2)
        assert host.welcomes[1].since > 0 and not host.welcomes[1].send_inventory
        await until(lambda: [m.run.value for m in host.machines.values()] == ["stopped"])
        assert not host.told[-1].snapshot
        await host.cut()


@pytest.mark.parametrize("steps", range(4))
async def test_a_host_that_hangs_up_while_its_session_ends_is_told_as_gone(tmp_path: Path, steps: int) -> None:
    """gRPC cancels the call where the host hangs up, wherever the call is."""
    async with manager(tmp_path) as (writer, sessions):
        await start(writer)
        host = Host(sessions, "h1")
        host.dial()
        await until(lambda: writer.observed.host("h1").connected)
        assert host._serve is not None
        host._serve.cancel()
        for _ in range(steps):
            await asyncio.sleep(0)
        await host.cut()
        await until(lambda: not writer.observed.host("h1").connected)
        assert len(sessions) == 0


async def test_a_new_manager_tells_the_whole_state(tmp_path: Path) -> None:
    async with manager(tmp_path) as (writer, sessions):
        await start(writer)
        host = Host(sessions, "h1")
        host.dial()
        await until(lambda: writer.observed.host("h1").whole)
        await writer.submit(ApplyResources("a", (environment("a"),), "seed"))
        await until(lambda: len(host.machines) == 1)
        machines = dict(host.machines)
        await host.cut()
    async with manager(tmp_path) as (writer, sessions):
        host._sessions = sessions
        host.dial()
        await until(lambda: writer.observed.host("h1").whole and host.told[-1].snapshot)
        assert host.machines == machines and host.at[0] == 2
        await host.cut()


async def test_a_newer_session_supersedes_a_half_open_one(tmp_path: Path) -> None:
    async with manager(tmp_path) as (writer, sessions):
        await start(writer)
        old = Host(sessions, "h1")
        old.dial()
        await until(lambda: writer.observed.host("h1").whole)
        new = Host(sessions, "h1")
        new.dial(2)
        await until(lambda: old.refused is not None)
        assert old.refused is not None and old.refused.reason == "Superseded"
        await until(lambda: writer.observed.host("h1").session == 2 and writer.observed.host("h1").whole)
        assert len(sessions) == 1
        await old.cut()
        assert writer.observed.host("h1").connected, "the end of the old stream is not the host's end"
        await new.cut()


async def test_a_cloned_identity_is_held_on_both_machines(tmp_path: Path) -> None:
    async with manager(tmp_path) as (writer, sessions):
        first, second = Host(sessions, "h1"), Host(sessions, "h1")
        first.dial()
        await until(lambda: writer.observed.host("h1").whole)
        second.dial()
        await until(lambda: first.refused is not None and second.refused is not None)
        for host in (first, second):
            assert host.refused is not None and host.refused.reason == "Held" and host.refused.retry_after_s < 0
        await until(lambda: len(sessions) == 0)
        await first.cut()
        await second.cut()


async def test_what_a_host_says_is_acknowledged_after_it_is_durable(tmp_path: Path) -> None:
    class Refusing(SqliteStore):
        failing = False

        def commit(self, epoch, transactions):  # type: ignore[no-untyped-def]
            if self.failing:
                raise StoreFailed("the disk")
            super().commit(epoch, transactions)

    store = Refusing(tmp_path / "fleet.db")
    async with manager(tmp_path, store) as (writer, sessions):
        host = Host(sessions, "h1")
        host.dial()
        await until(lambda: writer.observed.host("h1").whole)
        store.failing = True
        host.say("one")
        await until(lambda: host.refused is not None)
        assert len(host.outbox) == 1, "not acknowledged"
        store.failing = False
        await until(lambda: writer.leading)
        host.dial()
        await until(lambda: len(host.outbox) == 0)
        assert [e.message for e in writer.state.events.values() if e.reason == "Said"] == ["one"]
        await host.cut()


async def test_hundreds_of_hosts_at_once(tmp_path: Path) -> None:
    async with manager(tmp_path) as (writer, sessions):
        hosts = [Host(sessions, f"h{n}") for n in range(300)]
        for host in hosts:
            host.dial()
        await until(lambda: all(writer.observed.host(h.name).whole for h in hosts))
        assert len(sessions) == 300
        await asyncio.gather(*(host.cut() for host in hosts))
        assert len(sessions) == 0


@pytest.mark.parametrize("first", [None, HostEvent("x", "", "", "", "")], ids=["nothing", "no-hello"])
async def test_a_stream_that_does_not_begin_with_hello_ends(tmp_path: Path, first: FromHost | None) -> None:
    async with manager(tmp_path) as (_, sessions):
        pipe = Pipe()
        pipe.up.put_nowait(first)
        async with asyncio.timeout(60):
            await sessions.serve(pipe)
        assert len(sessions) == 0


class Side:
    """A side stream in memory, as the manager sees it."""

    def __init__(self, *frames: Frame | None) -> None:
        self.frames: asyncio.Queue[Frame | None] = asyncio.Queue()
        for frame in frames:
            self.frames.put_nowait(frame)
        self.sent: list[Frame] = []

    async def receive(self) -> Frame | None:
        return await self.frames.get()

    async def send(self, frame: Frame) -> None:
        self.sent.append(frame)


async def test_a_channel_is_dialled_with_a_ticket_that_is_good_once(tmp_path: Path) -> None:
    async with manager(tmp_path) as (writer, sessions):
        host = Host(sessions, "h1")
        host.dial()
        await until(lambda: writer.observed.host("h1").whole)
        line = LogLine(1.0, "web", "c", 1, "hello")

        async def agent() -> None:
            await until(lambda: bool(host.tickets))
            side = Side(Ticket(host.tickets[0].ticket), line, None)
            await sessions.serve_channel(side)
            assert side.sent == [Eof()]
            with pytest.raises(ProtocolError):
                await sessions.serve_channel(Side(Ticket(host.tickets[0].ticket)))

        dialling = asyncio.create_task(agent())
        async with sessions.open_channel("h1", "logs", "uid", {"pod": "web"}) as channel:
            await channel.send(Eof())
            assert [frame async for frame in channel] == [line]
        await dialling
        assert (host.tickets[0].kind, host.tickets[0].parameters) == ("logs", {"pod": "web"})
        await host.cut()


async def test_a_channel_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casemate_manager.sessions.TICKET_S", 0.05)
    async with manager(tmp_path) as (writer, sessions):
        with pytest.raises(Unavailable, match="not connected"):
            async with sessions.open_channel("h1", "logs", "uid", {}):
                pass
        host = Host(sessions, "h1")
        host.dial()
        await until(lambda: writer.observed.host("h1").whole)
        with pytest.raises(Unavailable, match="did not open"):
            async with sessions.open_channel("h1", "logs", "uid", {}):
                pass
        with pytest.raises(ProtocolError):
            await sessions.serve_channel(Side(Ticket(host.tickets[0].ticket)))

        async def agent() -> None:
            await until(lambda: len(host.tickets) == 2)
            await sessions.serve_channel(Side(Ticket(host.tickets[1].ticket), Failed("no such pod")))

        dialling = asyncio.create_task(agent())
        monkeypatch.setattr("casemate_manager.sessions.TICKET_S", 5.0)
        with pytest.raises(Unavailable, match="no such pod"):
            async with sessions.open_channel("h1", "logs", "uid", {}) as channel:
                async for _ in channel:
                    pass
        await dialling
        await host.cut()
