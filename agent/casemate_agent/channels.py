"""Serves one channel: the log of a container, or a command.

What may live here: moving frames between a channel and a guest. What a request names is checked here, because it comes
from another machine; that the instance is on this host, and the caller allowed, was decided by the manager.
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from typing import Any

from casemate_agent.drivers.ports import ExecRequest, ExecSession, Guests
from casemate_agent.transport import BrokenOff, Stream, frames
from casemate_core.errors import CallerError, CasemateError
from casemate_wire.channel import Eof, ExitCode, Failed, Frame, LogLine, Output, Resize, Signal, Stdin, Ticket
from casemate_wire.stream import OpenChannel

#: How long the other end may take to close a channel after its last frame.
CLOSE_S = 5.0
#: A command must begin within so many seconds.
EXEC_DEADLINE_S = 30.0


class BadParameters(CallerError):
    """The request of a channel does not have its shape."""

    reason = "BadParameters"


async def serve_channel(request: OpenChannel, stream: Stream[Frame, Frame], guests: Guests) -> None:
    """Say the ticket, serve to the end, and tell how it ended. Raises BrokenOff where the channel itself broke off."""
    await stream.send(Ticket(request.ticket))
    reader: asyncio.Task[None] | None = None
    try:
        match request.kind:
            case "logs":
                reader = await _serve_logs(request, stream, guests)
            case "exec":
                reader = await _serve_exec(request, stream, guests)
            case other:
                raise BadParameters(f"no channels of kind {other!r}")
        if reader is not None:
            await stream.send(Eof())
    except BrokenOff:
        raise
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
    )

    async def pump() -> None:
        async for line in lines:
            await stream.send(
                LogLine(line.time_s, line.pod, line.container, line.sequence, line.text, line.stream, line.lost)
            )

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

    async def pump() -> None:
        async for name, data in session.output():
            await stream.send(Output(name, data))
        await stream.send(ExitCode(session.exit_code if session.exit_code is not None else 255))

    try:
        return await _until_over(pump(), _feed(stream, session))
    finally:
        await session.close()


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
    """Run both until one is over. What the pump raises is raised; the caller's hanging up ends the pump.

    Returns the listener where the pump was over first: it goes on, since in gRPC to cancel a pending read is to cancel the
    call, and with it the frames that the other end has not read yet.
    """
    pumping = asyncio.create_task(pump, name="channel-pump")
    listening = asyncio.create_task(listen, name="channel-listen")
    kept = False
    try:
        await asyncio.wait({pumping, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not pumping.done():
            listening.result()
            return None
        pumping.result()
        kept = True
        return listening
    finally:
        ended = [pumping] if kept else [pumping, listening]
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)
