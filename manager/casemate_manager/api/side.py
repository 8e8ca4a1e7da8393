"""Side streams of instances: the log of a container, a command. Which one is meant, and frames moved both ways.

The host dials a channel back when the manager asks (`Channels`). Nothing is buffered here: a caller that does not read
stops the guest's writing, through the flow control of both streams.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol

from casemate_core.errors import Conflict, InvalidSpec, NotFound, Unavailable, Violation, shown
from casemate_core.spec.pod import pod_name
from casemate_manager.api.lookup import Reader
from casemate_manager.fleet.records import InstanceRecord
from casemate_manager.fleet.state import State
from casemate_wire.v1 import hosts_pb2
from casemate_wire.v1 import operators_pb2 as pb

MAX_TAIL: Final = 100_000
MAX_LOG_NAME: Final = 256
MAX_WORDS: Final = 1024
MAX_COMMAND_BYTES: Final = 128 * 1024
MAX_TERMINAL: Final = 4096


class Channel(Protocol):
    """A stream that a host dialled back."""

    def frames(self) -> AsyncIterator[hosts_pb2.ChannelFrame]: ...

    async def send(self, frame: hosts_pb2.ChannelFrame) -> None: ...

    async def close(self) -> None: ...


class Channels(Protocol):
    """Opens streams to hosts that are connected."""

    async def open(self, host: str, kind: str, instance: str, parameters: dict[str, Any]) -> Channel:
        """Ask the host to dial back. Raises Unavailable where it is not connected or does not dial in time."""
        ...


class SessionLog(Protocol):
    """Writes sessions down."""

    async def began(self, act: str, tenant: str, instance: str, detail: str) -> None:
        """Raises Unavailable where it cannot be written: then there is no session."""
        ...

    async def ended(self, act: str, tenant: str, instance: str, detail: str) -> None: ...


def host_of(state: State, instance: InstanceRecord) -> str:
    """The host that an instance is placed on. Raises Conflict where it is on none."""
    placement = state.placement_of(instance.meta.uid)
    if placement is None:
        raise Conflict(f"instance {instance.meta.name} is not placed on a host yet")
    return placement.host


def container_of(
    state: State, reader: Reader, tenant: str, instance_name: str, pod: str, container: str
) -> tuple[InstanceRecord, str, str]:
    """Instance, pod and container that are meant; a name may be left out where there is one only."""
    instance = reader.instance(tenant, instance_name)
    name = instance.meta.name
    pods = {pod_name(p): p["spec"] for p in state.environment_of(instance).environment.spec.pods}
    pod = pod or _only("pod", list(pods), name)
    if pod not in pods:
        raise NotFound("Pod", f"{name}.{pod}")
    regular = [str(c["name"]) for c in pods[pod]["containers"]]
    first = [str(c["name"]) for c in pods[pod].get("initContainers", ())]
    container = container or _only("container", regular, f"{name}.{pod}")
    if container not in (*first, *regular):
        raise NotFound("Container", f"{name}.{pod}/{container}")
    return instance, pod, container


def pod_of(state: State, instance: InstanceRecord, pod: str) -> str:
    """``pod`` where the instance has a pod of that name. Raises NotFound."""
    if pod not in {pod_name(p) for p in state.environment_of(instance).environment.spec.pods}:
        raise NotFound("Pod", f"{instance.meta.name}.{pod}")
    return pod


def _only(what: str, names: list[str], of: str) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise NotFound(what.capitalize(), of)
    raise InvalidSpec(
        (Violation(what, "", f"is missing, and {of} has {len(names)}", f"name one: {', '.join(names[:8])}"),)
    )


async def logs(state: State, reader: Reader, channels: Channels, request: pb.LogsRequest) -> AsyncIterator[pb.LogLine]:
    """Log lines of a container, from the guest that runs it."""
    if not 0 <= request.tail <= MAX_TAIL:
        raise InvalidSpec((Violation("tail", str(request.tail), "is out of range", f"write 0 to {MAX_TAIL}"),))
    if request.previous and request.follow:
        raise InvalidSpec((Violation("previous", "true", "is over, and cannot be followed", "leave follow out"),))
    if request.after < 0 or len(request.log) > MAX_LOG_NAME:
        raise InvalidSpec((Violation("after", str(request.after), "is no place in a log", "take it from a line"),))
    instance, pod, container = container_of(
        state, reader, request.tenant, request.instance, request.pod, request.container
    )
    parameters = {
        "pod": pod,
        "container": container,
        "follow": request.follow,
        "tail": request.tail,
        "since_s": request.since.seconds + request.since.nanos / 1e9,
        "previous": request.previous,
        "after": request.after,
        "log": request.log,
    }
    channel = await channels.open(host_of(state, instance), "logs", instance.meta.uid, parameters)
    try:
        async for frame in channel.frames():
            match frame.WhichOneof("frame"):
                case "log":
                    yield _log_line(frame.log)
                case "error":
                    raise Unavailable(shown(frame.error))
                case "eof":
                    return
                case _:
                    continue
        raise Unavailable("the host ended the channel before the log's end: its agent was stopped, or is out of reach")
    finally:
        await channel.close()


def _log_line(log: hosts_pb2.ChannelLog) -> pb.LogLine:
    return pb.LogLine(
        time=log.time,
        pod=log.pod,
        container=log.container,
        sequence=log.sequence,
        text=log.text,
        stream=log.stream,
        lost=log.lost,
        log=log.log,
    )


async def exec_command(
    state: State, reader: Reader, channels: Channels, inputs: AsyncIterator[pb.ExecInput], log: SessionLog
) -> AsyncIterator[pb.ExecOutput]:
    """A command: its output, and last its exit code. The caller's hanging up ends it. There is none that ``log`` refuses."""
    first = await anext(inputs, None)
    if first is None or first.WhichOneof("input") != "start":
        raise InvalidSpec((Violation("start", "", "is missing", "say first which command, and where"),))
    instance, parameters = _exec_parameters(state, reader, first.start)
    ended = "the caller hung up, or the channel broke"
    # Of the words only the first: what stands behind it may be in confidence.
    word = shown(parameters["argv"][0])
    channel = await opened(channels, log, host_of(state, instance), "exec", instance, parameters, word)
    feeding = asyncio.create_task(_feed(channel, inputs), name="exec-input")
    try:
        async for frame in channel.frames():
            match frame.WhichOneof("frame"):
                case "stdout":
                    yield pb.ExecOutput(stdout=frame.stdout)
                case "stderr":
                    yield pb.ExecOutput(stderr=frame.stderr)
                case "exit_code":
                    ended = f"exit code {frame.exit_code}"
                    yield pb.ExecOutput(exit_code=frame.exit_code)
                    return
                case "error":
                    raise Unavailable(shown(frame.error))
                case _:
                    continue
        raise Unavailable("the host ended the channel before the command's exit code was known")
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        with contextlib.suppress(Unavailable):
            await channel.close()
        await log.ended("exec", instance.meta.tenant, instance.meta.name, ended)


