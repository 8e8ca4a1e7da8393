"""Serves one channel: the log of a container, a command, a console, a port, files.

What may live here: moving frames between a channel and a guest. What a request names is checked here, because it comes
from another machine; that the instance is on this host, and the caller allowed, was decided by the manager.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from dataclasses import asdict
from typing import Any

from casemate_agent.drivers.ports import Drivers, ExecRequest, ExecSession, Guests
from casemate_agent.drivers.sideports import EOF, ConsoleSession, CopyRequest
from casemate_agent.fsck import leaks
from casemate_agent.ledger.witness import Witness
from casemate_agent.uplink.support import HostSupport
from casemate_agent.uplink.transport import BrokenOff, Stream, frames
from casemate_core.checkpoint import witnessed_to_json
from casemate_core.errors import CallerError, CasemateError, Unavailable
from casemate_wire.channel import (
    Eof,
    ExitCode,
    Failed,
    Frame,
    LogLine,
    Lost,
    Opened,
    Output,
    Resize,
    Signal,
    Stdin,
    Ticket,
)
from casemate_wire.stream import OpenChannel

#: How long the other end may take to close a channel after its last frame.
CLOSE_S = 5.0
#: A command must begin within so many seconds; a console or a connection too.
EXEC_DEADLINE_S = 30.0
#: The guest starts a program to copy, and an emulated one takes its time.
COPY_DEADLINE_S = 60.0


TOO_MANY = "too-many"
"""Kind of a channel that is opened only to say that it is not served."""
JSON_PIECE = 256 * 1024


class BadParameters(CallerError):
    """The request of a channel does not have its shape."""

    reason = "BadParameters"


class _Broke(Exception):
    """What was to be sent ended with an error, while the listener still listens."""

    def __init__(self, error: CasemateError, listener: asyncio.Task[None]) -> None:
        self.error, self.listener = error, listener


async def serve_channel(
    request: OpenChannel,
    stream: Stream[Frame, Frame],
    drivers: Drivers,
    support: HostSupport | None = None,
    witness: Witness | None = None,
) -> None:
    """Say the ticket, serve to the end, and tell how it ended. Raises BrokenOff where the channel itself broke off."""
    await stream.send(Ticket(request.ticket))
    reader: asyncio.Task[None] | None = None
    guests = drivers.guests
    try:
        match request.kind:
            case "logs":
                reader = await _serve_logs(request, stream, guests)
            case "exec":
                reader = await _serve_exec(request, stream, guests)
            case "forward":
                reader = await _serve_forward(request, stream, guests)
            case "copy":
                reader = await _serve_copy(request, stream, guests)
            case "authorize":
                await _serve_authorize(request, stream, guests)
            case "support" if support is not None:
                reader = await _serve_json(stream, support.files())
            case "witness" if witness is not None:
                await _serve_witness(stream, witness)
            case "fsck":
                reader = await _serve_json(stream, _fsck(request, drivers))
            case "console":
                console = await drivers.consoles.open(request.instance, EXEC_DEADLINE_S)
                reader = await _serve_console(stream, console)
            case "console-log":
                since_s = _get(request.parameters, "since_s", float, 0.0)
                reader = await _serve_serial(stream, drivers.serials.read(request.instance, since_s, EXEC_DEADLINE_S))
            case "too-many":
                raise Unavailable("this host serves no more channels at the moment: end some, or try again later")
            case other:
                raise BadParameters(f"no channels of kind {other!r}")
        if reader is not None:
            await stream.send(Eof())
    except BrokenOff:
        raise
    except _Broke as broke:
        reader = broke.listener
        await stream.send(Failed(f"{broke.error.reason}: {broke.error}"))
    except CasemateError as error:
        await stream.send(Failed(f"{error.reason}: {error}"))
    # The other end closes when it has read the last frame; closing first could cut it off.
    with contextlib.suppress(TimeoutError, CasemateError):
        async with asyncio.timeout(CLOSE_S):
            await (reader if reader is not None else _drain(stream))


def _get(parameters: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = parameters.get(name, default)
    if kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return kind(value)
    if not isinstance(value, kind):
        raise BadParameters(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


async def _drain(stream: Stream[Frame, Frame]) -> None:
    """Read until the other end closes; what it says on the way has no meaning here."""
    async for _ in frames(stream):
        pass


async def _serve_json(
    stream: Stream[Frame, Frame], answer: Coroutine[Any, Any, Mapping[str, Any]]
) -> asyncio.Task[None] | None:
    """One JSON object about this host, in pieces."""

    async def send() -> None:
        data = json.dumps(await answer).encode()
        for start in range(0, len(data), JSON_PIECE):
            await stream.send(Output("stdout", data[start : start + JSON_PIECE]))

    return await _until_over(send(), _drain(stream))


async def _serve_witness(stream: Stream[Frame, Frame], witness: Witness) -> None:
    """What this host keeps of the manager's audit chain, as one JSON object."""
    try:
        found = await witness.kept()
    except OSError as error:
        raise Unavailable(f"what this host keeps of the audit chain cannot be read: {error.strerror}") from error
    data = witnessed_to_json(found)
    for start in range(0, len(data), JSON_PIECE):
        await stream.send(Output("stdout", data[start : start + JSON_PIECE]))
    await stream.send(Eof())


