"""How an agent reaches its manager: a port, and its gRPC form.

What may live here: streams of values. The protocol on them is :mod:`casemate_wire.session`; who dials and when is
:mod:`casemate_agent.uplink.link`. With an identity it is TLS 1.3 with the host's certificate; plain text is spoken on loopback
alone.
"""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from casemate_agent.drivers.passageports import Ends
from casemate_core.errors import CallerError, Unavailable
from casemate_wire.channel import Frame
from casemate_wire.stream import FromHost, ToHost
from casemate_wire.tls import TARGET_NAME

if TYPE_CHECKING:
    import grpc.aio

    from casemate_agent.enrolment.identity import Identity

Out = TypeVar("Out", contravariant=True)
In = TypeVar("In", covariant=True)

#: Dead peers are noticed after the two together, in milliseconds.
KEEPALIVE_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 10_000
#: Parts of a transfer are cut to well under this (casemate_wire.session.PART_CHARACTERS).
MAX_MESSAGE_BYTES = 4 * 2**20
#: How long the manager has to sign a certificate, in seconds.
CERTIFY_S: Final = 10.0
#: Of the service HostLink, for who passes messages on without reading them.
METHODS: Final = {"session": "/casemate.host.v1.HostLink/Session", "channel": "/casemate.host.v1.HostLink/Channel"}


class Stream(Protocol[Out, In]):
    """One open stream. Both methods raise BrokenOff where it broke off."""

    async def send(self, message: Out) -> None:
        """Returns when the transport has taken the message."""
        ...

    async def receive(self) -> In | None:
        """The next message; None where the other end has closed."""
        ...

    async def close(self) -> None:
        """End it; what was sent is delivered where the other end still reads."""
        ...


class Transport(Protocol):
    """The way to one manager."""

    async def session(self) -> Stream[FromHost, ToHost]: ...

    async def channel(self) -> Stream[Frame, Frame]: ...

    async def close(self) -> None: ...


class BrokenOff(Unavailable):
    """The stream ended before it was done."""

    reason = "BrokenOff"


class NotLoopback(CallerError):
    """Without TLS nothing leaves this machine."""

    reason = "NotLoopback"


def checked_address(address: str) -> str:
    """``host:port`` of a manager on this machine. Raises NotLoopback."""
    host, _, port = address.rpartition(":")
    name = host.strip("[]")
    try:
        local = name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        local = False
    if not local or not port.isdigit():
        raise NotLoopback(f"manager {address!r}: only a loopback address and port is dialled, such as 127.0.0.1:7443")
    return address


class GrpcTransport:
    """Dials a manager by gRPC: as the host that ``identity`` gives, or in plain text, on loopback only.

    A certificate that was renewed is shown from the next session on; channels beside a session go with its connection.
    """

    def __init__(self, address: str, identity: "Callable[[], Awaitable[Identity]] | None" = None) -> None:
        self._address = address if identity else checked_address(address)
        self._identity = identity
        self._shown: Identity | None = None
        self._channel: grpc.aio.Channel | None = None

    async def _dialled(self) -> "grpc.aio.Channel":
        """The connection for a new session."""
        import grpc.aio  # takes 200 ms: only for who dials

        options = [
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            # we make our own jitter between sessions; gRPC's back-off must not add to it
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if self._identity is None:
            if self._channel is None:
                self._channel = grpc.aio.insecure_channel(self._address, options=options)
            return self._channel
        identity = await self._identity()
        if self._channel is None or identity is not self._shown:
            await self.close()
            credentials = grpc.ssl_channel_credentials(
                identity.roots.encode(), identity.key.encode(), identity.certificate.encode()
            )
            self._channel = grpc.aio.secure_channel(self._address, credentials, options=[*options, TARGET_NAME])
            self._shown = identity
        return self._channel

    async def session(self) -> Stream[FromHost, ToHost]:
        from casemate_wire.codec.hosts import from_host_to_wire, to_host_from_wire
        from casemate_wire.v1.hosts_pb2_grpc import HostLinkStub

        call = HostLinkStub(await self._dialled()).Session()
        return _GrpcStream(call, from_host_to_wire, to_host_from_wire)

    async def raw(self, kind: str) -> Stream[bytes, bytes]:
        """A ``session`` or a ``channel`` whose messages are passed on as they are, by who does not read them."""
        connection = (self._channel if kind == "channel" else None) or await self._dialled()
        return _GrpcStream(connection.stream_stream(METHODS[kind])(), _same, _same)

    async def channel(self) -> Stream[Frame, Frame]:
        from casemate_wire.codec.channels import frame_from_wire, frame_to_wire
        from casemate_wire.v1.hosts_pb2_grpc import HostLinkStub

        call = HostLinkStub(self._channel or await self._dialled()).Channel()
        return _GrpcStream(call, frame_to_wire, frame_from_wire)

    async def certify(self, host: str, migration: str, request: bytes) -> Ends:
        """A certificate for this host's end of a migration. Raises Unavailable."""
        import grpc.aio

        from casemate_wire.v1.hosts_pb2 import MigrationCertificateRequest
        from casemate_wire.v1.hosts_pb2_grpc import HostLinkStub

        asked = MigrationCertificateRequest(migration=migration, certificate_request=request, host=host)
        try:
            made = await HostLinkStub(self._channel or await self._dialled()).MigrationCertificate(
                asked, timeout=CERTIFY_S
            )
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"the manager does not sign for this migration: {error.details()}") from None
        return Ends(made.certificate, made.issuer, made.end)

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()


