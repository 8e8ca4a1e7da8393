"""The hosts' service: streams of messages become streams of values, and nothing is decided here.

A host that begins a stream with a nonce is told in signed messages (:mod:`casemate_wire.signed`); one to which TLS itself leads
is not, since it knows already who speaks. What only keeps the stream going (credit, acknowledgements) is signed for nobody: who
forges it gains no more than who cuts the stream.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any, Final, Generic, Protocol, TypeVar

import grpc

from casemate_core.checkpoint import Checkpoint
from casemate_core.errors import CallerError
from casemate_manager.api.errors import unary
from casemate_manager.api.peer import Host, Nobody, peer_of
from casemate_manager.movecerts import MoveAuthority
from casemate_manager.pki import key_id_of
from casemate_manager.sessions import Channel, Identity, Sessions
from casemate_wire.channel import Frame, Ticket
from casemate_wire.codec.channels import frame_from_wire, frame_to_wire
from casemate_wire.codec.hosts import from_host_from_wire, to_host_to_wire
from casemate_wire.codec.signed import sealed_to_wire
from casemate_wire.signed import Purpose, Signer, SigningKey
from casemate_wire.stream import Desired, FromHost, Hello, OpenChannel, Operate, ToHost, Welcome
from casemate_wire.v1 import hosts_pb2 as pb
from casemate_wire.v1 import hosts_pb2_grpc

In = TypeVar("In")
Out = TypeVar("Out")
Context = grpc.aio.ServicerContext[Any, Any]
#: What a host acts upon.
SIGNED: Final = (Welcome, Desired, Operate, OpenChannel, Checkpoint)


class Signing(Protocol):
    """What messages are signed with, and the pins of the authorities that are trusted (casemate_manager.api.tls)."""

    def signing(self) -> SigningKey: ...

    @property
    def pins(self) -> tuple[str, ...]: ...


class _Stream(Generic[In, Out]):
    """A bidirectional call, seen from the server, as a stream of values."""

    def __init__(self, context: Context, decode: Callable[[Any], In], encode: Callable[[Out], Any]) -> None:
        self._context = context
        self._decode = decode
        self._encode = encode

    async def receive(self) -> In | None:
        message = await self._context.read()
        # grpc.aio.EOF: the client has half-closed.
        return None if message is grpc.aio.EOF else self._decode(message)

    async def send(self, message: Out) -> None:
        await self._context.write(self._encode(message))


class _Session(_Stream[FromHost, ToHost]):
    """A host's session. Without ``signing`` (plain text) nothing is signed, whatever is asked for."""

    def __init__(self, context: Context, signing: Signing | None, sealing: Callable[[str], bytes]) -> None:
        super().__init__(context, from_host_from_wire, to_host_to_wire)
        self._signing = signing
        self._sealing = sealing
        self._signer: Signer | None = None

    async def receive(self) -> FromHost | None:
        message = await super().receive()
        if isinstance(message, Hello) and message.nonce and self._signing is not None and self._signer is None:
            purpose = Purpose("session", message.host, "", message.nonce)
            self._signer = Signer(self._signing.signing(), purpose, self._sealing(message.host))
        return message

    async def send(self, message: ToHost) -> None:
        if self._signer is None or self._signing is None or not isinstance(message, SIGNED):
            await super().send(message)
            return
        if isinstance(message, Welcome):
            message = replace(message, authorities=self._signing.pins)
        signed = self._signer.sign(to_host_to_wire(message).SerializeToString())
        await self._context.write(pb.ToHost(signed=sealed_to_wire(signed)))


class _Channel(_Stream[Frame, Frame]):
    """A channel of a host."""

    def __init__(
        self,
        context: Context,
        signing: Signing | None,
        sealing: Callable[[str], bytes],
        identity: Identity | None,
    ) -> None:
        super().__init__(context, frame_from_wire, frame_to_wire)
        self._signing = signing
        self._sealing = sealing
        self._identity = identity
        self._signer: Signer | None = None

    async def receive(self) -> Frame | None:
        frame = await super().receive()
        if isinstance(frame, Ticket) and frame.nonce and self._signing is not None and self._identity is not None:
            purpose = Purpose("channel", self._identity.host, frame.ticket, frame.nonce)
            self._signer = Signer(self._signing.signing(), purpose, self._sealing(self._identity.host))
        return frame

    async def send(self, message: Frame) -> None:
        if self._signer is None:
            await super().send(message)
            return
        signed = self._signer.sign(frame_to_wire(message).SerializeToString())
        await self._context.write(pb.ChannelFrame(signed=sealed_to_wire(signed)))


async def _identity(context: Context) -> Identity | None:
    """Whom the caller's certificate names; ends the call of who is no host. None on plain text."""
    match peer_of(context):
        case Host(name, certificate):
            return Identity(name, key_id_of(certificate))
        case Nobody(secure=False):
            return None
        case _:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this service is for hosts, by their certificate")
            raise AssertionError("abort returned")


class HostLink(hosts_pb2_grpc.HostLinkServicer):
    """casemate.host.v1.HostLink."""

    def __init__(
        self,
        sessions: Sessions,
        moves: MoveAuthority,
        signing: Signing | None = None,
        sealing: Callable[[str], bytes] = lambda host: b"",
    ) -> None:
        self._sessions = sessions
        self._moves = moves
        self._signing = signing
        #: The key for which a host's root is told; empty: none.
        self._sealing = sealing

    @unary
    async def MigrationCertificate(
        self, request: pb.MigrationCertificateRequest, context: Context
    ) -> pb.MigrationCertificateResponse:
        """A certificate for one end of one migration."""
        identity = await _identity(context)
        host, key = (identity.host, identity.key) if identity is not None else (request.host, None)
        made = self._moves.issue(host, key, request.migration, request.certificate_request)
        return pb.MigrationCertificateResponse(certificate=made.certificate, issuer=made.issuer, end=made.end)

    # grpc.aio serves a stream by a generator or, as here, by a coroutine that writes; the stub declares the former only.
    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.FromHost], context: Context
    ) -> None:
        """The host's stream, for as long as the agent lives."""
        await self._sessions.serve(_Session(context, self._signing, self._sealing), await _identity(context))

    async def Channel(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.ChannelFrame], context: Context
    ) -> None:
        """A side stream, opened with a ticket."""
        try:
            identity = await _identity(context)
            await self._sessions.serve_channel(_Channel(context, self._signing, self._sealing, identity), identity)
        except CallerError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no ticket in time")


class OpenedChannel:
    """A channel as the operators' service reads it: frames as messages, and an end."""

    def __init__(self, channel: Channel, opened: AbstractAsyncContextManager[Channel]) -> None:
        self._channel = channel
        self._opened = opened

    async def frames(self) -> AsyncIterator[pb.ChannelFrame]:
        """Frames of the agent, to the end. Raises Unavailable where the host says that it failed."""
        async for frame in self._channel:
            yield frame_to_wire(frame)

    async def send(self, frame: pb.ChannelFrame) -> None:
        """Send one frame."""
        await self._channel.send(frame_from_wire(frame))

    async def close(self) -> None:
        """Let the agent go."""
        await self._opened.__aexit__(None, None, None)


class Channels:
    """Opens streams to hosts that are connected."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def open(self, host: str, kind: str, instance: str, parameters: dict[str, Any]) -> OpenedChannel:
        """Ask the host to dial back. Raises Unavailable where it is not connected or does not dial in time."""
        opened = self._sessions.open_channel(host, kind, instance, parameters)
        return OpenedChannel(await opened.__aenter__(), opened)