async def _fsck(request: OpenChannel, drivers: Drivers) -> Mapping[str, Any]:
    """What is left of somebody on this host, after its repair where that is asked for."""
    machine = await drivers.machine.observe(leaks.DEADLINE_S)
    repair = _get(request.parameters, "repair", bool, False)
    found = await leaks.look(drivers.functions, drivers.partitions, machine.partitionable, repair=repair)
    return {
        "findings": [asdict(finding) for finding in found.findings[: leaks.MOST]],
        "left_off": max(0, len(found.findings) - leaks.MOST),
        "virtual_functions": len(found.facts.vfs),
        "devices": len(found.facts.devices),
        "free": found.free,
    }


async def _serve_logs(request: OpenChannel, stream: Stream[Frame, Frame], guests: Guests) -> asyncio.Task[None] | None:
    p = request.parameters
    tail = _get(p, "tail", int, 0)
    lines = guests.logs(
        request.instance,
        _get(p, "pod", str, ""),
        _get(p, "container", str, ""),
        follow=_get(p, "follow", bool, False),
        tail=tail if tail > 0 else -1,  # to a guest, 0 would be none of them
        since_s=_get(p, "since_s", float, 0.0),
        after_sequence=_get(p, "after", int, 0),
        log=_get(p, "log", str, ""),
        previous=_get(p, "previous", bool, False),
    )

    async def pump() -> None:
        async for line in lines:
            sent = LogLine(
                line.time_s, line.pod, line.container, line.sequence, line.text, line.stream, line.lost, line.log
            )
            await stream.send(sent)

    return await _until_over(pump(), _drain(stream))


async def _serve_exec(request: OpenChannel, stream: Stream[Frame, Frame], guests: Guests) -> asyncio.Task[None] | None:
    p = request.parameters
    argv = _get(p, "argv", list, [])
    environment = _get(p, "environment", Mapping, {})
    if not argv or not all(isinstance(word, str) for word in (*argv, *environment, *environment.values())):
        raise BadParameters("argv: expected a command as a list of words")
    session = await guests.exec(
        request.instance,
        ExecRequest(
            argv=tuple(argv),
            pod=_get(p, "pod", str, ""),
            container=_get(p, "container", str, ""),
            tty=_get(p, "tty", bool, False),
            rows=_get(p, "rows", int, 24),
            columns=_get(p, "columns", int, 80),
            environment=dict(environment),
        ),
        EXEC_DEADLINE_S,
    )

    return await _serve_session(stream, session)


async def _serve_session(stream: Stream[Frame, Frame], session: ExecSession) -> asyncio.Task[None] | None:
    """A session to its end: what it gives, then its exit code."""

    async def pump() -> None:
        async for name, data in session.output():
            await stream.send(Eof() if name == EOF else Output(name, data))
        await stream.send(ExitCode(session.exit_code if session.exit_code is not None else 255))

    try:
        return await _until_over(pump(), _feed(stream, session))
    finally:
        await session.close()


