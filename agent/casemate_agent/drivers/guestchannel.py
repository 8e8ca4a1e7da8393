"""The connection to one guest's helper: dialled, greeted, held within bounds.

What may live here: the session on one port, its requests and streams. What is asked of guests is `guest`.

Theory of operation. `GuestChannel` keeps one connection to one guest: it dials, says hello with a session name of its
own, and takes nothing for true before the answer carries that name. It dials again when QEMU or the agent was restarted,
and says hello again when the helper was (``here``). All that waits for a guest fails with `Unavailable` when its session
ends; a log that is being followed is taken up where it stopped.

A guest is hostile: each message is parsed by `guestwire`, more than `MAX_REJECTED` bad ones close the connection for a
while, more than `FRAMES_PER_S` frames are not read (its socket fills, nobody else notices), of notes `NOTES_PER_S` go on
and the rest is counted, pods are kept as the last report alone, and a stream sends only what we granted.
"""

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from casemate_agent.drivers import guestwire as wire
from casemate_agent.drivers.ports import (
    GuestEvent,
    GuestGone,
    GuestHello,
    GuestNote,
    GuestPods,
    GuestRefused,
)
from casemate_agent.guest.casemate_guest.frames import CHUNK, PROTOCOL, STDIN_WINDOW, Decoder, encode
from casemate_core.errors import DeadlineExceeded, MachineError, Unavailable

GREET_EVERY_S = 5.0
"""How long the answer to a hello may take before it is said again: a guest that boots answers when its helper is up."""
DIAL_FIRST_S, DIAL_MAX_S = 0.05, 2.0
FRAMES_PER_S, FRAMES_BURST = 2000.0, 4000.0
NOTES_PER_S, NOTES_BURST = 10.0, 100.0
MAX_REJECTED = 100
PENALTY_S = 30.0


class GuestMisbehaved(MachineError):
    """The guest broke the protocol."""

    reason = "GuestMisbehaved"


