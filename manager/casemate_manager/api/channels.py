"""The service of side streams: console, ports, files, a key for SSH. Which instance is meant, and frames moved both ways.

What may live here: the checks of what a caller names, and the translation between its messages and the host's frames. As
in `side`, nothing is buffered: who does not read holds up the other end through the flow control of both streams.

Theory of operation. Each stream is `_bridge`: the caller's first message says what is meant, a channel is opened on the
host, then two tasks move what comes. The caller's hanging up ends the channel. A host that ends it without its last word
(it was killed, or lost its way to us) is told as Unavailable: a caller never takes a cut for an end.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Final, Protocol, TypeVar

import grpc

from casemate_core.errors import InvalidSpec, Unavailable, Violation, shown
from casemate_core.spec.access import Scope
from casemate_manager.access import ACTIONS
from casemate_manager.api import side
from casemate_manager.api.errors import streaming, unary
from casemate_manager.api.gate import caller
from casemate_manager.api.lookup import Reader, instance_named
from casemate_manager.fleet.acts import Actor
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import InstanceRecord
from casemate_manager.fleet.state import State
from casemate_manager.tickets import Tickets
from casemate_wire.v1 import channels_pb2 as pb
from casemate_wire.v1 import channels_pb2_grpc, hosts_pb2, seriallog_pb2, tickets_pb2

MAX_PATH: Final = 4096
MAX_KEY: Final = 16 * 1024
#: Types of public keys that sshd takes; a line that begins otherwise could hold options.
KEY_TYPES: Final = ("ssh-ed25519 ", "ssh-rsa ", "ecdsa-sha2-", "sk-ssh-ed25519@openssh.com ", "sk-ecdsa-sha2-")

Context = grpc.aio.ServicerContext[Any, Any]
In = TypeVar("In")
Out = TypeVar("Out")
Frame = hosts_pb2.ChannelFrame


class Core(Protocol):
    """What is read of the manager."""

    @property
    def state(self) -> State: ...

    @property
    def observed(self) -> Observed: ...

    def sessions_of(self, by: Actor) -> side.SessionLog:
        """Writes down the sessions of one caller."""
        ...


class ChannelsService(channels_pb2_grpc.ChannelsServicer):
    """casemate.v1.Channels."""

    def __init__(self, core: Core, channels: side.Channels, tickets: Tickets) -> None:
        self._core = core
        self._channels = channels
        self._tickets = tickets

    @unary
    async def Admit(self, request: tickets_pb2.TicketRequest, context: Context) -> tickets_pb2.Ticket:
        """A ticket for one stream."""
        permission = ACTIONS.get(request.action)
        if permission is None:
            words = ", ".join(sorted(ACTIONS))
            raise _bad("action", request.action, "is nothing that a ticket is for", f"write one of {words}")
        asking, instance = caller(), instance_named(self._core.state, request.tenant, request.instance)
        meta = instance.meta
        await asking.require(permission, Scope(meta.tenant, instance.environment), "Instance", meta.name)
        ticket, expires_s = self._tickets.issue(asking.actor.principal.name, request.action, meta.uid)
        answer = tickets_pb2.Ticket(ticket=ticket, instance_uid=meta.uid)
        answer.expires.FromMilliseconds(round(expires_s * 1000))
        return answer

    @streaming
    async def Console(
        self, request_iterator: AsyncIterator[pb.ConsoleInput], context: Context
    ) -> AsyncIterator[pb.ConsoleOutput]:
        """The serial console of an instance."""
        first = await _first(request_iterator, "start")
        instance, _ = self._target(first.start, container=False)
        bridge = self._bridge("console", instance, {}, request_iterator, _console_in)
        async with aclosing(bridge):
            async for frame in bridge:
                match frame.WhichOneof("frame"):
                    case "opened":
                        yield pb.ConsoleOutput(opened=True)
                    case "stdout":
                        yield pb.ConsoleOutput(data=frame.stdout)
                    case "lost":
                        yield pb.ConsoleOutput(lost=frame.lost)
                    case "eof":
                        yield pb.ConsoleOutput(closed=True)

    @streaming
    async def ConsoleLog(
        self, request: seriallog_pb2.ConsoleLogRequest, context: Context
    ) -> AsyncIterator[seriallog_pb2.ConsoleLogPart]:
        """What an instance wrote to its serial console."""
        instance, _ = self._target(pb.ChannelTarget(tenant=request.tenant, instance=request.instance))
        since_s = request.since.seconds + request.since.nanos / 1e9
        bridge = self._bridge("console-log", instance, {"since_s": since_s}, None, _nothing_in)
        async with aclosing(bridge):
            async for frame in bridge:
                if frame.WhichOneof("frame") == "stdout":
                    yield seriallog_pb2.ConsoleLogPart(data=frame.stdout)

    @streaming
    async def Forward(
        self, request_iterator: AsyncIterator[pb.ForwardInput], context: Context
    ) -> AsyncIterator[pb.ForwardOutput]:
        """One connection to a port."""
        start = (await _first(request_iterator, "start")).start
        if not 0 < start.port < 65536:
            raise _bad("port", str(start.port), "is no port", "write 1 to 65535")
        instance, where = self._target(start.target, container=False)
        bridge = self._bridge("forward", instance, where | {"port": start.port}, request_iterator, _forward_in)
        async with aclosing(bridge):
            async for frame in bridge:
                match frame.WhichOneof("frame"):
                    case "opened":
                        yield pb.ForwardOutput(opened=True)
                    case "stdout":
                        yield pb.ForwardOutput(data=frame.stdout)
                    case "eof":
                        yield pb.ForwardOutput(eof=True)
                    case "exit_code":
                        yield pb.ForwardOutput(closed=True)

    @streaming
    async def Copy(
        self, request_iterator: AsyncIterator[pb.CopyInput], context: Context
    ) -> AsyncIterator[pb.CopyOutput]:
        """Files in or out, as an archive."""
        start = (await _first(request_iterator, "start")).start
        if not start.path.startswith("/") or len(start.path) > MAX_PATH or "\0" in start.path:
            raise _bad("path", start.path, "is not an absolute path", "begin it with /")
        if start.into and (start.name in ("", ".", "..") or "/" in start.name or "\0" in start.name):
            raise _bad("name", start.name, "cannot be the name of a copy", "name a file without /")
        instance, where = self._target(start.target)
        parameters = where | {"into": start.into, "path": start.path, "name": start.name}
        bridge = self._bridge("copy", instance, parameters, request_iterator, _copy_in)
        async with aclosing(bridge):
            async for frame in bridge:
                match frame.WhichOneof("frame"):
                    case "stdout":
                        yield pb.CopyOutput(data=frame.stdout)
                    case "stderr":
                        yield pb.CopyOutput(message=frame.stderr)
                    case "exit_code":
                        yield pb.CopyOutput(exit_code=frame.exit_code)

    @unary
    async def Authorize(self, request: pb.AuthorizeRequest, context: Context) -> pb.AuthorizeResponse:
        """Lets a public key in by SSH; the instance's host keys."""
        key = request.public_key.strip()
        if not key.startswith(KEY_TYPES) or len(key) > MAX_KEY or not key.isprintable():
            raise _bad(
                "public_key", key[:40], "is no public key", "send one line as in authorized_keys, without options"
            )
        instance, _ = self._target(request.target, container=False)
        text = b""
        bridge = self._bridge("authorize", instance, {"key": key}, None, _nothing_in)
        async with aclosing(bridge):
            async for frame in bridge:
                if frame.WhichOneof("frame") == "stdout":
                    text = (text + frame.stdout)[:MAX_KEY]
        keys = [line for line in text.decode(errors="replace").splitlines() if line]
        return pb.AuthorizeResponse(host_keys=keys, instance_uid=instance.meta.uid)

    def _target(self, target: pb.ChannelTarget, *, container: bool = True) -> tuple[InstanceRecord, dict[str, Any]]:
        """The instance that is meant, and where in it."""
        state = self._core.state
        reader = Reader(state, self._core.observed)
        if not target.pod:
            return reader.instance(target.tenant, target.instance), {"pod": "", "container": ""}
        if container or target.container:
            instance, pod, name = side.container_of(
                state, reader, target.tenant, target.instance, target.pod, target.container
            )
            return instance, {"pod": pod, "container": name}
        instance = reader.instance(target.tenant, target.instance)
        return instance, {"pod": side.pod_of(state, instance, target.pod), "container": ""}

    async def _bridge(
        self,
        kind: str,
        instance: InstanceRecord,
        parameters: dict[str, Any],
        inputs: AsyncIterator[In] | None,
        translate: Callable[[In], Frame | None],
    ) -> AsyncGenerator[Frame, None]:
        """Frames of the host up to its last word; what the caller sends goes the other way meanwhile."""
        host, log = side.host_of(self._core.state, instance), self._core.sessions_of(caller().actor)
        channel = await side.opened(self._channels, log, host, kind, instance, parameters, _detail(parameters))
        ended = "the caller hung up, or the channel broke"
        feeding = (
            None if inputs is None else asyncio.create_task(_feed(channel, inputs, translate), name=f"{kind}-input")
        )
        try:
            last = False
            async for frame in channel.frames():
                last = frame.WhichOneof("frame") in (("eof",) if kind in ("console", "console-log") else ("exit_code",))
                yield frame
                if last:
                    ended = "to its end"
                    return
            raise Unavailable(
                f"the host ended the {kind} channel before its end: its agent was stopped, or is out of reach"
            )
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
            with contextlib.suppress(Unavailable):
                await channel.close()
            await log.ended(kind, instance.meta.tenant, instance.meta.name, ended)


