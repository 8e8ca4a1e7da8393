"""A manager's far end of a host's stream, in memory or by gRPC: what tests of the link stand on."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from casemate_agent.uplink.transport import BrokenOff
from casemate_core.errors import CasemateError
from casemate_core.spec.instance import DesiredInstance, HostNetwork, InstanceState
from casemate_wire.channel import Frame, Ticket
from casemate_wire.session import ManagerEnd, resumable
from casemate_wire.stream import (
    Ack,
    Desired,
    Facts,
    FromHost,
    Hello,
    HostEvent,
    HostReport,
    OpenChannel,
    Outcome,
    ToHost,
)


class Pipe:
    """One stream in memory, as its two ends see it. Cut, both ends see it break off."""

    def __init__(self) -> None:
        self.up: asyncio.Queue[Any] = asyncio.Queue()
        self.down: asyncio.Queue[Any] = asyncio.Queue()
        self.broken = asyncio.Event()

    async def send(self, message: Any) -> None:
        if self.broken.is_set():
            raise BrokenOff("cut")
        self.up.put_nowait(message)

    async def receive(self) -> Any:
        get = asyncio.ensure_future(self.down.get())
        broken = asyncio.ensure_future(self.broken.wait())
        try:
            await asyncio.wait({get, broken}, return_when=asyncio.FIRST_COMPLETED)
            if get.done():
                return get.result()
            raise BrokenOff("cut")
        finally:
            get.cancel()
            broken.cancel()

    async def close(self) -> None:
        self.up.put_nowait(None)


class SmallManager:
    """One host's manager: a desired state, and what the host told. Its session is the product's (ManagerEnd)."""

    def __init__(self, epoch: int = 1, reconnect_window_s: float = 2.0) -> None:
        self.epoch = epoch
        self.revision = 1
        self.window_s = reconnect_window_s
        self.instances: dict[str, DesiredInstance] = {}
        self.networks: tuple[HostNetwork, ...] = ()
        self.states: dict[str, InstanceState] = {}
        self.gone: list[str] = []
        self.hellos: list[Hello] = []
        self.events: dict[str, HostEvent] = {}
        self.outcomes: list[Outcome] = []
        self.acked = 0
        #: Transfers of facts that came, and what the last one that said so told of the host.
        self.facts = 0
        self.report: HostReport | None = None
        self.away = False
        self.pipes: list[Pipe] = []
        self.channels: dict[str, Pipe] = {}
        self._end: ManagerEnd | None = None
        self._kick = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # --- transport, as the agent sees it ---

    async def session(self) -> Pipe:
        if self.away:
            raise BrokenOff("nobody listens")
        pipe = Pipe()
        self.pipes.append(pipe)
        self._spawn(self._serve(pipe))
        return pipe

    async def channel(self) -> Pipe:
        if self.away:
            raise BrokenOff("nobody listens")
        pipe = Pipe()
        self._spawn(self._take_channel(pipe))
        return pipe

    async def close(self) -> None:
        """The agent's process ends."""

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take_channel(self, pipe: Pipe) -> None:
        first = await pipe.up.get()
        assert isinstance(first, Ticket)
        self.channels[first.ticket] = pipe

    # --- what happens to a manager ---

    def cut(self) -> None:
        """The connection breaks."""
        for pipe in self.pipes:
            pipe.broken.set()
        self.pipes.clear()
        self._end = None

    def want(self, *desired: DesiredInstance) -> None:
        self.instances |= {d.uid: d for d in desired}
        self.revision += 1
        if self._end is not None:
            self._end.desire(self.revision, desired, networks=self.networks)
        self._kick.set()

    def unwant(self, *uids: str) -> None:
        for name in uids:
            self.instances.pop(name, None)
        self.revision += 1
        if self._end is not None:
            self._end.desire(self.revision, (), uids)
        self._kick.set()

    def open_channel(self, request: OpenChannel) -> None:
        assert self._end is not None
        self._end.open_channel(request)
        self._kick.set()

    # --- the session ---

    async def _serve(self, pipe: Pipe) -> None:
        end = ManagerEnd(self.epoch, reconnect_window_s=self.window_s)
        sender = asyncio.ensure_future(self._send(end, pipe))
        try:
            while (message := await pipe.up.get()) is not None and not pipe.broken.is_set():
                self.take(end, message)
                self._kick.set()
        except CasemateError:
            pipe.broken.set()
            raise
        finally:
            sender.cancel()

    async def _send(self, end: ManagerEnd, pipe: Pipe) -> None:
        while not pipe.broken.is_set():
            for message in end.take():
                pipe.down.put_nowait(message)
            self._kick.clear()
            await self._kick.wait()

    def take(self, end: ManagerEnd, message: FromHost) -> None:
        """One message of the host."""
        value = end.receive(message)
        match value:
            case Hello():
                self.hellos.append(value)
                resume = resumable(value, self.epoch, self.revision)
                end.welcome(resume=resume, send_inventory=True)
                end.desire(
                    self.revision,
                    self.instances.values(),
                    networks=self.networks,
                    snapshot=not resume,
                )
                self._end = end
            case Facts():
                self.facts += 1
                self.report = value.host or self.report
                if value.snapshot:
                    self.states.clear()
                self.states |= {s.uid: s for s in value.instances}
                for name in value.gone:
                    self.states.pop(name, None)
                self.gone += value.gone
                end.facts_taken(value.sequence)
                end.consumed()
            case HostEvent():
                self.events[value.id] = value
                end.consumed()
            case Outcome():
                self.outcomes.append(value)
                end.consumed()
            case Ack():
                self.acked = value.revision
            case None:
                pass
            case _:
                end.consumed()


async def down(pipe: Pipe, *frames: Frame) -> None:
    """The manager's side says this on a channel."""
    for frame in frames:
        pipe.down.put_nowait(frame)


async def up(pipe: Pipe) -> AsyncIterator[Frame]:
    """What the agent says on a channel."""
    while (frame := await pipe.up.get()) is not None:
        yield frame


__all__ = ["Desired", "Pipe", "SmallManager", "ToHost", "down", "up"]
