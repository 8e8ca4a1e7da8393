"""The socket between the two halves of a split agent, and root's end of it.

An agent can run as two processes: the one that is root and has no network, and the relay, which has the network, the host's
key and nothing else (:mod:`casemate_agent.relay.server`). What may live here: the frames between them, who may be at the
other end, and the three things that root asks the relay for: streams to the manager, files by http, and to be scraped.

Theory of operation. Root dials, always; it listens nowhere. Each connection is for one thing, which its first frame says, and
lives as long as that thing. A frame is a length, a kind and as many bytes; the length is bounded before anything is read, and
whoever sends waits until the socket has taken it, so nothing queues but in the kernel. The kernel says which user is at the
other end (SO_PEERCRED); anybody but the relay's user is hung up on before a word is said.

The relay is not believed. What it passes on counts only as the manager has signed it (:mod:`casemate_agent.relay.trust`), and is
checked as if it came from the network all the same: the schema's codec, the term of the manager, this host's own arithmetic on
every claim, the digest of every file.
"""

import asyncio
import contextlib
import json
import logging
import pwd
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from random import Random
from typing import Any, Final, Generic, TypeVar

from casemate_agent.drivers.http import SourceFailed
from casemate_agent.relay.trust import Trust
from casemate_agent.uplink.transport import MAX_MESSAGE_BYTES, BrokenOff, Codec, Stream, channel_codec, session_codec
from casemate_core.errors import CallerError, MachineError, Unavailable, shown
from casemate_wire.channel import Frame
from casemate_wire.stream import FromHost, ToHost

log = logging.getLogger("casemate.agent.relay")

Out = TypeVar("Out")
In = TypeVar("In")
T = TypeVar("T")

#: Where the relay listens, and as whom, unless told otherwise.
SOCKET: Final = "/run/casemate-relay/relay.sock"
USER: Final = "casemate-relay"
#: A message of the manager, and some room for words.
MAX_PAYLOAD: Final = MAX_MESSAGE_BYTES + 4096
#: Bytes of a file that travel in one frame.
PIECE: Final = 1 << 20
#: Connecting, and the answer to a first frame. Both ends are on one machine.
ANSWER_S: Final = 20.0
#: A relay that does not answer is asked again after a random part of so many seconds.
AGAIN_S: Final = 10.0
MAX_WORDS: Final = 4096

_HEAD = struct.Struct("!IB")
#: struct ucred of unix(7): process, user, group.
_PEER = struct.Struct("3i")


class Kind(IntEnum):
    """Of a frame."""

    ORDER = 1
    """The first of a connection: what it is for, as a JSON object."""
    OPENED = 2
    """The answer to it, as a JSON object."""
    MESSAGE = 3
    END = 4
    """There is no more, and all of it was sent."""
    FAILED = 5
    """It is over, and these words say why."""


class WrongPeer(MachineError):
    """At the other end of the socket is another user than there should be."""

    reason = "WrongPeer"


class NoSuchUser(CallerError):
    """The relay's user is not known to this machine."""

    reason = "NoSuchUser"


def peer_uid(connection: Any) -> int:
    """The user at the other end of a Unix socket, as the kernel says it."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(data)[1])


def uid_of(user: str) -> int:
    """Raises NoSuchUser."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise NoSuchUser(
            f"relay_user: there is no user {shown(user)}; make it (systemd-sysusers casemate-relay.conf)"
        ) from None