async def _serve_forward(
    request: OpenChannel, stream: Stream[Frame, Frame], guests: Guests
) -> asyncio.Task[None] | None:
    p = request.parameters
    port = _get(p, "port", int, 0)
    if not 0 < port < 65536:
        raise BadParameters(f"port: {port} is none of 1 to 65535")
    session = await guests.dial(
        request.instance, _get(p, "pod", str, ""), _get(p, "container", str, ""), port, EXEC_DEADLINE_S
    )
    try:
        await stream.send(Opened())
    except BaseException:
        await session.close()
        raise
    return await _serve_session(stream, session)


async def _serve_copy(request: OpenChannel, stream: Stream[Frame, Frame], guests: Guests) -> asyncio.Task[None] | None:
    p = request.parameters
    copy = CopyRequest(
        path=_get(p, "path", str, ""),
        into=_get(p, "into", bool, False),
        name=_get(p, "name", str, ""),
        pod=_get(p, "pod", str, ""),
        container=_get(p, "container", str, ""),
    )
    if not copy.path.startswith("/") or "\0" in copy.path + copy.name:
        raise BadParameters("path: expected an absolute path")
    return await _serve_session(stream, await guests.copy(request.instance, copy, COPY_DEADLINE_S))


async def _serve_authorize(request: OpenChannel, stream: Stream[Frame, Frame], guests: Guests) -> None:
    keys = await guests.authorize(request.instance, _get(request.parameters, "key", str, ""), EXEC_DEADLINE_S)
    await stream.send(Output("stdout", "\n".join(keys).encode()))
    await stream.send(ExitCode(0))


async def _serve_serial(stream: Stream[Frame, Frame], parts: AsyncGenerator[bytes, None]) -> asyncio.Task[None] | None:
    """What is kept of a serial console, to its end."""

    async def pump() -> None:
        async with contextlib.aclosing(parts):
            async for data in parts:
                await stream.send(Output("stdout", data))

    return await _until_over(pump(), _drain(stream))


async def _serve_console(stream: Stream[Frame, Frame], console: ConsoleSession) -> asyncio.Task[None] | None:
    """A console until it is gone or the caller hangs up."""

    async def pump() -> None:
        await stream.send(Opened())
        async for item in console.output():
            await stream.send(Lost(item) if isinstance(item, int) else Output("stdout", item))

    async def listen() -> None:
        async for frame in frames(stream):
            if not isinstance(frame, Stdin):
                raise BadParameters(f"{type(frame).__name__} is not for a console")
            await console.input(frame.data)

    try:
        return await _until_over(pump(), listen())
    finally:
        await console.close()


async def _feed(stream: Stream[Frame, Frame], session: ExecSession) -> None:
    """What the caller sends, until it hangs up."""
    async for frame in frames(stream):
        match frame:
            case Stdin(data):
                await session.stdin(data)
            case Eof():
                await session.close_stdin()
            case Resize(rows, columns):
                await session.resize(rows, columns)
            case Signal(number):
                await session.signal(number)
            case _:
                raise BadParameters(f"{type(frame).__name__} is not for an agent")


async def _until_over(pump: Coroutine[Any, Any, None], listen: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """Run both until one is over. The caller's hanging up ends the pump.

    Returns the listener where the pump was over first, raises `_Broke` with it where the pump failed: it goes on, since in
    gRPC to cancel a pending read is to cancel the call, and with it the frames that the other end has not read yet.
    """
    pumping = asyncio.create_task(pump, name="channel-pump")
    listening = asyncio.create_task(listen, name="channel-listen")
    kept = False
    try:
        await asyncio.wait({pumping, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not pumping.done():
            listening.result()
            return None
        try:
            pumping.result()
        except BrokenOff:
            raise
        except CasemateError as error:
            kept = True
            raise _Broke(error, listening) from error
        kept = True
        return listening
    finally:
        ended = [pumping] if kept else [pumping, listening]
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)
