"""The virtio-serial port (or a socket in its place), as frames in and out."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections import deque

from .files import read_text
from .frames import CHUNK, OUT_LOW, Decoder, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .frames import Message
    from .loop import Loop

PORT_NAME = "casemate.guest.0"


class Port:
    """The way to the host: the virtio-serial device, or for tests a Unix socket that one host at a time connects to.

    Edge-triggered, since a virtio port whose host is away is "hung up" for as long as that lasts: a level would spin.
    """

    EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET | select.EPOLLRDHUP

    def __init__(
        self,
        loop: Loop,
        on_frame: Callable[[Message, bytes], None],
        on_lost: Callable[[], None],
        on_room: Callable[[], None],
    ) -> None:
        self.loop = loop
        self.on_frame, self.on_lost, self.on_room = on_frame, on_lost, on_room
        self.decoder = Decoder()
        self.queued = 0  # bytes that wait for the port
        self._asked = False
        self._out: deque[memoryview] = deque()
        self._fd = -1
        self._listener: socket.socket | None = None
        self._peer: socket.socket | None = None

    def open_device(self, sysfs: str, dev: str) -> bool:
        """Open the port of our name; False when the guest has none (yet), or when it is open already."""
        if self._fd >= 0:
            return False
        folder = f"{sysfs}/class/virtio-ports"
        with contextlib.suppress(FileNotFoundError):
            for entry in os.listdir(folder):
                if read_text(f"{folder}/{entry}/name").strip() == PORT_NAME:
                    self._fd = os.open(f"{dev}/{entry}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                    self.loop.watch(self._fd, self.EVENTS, lambda _: self._turn())
                    self.send({"t": "here"})
                    return True
        return False

    def listen(self, path: str) -> None:
        """Wait for hosts on a Unix socket."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._listener.bind(path)
        self._listener.listen(1)
        self.loop.watch(self._listener.fileno(), select.EPOLLIN, lambda _: self._accept())

    def _accept(self) -> None:
        assert self._listener is not None  # watched only while it is there
        if self._peer is not None:
            return  # as QEMU does: the next host waits until this one has left
        with contextlib.suppress(OSError):
            self._peer, _ = self._listener.accept()
            self._peer.setblocking(False)
            self._fd = self._peer.fileno()
            self.loop.unwatch(self._listener.fileno())
            self.loop.watch(self._fd, self.EVENTS, lambda _: self._turn())
            self.send({"t": "here"})

    def _host_left(self) -> None:
        self.decoder.reset()
        self._out.clear()
        self.queued = 0
        self.on_lost()
        if self._peer is not None and self._listener is not None:
            self.loop.unwatch(self._fd)
            self._peer.close()
            self._peer, self._fd = None, -1
            self.loop.watch(self._listener.fileno(), select.EPOLLIN, lambda _: self._accept())

    def _turn(self) -> None:
        """Read and write until neither is possible: that is what edge-triggering demands."""
        while self._fd >= 0:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self._host_left()
                return
            for header, payload in self.decoder.feed(data):
                self.on_frame(header, payload)
        self._flush()

    def send(self, header: Message, payload: bytes = b"") -> None:
        """Queue a frame. Who sends much asks `queued` first."""
        frame = encode(header, payload)
        self._out.append(memoryview(frame))
        self.queued += len(frame)
        self._flush()

    def _flush(self) -> None:
        while self._out and self._fd >= 0:
            try:
                # A virtio port takes at most 32 KiB at once.
                written = os.write(self._fd, self._out[0][:CHUNK])
            except BlockingIOError:
                return
            except OSError:
                self._host_left()
                return
            self.queued -= written
            if written == len(self._out[0]):
                self._out.popleft()
            else:
                self._out[0] = self._out[0][written:]
            if self.queued < OUT_LOW and not self._asked:
                self._asked = True  # later, since who is asked sends, and we may be in the middle of its send
                self.loop.after(0.0, self._ask)

    def _ask(self) -> None:
        self._asked = False
        self.on_room()