class Pipe:
    """A connection as frames. Both methods raise BrokenOff; neither is called twice at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def put(self, kind: Kind, payload: bytes = b"") -> None:
        """Returns when the socket has taken it."""
        if len(payload) > MAX_PAYLOAD:
            raise BrokenOff(
                f"a frame of {len(payload)} bytes is longer than the {MAX_PAYLOAD} that the relay passes on"
            )
        try:
            self._writer.write(_HEAD.pack(len(payload), kind) + payload)
            await self._writer.drain()
        except (ConnectionError, RuntimeError) as error:
            raise BrokenOff(f"the other half of the agent has hung up: {error}") from None

    async def get(self) -> tuple[Kind, bytes] | None:
        """The next frame; None where the other end has closed between two."""
        try:
            head = await self._reader.readexactly(_HEAD.size)
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                return None
            raise BrokenOff("the other half of the agent has hung up within a frame") from None
        except ConnectionError as error:
            raise BrokenOff(f"the other half of the agent has hung up: {error}") from None
        length, number = _HEAD.unpack(head)
        if length > MAX_PAYLOAD or number not in _KINDS:
            raise BrokenOff(f"the other half of the agent does not keep to frames: {length} bytes of kind {number}")
        try:
            return Kind(number), await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise BrokenOff("the other half of the agent has hung up within a frame") from None

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                await self._writer.wait_closed()


#: Messages as they are passed on.
RAW: Final[Codec[bytes, bytes]] = Codec(bytes, bytes)
_KINDS: Final = frozenset(int(kind) for kind in Kind)


def words(payload: bytes) -> str:
    """What a FAILED frame says, made fit to be shown."""
    text = payload[:MAX_WORDS].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text) or "the relay does not say why"


@dataclass(frozen=True, slots=True)
class Relay:
    """Where the relay is, and the user that it must be. ``trust``: whose messages count; None in plain text on loopback, where
    nothing is signed."""

    path: Path
    uid: int
    trust: Trust | None = None

    async def ask(self, kind: str, **more: Any) -> tuple[Pipe, Mapping[str, Any]]:
        """A connection for one thing, and what the relay answers. Raises Unavailable, WrongPeer, BrokenOff."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._ask({"kind": kind, **more})
        except TimeoutError:
            raise Unavailable(f"the relay at {self.path} does not answer within {ANSWER_S:.0f} s") from None

    async def _ask(self, order: Mapping[str, Any]) -> tuple[Pipe, Mapping[str, Any]]:
        try:
            reader, writer = await asyncio.open_unix_connection(str(self.path))
        except OSError as error:
            raise Unavailable(f"no relay at {self.path}: {error.strerror or error}") from None
        pipe = Pipe(reader, writer)
        try:
            if (uid := peer_uid(writer.get_extra_info("socket"))) != self.uid:
                raise WrongPeer(
                    f"at {self.path} listens user {uid}, and the relay is user {self.uid}; nothing was said"
                )
            await pipe.put(Kind.ORDER, json.dumps(order).encode())
            match await pipe.get():
                case (Kind.OPENED, payload):
                    return pipe, _object(payload)
                case (Kind.FAILED, payload):
                    raise Unavailable(words(payload))
                case other:
                    raise BrokenOff(f"the relay does not answer but {'hangs up' if other is None else other[0].name}")
        except BaseException:
            await pipe.close()
            raise

    async def host(self) -> str:
        """The name under which this host joined; empty where it has not. Raises what `ask` raises."""
        pipe, answer = await self.ask("ping")
        await pipe.close()
        name = answer.get("host", "")
        return name if isinstance(name, str) else ""

    # --- streams to the manager ---------------------------------------------------------------------------------------

    async def _stream(self, kind: str, codec: Codec[Out, In]) -> "RelayedStream[Out, In]":
        pipe, _ = await self.ask(kind)
        return RelayedStream(pipe, codec)

    async def session(self) -> Stream[FromHost, ToHost]:
        if self.trust is None:
            return await self._stream("session", session_codec())
        raw = await self._stream("session", RAW)
        return await _or_closed(raw, self.trust.session)

    async def channel(self) -> Stream[Frame, Frame]:
        if self.trust is None:
            return await self._stream("channel", channel_codec())
        raw = await self._stream("channel", RAW)
        return await _or_closed(raw, self.trust.channel)

    async def close(self) -> None:
        """Nothing is kept open between streams."""

    # --- files --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def download(self, source: str, deadline_s: float) -> AsyncIterator[tuple[int | None, AsyncIterator[bytes]]]:
        """The length of a file, where its server says it, and its bytes. Raises SourceFailed, WrongPeer."""
        try:
            pipe, answer = await self.ask("fetch", source=source, deadline_s=deadline_s)
        except Unavailable as error:
            raise SourceFailed(str(error)) from None
        try:
            length = answer.get("length")
            yield (length if type(length) is int and length >= 0 else None), _pieces(pipe)
        finally:
            await pipe.close()

    # --- metrics ------------------------------------------------------------------------------------------------------

    async def be_scraped(self, rendered: Callable[[], Awaitable[bytes]], random: Random) -> None:
        """Answer the relay whenever somebody scrapes it; until cancelled."""
        while True:
            with contextlib.suppress(Unavailable, WrongPeer):  # that the relay is away is told by the session
                pipe, _ = await self.ask("metrics")
                try:
                    while (frame := await pipe.get()) is not None and frame[0] is Kind.MESSAGE:
                        await pipe.put(Kind.MESSAGE, await rendered())
                finally:
                    await pipe.close()
            await asyncio.sleep(random.uniform(0, AGAIN_S))


class RelayedStream(Generic[Out, In]):
    """A stream to the manager, by way of the relay."""

    def __init__(self, pipe: Pipe, codec: Codec[Out, In]) -> None:
        self._pipe = pipe
        self._codec = codec

    async def send(self, message: Out) -> None:
        await self._pipe.put(Kind.MESSAGE, self._codec.encode(message))

    async def receive(self) -> In | None:
        match await self._pipe.get():
            case (Kind.MESSAGE, payload):
                return self._codec.decode(payload)
            case (Kind.END, _):
                return None
            case (Kind.FAILED, payload):
                raise BrokenOff(words(payload))
            case None:
                raise BrokenOff("the relay has hung up")
            case (kind, _):
                raise BrokenOff(f"the relay sends {kind.name} within a stream")

    async def close(self) -> None:
        await self._pipe.close()


async def _or_closed(raw: RelayedStream[bytes, bytes], wrap: Callable[[RelayedStream[bytes, bytes]], T]) -> T:
    """The stream within another, which does not stay open where there is none."""
    try:
        return wrap(raw)
    except BaseException:
        await raw.close()
        raise


async def _pieces(pipe: Pipe) -> AsyncIterator[bytes]:
    while True:
        try:
            frame = await pipe.get()
        except BrokenOff as error:
            raise SourceFailed(str(error)) from None
        match frame:
            case (Kind.MESSAGE, payload):
                yield payload
            case (Kind.END, _):
                return
            case (Kind.FAILED, payload):
                raise SourceFailed(words(payload))
            case _:
                raise SourceFailed("the relay has hung up within a file")


def _object(payload: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(payload[:MAX_WORDS])
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BrokenOff("the relay's answer is no JSON object")
    return found
