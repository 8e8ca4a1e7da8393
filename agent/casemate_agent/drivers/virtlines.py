"""Connections to one libvirtd, and calls within them.

For: ``casemate_agent.drivers.libvirt``. What may live here: opening, losing and sharing connections; libvirt's event loop; the
translation of libvirt's errors. What is asked of libvirt is not decided here.

Theory of operation. libvirt-python blocks, so every call runs in a ``DeadlineExecutor``; objects of libvirt live and die in
its threads only, because letting go of a connection is itself a call that may hang. libvirt's own event loop runs in one
daemon thread for the whole process. It is apart from asyncio on purpose: keep-alive answers and the detection of a dead
libvirtd must work while our loop is busy, and libvirt allows one event implementation for a process's whole life, which
an asyncio loop is not.

A few connections are kept, and each has one call at a time: two threads within one connection crash libvirt's client before
10.4 (CVE-2024-4418; Debian 12 has 9.0). Whoever finds none free waits for one. A connection that a call hangs in stays with
that call, whose thread closes it when it returns. The first connection brings the events. When libvirt says that one closed
(keep-alive sees a libvirtd that hangs after about 15 s) or a call finds it broken, all are dropped, and a task opens new
ones with growing pauses; meanwhile calls fail at once with Unavailable, so that a libvirtd that is away for a minute costs
nobody more than that.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import libvirt

from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_core.errors import DeadlineExceeded, InternalError, MachineError, NotFound, Unavailable

T = TypeVar("T")
log = logging.getLogger(__name__)

#: Seconds between keep-alive messages, and how many may stay unanswered.
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 2
#: Connections, and so calls at a time. Starts take the better part of a second, and looking must not wait for all of them.
CONNECTIONS = 3
#: An open connection answers in milliseconds; the first one after libvirtd's start probes QEMU for up to 10 s.
OPEN_DEADLINE_S = 30.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
#: Errors that say that the connection, not the call, is broken.
BROKEN = {
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_INVALID_CONN,
    libvirt.VIR_ERR_RPC,
    libvirt.VIR_ERR_AUTH_FAILED,
    libvirt.VIR_ERR_AUTH_UNAVAILABLE,
}
#: Errors that say that our XML is wrong.
OUR_FAULT = {libvirt.VIR_ERR_XML_ERROR, libvirt.VIR_ERR_XML_DETAIL, libvirt.VIR_ERR_XML_INVALID_SCHEMA}


class HypervisorFailed(MachineError):
    """libvirt or QEMU refused; ``code`` is libvirt's (virErrorNumber)."""

    reason = "HypervisorFailed"

    def __init__(self, what: str, text: str, code: int) -> None:
        self.code = code
        super().__init__(f"{what}: {text}")


class _Broken(Unavailable):
    """The connection to libvirtd is gone."""


@dataclass(frozen=True, slots=True, eq=False)
class _Line:
    """One connection; ``era`` counts how often all were opened anew."""

    connection: Any
    era: int


class EventLoop:
    """libvirt's event loop: one daemon thread, for as long as the process lives."""

    _lock = threading.Lock()
    _running = False

    @classmethod
    def ensure(cls) -> None:
        """Have it run. Every later call does nothing."""
        with cls._lock:
            if cls._running:
                return
            # libvirt writes each error to stderr unless told not to; we raise them.
            libvirt.registerErrorHandler(lambda _context, _error: None, None)
            libvirt.virEventRegisterDefaultImpl()
            # Without any timer the loop would sleep until the first descriptor shows up, and miss those added meanwhile.
            libvirt.virEventAddTimeout(1000, lambda _timer, _opaque: None, None)
            threading.Thread(target=cls._run, name="libvirt-events", daemon=True).start()
            cls._running = True

    @staticmethod
    def _run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()


