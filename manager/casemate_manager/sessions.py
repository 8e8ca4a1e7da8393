"""Hosts' sessions: one for each stream, around :mod:`casemate_wire.session`, and the channels that hosts dial back.

Theory of operation. A stream is served by two tasks. The reader takes messages in order, hands each to the writer and
waits until it is committed, so that what is acknowledged to the host is durable; the sender takes what the protocol has to
say whenever the session is woken. The writer's publications wake the sessions of hosts whose desired state changed; the
records are resolved from the committed state at that moment. A session is registered and given its first desired state in
one step of the event loop, so that nothing published falls between.

Storms: at most `ADMITTED` Hellos are worked on at once and `QUEUED` wait; beyond that a host is told to come back within a
window. A channel is dialled by the agent with a ticket that is good once and for `TICKET_S`.

This module knows no gRPC: a stream is anything with ``receive`` and ``send`` (:mod:`casemate_manager.api.hostlink`).
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final, Protocol, TypeVar

from casemate_core.checkpoint import Checkpoint
from casemate_core.errors import CallerError, CasemateError, Unavailable, shown
from casemate_core.spec.instance import DesiredInstance
from casemate_manager.fleet import desired, gpus, volumes
from casemate_manager.fleet.commands import (
    Answer,
    Command,
    HostFacts,
    HostGone,
    HostHello,
    HostInventory,
    HostNote,
    Turned,
    Welcomed,
)
from casemate_manager.fleet.state import State
from casemate_manager.writer import Published, Writer
from casemate_wire.channel import Failed, Frame, Ticket
from casemate_wire.session import WINDOW, ManagerEnd, ManagerInput, ProtocolError
from casemate_wire.stream import (
    Ack,
    Bye,
    Facts,
    FromHost,
    Hello,
    HostEvent,
    Inventory,
    Measurement,
    OpenChannel,
    Outcome,
    ToHost,
)

log = logging.getLogger("casemate.sessions")

#: Hellos worked on at once, and those that wait for their turn.
ADMITTED: Final = 64
QUEUED: Final = 4096
#: Within so many seconds a stream says Hello.
HELLO_S: Final = 10.0
#: Hosts that were turned away for lack of room, or whose manager lost its term, come back within this window.
RECONNECT_WINDOW_S: Final = 5.0
TICKET_S: Final = 30.0
#: Between two looks at whose certificate has expired.
RECHECK_S: Final = 2.0
#: Facts of a host that follow one another closely are acknowledged together, so many seconds after those before.
ACK_S: Final = 0.02
#: Frames of a channel that wait for their reader; HTTP/2 holds back the rest.
CHANNEL_FRAMES: Final = 16

In = TypeVar("In", covariant=True)
Out = TypeVar("Out", contravariant=True)


class Stream(Protocol[In, Out]):
    """One open stream."""

    async def receive(self) -> In | None:
        """The next message; None where the other end has closed. Raises what the codec raises."""
        ...

    async def send(self, message: Out) -> None: ...


#: An instance as its host gets it: with the texts of the secrets that its pods name.
Reveal = Callable[[State, DesiredInstance], DesiredInstance]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a stream's certificate says that the host is, and SHA-256 of its key. None on plain text."""

    host: str
    key: str


@dataclass(slots=True, eq=False)
class Session:
    """One stream of a host."""

    end: ManagerEnd
    identity: Identity | None = None
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    measurement: Measurement | None = None
    #: Whether the fleet was asked to take it, and has not turned it away.
    asked: bool = False
    #: When facts were last acknowledged, by the loop's clock, and what wakes the session to acknowledge those since.
    acked_s: float = -inf
    ack_timer: asyncio.TimerHandle | None = None
    #: Set when the stream has ended: what was asked over it and is not there yet will not come.
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """Have said what there is to say: at once, or gathered, where it is nothing but one more acknowledgement."""
        if self.end.pressing:
            self.woken.set()
        elif self.end.ack_due and self.ack_timer is None:
            loop = asyncio.get_running_loop()
            if (wait_s := self.acked_s + ACK_S - loop.time()) <= 0:
                self.woken.set()
            else:
                self.ack_timer = loop.call_later(wait_s, self.woken.set)

    def take(self) -> tuple[ToHost, ...]:
        """What the protocol has to say."""
        if self.end.ack_due:
            self.acked_s = asyncio.get_running_loop().time()
            self.stop_timer()
        return self.end.take()

    def stop_timer(self) -> None:
        """Nothing waits to be acknowledged."""
        if self.ack_timer is not None:
            self.ack_timer.cancel()
            self.ack_timer = None

    @property
    def host(self) -> str:
        """The host's name, once it has said Hello."""
        return self.end.hello.host if self.end.hello else ""

    @property
    def counter(self) -> int:
        """The session counter of its Hello."""
        return self.end.hello.session if self.end.hello else 0