class Bucket:
    """A token bucket: ``rate`` a second, ``burst`` at once. The caller gives the time (seconds, monotonic)."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._tokens, self._at = burst, 0.0

    def wait_s(self, now_s: float) -> float:
        """Take a token; seconds until it would have been there, 0 where it is."""
        self._tokens = min(self._burst, self._tokens + (now_s - self._at) * self._rate)
        self._at = now_s
        self._tokens -= 1
        return max(0.0, -self._tokens / self._rate)

    def take(self, now_s: float) -> bool:
        """Take a token if there is one."""
        if self.wait_s(now_s) > 0:
            self._tokens += 1
            return False
        return True


class GuestStream:
    """What came in on one stream and was not taken yet; the guest cannot send more than it was granted."""

    def __init__(self, credit: int) -> None:
        self.items: deque[wire.GuestMessage] = deque()
        self.owed = credit  # bytes that the guest may still send
        self.input_room = STDIN_WINDOW
        self.changed = asyncio.Event()
        self.ended = False
        self.failure: Exception | None = None

    def put(self, item: wire.GuestMessage, size: int) -> None:
        """Raises Rejected when the guest sends more than it was granted."""
        self.owed -= size
        # A line may exceed the credit by one chunk, else a long line would never come.
        if self.owed < -2 * CHUNK or len(self.items) > 10_000:
            raise wire.Rejected("more than was granted")
        self.items.append(item)
        self.changed.set()

    def fail(self, error: Exception) -> None:
        if not self.ended:
            self.ended, self.failure = True, error
        self.changed.set()

    async def get(self) -> wire.GuestMessage | None:
        """The next item; None at the end. Raises what ended the stream, once all items are taken."""
        while not self.items:
            if self.failure is not None:
                raise self.failure
            if self.ended:
                return None
            self.changed.clear()
            await self.changed.wait()
        return self.items.popleft()


class GuestChannel:
    """The connection to one guest. `run` keeps it; everything else works while `greeted` is set."""

    def __init__(self, uid: str, path: str, on_event: Callable[[GuestEvent], None]) -> None:
        self.uid, self.path = uid, path
        self._on_event = on_event
        self._writer: asyncio.StreamWriter | None = None
        self._session = ""
        self.greeted = asyncio.Event()
        self.hello: wire.Hello | None = None
        self._next = 0
        self._answers: dict[int, asyncio.Future[str]] = {}
        self._streams: dict[int, GuestStream] = {}
        self._frames = Bucket(FRAMES_PER_S, FRAMES_BURST)
        self._notes = Bucket(NOTES_PER_S, NOTES_BURST)
        self._suppressed = 0
        self.rejected = 0
        #: Set when nobody keeps this connection any more.
        self.let_go = asyncio.Event()

    # The connection.

    async def run(self) -> None:
        """Dial, serve, dial again; ends by cancellation alone."""
        pause_s = DIAL_FIRST_S
        try:
            while True:
                try:
                    reader, self._writer = await asyncio.open_unix_connection(self.path)
                except OSError:
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * 2, DIAL_MAX_S)
                    continue
                began = time.monotonic()
                try:
                    await self._serve(reader)
                except GuestMisbehaved as error:
                    self._event(GuestNote(self.uid, "", error.reason, str(error), "Warning", time.time()))
                    self._drop()
                    await asyncio.sleep(PENALTY_S)
                except OSError:
                    pass
                finally:
                    self._drop()
                # QEMU takes a host only while another is not there: one that hangs up at once is tried less often.
                pause_s = DIAL_FIRST_S if time.monotonic() - began > 1.0 else min(pause_s * 2, DIAL_MAX_S)
                await asyncio.sleep(pause_s)
        finally:
            self.let_go.set()
            self._drop()

    async def greeted_again(self) -> None:
        """Wait for the next session, however long it takes. Raises Unavailable where the guest was let go."""
        greeted = asyncio.ensure_future(self.greeted.wait())
        let_go = asyncio.ensure_future(self.let_go.wait())
        try:
            await asyncio.wait({greeted, let_go}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            greeted.cancel()
            let_go.cancel()
        if self.let_go.is_set():
            raise Unavailable(f"the guest {self.uid} is off, or no longer on this host")

    def _drop(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._end_session(f"the channel of {self.uid} was closed")
            self._event(GuestGone(self.uid))

    def _end_session(self, why: str) -> None:
        self.greeted.clear()
        self.hello = None
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Unavailable(why))
                answer.exception()  # looked at: who asked may have gone
        self._answers.clear()
        for stream in self._streams.values():
            stream.fail(Unavailable(why))
        self._streams.clear()

    def _greet(self) -> None:
        self._end_session(f"the helper of {self.uid} was started anew")
        self._session = secrets.token_hex(8)
        self._write({"t": "hello", "v": PROTOCOL, "session": self._session})

    async def _serve(self, reader: asyncio.StreamReader) -> None:
        decoder = Decoder()
        rejected = 0
        self._greet()
        while True:
            try:
                # The timer is for the greeting alone; while greeted, a silent guest costs nothing.
                async with asyncio.timeout(None if self.greeted.is_set() else GREET_EVERY_S):
                    data = await reader.read(64 * 1024)
            except TimeoutError:
                self._greet()
                continue
            if not data:
                return
            dropped = decoder.dropped
            for header, payload in decoder.feed(data):
                pause_s = self._frames.wait_s(time.monotonic())
                if pause_s > 0:
                    await asyncio.sleep(pause_s)
                try:
                    self._take(wire.parse(header, payload))
                except wire.Rejected:
                    rejected += 1
            # Pieces that are no frames come from a session before ours, or from a guest that plays.
            if self.greeted.is_set():
                rejected += decoder.dropped - dropped
            self.rejected = rejected
            if rejected > MAX_REJECTED:
                raise GuestMisbehaved(f"more than {MAX_REJECTED} messages that are none")

    def _take(self, message: wire.GuestMessage) -> None:
        if isinstance(message, wire.Here):
            self._greet()
            return
        if isinstance(message, wire.Hello):
            if message.session == self._session and message.version == PROTOCOL:
                self.hello = message
                self.greeted.set()
                self._write({"t": "notes"})
                self._event(_greeting(self.uid, message, message.cloud_init))
            return
        if not self.greeted.is_set():
            return  # of an older session
        match message:
            case wire.Pods(revision=revision, pods=pods):
                self._event(GuestPods(self.uid, pods, revision))
            case wire.CloudInit(status=status, errors=errors):
                if self.hello is not None:
                    self._event(_greeting(self.uid, self.hello, message))
                severity = "Warning" if status == "error" else "Normal"
                text = "; ".join(errors) or f"cloud-init: {status}"
                self._note(GuestNote(self.uid, "", "CloudInit" + status.title(), text, severity, time.time()))
            case wire.Note():
                where = f"{message.container}: " if message.container else ""
                text = where + message.message
                self._note(GuestNote(self.uid, message.pod, message.reason, text, message.severity, message.time_s))
            case wire.Done(id=number, error=error, text=text):
                answer = self._answers.pop(number, None)
                if answer is None and error and number in self._streams:
                    self._take(
                        wire.End(number, None, error)
                    )  # a helper of an earlier release does not know the request
                if answer is not None and not answer.done():
                    if error:
                        answer.set_exception(GuestRefused(error))
                    else:
                        answer.set_result(text)
            case wire.Opened() | wire.Gap() | wire.Eof():
                self._put(message.stream, message, 0)
            case wire.LogChunk(data=data) | wire.Data(data=data):
                self._put(message.stream, message, len(data))
            case wire.Credit(stream=number, amount=amount):
                if (stream := self._streams.get(number)) is not None:
                    stream.input_room = min(stream.input_room + amount, STDIN_WINDOW)
                    stream.changed.set()
            case wire.End(stream=number):
                if (stream := self._streams.pop(number, None)) is not None:
                    stream.put(message, 0)
                    stream.ended = True
            case wire.Addresses():
                pass  # the manager gave them out, so it knows them

    def _put(self, number: int, message: wire.GuestMessage, size: int) -> None:
        stream = self._streams.get(number)
        if stream is not None:
            stream.put(message, size)

    def _note(self, note: GuestNote) -> None:
        if not self._notes.take(time.monotonic()):
            self._suppressed += 1
            return
        if self._suppressed:
            text = f"{self._suppressed} notes of the guest were left out: it says more than {NOTES_PER_S:.0f} a second"
            self._suppressed = 0
            self._event(GuestNote(self.uid, "", "NotesLeftOut", text, "Warning", time.time()))
        self._event(note)

    def _event(self, event: GuestEvent) -> None:
        self._on_event(event)

    def _write(self, header: Mapping[str, Any], payload: bytes = b"") -> None:
        if self._writer is None:
            raise Unavailable(f"the helper of {self.uid} is not connected")
        self._writer.write(encode(dict(header), payload))

    # Requests.

    async def connected(self, deadline_s: float) -> None:
        """Wait for a session. Raises Unavailable."""
        try:
            async with asyncio.timeout(deadline_s):
                await self.greeted.wait()
        except TimeoutError as error:
            raise Unavailable(f"the helper of {self.uid} is not connected") from error

    async def call(self, header: Mapping[str, Any], payload: bytes, deadline_s: float) -> str:
        """Ask, and wait until it is done; the text of the answer. Raises Unavailable, DeadlineExceeded, GuestRefused."""
        if not self.greeted.is_set():
            raise Unavailable(f"the helper of {self.uid} is not connected")
        self._next += 1
        number = self._next
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._write({**header, "id": number}, payload)
            async with asyncio.timeout(deadline_s):
                return await answer
        except TimeoutError as error:
            raise DeadlineExceeded(f"{header['t']}: no answer of the guest within {deadline_s:.0f} s") from error
        finally:
            self._answers.pop(number, None)

    async def open(
        self, header: Mapping[str, Any], credit: int, deadline_s: float
    ) -> "tuple[int, GuestStream, wire.Opened]":
        """Open a stream. Raises Unavailable, DeadlineExceeded, GuestRefused."""
        if not self.greeted.is_set():
            raise Unavailable(f"the helper of {self.uid} is not connected")
        self._next += 1
        number = self._next
        stream = self._streams[number] = GuestStream(credit)
        try:
            self._write({**header, "s": number, "id": number, "credit": credit})
            async with asyncio.timeout(deadline_s):
                first = await stream.get()
        except TimeoutError as error:
            self.close(number)
            raise DeadlineExceeded(f"{header['t']}: no answer of the guest within {deadline_s:.0f} s") from error
        except asyncio.CancelledError:
            self.close(number)
            raise
        if isinstance(first, wire.Opened):
            return number, stream, first
        self._streams.pop(number, None)
        raise GuestRefused(first.error if isinstance(first, wire.End) and first.error else "the stream was not opened")

    def granted(self, number: int, stream: GuestStream, size: int) -> None:
        """``size`` bytes of a stream were used: the guest may send as many."""
        if size and number in self._streams:
            stream.owed += size
            with contextlib.suppress(Unavailable):
                self._write({"t": "credit", "s": number, "n": size})

    def close(self, number: int) -> None:
        """End a stream; nothing happens where it has ended."""
        if self._streams.pop(number, None) is not None:
            with contextlib.suppress(Unavailable):
                self._write({"t": "close", "s": number})

    def send(self, number: int, header: Mapping[str, Any], payload: bytes = b"") -> None:
        """Send something on a stream that is open; nothing happens where it has ended."""
        if number in self._streams:
            self._write({**header, "s": number}, payload)


def _greeting(uid: str, hello: wire.Hello, cloud_init: wire.CloudInit) -> GuestHello:
    return GuestHello(uid, hello.boot_id, hello.helper, cloud_init.status, "; ".join(cloud_init.errors)[:1000])