def _same(message: bytes) -> bytes:
    return message


def session_codec() -> "Codec[FromHost, ToHost]":
    """Between the values of a session and the bytes of its messages."""
    from casemate_wire.codec.hosts import from_host_to_wire, to_host_from_wire
    from casemate_wire.v1.hosts_pb2 import ToHost as Message

    return Codec(
        lambda value: from_host_to_wire(value).SerializeToString(),
        _decoder(Message.FromString, to_host_from_wire),
    )


def channel_codec() -> "Codec[Frame, Frame]":
    """The same for a channel."""
    from casemate_wire.codec.channels import frame_from_wire, frame_to_wire
    from casemate_wire.v1.hosts_pb2 import ChannelFrame as Message

    return Codec(
        lambda value: frame_to_wire(value).SerializeToString(),
        _decoder(Message.FromString, frame_from_wire),
    )


def _decoder(parse: Callable[[bytes], Any], decode: Callable[[Any], In]) -> Callable[[bytes], In]:
    from google.protobuf.message import DecodeError

    def decoded(data: bytes) -> In:
        try:
            message = parse(data)
        except DecodeError:
            raise BrokenOff(f"what came is no message of the schema ({len(data)} bytes)") from None
        return decode(message)

    return decoded


@dataclass(frozen=True, slots=True)
class Codec(Generic[Out, In]):
    """Both directions; ``decode`` raises what the codec of the schema raises, and BrokenOff for bytes of no schema."""

    encode: Callable[[Out], bytes]
    decode: Callable[[bytes], In]


class _GrpcStream:
    """A bidirectional call of grpc.aio as a Stream."""

    def __init__(self, call, encode, decode) -> None:  # type: ignore[no-untyped-def]
        self._call: grpc.aio.StreamStreamCall[Any, Any] = call
        self._encode = encode
        self._decode = decode

    async def send(self, message: object) -> None:
        import grpc.aio

        try:
            await self._call.write(self._encode(message))
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            raise BrokenOff(f"stream to the manager broke off: {await self._why(error)}") from error

    async def receive(self):  # type: ignore[no-untyped-def]
        import grpc.aio

        try:
            message = await self._call.read()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            raise BrokenOff(f"stream to the manager broke off: {await self._why(error)}") from error
        return None if message is grpc.aio.EOF else self._decode(message)

    async def _why(self, error: Exception) -> str:
        details = getattr(error, "details", None)
        code = getattr(error, "code", None)
        return f"{code().name}: {details()}" if callable(details) and callable(code) else str(error)

    async def close(self) -> None:
        self._call.cancel()


async def frames(stream: Stream[Frame, Frame]) -> AsyncIterator[Frame]:
    """What arrives on a channel, to its end."""
    while (frame := await stream.receive()) is not None:
        yield frame