async def opened(
    channels: Channels,
    log: SessionLog,
    host: str,
    kind: str,
    instance: InstanceRecord,
    parameters: dict[str, Any],
    detail: str,
) -> Channel:
    """A channel, written down before it is asked for. Raises Unavailable."""
    await log.began(kind, instance.meta.tenant, instance.meta.name, detail)
    try:
        return await channels.open(host, kind, instance.meta.uid, parameters)
    except BaseException:
        await log.ended(kind, instance.meta.tenant, instance.meta.name, "did not open")
        raise


def _exec_parameters(state: State, reader: Reader, start: pb.ExecStart) -> tuple[InstanceRecord, dict[str, Any]]:
    words = list(start.argv)
    if not words or len(words) > MAX_WORDS or sum(map(len, words)) > MAX_COMMAND_BYTES or any("\0" in w for w in words):
        raise InvalidSpec(
            (Violation("argv", shown(" ".join(words)), "is not a command", f"give 1 to {MAX_WORDS} words without NUL"),)
        )
    rows, columns = start.size.rows or 24, start.size.columns or 80
    if not (0 < rows <= MAX_TERMINAL and 0 < columns <= MAX_TERMINAL):
        raise InvalidSpec((Violation("size", f"{rows}x{columns}", "is out of range", f"write 1 to {MAX_TERMINAL}"),))
    if start.guest:
        instance, pod, container = reader.instance(start.tenant, start.instance), "", ""
    else:
        instance, pod, container = container_of(state, reader, start.tenant, start.instance, start.pod, start.container)
    return instance, {
        "argv": words,
        "pod": pod,
        "container": container,
        "tty": start.tty,
        "rows": rows,
        "columns": columns,
        "environment": dict(start.environment),
    }


async def _feed(channel: Channel, inputs: AsyncIterator[pb.ExecInput]) -> None:
    """What the caller sends, to the host; the end of the caller's stream is the end of standard input."""
    closed = False
    async for item in inputs:
        match item.WhichOneof("input"):
            case "stdin":
                await channel.send(hosts_pb2.ChannelFrame(stdin=item.stdin))
            case "close_stdin":
                closed = True
                await channel.send(hosts_pb2.ChannelFrame(eof=True))
            case "resize":
                size = hosts_pb2.ChannelResize(rows=item.resize.rows, columns=item.resize.columns)
                await channel.send(hosts_pb2.ChannelFrame(resize=size))
            case "signal":
                await channel.send(hosts_pb2.ChannelFrame(signal=item.signal))
            case _:
                raise InvalidSpec((Violation("input", "", "is not understood", "send stdin, resize or signal"),))
    if not closed:
        await channel.send(hosts_pb2.ChannelFrame(eof=True))
