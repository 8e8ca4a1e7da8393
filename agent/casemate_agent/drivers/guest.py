"""The host's end of the guests' channels: what the agent asks of a helper, and what helpers push.

What may live here: what is asked of all guests, over the sockets that libvirt makes for each one's port
``casemate.guest.0``. The connection to one of them is `guestchannel`; what a guest may say is `guestwire`; what the helper
does is ``guest/casemate_guest/``.
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from casemate_agent.drivers import guestwire as wire
from casemate_agent.drivers.guestchannel import GuestChannel, GuestStream
from casemate_agent.drivers.guestside import GuestExec, GuestSides
from casemate_agent.drivers.ports import (
    UNKNOWN,
    ExecRequest,
    ExecSession,
    GuestEvent,
    GuestNote,
    GuestPods,
    GuestRefused,
    LogRecord,
)
from casemate_core.errors import Unavailable

LOG_CREDIT = 256 * 1024
EXEC_CREDIT = 256 * 1024
MAX_KEPT_EVENTS = 2000
MAX_LINE = wire.MAX_LOG_TEXT


class GuestChannels(GuestSides):
    """All the guests of a host; see `ports.Guests`."""

    def __init__(self) -> None:
        self._channels: dict[str, GuestChannel] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._events: deque[GuestEvent] = deque()
        self._wake = asyncio.Event()

    async def attach(self, uid: str, channel_path: str) -> None:
        """Keep a connection to this guest until it is detached."""
        known = self._channels.get(uid)
        if known is not None and known.path == channel_path:
            return
        await self.detach(uid)
        channel = self._channels[uid] = GuestChannel(uid, channel_path, self._push)
        self._tasks[uid] = asyncio.create_task(channel.run(), name=f"guest {uid}")

    async def detach(self, uid: str) -> None:
        """End the connection to a guest."""
        self._channels.pop(uid, None)
        task = self._tasks.pop(uid, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        """End all connections."""
        for uid in tuple(self._channels):
            await self.detach(uid)

    def attached(self) -> frozenset[str]:
        return frozenset(self._channels)

    def _push(self, event: GuestEvent) -> None:
        if isinstance(event, GuestPods):  # a report replaces the one before
            for kept in self._events:
                if isinstance(kept, GuestPods) and kept.uid == event.uid:
                    self._events.remove(kept)
                    break
        self._events.append(event)
        if len(self._events) > MAX_KEPT_EVENTS:
            for kept in self._events:
                if isinstance(kept, GuestNote):  # what is a level stays, what is a story gives way
                    self._events.remove(kept)
                    break
            else:
                self._events.popleft()
        self._wake.set()

    async def events(self) -> AsyncIterator[GuestEvent]:
        """What the guests push; one reader."""
        while True:
            while self._events:
                yield self._events.popleft()
            self._wake.clear()
            await self._wake.wait()

    def _channel(self, uid: str) -> GuestChannel:
        channel = self._channels.get(uid)
        if channel is None or not channel.greeted.is_set():
            raise Unavailable(f"the helper of {uid} is not connected")
        return channel

    async def apply(
        self,
        uid: str,
        pods: tuple[Mapping[str, Any], ...],
        archives: int,
        revision: str,
        peers: Mapping[str, str],
        deadline_s: float,
    ) -> None:
        """Make these the guest's pods, after the images of its archive disks were loaded."""
        channel = self._channel(uid)
        ends = asyncio.get_running_loop().time() + deadline_s
        if archives:
            serials = [f"cm-ar-{number}" for number in range(archives)]
            await channel.call({"t": "load", "serials": serials}, b"", deadline_s)
        left_s = max(0.1, ends - asyncio.get_running_loop().time())
        payload = json.dumps([_plain(pod) for pod in pods]).encode()
        await channel.call({"t": "apply", "revision": revision, "hosts": dict(peers)}, payload, left_s)

    async def logs(
        self,
        uid: str,
        pod: str,
        container: str,
        *,
        follow: bool,
        tail: int,
        since_s: float,
        after_sequence: int = 0,
        log: str = "",
        previous: bool = False,
    ) -> AsyncIterator[LogRecord]:
        """Lines of a container. A record's sequence is the position after it in the container's log, from which
        ``after_sequence`` goes on. A log that is followed goes on over restarts of the container, the helper and the agent's
        connection, until the container is gone or has ended for good."""
        channel = self._channel(uid)
        if previous:
            async for record in self._previous(channel, pod, container, tail, since_s):
                yield record
            return
        position, container_id, anew = after_sequence, log, False
        request: dict[str, Any] = {"t": "logs", "pod": pod, "container": container, "follow": follow, "tail": tail}
        began = False
        while True:
            try:
                number, stream, opened = await channel.open({**request, "from": position}, LOG_CREDIT, 30.0)
            except Unavailable:
                if not follow or not began:
                    raise
                await channel.greeted_again()
                continue
            began = True
            if container_id and opened.container_id != container_id:
                channel.close(number)  # another container of the same name: its log begins anew
                position, container_id, anew = 0, opened.container_id, True
                continue
            container_id = opened.container_id
            request["tail"] = -1  # a resumed log goes on where it was
            try:
                async for record in _records(channel, number, stream, pod, container or opened.container):
                    position = record.sequence
                    if record.time_s >= since_s or record.lost or anew:
                        yield replace(record, log=container_id, lost=UNKNOWN if anew else record.lost)
                        anew = False
                return
            except Unavailable:
                if not follow:
                    raise
                await channel.greeted_again()
            finally:
                channel.close(number)

    async def _previous(
        self, channel: GuestChannel, pod: str, container: str, tail: int, since_s: float
    ) -> AsyncIterator[LogRecord]:
        """Lines between the last start but one and the last."""
        request = {"t": "logs", "pod": pod, "container": container, "follow": False, "tail": -1}
        number, _, opened = await channel.open({**request, "tail": 0, "from": 0}, LOG_CREDIT, 30.0)
        channel.close(number)
        if len(opened.starts) < 2:
            raise GuestRefused(f"container {opened.container} was started once: there is no earlier run")
        begin, end = opened.starts[-2:]
        number, stream, opened = await channel.open({**request, "from": begin}, LOG_CREDIT, 30.0)
        last: deque[LogRecord] = deque(maxlen=tail if tail >= 0 else None)
        try:
            async for record in _records(channel, number, stream, pod, container or opened.container):
                if record.sequence > end:
                    break
                if record.time_s >= since_s or record.lost:
                    last.append(replace(record, log=opened.container_id))
        finally:
            channel.close(number)
        for record in last:
            yield record

    async def exec(self, uid: str, request: ExecRequest, deadline_s: float) -> ExecSession:
        """Run a command in a container, or in the guest where no pod is named."""
        channel = self._channel(uid)
        header = {
            "t": "exec",
            "pod": request.pod,
            "container": request.container,
            "argv": list(request.argv),
            "env": dict(request.environment),
            "tty": request.tty,
            "rows": request.rows,
            "cols": request.columns,
        }
        number, stream, _ = await channel.open(header, EXEC_CREDIT, deadline_s)
        return GuestExec(channel, number, stream)

    async def shutdown(self, uid: str, deadline_s: float) -> None:
        """Ask the guest's system to power off."""
        await self._channel(uid).call({"t": "power", "action": "shutdown"}, b"", deadline_s)

    async def reboot(self, uid: str, deadline_s: float) -> None:
        """Ask the guest's system to boot anew; a new boot id in its next hello proves it."""
        await self._channel(uid).call({"t": "power", "action": "reboot"}, b"", deadline_s)


async def _records(
    channel: GuestChannel, number: int, stream: GuestStream, pod: str, container: str
) -> AsyncIterator[LogRecord]:
    """Records of one log stream. Lines that conmon broke are put together again, up to `MAX_LINE` bytes."""
    parts: dict[str, bytes] = {}
    lost = 0
    while (item := await stream.get()) is not None:
        if isinstance(item, wire.Gap):
            lost += max(1, item.lines)
            parts.clear()
        elif isinstance(item, wire.LogChunk):
            for line in wire.log_lines(item):
                text = parts.pop(line.stream, b"") + line.text
                if line.partial and len(text) < MAX_LINE:
                    parts[line.stream] = text
                    continue
                words = wire.clean(text.decode(errors="replace"), MAX_LINE)
                yield LogRecord(line.time_s, pod, container, line.end, words, line.stream, lost)
                lost = 0
            channel.granted(number, stream, len(item.data))
        elif isinstance(item, wire.End) and item.error:
            raise GuestRefused(item.error)


def _plain(value: Any) -> Any:
    """Mappings and tuples as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