class Lines:
    """The connections to one libvirtd; one event loop. Between ``begin`` and ``end``, ``call`` runs calls.

    ``on_lifecycle`` hears of domains, in libvirt's thread; ``on_back`` that there are connections again, on the loop.
    """

    def __init__(
        self, uri: str, calls: DeadlineExecutor, on_lifecycle: Callable[..., None], on_back: Callable[[], None]
    ) -> None:
        self._uri = uri
        self._calls = calls
        self._on_lifecycle = on_lifecycle
        self._on_back = on_back
        self._era = 0
        self._free: list[_Line] = []
        self._freed = asyncio.Event()
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        self._why_away = "not connected yet"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Connect, and stay connected."""
        self._loop = asyncio.get_running_loop()
        EventLoop.ensure()
        self._keeper = self._loop.create_task(self._keep_connected(), name="libvirt connections")

    async def end(self) -> None:
        """Let go of everything; calls that still hang let go of theirs when they return."""
        assert self._keeper is not None
        self._keeper.cancel()
        with suppress(asyncio.CancelledError):
            await self._keeper
        await self._drop("closed")
        await asyncio.gather(*self._closing)

    async def call(self, what: str, call: Callable[[Any], T], deadline_s: float) -> T:
        """Run ``call`` with a connection in a thread; translate its errors."""
        async with Remaining(deadline_s) as left:
            if not self._connected.is_set() and self._why_away == "not connected yet":
                # Right after the start; later a lost connection is told at once.
                try:
                    await asyncio.wait_for(self._connected.wait(), left())
                except TimeoutError:
                    raise Unavailable(f"{what}: libvirt: {self._why_away}") from None
            line = await self._take(what, left)

            def run() -> T:
                try:
                    return _translated(what, call, line.connection)
                finally:
                    self._end_call(line)

            try:
                return await self._calls.run(what, run, left(), unused=lambda: self._give_back(line))
            except _Broken as error:
                self._mark_lost(str(error), line.era)
                raise

    # --- one call at a time -------------------------------------------------------------------------------------------

    async def _take(self, what: str, left: Callable[[], float]) -> _Line:
        """A connection for one call alone."""
        deadline_s = left()
        while True:
            if not self._connected.is_set():
                raise Unavailable(f"{what}: libvirt is away: {self._why_away}")
            if self._free:
                return self._free.pop()
            self._freed.clear()
            try:
                await asyncio.wait_for(self._freed.wait(), left())
            except TimeoutError:
                raise DeadlineExceeded(f"{what}: no answer of libvirt within {deadline_s:g} s") from None

    def _end_call(self, line: _Line) -> None:
        """In the thread of a call that has ended: its connection is free again, or closed where it was given up."""
        assert self._loop is not None
        if line.era == self._era:
            try:
                self._loop.call_soon_threadsafe(self._give_back, line)
                return
            except RuntimeError:  # the loop is closed: nobody calls any more
                pass
        _close(line.connection)

    def _give_back(self, line: _Line) -> None:
        """On the event loop."""
        if line.era == self._era:
            self._free.append(line)
            self._freed.set()
        else:  # given up since its call ended
            task = asyncio.get_running_loop().create_task(self._close([line]), name="close a libvirt connection")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # --- keeping them -------------------------------------------------------------------------------------------------

    def _on_close(self, _connection: Any, reason: int, era: int) -> None:
        """In libvirt's thread."""
        words = {
            libvirt.VIR_CONNECT_CLOSE_REASON_ERROR: "an error on the socket",
            libvirt.VIR_CONNECT_CLOSE_REASON_EOF: "libvirtd ended",
            libvirt.VIR_CONNECT_CLOSE_REASON_KEEPALIVE: "libvirtd does not answer",
            libvirt.VIR_CONNECT_CLOSE_REASON_CLIENT: "closed",
        }
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._mark_lost, words.get(reason, f"reason {reason}"), era)

    def _mark_lost(self, why: str, era: int) -> None:
        if era != self._era:
            return  # of connections that were dropped already
        if self._connected.is_set():
            log.warning("connection to libvirt lost: %s", why)
        self._why_away = why
        self._connected.clear()
        self._lost.set()
        self._freed.set()  # who waits for a connection waits in vain

    async def _keep_connected(self) -> None:
        """Open the connections, wait until one is lost, and again."""
        pause_s, opened_before = FIRST_PAUSE_S, False
        while True:
            self._lost.clear()
            try:
                await self._open_one(events=True)
            except (MachineError, libvirt.libvirtError) as error:
                self._why_away = str(error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            pause_s = FIRST_PAUSE_S
            if not self._lost.is_set():
                self._connected.set()
                if opened_before:
                    log.info("connection to libvirt is back")
                    self._on_back()
                opened_before = True
                await self._open_more()
            await self._lost.wait()
            await self._drop(self._why_away)

    async def _open_more(self) -> None:
        """The other connections. Without them calls wait for each other, and all goes on."""
        for _ in range(CONNECTIONS - 1):
            if self._lost.is_set():
                return
            try:
                await self._open_one(events=False)
            except (MachineError, libvirt.libvirtError) as error:
                log.warning("there are fewer connections to libvirt than wanted: %s", error)
                return

    async def _open_one(self, *, events: bool) -> None:
        era = self._era
        connection = await self._calls.run("connect", lambda: self._open(era, events), OPEN_DEADLINE_S, discard=_close)
        self._give_back(_Line(connection, era))

    def _open(self, era: int, events: bool) -> Any:
        connection = libvirt.open(self._uri)
        try:
            connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
            connection.registerCloseCallback(self._on_close, era)
            if events:
                connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None)
        except BaseException:
            _close(connection)
            raise
        return connection

    async def _drop(self, why: str) -> None:
        """Let go of the free connections; those within a call are closed when it ends."""
        lines, self._free = self._free, []
        self._era += 1
        self._connected.clear()
        self._freed.set()
        self._why_away = why
        if lines:
            await self._close(lines)

    async def _close(self, lines: list[_Line]) -> None:
        """In a thread: closing one is a call, too."""
        with suppress(MachineError):
            await self._calls.run("close a connection", lambda: _close_all(lines), 5.0)


class Remaining:
    """What is left of a deadline over several steps."""

    def __init__(self, deadline_s: float) -> None:
        self._end = asyncio.get_running_loop().time() + deadline_s

    async def __aenter__(self) -> Callable[[], float]:
        return self._left

    async def __aexit__(self, *_: object) -> None:
        return None

    def _left(self) -> float:
        left = self._end - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineExceeded("no time left")
        return left


def _translated(what: str, call: Callable[[Any], T], connection: Any) -> T:
    try:
        return call(connection)
    except libvirt.libvirtError as error:
        code, domain = error.get_error_code(), error.get_error_domain()
        text = error.get_error_message() or str(error)
        # ``from None``: the error's traceback holds libvirt's objects, and they must not leave this thread.
        if code in OUR_FAULT:
            raise InternalError(f"{what}: {text}") from None
        if code in BROKEN or domain == libvirt.VIR_FROM_RPC or "client socket is closed" in text:
            raise _Broken(f"{what}: {text}") from None
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            raise NotFound("domain", text) from None
        raise HypervisorFailed(what, text, code) from None


def _close(connection: Any) -> None:
    # Callbacks hold the connection: while one is registered, closing it only counts down.
    for number in list(getattr(connection, "domainEventCallbackID", ())):
        with suppress(libvirt.libvirtError):
            connection.domainEventDeregisterAny(number)
    with suppress(libvirt.libvirtError):
        connection.unregisterCloseCallback()
    with suppress(libvirt.libvirtError):
        connection.close()


def _close_all(lines: list[_Line]) -> None:
    while lines:
        _close(lines.pop().connection)