class HostRefused(CallerError):
    """The host, or the guest on it, will not do what was asked: its state is another, or there is no such thing."""

    reason = "HostRefused"


#: Reasons of an agent's errors that lie with what was asked, not with the way there.
_ASKED: Final = frozenset({"GuestRefused", "ConsoleRefused", "BadParameters"})


def refused(message: str) -> CasemateError:
    """The error that an agent ended a channel with, as ours."""
    reason, _, text = message.partition(": ")
    return HostRefused(shown(text)) if reason in _ASKED else Unavailable(shown(message))


class Channel:
    """A side stream to a host, from the asker's side. Iterate for frames; a ``Failed`` frame is raised as Unavailable."""

    def __init__(self) -> None:
        self._stream: Stream[Frame, Frame] | None = None
        self._dialled = asyncio.Event()
        self.ended = asyncio.Event()
        #: The host that was asked to dial.
        self.host = ""

    def dialled(self, stream: Stream[Frame, Frame]) -> None:
        """The agent is there."""
        self._stream = stream
        self._dialled.set()

    async def wait_dialled(self, seconds: float, over: asyncio.Event) -> None:
        """Wait for the agent, or until the session over which it was asked is ``over``. Raises Unavailable."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._dialled, over)]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._dialled.is_set():
            return
        if over.is_set():
            raise Unavailable("the host's session ended before it opened the channel")
        raise Unavailable(f"the host did not open the channel within {seconds:g} s")

    async def send(self, frame: Frame) -> None:
        """Send one frame; waits while the host does not read."""
        assert self._stream is not None
        await self._stream.send(frame)

    async def __aiter__(self) -> AsyncIterator[Frame]:
        assert self._stream is not None
        while (frame := await self._stream.receive()) is not None:
            if isinstance(frame, Failed):
                raise refused(frame.message)
            yield frame


class Sessions:
    """All sessions of this manager."""

    def __init__(
        self,
        writer: Writer,
        seed: Callable[[], str],
        *,
        window: int = WINDOW,
        reveal: Reveal = lambda state, instance: instance,
    ) -> None:
        self._reveal = reveal
        self._writer = writer
        self._seed = seed
        self._window = window
        self._sessions: dict[str, Session] = {}
        #: In the order of their arrival, so that what is told to all is told in an order that can be repeated.
        self._streams: dict[Session, None] = {}
        self._admission = asyncio.Semaphore(ADMITTED)
        self._queued = 0
        self._tickets: dict[str, Channel] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._checkpoint: Checkpoint | None = None
        #: Channels that hosts have dialled with a certificate, and what is set when that has expired.
        self._dialled: dict[tuple[Identity, Channel], asyncio.Event] = {}
        self._unsubscribe = writer.subscribe(self._published)

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def hosts(self) -> list[str]:
        """Hosts that are connected."""
        return sorted(self._sessions)

    # --- what the manager wants ---------------------------------------------------------------------------------------

    def _published(self, published: Published) -> None:
        if published.reset:
            # A new term: hosts dial again and tell everything.
            for session in list(self._streams):
                self._end(session, "NewTerm", "the manager begins a new term", RECONNECT_WINDOW_S)
            return
        for effect in published.effects:
            for session in list(self._streams):
                if session.host == effect.host and session.counter == effect.session:
                    self._end(session, effect.reason, effect.message, effect.retry_after_s)
        for host, uids in published.hosts:
            session_ = self._sessions.get(host)
            if session_ is None or session_.end.closed:
                continue
            keep, removed = desired.some(published.state, host, uids)
            keep = tuple(self._reveal(published.state, instance) for instance in keep)
            session_.end.desire(
                published.revision,
                keep,
                removed,
                desired.networks(published.state, host),
                volumes_removed=volumes.removed(published.state, host),
                gpu_orders=gpus.orders(published.state, host),
            )
            session_.woken.set()

    def witness(self, checkpoint: Checkpoint) -> None:
        """Have all hosts keep a place of the audit chain: those that are there now, and those that come."""
        self._checkpoint = checkpoint
        for session in self._sessions.values():
            session.end.witness(checkpoint)
            session.woken.set()

    def _end(self, session: Session, reason: str, message: str, retry_after_s: float) -> None:
        session.end.reject(reason, message, retry_after_s)
        session.woken.set()

    # --- one stream ---------------------------------------------------------------------------------------------------

    async def serve(self, stream: Stream[FromHost, ToHost], identity: Identity | None = None) -> None:
        """Serve a host's stream until either end closes it. ``identity`` is what its certificate says."""
        end = ManagerEnd(self._writer.epoch, window=self._window, reconnect_window_s=RECONNECT_WINDOW_S)
        session = Session(end, identity)
        self._streams[session] = None
        reader = asyncio.create_task(self._read(session, stream), name="host-session-reader")
        reason = "the stream was cut"
        try:
            while True:
                for message in session.take():
                    await stream.send(message)
                if session.end.closed or reader.done():
                    break
                await session.woken.wait()
                session.woken.clear()
            reason = "the stream ended"
        finally:
            session.over.set()
            session.stop_timer()
            reader.cancel()
            self._streams.pop(session, None)
            # Asked to be taken and not in the table: cut between the two, and perhaps known as connected already.
            last = self._sessions.get(session.host, session) is session and session.asked
            if last:
                self._sessions.pop(session.host, None)
            # gRPC cancels this call where the host hangs up, also while it is here: a host that has gone is told as gone.
            leaving = asyncio.create_task(self._leave(session, reader, reason, last=last), name="host-session-end")
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            await asyncio.shield(leaving)

    async def _leave(self, session: Session, reader: "asyncio.Task[None]", reason: str, *, last: bool) -> None:
        await asyncio.gather(reader, return_exceptions=True)
        if last:
            await self._gone(session, reason)

    async def _gone(self, session: Session, reason: str) -> None:
        try:
            await self._writer.submit(HostGone(session.host, session.counter, reason))
        except CasemateError as error:
            log.warning("host %s left unrecorded: %s", session.host, error)

    async def _read(self, session: Session, stream: Stream[FromHost, ToHost]) -> None:
        try:
            await self._read_all(session, stream)
        except ProtocolError as error:
            log.warning("host %s broke the protocol: %s", session.host or "?", error)
            session.end.reject(error.reason, str(error), RECONNECT_WINDOW_S)
        except CasemateError as error:
            # The store failed, or a message did not decode: the host comes back and tells everything again.
            log.warning("session of host %s ends: %s", session.host or "?", error)
            session.end.reject(error.reason, str(error), RECONNECT_WINDOW_S)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("session of host %s failed", session.host or "?")
            session.end.reject("Internal", "the manager failed", RECONNECT_WINDOW_S)
        finally:
            session.woken.set()

    async def _read_all(self, session: Session, stream: Stream[FromHost, ToHost]) -> None:
        try:
            async with asyncio.timeout(HELLO_S):
                first = await stream.receive()
        except TimeoutError:
            raise ProtocolError(f"no Hello within {HELLO_S:g} s") from None
        if first is None:
            return
        hello = session.end.receive(first)
        if not isinstance(hello, Hello):
            raise ProtocolError("a stream begins with Hello")
        await self._admit(session, hello)
        session.woken.set()
        while not session.end.closed:
            message = await stream.receive()
            if message is None:
                return
            got = session.end.receive(message)
            if got is not None:
                await self._take(session, got)
            session.wake()

    async def _admit(self, session: Session, hello: Hello) -> None:
        identity = session.identity
        if identity is not None and identity.host != hello.host:
            # Who it is says the certificate alone; a Hello that says otherwise is a defect or an attack.
            log.warning("host %s says that it is %s", identity.host, hello.host)
            session.end.reject("OtherHost", f"the certificate is that of host {identity.host}", -1.0)
            return
        if self._queued >= QUEUED:
            session.end.reject("Busy", "too many hosts dial at once", RECONNECT_WINDOW_S)
            return
        self._queued += 1
        try:
            async with self._admission:
                session.asked = True
                answer = await self._writer.submit(HostHello(hello, self._seed(), identity.key if identity else None))
        finally:
            self._queued -= 1
        if session.end.closed:
            return  # superseded while it waited
        if isinstance(answer, Turned):
            session.asked = False
            log.warning("host %s is turned away: %s", hello.host, answer.message)
            session.end.reject(answer.reason, answer.message, answer.retry_after_s)
            return
        assert isinstance(answer, Welcomed)
        state = self._writer.state
        if session.end.epoch != state.epoch:
            session.end.reject("NewTerm", "the manager began a new term", RECONNECT_WINDOW_S)
            return
        resume = answer.resume
        session.end.welcome(resume=resume, send_inventory=answer.send_inventory)
        keep, removed = desired.since(state, hello.host, hello.revision) if resume else desired.whole(state, hello.host)
        keep = tuple(self._reveal(state, instance) for instance in keep)
        ended, orders = volumes.removed(state, hello.host), tuple(gpus.orders(state, hello.host))
        if keep or removed or ended or orders or not resume:
            session.end.desire(
                state.revision,
                keep,
                removed,
                desired.networks(state, hello.host),
                snapshot=not resume,
                volumes_removed=ended,
                gpu_orders=orders,
            )
        if self._checkpoint is not None:
            session.end.witness(self._checkpoint)
        self._sessions[hello.host] = session
        log.info("host %s: session %d, %s", hello.host, hello.session, "resumed" if resume else "whole state")

    async def _take(self, session: Session, message: ManagerInput) -> None:
        host, counter = session.host, session.counter
        match message:
            case Inventory():
                await self._submit(HostInventory(host, counter, message))
            case Facts():
                await self._submit(HostFacts(host, counter, message))
                session.end.facts_taken(message.sequence)
            case HostEvent() | Outcome():
                await self._submit(HostNote(host, counter, message))
            case Measurement():
                session.measurement = message
            case Ack() | Bye() | Hello():
                return
        session.end.consumed()

    async def _submit(self, command: Command) -> Answer:
        return await self._writer.submit(command)

    # --- channels -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def open_channel(
        self, host: str, kind: str, instance_uid: str, parameters: Mapping[str, Any]
    ) -> AsyncIterator[Channel]:
        """A channel to an instance of a host. Raises Unavailable where the host is not there or does not dial back."""
        session = self._sessions.get(host)
        if session is None or session.end.closed:
            raise Unavailable(f"host {host} is not connected")
        ticket = secrets.token_urlsafe(24)
        channel = Channel()
        self._tickets[ticket] = channel
        try:
            channel.host = host
            session.end.open_channel(OpenChannel(ticket, kind, instance_uid, parameters))
            session.woken.set()
            await channel.wait_dialled(TICKET_S, session.over)
            yield channel
        finally:
            self._tickets.pop(ticket, None)
            channel.ended.set()

    async def serve_channel(self, stream: Stream[Frame, Frame], identity: Identity | None = None) -> None:
        """Serve a stream that an agent dialled with a ticket, until the asker is done."""
        async with asyncio.timeout(TICKET_S):
            first = await stream.receive()
        # Popped: a ticket is good once.
        channel = self._tickets.pop(first.ticket, None) if isinstance(first, Ticket) else None
        if channel is None or (identity is not None and identity.host != channel.host):
            raise ProtocolError("no such ticket, or it was used, or its time is over")
        channel.dialled(stream)
        if identity is None:
            await channel.ended.wait()
            return
        expired = asyncio.Event()
        self._dialled[identity, channel] = expired
        waits = [asyncio.ensure_future(event.wait()) for event in (channel.ended, expired)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._dialled[identity, channel]
            for wait in waits:
                wait.cancel()
        if not channel.ended.is_set():
            raise ProtocolError("the host's certificate has expired")

    async def end_what_has_expired(self, clock: Callable[[], float], every_s: float = RECHECK_S) -> None:
        """End streams of hosts whose last certificate has expired, until cancelled.

        The key is the host, and the stream has proved it: what counts is the last certificate that was made for it, not the one
        with which the stream was dialled. A host that renews keeps its stream.
        """
        while True:
            await asyncio.sleep(every_s)
            now_s = clock()
            for session in list(self._streams):
                if session.identity is not None and self._has_expired(session.identity, now_s):
                    text = "the host's certificate has expired: it renews with the same key, and dials again"
                    self._end(session, "CertificateExpired", text, 0.0)
            for identity, expired in list(self._dialled.items()):
                if self._has_expired(identity[0], now_s):
                    expired.set()

    def _has_expired(self, identity: Identity, now_s: float) -> bool:
        enrolment = self._writer.state.enrolments.get(identity.host)
        return enrolment is not None and enrolment.key == identity.key and now_s >= enrolment.expires_s

    def close(self, reason: str) -> None:
        """End all sessions; hosts dial again within the window."""
        for session in list(self._streams):
            self._end(session, "Stopping", reason, RECONNECT_WINDOW_S)
