"""What goes on beside a guest's pods: commands, connections to its ports, files in and out, keys for SSH.

What may live here: sessions on the streams of a `guestchannel.GuestChannel`. What a guest says of itself, host keys too, is
hostile: each is taken only in the shape that it must have.
"""

import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from casemate_agent.drivers import guestwire as wire
from casemate_agent.drivers.ports import ExecSession, GuestRefused
from casemate_agent.drivers.sideports import EOF, CopyRequest
from casemate_agent.guest.casemate_guest.frames import CHUNK
from casemate_core.errors import Unavailable

if TYPE_CHECKING:
    from casemate_agent.drivers.guestchannel import GuestChannel, GuestStream

SIDE_CREDIT = 256 * 1024
#: A public key as sshd writes it: its type, and base64; what follows is a comment.
HOST_KEY = re.compile(r"((?:ssh|ecdsa|sk)-[a-z0-9@.-]{1,60} [A-Za-z0-9+/]{20,4000}={0,3})(?: .*)?\Z", re.ASCII)


class GuestExec:
    """A command that runs in a guest, or a connection to a port of it; see `ports.ExecSession`."""

    def __init__(self, channel: "GuestChannel", number: int, stream: "GuestStream") -> None:
        self._channel, self._number, self._stream = channel, number, stream
        self._exit_code: int | None = None

    @property
    def exit_code(self) -> int | None:
        return self._exit_code

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        """What the command writes, until it has ended. Raises Unavailable, GuestRefused."""
        while (item := await self._stream.get()) is not None:
            if isinstance(item, wire.Data):
                yield ("stdout" if item.channel == "out" else "stderr"), item.data
                self._channel.granted(self._number, self._stream, len(item.data))
            elif isinstance(item, wire.Eof):
                yield EOF, b""
            elif isinstance(item, wire.End):
                self._exit_code = item.code
                if item.code is None or item.error:
                    raise GuestRefused(item.error or "the command ended without an exit status")
                return

    async def stdin(self, data: bytes) -> None:
        """Give input; waits while the command does not take it."""
        while data and not self._stream.ended:
            room = min(self._stream.input_room, CHUNK)
            if room == 0:
                # `changed` wakes the reader of the output too; both look at what they wait for and wait again.
                self._stream.changed.clear()
                await self._stream.changed.wait()
                continue
            self._stream.input_room -= min(room, len(data))
            self._channel.send(self._number, {"t": "data", "ch": "in"}, data[:room])
            data = data[room:]

    async def close_stdin(self) -> None:
        self._channel.send(self._number, {"t": "eof"})

    async def resize(self, rows: int, columns: int) -> None:
        self._channel.send(self._number, {"t": "resize", "rows": rows, "cols": columns})

    async def signal(self, number: int) -> None:
        self._channel.send(self._number, {"t": "signal", "sig": number})

    async def close(self) -> None:
        self._channel.close(self._number)
        self._stream.fail(Unavailable("closed"))


class GuestSides:
    """See `sideports.GuestSides`. Mixed into `guest.GuestChannels`."""

    def _channel(self, uid: str) -> "GuestChannel":
        raise NotImplementedError

    async def dial(self, uid: str, pod: str, container: str, port: int, deadline_s: float) -> ExecSession:
        """A connection to a port on the loopback of a pod, or of the guest where none is named."""
        channel = self._channel(uid)
        header = {"t": "dial", "pod": pod, "container": container, "port": port}
        number, stream, _ = await channel.open(header, SIDE_CREDIT, deadline_s)
        return GuestExec(channel, number, stream)

    async def copy(self, uid: str, request: CopyRequest, deadline_s: float) -> ExecSession:
        """Files in or out, as an archive."""
        channel = self._channel(uid)
        header = {
            "t": "copy",
            "pod": request.pod,
            "container": request.container,
            "into": request.into,
            "path": request.path,
            "name": request.name,
        }
        number, stream, _ = await channel.open(header, SIDE_CREDIT, deadline_s)
        return GuestExec(channel, number, stream)

    async def authorize(self, uid: str, key: str, deadline_s: float) -> tuple[str, ...]:
        """Let a key log in as root; the guest's host keys."""
        answer = await self._channel(uid).call({"t": "authorize", "key": key}, b"", deadline_s)
        return host_keys(answer)


def host_keys(answer: str) -> tuple[str, ...]:
    """The lines of an answer that are public keys, without their comments."""
    return tuple(found[1] for line in answer.split("\n") if (found := HOST_KEY.match(line.strip())))