def _detail(parameters: dict[str, Any]) -> str:
    """What a session was for, in the words of its request; of a key, its type and no more."""
    if "key" in parameters:
        return f"key {parameters['key'].partition(' ')[0]}"
    if "path" in parameters:
        return f"{'into' if parameters['into'] else 'out of'} {shown(parameters['path'])}"
    return f"port {parameters['port']}" if "port" in parameters else ""


async def _feed(channel: side.Channel, inputs: AsyncIterator[In], translate: Callable[[In], Frame | None]) -> None:
    """What the caller sends. The end of its stream without a word of its own is no end of the data: it hung up."""
    async for item in inputs:
        frame = translate(item)
        if frame is None:
            raise _bad("input", "", "is not understood", "send data, or its end")
        await channel.send(frame)


def _console_in(item: pb.ConsoleInput) -> Frame | None:
    return Frame(stdin=item.data) if item.WhichOneof("input") == "data" else None


def _forward_in(item: pb.ForwardInput) -> Frame | None:
    match item.WhichOneof("input"):
        case "data":
            return Frame(stdin=item.data)
        case "eof":
            return Frame(eof=True)
    return None


def _copy_in(item: pb.CopyInput) -> Frame | None:
    match item.WhichOneof("input"):
        case "data":
            return Frame(stdin=item.data)
        case "eof":
            return Frame(eof=True)
    return None


def _nothing_in(item: object) -> Frame | None:
    return None


async def _first(inputs: AsyncIterator[Any], word: str) -> Any:
    first = await anext(inputs, None)
    if first is None or first.WhichOneof("input") != word:
        raise _bad(word, "", "is missing", "say first which instance is meant")
    return first


def _bad(field: str, value: str, problem: str, remedy: str) -> InvalidSpec:
    return InvalidSpec((Violation(field, shown(value) if value else "", problem, remedy),))
