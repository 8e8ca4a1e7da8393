#!/usr/bin/python3
"""The Casemate helper: runs an instance's pods inside its guest, and tells the host about them.

What it is for: one process in the guest that turns a set of Kubernetes v1 Pod manifests into running containers (by
``podman kube play``), pushes every change of their state, streams logs, runs commands, and does the few things that a
guest must do for itself (addresses at boot, new processors). One file, standard library alone, so that it can be
delivered on the seed disk of any image; ``/usr/bin/python3 -I -S -E casemate_guest.py`` is the whole installation.
It imports neither asyncio nor subprocess: on an emulated processor each costs a good part of a second.

Theory of operation. One thread, one epoll loop, no polling: whatever the helper reacts to wakes it by a descriptor (the
port, a child's pidfd, inotify, netlink) or is a timer that a manifest asked for (a probe, a back-off). Waiting code is
written as coroutines on a loop of a few dozen lines (`Loop`, `Future`). Each pod has one task (`Pods.work`) that makes
what is there equal to what is wanted; podman itself never restarts a container, the helper does, by the rules of
Kubernetes: immediately, then after 10, 20, 40 ... 300 s, forgotten after ten quiet minutes.
The end of a container is read from the file that conmon writes into podman's ``exits`` folder, watched with inotify.
What must outlive the helper is in ``/var/lib/casemate/guest.json``; containers outlive it anyway.

The protocol (docs/guest-protocol.md has the table of messages) runs over the virtio-serial port ``casemate.guest.0``:

* A frame is ``FF <stuffed> FF``. The byte FF occurs nowhere else, so whoever sees it knows that a frame ends or begins:
  a frame that was cut off by a reconnect, and any garbage, is dropped at the next FF. Inside, FE is written FE 01 and
  FF is written FE 02. Unstuffed: CRC-32 of the rest (4 bytes, big-endian), length of the header (2 bytes), header (a
  JSON object), payload (any bytes). At most 65,535 bytes of header and 2 MiB of payload.
* The helper says ``here`` when it starts, so that a host that never left the port knows. The host begins with
  ``hello`` and a session name of its own; the guest answers ``hello`` with the same session, and what it sent before
  that is of an older session and is ignored. The host then asks for ``notes``. A session ends when the host leaves the
  port or says ``hello`` again; its streams end with it, pods do not.
* State goes by level: ``pods`` carries all pods as they are, after ``hello`` and after each change.
* A stream (``logs``, ``exec``) has a number chosen by the host. Payload of streams costs credit that the receiver
  grants, so that no stream holds up another or grows a buffer; control messages cost nothing and are small.
* The position of a log record is its byte offset in the container's log, which only grows, across restarts of the
  container, the helper and the agent. Old parts are given back to the disk as holes; a reader that asks for them is
  told which bytes are gone (``gap``).
"""

import contextlib
import ctypes
import errno
import fcntl
import heapq
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import time
from binascii import crc32
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import Any

PROTOCOL = 1
VERSION = "1.1"
PORT_NAME = "casemate.guest.0"

MAX_HEADER = 0xFFFF
MAX_PAYLOAD = 2 << 20
MAX_CONTENT = 6 + MAX_HEADER + MAX_PAYLOAD
CHUNK = 32 * 1024  # bytes of one frame of a stream
STDIN_WINDOW = 64 * 1024  # bytes of standard input that the host may send before it is granted more
MAX_STREAMS = 64
OUT_LOW = 128 * 1024  # streams are asked for more while less than this waits for the port

BACKOFF_FIRST_S, BACKOFF_MAX_S, BACKOFF_FORGET_S = 10.0, 300.0, 600.0  # those of the kubelet
LOG_KEEP = 16 << 20  # bytes kept of each container's log; up to twice that until it is trimmed
LOG_TRIM_EVERY_S = 10.0
PODMAN_TIMEOUT_S = 600.0
NIC_WAIT_S = 60.0  # for an interface to appear: an emulated guest loads its driver late
NIC_BACK_S = 10.0  # for it to come back out of a network that is gone: the kernel does so a moment later
POWER_TRIES = 60  # a guest that is emulated on a busy host may take half a minute to its systemd
POWER_AGAIN_S = 1.0
DIAL_S = 10.0  # for a port to take a connection
CLONE_NEWNET = 0x40000000
VOLUMES = "/volumes"  # where the instance's volumes are mounted
VOLUME_AGAIN_S, VOLUME_AGAIN_MAX_S = 1.0, 30.0
VOLUME_QUIET = 3  # tries of a volume that are not worth a warning: its disk may only be on its way
MAX_TEXT = 512  # characters of a message about an error

Message = dict[str, Any]


# --- frames -----------------------------------------------------------------------------------------------------------


def encode(header: Message, payload: bytes = b"") -> bytes:
    """One frame. Raises ValueError when the header or the payload is too large."""
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER or len(payload) > MAX_PAYLOAD:
        raise ValueError(f"frame too large: header {len(text)}, payload {len(payload)} bytes")
    body = len(text).to_bytes(2, "big") + text + payload
    content = crc32(body).to_bytes(4, "big") + body
    return b"\xff" + content.replace(b"\xfe", b"\xfe\x01").replace(b"\xff", b"\xfe\x02") + b"\xff"


class Decoder:
    """Bytes in, frames out. Never raises, and never holds more than one frame of the largest size.

    ``dropped`` counts the pieces between two FF that were no frame: cut off, garbled or too long.
    """

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._skipping = False
        self.dropped = 0

    def feed(self, data: bytes) -> list[tuple[Message, bytes]]:
        """Return the frames that ``data`` completes."""
        frames = []
        *ended, rest = data.split(b"\xff")
        for piece in ended:
            content = b"".join((*self._held, piece))
            skipping = self._skipping
            self.reset()
            if skipping:
                self.dropped += 1
            elif content:
                frame = self._decode(content)
                if frame is None:
                    self.dropped += 1
                else:
                    frames.append(frame)
        if rest and not self._skipping:
            self._held.append(rest)
            self._held_bytes += len(rest)
            if self._held_bytes > 2 * MAX_CONTENT:  # twice: every byte may be stuffed
                self.reset()
                self._skipping = True
        return frames

    def reset(self) -> None:
        """Forget a frame that has begun."""
        self._held.clear()
        self._held_bytes = 0
        self._skipping = False

    @staticmethod
    def _decode(stuffed: bytes) -> tuple[Message, bytes] | None:
        if stuffed.endswith(b"\xfe"):
            return None  # cut off within a stuffed byte
        content = stuffed.replace(b"\xfe\x02", b"\xff").replace(b"\xfe\x01", b"\xfe")
        if not 6 <= len(content) <= MAX_CONTENT or crc32(content[4:]) != int.from_bytes(content[:4], "big"):
            return None
        end = 6 + int.from_bytes(content[4:6], "big")
        if end > len(content):
            return None
        try:
            header = json.loads(content[6:end])
        except (ValueError, RecursionError):
            return None
        if not isinstance(header, dict) or not isinstance(header.get("t"), str):
            return None
        return header, content[end:]


# --- the loop ---------------------------------------------------------------------------------------------------------


class Future:
    """A value that comes later. Await it, or add a callback."""

    __slots__ = ("_callbacks", "done", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self._callbacks: list[Callable[[], None]] = []

    def set(self, value: Any = None) -> None:
        """Give the value; the second and later ones are ignored."""
        if not self.done:
            self.done, self.value = True, value
            for callback in self._callbacks:
                callback()

    def then(self, callback: Callable[[], None]) -> None:
        """Call back once there is a value."""
        if self.done:
            callback()
        else:
            self._callbacks.append(callback)

    def __await__(self) -> Generator["Future", None, Any]:
        if not self.done:
            yield self
        return self.value


Task = Coroutine[Future, None, Any]


class Loop:
    """Descriptors, timers and children of one thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._cancelled: set[int] = set()
        self._timer_count = 0
        self.stopping = False

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call ``handler(events)`` when ``fd`` is ready; replaces what was asked for it before.

        No events means not to watch: epoll reports errors even to those who asked for nothing.
        """
        if not events:
            self.unwatch(fd)
            return
        known = fd in self._handlers
        self._handlers[fd] = handler
        (self._epoll.modify if known else self._epoll.register)(fd, events)

    def unwatch(self, fd: int) -> None:
        """No longer watch ``fd``; call it before the descriptor is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, callback: Callable[[], None]) -> int:
        """Call back later; returns a number for `cancel`."""
        self._timer_count += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._timer_count, callback))
        return self._timer_count

    def _soon(self, callback: Callable[[], None]) -> None:
        self.after(0.0, callback)

    def cancel(self, timer: int) -> None:
        """Cancel a timer that may still be pending."""
        if any(number == timer for _, number, _ in self._timers):
            self._cancelled.add(timer)

    def start(self, task: Task) -> Future:
        """Run a coroutine; the future has its result, or None when it raised (which is logged)."""
        result = Future()

        def step() -> None:
            try:
                waited = task.send(None)
            except StopIteration as stop:
                result.set(stop.value)
            except Exception:
                import traceback  # here, since it costs an emulated boot a tenth of a second

                log("task failed:\n" + traceback.format_exc())
                result.set(None)
            else:
                # Through the timers and not at once: a future that is set deep in a handler must not run tasks there.
                waited.then(lambda: self._soon(step))

        step()
        return result

    def sleep(self, seconds: float) -> Future:
        """A future for later."""
        future = Future()
        self.after(seconds, future.set)
        return future

    def ready(self, fd: int, events: int, timeout_s: float) -> Future:
        """The events of ``fd``, or 0 after the timeout."""
        future = Future()
        timer = self.after(timeout_s, lambda: future.set(0))

        def done() -> None:
            self.unwatch(fd)
            self.cancel(timer)

        future.then(done)
        self.watch(fd, events, future.set)
        return future

    def run(self) -> None:
        """Run until `stopping` is set."""
        while not self.stopping:
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                _, number, callback = heapq.heappop(self._timers)
                if number in self._cancelled:
                    self._cancelled.discard(number)
                else:
                    callback()
            wait = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1
            for fd, events in self._epoll.poll(wait):
                handler = self._handlers.get(fd)  # an earlier handler of this round may have removed it
                if handler is not None:
                    handler(events)


class Signal:
    """Something happened; one waiter."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._future = Future()

    def set(self) -> None:
        """Wake the waiter, or let its next wait return at once."""
        self._future.set()

    async def wait(self, timeout_s: float | None) -> None:
        """Wait for the next `set`, or for the timeout."""
        future = self._future
        timer = None if timeout_s is None else self._loop.after(timeout_s, future.set)
        await future
        if timer is not None:
            self._loop.cancel(timer)
        self._future = Future()


def log(text: str) -> None:
    """One line for the journal."""
    with contextlib.suppress(OSError):
        os.write(2, f"casemate-guest: {text[:2000]}\n".encode(errors="replace"))


def read_text(path: str, limit: int = 1 << 20) -> str:
    """The beginning of a file, or nothing."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(limit)
    except OSError:
        return ""


def write_text(path: str, text: str) -> bool:
    """Write a kernel file; whether it took it."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return False
    return True


# --- children ---------------------------------------------------------------------------------------------------------


class Ended:
    """How a child ended: its exit status (128 + n for a signal), and what it wrote."""

    __slots__ = ("code", "err", "out")

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code, self.out, self.err = code, out, err

    def reason(self) -> str:
        """The last lines of standard error."""
        return self.err[-MAX_TEXT:].decode(errors="replace").strip() or f"exit status {self.code}"


class Child:
    """A process with pipes or a terminal. ``ended`` is set to its exit status once it is gone."""

    def __init__(
        self, loop: Loop, argv: list[str], *, env: Mapping[str, str], terminal: str = "", stdin: bool = True
    ) -> None:
        """Start it. ``terminal`` is the path of a terminal that becomes its own. Raises OSError."""
        self.loop = loop
        self.ended = Future()
        self.fds: list[int] = []  # ours: standard input, output, error; none for a terminal
        theirs: list[int] = []
        actions: list[Any] = []
        if terminal:
            actions = [(os.POSIX_SPAWN_OPEN, 0, terminal, os.O_RDWR, 0), (os.POSIX_SPAWN_DUP2, 0, 1)]
            actions.append((os.POSIX_SPAWN_DUP2, 0, 2))
        else:
            for number in range(3):
                if number == 0 and not stdin:
                    actions.append((os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0))
                    self.fds.append(-1)
                    continue
                read, write = os.pipe2(os.O_CLOEXEC)
                ours, other = (write, read) if number == 0 else (read, write)
                os.set_blocking(ours, False)
                self.fds.append(ours)
                theirs.append(other)
                actions.append((os.POSIX_SPAWN_DUP2, other, number))
        try:
            self.pid = os.posix_spawnp(
                argv[0], argv, env, file_actions=actions, setsid=True, setsigdef=[signal.SIGPIPE], setsigmask=[]
            )
        except OSError:
            self.close()
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        self._pidfd = os.pidfd_open(self.pid)
        loop.watch(self._pidfd, select.EPOLLIN, lambda _: self._reap())

    def _reap(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        self.loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        code = os.waitstatus_to_exitcode(status)
        self.ended.set(code if code >= 0 else 128 - code)

    def kill(self, number: int) -> None:
        """Send a signal to its process group, if it is still there."""
        if not self.ended.done:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def close_fd(self, index: int) -> None:
        """Close one of our ends."""
        if len(self.fds) > index and self.fds[index] >= 0:
            self.loop.unwatch(self.fds[index])
            os.close(self.fds[index])
            self.fds[index] = -1

    def close(self) -> None:
        """Close all our ends."""
        for index in range(len(self.fds)):
            self.close_fd(index)


BASE_ENV = {"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), "HOME": "/root", "LANG": "C.UTF-8"}


async def run(loop: Loop, argv: list[str], stdin: bytes = b"", timeout_s: float = 60.0, keep: int = 4 << 20) -> Ended:
    """Run a command to its end; ``keep`` bytes of each output are kept. After the timeout it is killed."""
    try:
        child = Child(loop, argv, env=BASE_ENV, stdin=bool(stdin))
    except OSError as error:
        return Ended(127, b"", f"{argv[0]}: {error.strerror}".encode())
    outputs: list[bytearray] = [bytearray(), bytearray()]

    def drain(index: int) -> None:
        while child.fds[index] >= 0:
            try:
                data = os.read(child.fds[index], 65536)
            except BlockingIOError:
                return
            if not data:
                child.close_fd(index)
                return
            space = keep - len(outputs[index - 1])
            outputs[index - 1] += data[:space]

    rest = memoryview(stdin)

    def feed(_: int) -> None:
        nonlocal rest
        try:
            rest = rest[os.write(child.fds[0], rest) :]
        except BlockingIOError:
            return
        except OSError:  # it does not read its input; its exit status tells whether that was wrong
            rest = rest[:0]
        if not rest:
            child.close_fd(0)

    if child.fds[0] >= 0:
        loop.watch(child.fds[0], select.EPOLLOUT, feed)
    loop.watch(child.fds[1], select.EPOLLIN, lambda _: drain(1))
    loop.watch(child.fds[2], select.EPOLLIN, lambda _: drain(2))
    timer = loop.after(timeout_s, lambda: child.kill(signal.SIGKILL))
    code = await child.ended
    loop.cancel(timer)
    # Not until end of file: a container that podman started may hold the pipe.
    drain(1)
    drain(2)
    child.close()
    return Ended(code, bytes(outputs[0]), bytes(outputs[1]))


# --- inotify, holes ---------------------------------------------------------------------------------------------------

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
IN_MODIFY, IN_CLOSE_WRITE, IN_MOVED_TO, IN_ONESHOT, IN_IGNORED = 0x2, 0x8, 0x80, 0x80000000, 0x8000
PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01


class Inotify:
    """Watches on files and folders, each with its callback, which gets the name of the changed member."""

    def __init__(self, loop: Loop) -> None:
        self._fd = LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._callbacks: dict[int, Callable[[str], None]] = {}
        loop.watch(self._fd, select.EPOLLIN, lambda _: self._read())

    def add(self, path: str, mask: int, callback: Callable[[str], None]) -> int:
        """Watch ``path``; returns a number for `remove`, or -1 when it cannot be watched."""
        number = int(LIBC.inotify_add_watch(self._fd, path.encode(), ctypes.c_uint32(mask)))
        if number >= 0:
            self._callbacks[number] = callback
        return number

    def remove(self, number: int) -> None:
        """End a watch."""
        if self._callbacks.pop(number, None) is not None:
            LIBC.inotify_rm_watch(self._fd, number)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            number, mask, _, length = struct.unpack_from("iIII", data, at)
            name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode(errors="replace")
            at += 16 + length
            callback = self._callbacks.get(number)
            if mask & IN_IGNORED:
                self._callbacks.pop(number, None)
            elif callback is not None:
                callback(name)


# --- the port ---------------------------------------------------------------------------------------------------------


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


# --- streams ----------------------------------------------------------------------------------------------------------


class Stream:
    """Something that the host opened under a number: it sends within the credit that it was granted."""

    def __init__(self, helper: "Helper", number: int, credit: int) -> None:
        self.helper, self.number, self.credit = helper, number, credit
        self.closed = False

    def pull(self) -> bool:
        """Send at most one chunk, if there is credit and something to send; whether it did."""
        return False

    def grant(self, amount: int) -> None:
        """The host can take ``amount`` bytes more."""
        self.credit = min(self.credit + amount, 1 << 30)
        self.helper.fill()

    def data(self, payload: bytes) -> None:
        """Bytes from the host."""

    def eof(self) -> None:
        """The host sends no more."""

    def end(self, **result: Any) -> None:
        """Close, and tell the host how it ended."""
        if not self.closed:
            self.close()
            self.helper.tell({"t": "end", "s": self.number, **result})

    def close(self) -> None:
        """Let go of everything; nothing is sent."""
        self.closed = True
        self.helper.streams.pop(self.number, None)


class LogStream(Stream):
    """A container's log from a position on, following it if asked."""

    def __init__(
        self, helper: "Helper", number: int, credit: int, container: "Container", start: int, follow: bool
    ) -> None:
        super().__init__(helper, number, credit)
        self.position, self.follow, self.container = start, follow, container
        self._watch = -1
        path = container.log_path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if follow:
            self._watch = helper.inotify.add(path, IN_MODIFY, lambda _: helper.fill())

    def pull(self) -> bool:
        size = os.fstat(self._file).st_size
        if self.position >= size:
            if not self.follow:
                self.end(position=self.position)
            return False
        if self.credit <= 0:
            return False
        data_at = _next_data(self._file, self.position, size)
        if data_at > self.position:  # trimmed: the first whole line after the hole
            block = os.pread(self._file, CHUNK, data_at)
            skip = block.find(b"\n") + 1 if data_at % 4096 == 0 else 0
            return self._gap(data_at + skip)
        block = os.pread(self._file, min(CHUNK, max(self.credit, 4096)), self.position)
        length = block.rfind(b"\n") + 1
        if length == 0:
            if len(block) == CHUNK:  # conmon breaks lines long before this: it is no log
                return self._gap(self.position + len(block))
            if len(block) < 4096 and not self.follow:
                self.end(position=self.position)
            if len(block) < CHUNK and self.position + len(block) < size:
                self.credit = max(self.credit, CHUNK)  # one line longer than the credit must not stop the stream
                return True
            return False
        self.credit -= length
        header = {"t": "log", "s": self.number, "pos": self.position, "next": self.position + length}
        self.position += length
        self.helper.port.send(header, block[:length])
        return True

    def _gap(self, to: int) -> bool:
        lines = sum(lines for end, lines in self.container.trimmed if end > self.position)
        self.helper.tell({"t": "gap", "s": self.number, "from": self.position, "to": to, "lines": lines})
        self.position = to
        return True

    def close(self) -> None:
        if not self.closed:
            super().close()
            self.helper.inotify.remove(self._watch)
            os.close(self._file)


def _next_data(fd: int, position: int, size: int) -> int:
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a hole up to the end
            return size
        raise


def tail_position(path: str, lines: int) -> int:
    """Where the last ``lines`` lines of a log begin, looking back 1 MiB at most."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        begin = max(0, size - (1 << 20))
        file.seek(begin)
        block = file.read()
    if lines <= 0:
        return begin + block.rfind(b"\n") + 1
    at = len(block) if block.endswith(b"\n") else len(block) + 1
    for _ in range(lines + 1):
        at = block.rfind(b"\n", 0, max(at - 1, 0)) + 1
        if at == 0:
            break
        lines -= 1
        if lines == 0:
            break
    return begin + at


def trim_log(path: str) -> tuple[int, int]:
    """Give all but the last `LOG_KEEP` bytes of a large log back to the disk; positions stay.

    Returns the position up to which it is gone, and how many lines went with this call; zeros when nothing did.
    """
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            state = os.fstat(fd)
            if state.st_blocks * 512 <= 2 * LOG_KEEP:
                return 0, 0
            begin, end = os.lseek(fd, 0, os.SEEK_DATA), (state.st_size - LOG_KEEP) // 4096 * 4096
            lines, at = 0, begin
            while at < end:
                block = os.pread(fd, min(1 << 20, end - at), at)
                lines, at = lines + block.count(b"\n"), at + len(block)
            if LIBC.fallocate(fd, PUNCH_HOLE_KEEP_SIZE, 0, end) == 0:
                return end, lines + 1  # the line that the end of the hole cuts is lost too
            log(f"cannot trim {path}: {os.strerror(ctypes.get_errno())}")
        finally:
            os.close(fd)
    return 0, 0


class ExecStream(Stream):
    """A running command: in a container through crun, which gives us the terminal or the pipes, or in the guest itself."""

    def __init__(self, helper: "Helper", number: int, credit: int) -> None:
        super().__init__(helper, number, credit)
        self.folder = f"{helper.paths.run}/exec/{helper.session_count}-{number}"
        self.child: Child | None = None
        self.master = -1
        self.in_container = False
        self._stdin = bytearray()
        self._stdin_ended = False
        self._open_outputs: dict[int, str] = {}  # descriptor -> "out" or "err", until end of file

    def start(self, request: Message, container_id: str | None) -> None:
        """Start the command. Raises OSError and ValueError."""
        loop = self.helper.loop
        argv, env = list(request["argv"]), {str(k): str(v) for k, v in dict(request.get("env", {})).items()}
        tty = bool(request.get("tty"))
        if not argv or not all(isinstance(word, str) for word in argv):
            raise ValueError("argv must be a list of texts")
        if container_id is not None:
            self.in_container = True
            os.makedirs(self.folder, mode=0o700)
            process = self.helper.pods.process_of(container_id)
            process.update(args=argv, terminal=tty)
            process["env"] = [*process.get("env", ()), *(f"{k}={v}" for k, v in env.items())]
            if tty:
                process["env"] = [e for e in process["env"] if not e.startswith("TERM=")] + [
                    f"TERM={env.get('TERM', 'xterm')}"
                ]
                process["consoleSize"] = {"height": _size(request, "rows", 24), "width": _size(request, "cols", 80)}
            write_text(f"{self.folder}/process.json", json.dumps(process))
            crun = [self.helper.paths.crun, "exec", "--process", f"{self.folder}/process.json"]
            crun += ["--pid-file", f"{self.folder}/pid"]
            if tty:
                self._window = (_size(request, "rows", 24), _size(request, "cols", 80))
                self._await_console()
                crun += ["--console-socket", f"{self.folder}/console"]
            self.child = Child(loop, [*crun, container_id], env=BASE_ENV, stdin=not tty)
        elif tty:
            self.master, slave = os.openpty()
            self.resize(_size(request, "rows", 24), _size(request, "cols", 80))
            try:
                path = os.ttyname(slave)
                self.child = Child(loop, argv, env=BASE_ENV | {"TERM": "xterm"} | env, terminal=path)
            finally:
                os.close(slave)
            self._take_master()
        else:
            self.child = Child(loop, argv, env=BASE_ENV | env)
        if self.child.fds:
            if not tty:
                self._open_outputs[self.child.fds[1]] = "out"
                if self.child.fds[0] >= 0:
                    loop.watch(self.child.fds[0], 0, lambda _: self._write())
            self._open_outputs[self.child.fds[2]] = "err"
            for fd in self._open_outputs:
                loop.watch(fd, select.EPOLLIN, lambda _: self._readable())
        self.child.ended.then(self._ended)

    def _await_console(self) -> None:
        """crun hands over the terminal's controlling end on this socket."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        listener.bind(f"{self.folder}/console")
        listener.listen(1)

        async def receive() -> None:
            loop = self.helper.loop
            try:
                if not await loop.ready(listener.fileno(), select.EPOLLIN, 30.0) or self.closed:
                    return
                peer, _ = listener.accept()
                with peer:
                    await loop.ready(peer.fileno(), select.EPOLLIN, 30.0)
                    _, ancillary, _, _ = peer.recvmsg(4096, socket.CMSG_SPACE(4))
                for _, kind, data in ancillary:
                    if kind == socket.SCM_RIGHTS and len(data) >= 4:
                        (fd,) = struct.unpack("i", data[:4])
                        if self.closed:
                            os.close(fd)
                        else:
                            self.master = fd
                            self._take_master()
            finally:
                listener.close()

        self.helper.loop.start(receive())

    def _take_master(self) -> None:
        os.set_blocking(self.master, False)
        self._open_outputs[self.master] = "out"
        self.helper.loop.watch(self.master, select.EPOLLIN, lambda events: self._master_turn(events))
        if self._window is not None:
            self.resize(*self._window)
        self._write()

    _window: tuple[int, int] | None = None

    def _master_turn(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._write()
        if events & select.EPOLLHUP and self.credit <= 0:
            self._stdin.clear()  # nobody is left to read it; what is left to read waits for credit
            self.helper.loop.unwatch(self.master)
        elif events & ~select.EPOLLOUT:
            self._readable()

    def _readable(self) -> None:
        """Output waits: sent if there is credit, else left in its pipe, which holds up the command and nobody else."""
        while self.pull():
            pass
        if not self.closed:
            self._arm()

    def _arm(self) -> None:
        reading = select.EPOLLIN if self.credit > 0 and self.helper.port.queued < OUT_LOW else 0
        for fd in self._open_outputs:
            if fd == self.master:
                writing = select.EPOLLOUT if self._stdin else 0
                self.helper.loop.watch(fd, reading | writing, lambda events: self._master_turn(events))
            else:
                self.helper.loop.watch(fd, reading, lambda _: self._readable())

    def pull(self) -> bool:
        sent = False
        for fd, channel in list(self._open_outputs.items()):
            if self.credit <= 0 or self.helper.port.queued >= OUT_LOW:
                break
            try:
                data = os.read(fd, min(CHUNK, self.credit))
            except BlockingIOError:
                continue
            except OSError:  # a terminal whose last user has gone
                data = b""
            if data:
                self.credit -= len(data)
                self.helper.port.send({"t": "data", "s": self.number, "ch": channel}, data)
                sent = True
            else:
                # A terminal stays open until the command has ended: closed sooner, it would be hung up while it exits.
                del self._open_outputs[fd]
                self.helper.loop.unwatch(fd)
        if not self._open_outputs:
            self._ended()
        elif not self.closed:
            self._arm()
        return sent

    def _ended(self) -> None:
        """Both the command and what it wrote have come to their end."""
        if self.closed or self.child is None or not self.child.ended.done:
            return
        if self._open_outputs and not self._lingered:
            # A descendant may hold the pipes for ever: what is there now is sent, then it is over.
            self._lingered = True
            self.helper.loop.after(0.0, self._linger)
        elif not self._open_outputs:
            self.end(code=self.child.ended.value)

    _lingered = False

    def _linger(self) -> None:
        if self.closed or self.child is None:
            return
        if self.credit > 0 and not self.pull() and not self.closed:
            self.end(code=self.child.ended.value)
        elif not self.closed:
            self.helper.loop.after(0.05 if self.credit <= 0 else 0.0, self._linger)

    def grant(self, amount: int) -> None:
        super().grant(amount)
        if not self.closed:
            self._arm()

    def data(self, payload: bytes) -> None:
        if len(self._stdin) + len(payload) > STDIN_WINDOW:
            self.end(code=-1, error="the host sent more input than it was granted")
            return
        self._stdin += payload
        self._write()

    def eof(self) -> None:
        self._stdin_ended = True
        self._write()

    def _write(self) -> None:
        fd = self.master if self.master >= 0 else self.child.fds[0] if self.child and self.child.fds else -1
        if fd < 0:
            if self.child is not None and self.child.fds and self.master < 0 and not self._console_pending():
                self._consumed(len(self._stdin))  # nobody reads it any more
            return
        written = 0
        try:
            while self._stdin:
                count = os.write(fd, self._stdin[:CHUNK])
                del self._stdin[:count]
                written += count
        except BlockingIOError:
            pass
        except OSError:
            written += len(self._stdin)
            self._stdin.clear()
        if written:
            self.helper.tell({"t": "credit", "s": self.number, "n": written})
        if fd == self.master:
            if self._stdin_ended and not self._stdin:
                self._stdin_ended = False
                with contextlib.suppress(OSError):
                    os.write(fd, b"\x04")  # what a user types to end the input of a terminal
            self._arm()
        elif self._stdin_ended and not self._stdin and self.child is not None:
            self.child.close_fd(0)
        else:
            self.helper.loop.watch(fd, select.EPOLLOUT if self._stdin else 0, lambda _: self._write())

    def _console_pending(self) -> bool:
        return self.in_container and os.path.exists(f"{self.folder}/console") and self.master < 0

    def _consumed(self, amount: int) -> None:
        self._stdin.clear()
        if amount:
            self.helper.tell({"t": "credit", "s": self.number, "n": amount})

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size."""
        self._window = (rows, columns)
        if self.master >= 0:
            with contextlib.suppress(OSError):
                fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def signal(self, number: int, tries: int = 40) -> None:
        """Send a signal to the command."""
        if self.in_container:
            pid = read_text(f"{self.folder}/pid").strip()
            if pid.isdigit():
                with contextlib.suppress(OSError):
                    os.kill(int(pid), number)
            elif tries and self.child is not None and not self.child.ended.done:
                # The command runs an instant before crun has written its number down.
                self.helper.loop.after(0.05, lambda: self.signal(number, tries - 1))
        elif self.child is not None:
            self.child.kill(number)

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        loop = self.helper.loop
        for fd in self._open_outputs:
            loop.unwatch(fd)
        if self.master >= 0:
            loop.unwatch(self.master)
            os.close(self.master)
            self.master = -1
        child = self.child
        if child is not None:
            child.close()
            if not child.ended.done:
                self.signal(signal.SIGHUP)
                loop.after(2.0, lambda: None if child.ended.done else self._kill(child))
        if self.in_container and (child is None or child.ended.done):
            _remove_folder(self.folder)

    def _kill(self, child: Child) -> None:
        self.signal(signal.SIGKILL)
        child.kill(signal.SIGKILL)
        _remove_folder(self.folder)


class DialStream(Stream):
    """A TCP connection to a port on the loopback of the guest, or of a pod's network."""

    def __init__(self, helper: "Helper", number: int, credit: int, sock: socket.socket, port: int) -> None:
        super().__init__(helper, number, credit)
        self._sock, self._port = sock, port
        self._opened = self._read_ended = self._write_ended = False
        self._input = bytearray()
        self._input_ended = False
        self._timer = helper.loop.after(DIAL_S, self._late)
        problem = sock.connect_ex(("127.0.0.1", port))
        if problem not in (0, errno.EINPROGRESS):
            raise OSError(problem, os.strerror(problem))
        helper.loop.watch(sock.fileno(), select.EPOLLOUT, lambda _: self._connected())

    def _late(self) -> None:
        if not self._opened:
            self._fail(errno.ETIMEDOUT)

    def _fail(self, problem: int) -> None:
        self.end(code=1, error=f"port {self._port}: {os.strerror(problem)}")

    def _connected(self) -> None:
        problem = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            self._fail(problem)
            return
        self._opened = True
        self.helper.loop.cancel(self._timer)
        self.helper.tell({"t": "opened", "s": self.number})
        self._arm()

    def _arm(self) -> None:
        if self.closed or not self._opened:
            return
        events = 0
        if not self._read_ended and self.credit > 0 and self.helper.port.queued < OUT_LOW:
            events |= select.EPOLLIN
        if self._input:
            events |= select.EPOLLOUT
        self.helper.loop.watch(self._sock.fileno(), events, self._turn)

    def _turn(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._write()
        if not self.closed and events & ~select.EPOLLOUT:
            while self.pull():
                pass
        self._arm()

    def pull(self) -> bool:
        if not self._opened or self._read_ended or self.credit <= 0 or self.helper.port.queued >= OUT_LOW:
            return False
        try:
            data = self._sock.recv(min(CHUNK, self.credit))
        except BlockingIOError:
            self._arm()
            return False
        except OSError as error:
            self._fail(error.errno or errno.EIO)
            return False
        if not data:
            self._read_ended = True
            self.helper.tell({"t": "eof", "s": self.number})
            self._settle()
            return False
        self.credit -= len(data)
        self.helper.port.send({"t": "data", "s": self.number, "ch": "out"}, data)
        return True

    def grant(self, amount: int) -> None:
        super().grant(amount)
        self._arm()

    def data(self, payload: bytes) -> None:
        if len(self._input) + len(payload) > STDIN_WINDOW:
            self.end(code=1, error="the host sent more than it was granted")
            return
        self._input += payload
        self._write()
        self._arm()

    def eof(self) -> None:
        self._input_ended = True
        self._write()
        self._arm()

    def _write(self) -> None:
        written = 0
        try:
            while self._opened and self._input:
                count = self._sock.send(self._input[:CHUNK])
                del self._input[:count]
                written += count
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(error.errno or errno.EIO)
            return
        if written:
            self.helper.tell({"t": "credit", "s": self.number, "n": written})
        if self._opened and self._input_ended and not self._input and not self._write_ended:
            self._write_ended = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
        self._settle()

    def _settle(self) -> None:
        if self._read_ended and self._write_ended:
            self.end(code=0)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self.helper.loop.cancel(self._timer)
            self.helper.loop.unwatch(self._sock.fileno())
            self._sock.close()


def socket_in(pid: int) -> socket.socket:
    """A TCP socket in the network of a process; in our own where ``pid`` is 0. Raises OSError.

    A socket stays in the network that its maker was in, and we have one thread, so nobody sees us elsewhere.
    """
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if pid:
            other = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.path.samestat(os.fstat(own), os.fstat(other)):
                    pid = 0
                elif LIBC.setns(other, CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(other)
        try:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        finally:
            if pid and LIBC.setns(own, CLONE_NEWNET) != 0:
                os._exit(70)  # in a pod's network we must not stay; what started us starts us anew
    finally:
        os.close(own)
    sock.setblocking(False)
    return sock


def _size(request: Message, name: str, default: int) -> int:
    value = request.get(name, default)
    return value if isinstance(value, int) and 0 < value < 10000 else default


def _remove_folder(path: str) -> None:
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            os.unlink(f"{path}/{name}")
        os.rmdir(path)


# --- pods -------------------------------------------------------------------------------------------------------------


class Paths:
    """Where things lie. Tests give another root."""

    def __init__(self, root: str, podman: str, crun: str) -> None:
        self.podman, self.crun, self.root = podman, crun, root
        self.run = f"{root}/run/casemate"
        self.seed = f"{self.run}/seed"
        self.secrets = f"{self.run}/secrets"  # /run is memory: nothing of it is on a disk
        self.instance = f"{self.run}/instance.env"
        self.state = f"{root}/var/lib/casemate/guest.json"
        self.exits = f"{root}/run/libpod/exits"
        self.cloud = f"{root}/run/cloud-init"
        self.hosts = f"{root}/etc/hosts"
        self.resolv = f"{root}/etc/resolv.conf"
        self.ssh = f"{root}/root/.ssh"
        self.host_keys = f"{root}/etc/ssh"
        self.crun_state = f"{root}/run/crun"
        self.etc_hostname = f"{root}/etc/hostname"
        self.hostname = f"{root}/proc/sys/kernel/hostname"
        self.sys = f"{root}/sys"
        self.ip, self.nsenter = "ip", "nsenter"
        self.dev = f"{root}/dev"
        self.proc = f"{root}/proc"
        self.mounts = f"{root}/proc/self/mounts"
        self.cgroup = f"{root}/sys/fs/cgroup"
        self.cdi, self.run_cdi = f"{root}/etc/cdi", f"{root}/run/cdi"
        self.recipes = f"{root}/etc/casemate/devices.d"
        self.volumes = f"{root}{VOLUMES}"


class PodNics:
    """Interfaces of the guest that go into the network of a pod: a virtual function, or any other, known by its MAC address.

    The seed says which, for it is of the domain that runs. An interface is given before the pod's first container starts, and
    again wherever the pod's network was made anew (the guest was rebooted). It comes back by itself: when the network of a
    pod goes, the kernel moves what is hardware in it to the guest's own (net/core/dev.c, default_device_exit_net). In its pod
    it is looked for by its permanent address too, for a container may give it another one.
    """

    def __init__(self, loop: Loop, paths: Paths) -> None:
        self.loop, self.paths = loop, paths
        self.wanted: list[Message] = []
        with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
            for entry in json.loads(read_text(f"{paths.seed}/meta-data")).get("casemate-pod-interfaces") or []:
                fields = {key: str(entry[key]) for key in ("pod", "mac", "name", "guest-name", "address")}
                if not any(c.isspace() for value in fields.values() for c in value):
                    self.wanted.append({**fields, "mac": fields["mac"].lower(), "mtu": int(entry["mtu"])})

    def of(self, pod: str) -> list[Message]:
        """Those of one pod, in their order."""
        return [nic for nic in self.wanted if nic["pod"] == pod]

    async def give(self, pod: str, pid: int) -> str:
        """Have the pod's interfaces in the network of this process; why not, or nothing. Done again it changes nothing."""
        for nic in self.of(pod):
            inside = f"--net=/proc/{pid}/ns/net"
            name = await self._find(nic, [self.paths.nsenter, inside])
            if not name:
                name = await self._await(nic, NIC_WAIT_S)
                if not name:
                    return (
                        f"interface {nic['mac']} of pod {pod} has not appeared in the guest: is there a driver for it?"
                    )
                # Under a name of its own on the way: the pod's network has an eth0 already.
                moving = f"to-{nic['guest-name']}"
                lines = [f"link set {name} down", f"link set {name} name {moving}", f"link set {moving} netns {pid}"]
                if problem := await self._ip([], lines):
                    return f"interface {nic['mac']} cannot be moved into pod {pod}: {problem}"
                name = moving
            lines = [] if name == nic["name"] else [f"link set {name} down", f"link set {name} name {nic['name']}"]
            lines += [f"link set {nic['name']} mtu {nic['mtu']}", f"addr replace {nic['address']} dev {nic['name']}"]
            if problem := await self._ip([self.paths.nsenter, inside], [*lines, f"link set {nic['name']} up"]):
                return f"interface {nic['mac']} in pod {pod}: {problem}"
        return ""

    async def take_back(self, pod: str) -> str:
        """The pod is gone: have its interfaces in the guest again, down and by their names; which is not, or nothing."""
        for nic in self.of(pod):
            name = await self._await(nic, NIC_BACK_S)
            if not name:
                return f"interface {nic['mac']} has not come back from pod {pod}"
            lines = [f"link set {name} down", f"addr flush dev {name}"]
            lines += [] if name == nic["guest-name"] else [f"link set {name} name {nic['guest-name']}"]
            if problem := await self._ip([], lines):
                return f"interface {nic['mac']}, back from pod {pod}: {problem}"
        return ""

    async def _await(self, nic: Message, wait_s: float) -> str:
        """Name of an interface in the guest's own network once it is there: its driver, or the end of a pod, takes a moment."""
        end = time.monotonic() + wait_s
        while not (name := await self._find(nic, [])) and time.monotonic() < end:
            await self.loop.sleep(0.25)
        return name

    async def _find(self, nic: Message, prefix: list[str]) -> str:
        """Name of an interface in a network; nothing where it is elsewhere."""
        ended = await run(self.loop, [*prefix, self.paths.ip, "-json", "link", "show"])
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            for link in json.loads(ended.out):
                # Where the address was changed, the permanent one is told beside it.
                if str(link.get("permaddr") or link.get("address")).lower() == nic["mac"]:
                    return str(link["ifname"])
        return ""

    async def _ip(self, prefix: list[str], lines: list[str]) -> str:
        """Commands of ip, in one go; what went wrong, or nothing."""
        words = [*prefix, self.paths.ip, "-batch", "-"]
        ended = await run(self.loop, words, "\n".join(lines).encode() + b"\n")
        return "" if ended.code == 0 else ended.reason()


class Container:
    """A container of a pod, as it is."""

    def __init__(self, name: str, image: str) -> None:
        self.name, self.image = name, image
        self.id = ""
        self.log_path = ""
        self.state = "waiting"  # waiting, running, terminated: the words of Kubernetes
        self.reason = "ContainerCreating"
        self.message = ""
        self.ready = False
        self.restarts = 0
        self.failures = 0  # in a row, for the back-off
        self.exit_code = 0
        self.started = 0.0
        self.finished = 0.0
        self.restart_at = 0.0  # monotonic; 0: not to be restarted
        self.starts: list[int] = []  # positions in the log at which the container was started, the last few
        self.trimmed: list[tuple[int, int]] = []  # (position up to which the log is gone, lines that went with it)
        self.cpus: list[int] = []  # those that it has for itself
        self.devices: list[str] = []  # qualified names of those that it was given by number

    def over(self) -> bool:
        """Whether it has ended and is not started again: its log is complete."""
        return self.state == "terminated" and not self.restart_at

    SAVED = (
        "id",
        "image",
        "log_path",
        "state",
        "reason",
        "restarts",
        "exit_code",
        "started",
        "finished",
        "starts",
        "trimmed",
        "cpus",
        "devices",
    )

    def report(self) -> Message:
        """What the host is told."""
        return {
            "name": self.name,
            "image": self.image,
            "state": self.state,
            "reason": self.reason,
            "message": self.message[:MAX_TEXT],
            "ready": self.ready,
            "restarts": self.restarts,
            "exit_code": self.exit_code,
            "started": self.started,
            "finished": self.finished,
        }


class Pod:
    """A pod that is wanted, or still there."""

    def __init__(self, name: str, loop: Loop) -> None:
        self.name = name
        self.wanted: Message | None = None  # its manifest; None: to be removed
        self.playing = ""  # text of the manifest that podman was given; "" while there is nothing
        self.infra = ""  # name of the container that holds its network
        self.maybe_there = False  # podman may have something of this name
        self.containers: dict[str, Container] = {}
        self.reason, self.message = "", ""
        self.address = "127.0.0.1"
        self.started = 0.0
        self.retry_at = 0.0
        self.failures = 0
        self.wake = Signal(loop)
        self.files: dict[str, list[Message]] = {}  # of secrets, by volume; in memory alone

    def spec(self) -> Message:
        """The spec of the manifest that plays, or of the wanted one."""
        manifest = json.loads(self.playing) if self.playing else self.wanted
        return dict(manifest["spec"]) if manifest else {}

    def phase(self) -> str:
        """The phase by the rules of Kubernetes."""
        states = list(self.containers.values())
        if not self.playing or not states or any(c.started == 0.0 for c in states):
            return "Pending"
        if all(c.over() for c in states):
            return "Succeeded" if all(c.exit_code == 0 for c in states) else "Failed"
        return "Running"

    def report(self) -> Message:
        """What the host is told."""
        phase = self.phase()
        containers = [c.report() for c in self.containers.values()]
        return {
            "name": self.name,
            "phase": phase,
            "ready": phase == "Running" and all(c["ready"] for c in containers),
            "reason": self.reason,
            "message": self.message[:MAX_TEXT],
            "started": self.started,
            "containers": containers,
        }


def restarts_after(policy: str, code: int) -> bool:
    """Whether a container that ended with ``code`` is started again."""
    return policy == "Always" or (policy == "OnFailure" and code != 0)


def backoff(failures: int) -> float:
    """Seconds before the next start, after so many ends in a row: none after the first, then doubling from 10."""
    return 0.0 if failures <= 1 else min(BACKOFF_FIRST_S * 2.0 ** min(failures - 2, 10), BACKOFF_MAX_S)


def remove_tree(path: str) -> None:
    """Remove a folder of our own with all that is in it; nothing where there is none."""
    for folder, folders, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(f"{folder}/{name}")
        for name in folders:
            os.rmdir(f"{folder}/{name}")
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path)


def secret_volumes(manifest: Message) -> list[str]:
    """Names of the volumes that are made of a secret."""
    return [str(v["name"]) for v in manifest["spec"].get("volumes") or () if "secret" in v]


def take_files(manifest: Message) -> dict[str, list[Message]]:
    """Files of secrets, by volume, out of a manifest: what is left of it may be kept on disk. Raises ValueError."""
    found: dict[str, list[Message]] = {}
    for volume in manifest["spec"].get("volumes") or ():
        if "secret" in volume:
            name, secret = volume["name"], volume["secret"]
            files = secret.pop("files") if isinstance(secret, dict) else None
            if not isinstance(name, str) or not all(c.isalnum() or c in "-._" for c in name) or name.startswith("."):
                raise ValueError("bad name of a volume")
            if not isinstance(files, list) or not all(
                isinstance(f, dict) and isinstance(f["text"], str) and isinstance(f["path"], str) for f in files
            ):
                raise ValueError(f"bad files of volume {name}")
            found[name] = files
    return found


class Pods:
    """Makes what runs equal to what is wanted."""

    def __init__(self, helper: "Helper") -> None:
        self.helper, self.loop, self.paths = helper, helper.loop, helper.paths
        self.pods: dict[str, Pod] = {}
        self.needs = Needs(self)
        self.revision = ""
        self.nics = PodNics(self.loop, self.paths)
        self.loaded: dict[str, list[str]] = {}  # fingerprint of an archive -> names of the images that came from it
        self._by_id: dict[str, tuple[Pod, Container]] = {}
        self._early_exits: dict[str, tuple[int, float]] = {}  # of containers whose id is not known yet
        self._podman_free = deque([0, 1])  # at most two at once: each costs a core for a while
        self._podman_waiters: deque[Future] = deque()
        os.makedirs(self.paths.exits, exist_ok=True)
        helper.inotify.add(self.paths.exits, IN_MOVED_TO | IN_CLOSE_WRITE, self._exit_file)

    # What is kept on disk.

    def save(self) -> None:
        """Write what must outlive the helper."""
        state = {
            "boot": self.helper.boot_id,
            "revision": self.revision,
            "loaded": self.loaded,
            "pods": [
                {
                    "manifest": pod.wanted,
                    "playing": pod.playing,
                    "infra": pod.infra,
                    "address": pod.address,
                    "started": pod.started,
                    "containers": {
                        c.name: {field: getattr(c, field) for field in Container.SAVED} for c in pod.containers.values()
                    },
                }
                for pod in self.pods.values()
                if pod.wanted is not None
            ],
        }
        path = self.paths.state
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)

    def restore(self) -> None:
        """Take up what the last helper left, in this boot of the guest or an earlier one."""
        text = read_text(self.paths.state, 16 << 20)
        if not text:
            return
        try:
            state = json.loads(text)
            self.revision, self.loaded = str(state["revision"]), dict(state["loaded"])
            for entry in state["pods"]:
                pod = Pod(entry["manifest"]["metadata"]["name"], self.loop)
                pod.wanted, pod.playing, pod.address = entry["manifest"], entry["playing"], entry["address"]
                pod.started, pod.maybe_there, pod.infra = entry["started"], True, str(entry.get("infra", ""))
                for name, saved in entry["containers"].items():
                    container = pod.containers[name] = Container(name, saved["image"])
                    for field in Container.SAVED:
                        if field in saved:  # an older helper knew fewer
                            setattr(container, field, saved[field])
                    if container.id:
                        self._by_id[container.id] = (pod, container)
                self.pods[pod.name] = pod
        except (ValueError, KeyError, TypeError) as error:
            log(f"the saved state is unreadable, the host will send it again: {error!r}")
            self.pods.clear()
            return
        if any(self._lacks_files(pod) for pod in self.pods.values()):
            self.revision = ""  # the host gives them once more
        rebooted = state.get("boot") != self.helper.boot_id
        for pod in self.pods.values():
            self.loop.start(self._adopt(pod, rebooted))

    async def _adopt(self, pod: Pod, rebooted: bool) -> None:
        """Compare a restored pod with what podman has, then look after it as after any other."""
        known = [c for c in pod.containers.values() if c.id]
        if rebooted:
            for container in known:
                if container.state != "terminated" or container.restart_at:
                    self._ended(pod, container, 137, "GuestRebooted", look=False)
        elif known:
            facts = await self._inspect([c.id for c in known])
            for container in known:
                fact = facts.get(container.id)
                if fact is None:
                    pod.playing = ""  # somebody removed it: play the pod anew
                    continue
                if fact["State"]["Running"]:
                    container.state, container.reason = "running", ""
                    self._watch_readiness(pod, container)
                elif container.state == "running":
                    self._ended(pod, container, int(fact["State"]["ExitCode"]), look=True)
                elif container.state == "waiting":
                    container.restart_at = time.monotonic()
        await self.work(pod)

    # From the host.

    def apply(self, manifests: list[Message], revision: str) -> None:
        """Make these the pods of the guest. Raises ValueError for what is no list of pods."""
        wanted: dict[str, Message] = {}
        for manifest in manifests:
            try:
                name = manifest["metadata"]["name"]
                valid = isinstance(name, str) and name and all(c.isalnum() or c in "-." for c in name)
                if not valid or not manifest["spec"]["containers"]:
                    raise ValueError(f"bad pod {name!r}")
            except (KeyError, TypeError) as error:
                raise ValueError(f"not a pod: {error!r}") from error
            wanted[name] = manifest
        files = {name: take_files(manifest) for name, manifest in wanted.items()}
        if len(wanted) != len(manifests) or len(wanted) > 256:
            raise ValueError("pods need names of their own, and are at most 256")
        for name, pod in self.pods.items():
            if name not in wanted and pod.wanted is not None:
                pod.wanted = None
                pod.reason = "Terminating"
                pod.wake.set()
        for name, manifest in wanted.items():
            known = self.pods.get(name)
            if known is None:
                known = self.pods[name] = Pod(name, self.loop)
                known.wanted, known.files = manifest, files[name]
                self.loop.start(self.work(known))
                continue
            known.files = files[name]
            if known.wanted == manifest:
                if known.files and self._lacks_files(known):
                    self._write_files(known)
                known.wake.set()
            else:
                known.wanted, known.reason, known.retry_at, known.failures = manifest, "", 0.0, 0
                known.wake.set()
        self.revision = revision
        self.changed()

    async def load(self, device: str) -> Ended:
        """Load the images of an archive disk, once for the same contents."""
        digest = await self._fingerprint(device)
        if digest in self.loaded:
            return Ended(0, b"", b"")
        ended = await self.podman(["load", "--quiet", "--input", device])
        if ended.code == 0:
            lines = ended.out.decode(errors="replace").splitlines()
            self.loaded[digest] = [line.partition(":")[2].strip() for line in lines if line.startswith("Loaded image")]
            self.save()
        return ended

    async def _fingerprint(self, device: str) -> str:
        """Length and checksum of a disk: enough to know again what was loaded before. Raises OSError."""
        check, length = 0, 0
        with open(device, "rb", buffering=0) as file:  # noqa: ASYNC230 (this loop has no other way)
            while block := file.read(1 << 20):
                check, length = crc32(block, check), length + len(block)
                await self.loop.sleep(0.0)  # others have their turn
        return f"{length}-{check:08x}"

    def changed(self, save: bool = True) -> None:
        """A pod's state is not what it was."""
        if save:
            self.save()
        self.helper.pods_changed()

    def settle(self) -> None:
        """Release the rest of the boot once no pod is about to be played for the first time."""
        if not any(pod.wanted is not None and not pod.playing and not pod.failures for pod in self.pods.values()):
            self.helper.release_boot()

    # podman.

    async def podman(self, words: list[str], stdin: bytes = b"") -> Ended:
        while not self._podman_free:
            future = Future()
            self._podman_waiters.append(future)
            await future
        slot = self._podman_free.popleft()
        try:
            return await run(self.loop, [self.paths.podman, *words], stdin, PODMAN_TIMEOUT_S)
        finally:
            self._podman_free.append(slot)
            if self._podman_waiters:
                self._podman_waiters.popleft().set()

    async def _inspect(self, names: list[str]) -> dict[str, Message]:
        """Facts of containers by id; those that are gone are left out.

        That podman fails is not that they are gone: it is asked again until it answers.
        """
        while True:
            ended = await self.podman(["container", "inspect", *names])
            try:
                # It prints what it found, and fails, when one of them is missing.
                return {str(fact["Id"]): fact for fact in json.loads(ended.out)}
            except (ValueError, KeyError, TypeError):
                log(f"podman inspect: {ended.reason()}")
                await self.loop.sleep(1.0)

    def process_of(self, container_id: str) -> Message:
        """The process that a container was started with: user, environment, capabilities, folder. Raises OSError."""
        found = self._by_id[container_id][1]
        with open(f"{os.path.dirname(found.log_path)}/config.json", encoding="utf-8") as file:
            process: Message = json.load(file)["process"]
        return process

    def pid_of(self, container: Container) -> int:
        """The first process of a container that runs, by the runtime's own record. Raises LookupError."""
        if container.state != "running":
            raise LookupError(f"container {container.name} is {container.state}")
        try:
            return int(json.loads(read_text(f"{self.paths.crun_state}/{container.id}/status"))["pid"])
        except (ValueError, KeyError, TypeError) as error:
            raise LookupError(f"container {container.name} has no process") from error

    def find(self, pod: str, container: str) -> Container:
        """A container by name; the only one where no name is given. Raises LookupError."""
        found = self.pods.get(pod)
        if found is None:
            raise LookupError(f"no pod {pod}")
        if not container and len(found.containers) == 1:
            return next(iter(found.containers.values()))
        if container not in found.containers:
            raise LookupError(f"pod {pod} has no container {container}, but {', '.join(found.containers)}")
        return found.containers[container]

    # Files of secrets.

    def _folder(self, pod: Pod, volume: str) -> str:
        return f"{self.paths.secrets}/{pod.name}/{volume}"

    def _lacks_files(self, pod: Pod) -> bool:
        """Whether a volume of a secret is not there, as after a boot of the guest."""
        if pod.wanted is None:
            return False
        return not all(os.path.isdir(self._folder(pod, name)) for name in secret_volumes(pod.wanted))

    def _write_files(self, pod: Pod) -> None:
        """Volumes of secrets, each made beside and renamed, so that it is whole where it is there. Raises OSError."""
        context = (pod.wanted or {}).get("spec", {}).get("securityContext") or {}
        group = context.get("fsGroup")
        for volume, files in pod.files.items():
            folder = self._folder(pod, volume)
            fresh = f"{folder}.new"
            remove_tree(fresh)
            os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
            os.mkdir(fresh, 0o755)
            os.chmod(fresh, 0o755)
            for file in files:
                path = f"{fresh}/{file['path']}"
                parts = file["path"].split("/")
                if not all(parts) or {".", ".."} & set(parts):
                    raise ValueError(f"bad path of a file in volume {volume}")
                at = fresh
                for part in parts[:-1]:
                    at = f"{at}/{part}"
                    if not os.path.isdir(at):
                        os.mkdir(at, 0o755)
                        os.chmod(at, 0o755)
                mode = int(file["mode"]) & 0o777 | (0o440 if group is not None else 0)
                with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
                    out.write(file["text"])
                    if group is not None:
                        os.fchown(out.fileno(), 0, int(group))
                    os.fchmod(out.fileno(), mode)
            remove_tree(folder)
            os.rename(fresh, folder)
        for left in set(os.listdir(f"{self.paths.secrets}/{pod.name}")) - set(pod.files):
            remove_tree(f"{self.paths.secrets}/{pod.name}/{left}")

    # One pod.

    async def work(self, pod: Pod) -> None:
        """Look after one pod until it is wanted no longer and gone."""
        while True:
            # Both are texts of JSON made by us, so that they compare by value and are kept as they are.
            wanted = "" if pod.wanted is None else json.dumps(pod.wanted, sort_keys=True)
            now = time.monotonic()
            blocked = "" if pod.wanted is None else self.helper.volumes.problem(pod.wanted)
            if not blocked and pod.reason == "VolumeNotMounted":
                pod.reason, pod.message, pod.failures = "", "", 0
                self.changed()
            if blocked:
                # Without its volume it would write into a folder of the root disk.
                if (pod.reason, pod.message) != ("VolumeNotMounted", blocked):
                    pod.reason, pod.message, pod.failures = "VolumeNotMounted", blocked, pod.failures + 1
                    self.changed()
                    self.settle()
                await pod.wake.wait(None)
                continue
            if pod.wanted is None:
                if await self._remove(pod):
                    break
                pod.retry_at = time.monotonic() + BACKOFF_FIRST_S
            elif self._lacks_files(pod) and not pod.files:
                pod.reason, pod.message = "SecretsMissing", "the host has not given its secrets yet, since this boot"
                self.changed()
                await pod.wake.wait(None)
                pod.reason, pod.message = "", ""
                continue
            elif wanted != pod.playing and now >= pod.retry_at:
                await self._play(pod, wanted)
                continue
            due = [c for c in pod.containers.values() if c.restart_at and c.restart_at <= now]
            if due and wanted == pod.playing:
                for container in due:
                    await self._start(pod, container)
                continue
            times = [c.restart_at for c in pod.containers.values() if c.restart_at]
            if wanted != pod.playing:
                times = [pod.retry_at]
            await pod.wake.wait(max(0.0, min(times) - time.monotonic()) if times else None)
        if self.pods.get(pod.name) is pod:
            del self.pods[pod.name]
        self.changed()

    async def _remove(self, pod: Pod) -> bool:
        if pod.maybe_there:
            grace = int(pod.spec().get("terminationGracePeriodSeconds", 10))
            ended = await self.podman(["pod", "rm", "--force", "--ignore", "--time", str(grace), pod.name])
            if ended.code != 0:
                pod.reason, pod.message = "RemoveFailed", ended.reason()
                self.changed()
                return False
            if problem := await self.nics.take_back(pod.name):
                self.helper.note(pod.name, "", "NicNotBack", problem, "Warning")
        self._forget(pod)
        await self.needs.take_back(pod)
        return True

    def _forget(self, pod: Pod) -> None:
        for container in pod.containers.values():
            self._by_id.pop(container.id, None)
            self.helper.log_complete(container)
        pod.containers = {}
        pod.playing, pod.maybe_there, pod.infra = "", False, ""
        if pod.wanted is None:
            remove_tree(f"{self.paths.secrets}/{pod.name}")

    async def _play(self, pod: Pod, wanted: str) -> None:
        if pod.maybe_there and not await self._remove(pod):
            pod.retry_at = time.monotonic() + BACKOFF_FIRST_S
            return
        manifest = json.loads(wanted)
        spec = manifest["spec"]
        if pod.files and pod.wanted is not None and json.dumps(pod.wanted, sort_keys=True) == wanted:
            try:
                self._write_files(pod)
            except (OSError, ValueError, KeyError, TypeError) as error:
                pod.failures += 1
                pod.retry_at = time.monotonic() + max(BACKOFF_FIRST_S, backoff(pod.failures))
                pod.reason, pod.message = "SecretFilesFailed", f"{type(error).__name__}"
                self.helper.note(pod.name, "", pod.reason, pod.message, "Warning")
                self.changed()
                self.settle()
                return
        if not secret_volumes(manifest):
            remove_tree(f"{self.paths.secrets}/{pod.name}")
        self._mount_files(pod, spec)
        pod.containers = {c["name"]: Container(c["name"], c.get("image", "")) for c in spec["containers"]}
        pod.maybe_there = True
        self.changed()
        # The helper restarts and probes by the rules of Kubernetes; podman's own rules are others.
        spec["restartPolicy"] = "Never"
        for container in spec["containers"]:
            for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
                container.pop(probe, None)
        try:
            ended = await self._begin(pod, manifest)
        except Lacking as lack:
            self._not_played(pod, lack.reason, str(lack))
            return
        if ended.code != 0:
            self._not_played(pod, "PlayFailed", ended.reason())
            return
        names = [f"{pod.name}-{c}" for c in pod.containers]
        facts = await self._inspect([*names, pod.infra] if pod.infra and not spec.get("hostNetwork") else names)
        pod.playing, pod.reason, pod.message, pod.failures = wanted, "", "", 0
        pod.started = time.time()
        for fact in facts.values():
            name = str(fact.get("Name", "")).removeprefix(f"{pod.name}-")
            container = pod.containers.get(name)
            if container is None:
                networks = (fact.get("NetworkSettings") or {}).get("Networks") or {}
                addresses = [n.get("IPAddress") for n in networks.values() if isinstance(n, dict)]
                pod.address = next((str(a) for a in addresses if a), pod.address)
                continue
            container.id = str(fact["Id"])
            container.log_path = str(fact["HostConfig"]["LogConfig"]["Path"])
            container.started, container.starts = time.time(), [0]
            container.state, container.reason = "running", ""
            self._by_id[container.id] = (pod, container)
            self._guard_log(container)
            early = self._early_exits.pop(container.id, None)
            if early is not None:
                self._ended(pod, container, early[0], look=True)
            elif not fact["State"]["Running"]:
                self._ended(pod, container, int(fact["State"]["ExitCode"]), look=True)
        for container in pod.containers.values():
            if container.state == "running":
                self.needs.started(pod, container)
                self._watch_readiness(pod, container)
        self.changed()
        self.settle()

    async def _begin(self, pod: Pod, manifest: Message) -> Ended:
        """Have podman make and start a pod. Its own interfaces are in its network, and CPUs of their own set on its
        containers, before the first of them starts. Raises Lacking."""
        nics, pinned = self.nics.of(pod.name), await self.needs.give(pod, manifest)
        words = ["kube", "play", "--quiet", *(["--start=false"] if nics or pinned else []), "-"]
        ended = await self.podman(words, json.dumps(manifest).encode())
        if ended.code != 0:
            return ended
        words = ended.out.decode(errors="replace").split()
        pod.infra = f"{words[words.index('Pod:') + 1][:12]}-infra" if "Pod:" in words[:-1] else ""
        if not nics and not pinned:
            return ended
        if problem := await self._give_nics(pod):
            return Ended(1, b"", problem.encode())
        if (unpinned := await self.needs.pin(pod)) is not None:
            return unpinned
        started = await self.podman(["pod", "start", pod.name])
        return ended if started.code == 0 else started

    async def _give_nics(self, pod: Pod) -> str:
        """Have a pod's network, and its interfaces in it; why not, or nothing."""
        if not self.nics.of(pod.name):
            return ""
        ended = await self.podman(["start", pod.infra])
        if ended.code != 0:
            return f"the network of pod {pod.name}: {ended.reason()}"
        for fact in (await self._inspect([pod.infra])).values():
            return await self.nics.give(pod.name, int(fact["State"]["Pid"]))
        return f"the network of pod {pod.name} is gone"

    def _mount_files(self, pod: Pod, spec: Message) -> None:
        """Volumes of secrets as podman takes them: folders of ours, read-only."""
        names = set()
        for volume in spec.get("volumes") or ():
            if "secret" in volume:
                names.add(volume["name"])
                del volume["secret"]
                volume["hostPath"] = {"path": self._folder(pod, volume["name"]), "type": "Directory"}
        for container in (*spec["containers"], *(spec.get("initContainers") or ())):
            for mount in container.get("volumeMounts") or ():
                if mount.get("name") in names:
                    mount["readOnly"] = True

    def _not_played(self, pod: Pod, reason: str, message: str) -> None:
        pod.failures += 1
        pod.retry_at = time.monotonic() + max(BACKOFF_FIRST_S, backoff(pod.failures))
        pod.reason, pod.message = reason, message
        self.helper.note(pod.name, "", reason, message, "Warning")
        self.changed()
        self.settle()

    async def _start(self, pod: Pod, container: Container) -> None:
        if problem := await self._give_nics(pod):
            # Not without what it was promised: it is tried again as a container that failed to start is.
            self.helper.note(pod.name, container.name, "NicMissing", problem, "Warning")
            container.restart_at = time.monotonic() + BACKOFF_FIRST_S
            container.state, container.reason, container.message = "waiting", "NicMissing", problem[:MAX_TEXT]
            self.changed()
            return
        container.restart_at = 0.0
        try:
            await self.needs.again(pod)
        except Lacking as lack:
            self.helper.note(pod.name, container.name, lack.reason, str(lack), "Warning")
            self._ended(pod, container, 128, lack.reason)
            return
        container.starts = [*container.starts, _size_of(container.log_path)][-8:]
        self._early_exits.pop(container.id, None)
        container.restarts += 1
        container.state, container.reason = "running", ""
        container.started = time.time()
        # podman's own clean-up after the last run may be under way still, and then the start fails: once more, and again.
        for pause_s in (1.0, 3.0, 0.0):
            ended = await self.podman(["start", container.id])
            if pod.wanted is None or container.state != "running":
                return  # it has ended again already, which was seen
            if ended.code == 0:
                break
            log(f"podman start {pod.name}/{container.name}: {ended.reason()}")
            if pause_s:
                await self.loop.sleep(pause_s)
        else:
            self.helper.note(pod.name, container.name, "StartFailed", ended.reason(), "Warning")
            self._ended(pod, container, 128, "StartFailed")
            return
        container.message = ""
        self.needs.started(pod, container)
        self._watch_readiness(pod, container)
        self.helper.note(pod.name, container.name, "ContainerRestarted", f"restart {container.restarts}")
        self.changed()

    # The end of a container.

    def _exit_file(self, name: str) -> None:
        text = read_text(f"{self.paths.exits}/{name}", 16).strip()
        if not text.lstrip("-").isdigit():
            return  # it is being written under another name, or was read and removed by podman
        found = self._by_id.get(name)
        if found is None:
            self._early_exits[name] = (int(text), time.time())
            while len(self._early_exits) > 256:
                del self._early_exits[next(iter(self._early_exits))]
        elif found[1].state == "running":
            self._ended(*found, int(text), look=True)

    def _ended(self, pod: Pod, container: Container, code: int, reason: str = "", look: bool = False) -> None:
        """A container has ended: say so, and decide whether and when it is started again."""
        now = time.time()
        if now - container.started > BACKOFF_FORGET_S:
            container.failures = 0
        container.failures += 1
        container.finished, container.exit_code, container.ready = now, code, False
        if look and os.path.exists(f"{os.path.dirname(container.log_path)}/oom"):
            reason = "OOMKilled"
        last = reason or ("Completed" if code == 0 else "Error")
        container.state, container.reason = "terminated", last
        if pod.wanted is not None and restarts_after(pod.spec().get("restartPolicy", "Always"), code):
            delay = 0.0 if reason == "GuestRebooted" else backoff(container.failures)
            container.restart_at = time.monotonic() + max(delay, 0.001)
            if delay:
                container.state, container.reason = "waiting", "CrashLoopBackOff"
                container.message = f"{last} with exit code {code}; next start in {delay:.0f} s"
        if container.over():
            self.helper.log_complete(container)
        severity = "Normal" if code == 0 else "Warning"
        self.helper.note(pod.name, container.name, "ContainerExited", f"{last} with exit code {code}", severity)
        self.changed()
        pod.wake.set()

    # Logs stay within bounds.

    def _guard_log(self, container: Container) -> None:
        def changed(_: str) -> None:
            end, lines = trim_log(container.log_path)
            if end:
                container.trimmed = [*container.trimmed, (end, lines)][-64:]
                self.save()
            if container.id in self._by_id:
                self.loop.after(LOG_TRIM_EVERY_S, watch)

        def watch() -> None:
            if container.id in self._by_id:
                self.helper.inotify.add(container.log_path, IN_MODIFY | IN_ONESHOT, changed)

        watch()

    # Readiness.

    def _watch_readiness(self, pod: Pod, container: Container) -> None:
        specs = [c for c in pod.spec().get("containers", ()) if c["name"] == container.name]
        probe = specs[0].get("readinessProbe") if specs else None
        if not probe:
            container.ready = True
            self.changed(save=False)
        else:
            self.loop.start(self._probe(pod, container, probe))

    async def _probe(self, pod: Pod, container: Container, probe: Message) -> None:
        """Probe a container for as long as this run of it lasts."""
        run_number = container.restarts
        period = max(1.0, float(probe.get("periodSeconds", 10)))
        timeout = max(1.0, float(probe.get("timeoutSeconds", 1)))
        # Sluggish emulated guests need longer than a second to start any process at all.
        timeout = max(timeout, 5.0) if "exec" in probe else timeout
        needed = {True: int(probe.get("successThreshold", 1)), False: int(probe.get("failureThreshold", 3))}
        streak, last = 0, False
        await self.loop.sleep(float(probe.get("initialDelaySeconds", 0)))
        while (
            container.state == "running"
            and container.restarts == run_number
            and pod.containers.get(container.name) is container
        ):
            good = await self._probe_once(pod, container, probe, timeout)
            streak = streak + 1 if good == last else 1
            last = good
            same_run = container.state == "running" and container.restarts == run_number
            if same_run and good != container.ready and streak >= max(1, needed[good]):
                container.ready = good
                self.changed(save=False)
            # Until it is ready for the first time, look once a second: nobody waits ten for a server that starts in two.
            await self.loop.sleep(period if container.ready else min(period, 1.0))

    async def _probe_once(self, pod: Pod, container: Container, probe: Message, timeout_s: float) -> bool:
        if "exec" in probe:
            return await self._probe_command(container, probe["exec"].get("command", ()), timeout_s)
        where = probe.get("httpGet") or probe.get("tcpSocket") or {}
        address = (str(where.get("host") or pod.address), int(where.get("port", 80)))
        with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as peer:
            peer.setblocking(False)
            deadline = time.monotonic() + timeout_s
            if peer.connect_ex(address) not in (0, errno.EINPROGRESS):
                return False
            await self.loop.ready(peer.fileno(), select.EPOLLOUT, timeout_s)
            if peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0 or time.monotonic() >= deadline:
                return False
            if "httpGet" not in probe:
                return True
            path = str(where.get("path") or "/")
            request = f"GET {path} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nConnection: close\r\n\r\n"
            if any(ord(c) < 32 or ord(c) == 127 for c in path):
                return False
            if where.get("scheme") == "HTTPS":
                return await self._https(peer, request.encode(), deadline)
            peer.sendall(request.encode())
            answer = b""
            while b"\n" not in answer and len(answer) < 4096:
                if not await self.loop.ready(peer.fileno(), select.EPOLLIN, max(0.0, deadline - time.monotonic())):
                    return False
                data = peer.recv(4096)
                if not data:
                    break
                answer += data
            return _good_status(answer)
        return False

    async def _probe_command(self, container: Container, argv: list[str], timeout_s: float) -> bool:
        folder = f"{self.paths.run}/probe-{container.id[:12]}"
        try:
            process = self.process_of(container.id)
            process.update(args=list(argv), terminal=False)
            os.makedirs(folder, mode=0o700, exist_ok=True)
            write_text(f"{folder}/process.json", json.dumps(process))
        except (OSError, LookupError):
            return False
        words = [self.paths.crun, "exec", "--process", f"{folder}/process.json", "--pid-file", f"{folder}/pid"]
        ended = await run(self.loop, [*words, container.id], timeout_s=timeout_s, keep=0)
        if ended.code == 137:  # what ran too long is in the container still, where crun put it
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(read_text(f"{folder}/pid")), signal.SIGKILL)
        _remove_folder(folder)
        return ended.code == 0

    async def _https(self, peer: socket.socket, request: bytes, deadline: float) -> bool:
        """A request over TLS; like the kubelet's, it does not check the certificate of the pod in its own guest."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        answer = b""
        with context.wrap_socket(peer, do_handshake_on_connect=False) as channel:
            steps: deque[Callable[[], Any]] = deque([channel.do_handshake, lambda: channel.send(request)])
            while b"\n" not in answer and len(answer) < 4096 and time.monotonic() < deadline:
                events = select.EPOLLIN
                try:
                    if steps:
                        steps[0]()
                        steps.popleft()
                        continue
                    data = channel.recv(4096)
                    if not data:
                        break
                    answer += data
                except ssl.SSLWantReadError:
                    await self.loop.ready(channel.fileno(), events, max(0.0, deadline - time.monotonic()))
                except ssl.SSLWantWriteError:
                    await self.loop.ready(channel.fileno(), select.EPOLLOUT, max(0.0, deadline - time.monotonic()))
        return _good_status(answer)


def _good_status(answer: bytes) -> bool:
    words = answer.split(None, 2)
    return len(words) >= 2 and words[0].startswith(b"HTTP/") and words[1].isdigit() and 200 <= int(words[1]) < 400


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


# --- what containers need of their guest: devices, huge pages, CPUs of their own --------------------------------------

# Resource -> folder of the pool in sysfs, bytes of a page, the page size as mount(8) and the cgroup's files have it.
HUGE_PAGES = {
    "hugepages-2Mi": ("hugepages-2048kB", 2 << 20, "2M", "2MB"),
    "hugepages-1Gi": ("hugepages-1048576kB", 1 << 30, "1G", "1GB"),
}
CDI_VERSION = "0.5.0"  # the first in which a node may have another path on the host; podman reads it from 4.1 on
NVIDIA = "nvidia.com/gpu"
# How devices of a kind are found and what a container of one gets. A guest's own, of the same form, are files in
# /etc/casemate/devices.d. ``nodes`` belong to one device, ``shared`` and ``mounts`` (globs of files) to any of them.
# In their text {n} is the device's place in the order of PCI addresses, {minor} the number that its driver gave it,
# {render} and {card} its nodes of the kernel's graphics drivers. A recipe without a vendor is one device, declared.
RECIPES: tuple[Message, ...] = (
    {
        "kind": NVIDIA,
        "vendor": "0x10de",
        "class": "0x03",
        "nodes": ["/dev/nvidia{minor}"],
        "shared": ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset"],
        "mounts": [
            "/usr/lib/x86_64-linux-gnu/libcuda.so*",
            "/usr/lib/x86_64-linux-gnu/libnvidia-*.so*",
            "/usr/bin/nvidia-smi",
        ],
    },
    {
        "kind": "amd.com/gpu",
        "vendor": "0x1002",
        "class": "0x03",
        "nodes": ["/dev/dri/{render}", "/dev/dri/{card}"],
        "shared": ["/dev/kfd"],
    },
    {"kind": "intel.com/gpu", "vendor": "0x8086", "class": "0x03", "nodes": ["/dev/dri/{render}", "/dev/dri/{card}"]},
)


class Lacking(Exception):
    """The guest does not have what a pod asks for. ``reason`` is the word for the pod's state."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def amounts(container: Message, which: str) -> Message:
    """Limits or requests of a container, to be read and changed."""
    found = (container.get("resources") or {}).get(which)
    return found if isinstance(found, dict) else {}


def parse_amount(value: Any) -> float:
    """A quantity of Kubernetes as a number; of what was checked by the manager already."""
    units = {
        "m": 1e-3,
        "k": 1e3,
        "M": 1e6,
        "G": 1e9,
        "T": 1e12,
        "Ki": 2.0**10,
        "Mi": 2.0**20,
        "Gi": 2.0**30,
        "Ti": 2.0**40,
    }
    text = str(value)
    number = text.rstrip("mkMGTi" + "K")
    return float(number) * units.get(text[len(number) :], 1.0)


def all_containers(spec: Message) -> list[Message]:
    """Init containers and containers of a pod."""
    return [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]


def pages_of(spec: Message) -> dict[str, int]:
    """Pages of each size that a pod holds: those of its containers, or of an init container that has more."""
    held = {}
    for key, (_, size, *_) in HUGE_PAGES.items():
        once = [int(parse_amount(amounts(c, "limits").get(key, 0))) // size for c in spec.get("containers") or ()]
        before = [int(parse_amount(amounts(c, "limits").get(key, 0))) // size for c in spec.get("initContainers") or ()]
        if total := max([sum(once), *before]):
            held[key] = total
    return held


def own_cpus(spec: Message, container: Message) -> int:
    """CPUs that a container has for itself, as under the kubelet's static policy: whole ones of a Guaranteed pod."""
    for other in all_containers(spec):
        limits, requests = amounts(other, "limits"), amounts(other, "requests")
        for key in ("cpu", "memory"):
            limit = parse_amount(limits.get(key, 0))
            if limit <= 0 or parse_amount(requests.get(key, limits[key])) != limit:
                return 0
    wanted = parse_amount(amounts(container, "limits")["cpu"])
    return int(wanted) if wanted == int(wanted) else 0


def parse_cpus(text: str) -> set[int]:
    """A list of CPUs as the kernel writes it: ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            found.update(range(int(first), int(last or first) + 1))
    return found


def format_cpus(cpus: set[int]) -> str:
    """The same, without ranges: every reader of such lists takes it."""
    return ",".join(map(str, sorted(cpus)))


class Needs:
    """Gives pods what their manifests ask of the guest, by changing the manifests into what podman understands.

    Devices go by the Container Device Interface: what is in the guest is written down as specifications (by nvidia-ctk
    where the image has it, else by recipes), and a number of devices becomes as many names, each given once. Huge pages
    are reserved with the kernel, and a volume of them is a hugetlbfs that is mounted here. CPUs of its own are set on a
    container before it starts, and then taken from everybody else by a partition of the kernel's cpusets.
    """

    def __init__(self, pods: "Pods") -> None:
        self.pods, self.loop, self.paths = pods, pods.loop, pods.paths
        self._missing: dict[str, str] = {}  # kind -> why a device of it that is there cannot be given

    async def give(self, pod: "Pod", manifest: Message) -> bool:
        """Change ``manifest``; whether its containers must not be started before `pin`. Raises Lacking."""
        spec = manifest["spec"]
        await self._pages(pod, spec)
        named = self._annotated(manifest)
        if named or any("/" in key for c in all_containers(spec) for key in amounts(c, "limits")):
            await self.write_specifications()
            self._devices(pod, spec, named)
        self._cpus(pod, spec)
        for container in all_containers(spec):
            for key in HUGE_PAGES:
                amounts(container, "limits").pop(key, None)
                amounts(container, "requests").pop(key, None)
        return any(c.cpus for c in pod.containers.values())

    async def again(self, pod: "Pod") -> None:
        """Before a container is started once more, maybe in another boot: what it needs is there. Raises Lacking."""
        spec = pod.spec()
        await self._pages(pod, json.loads(json.dumps(spec)), mounted=True)
        if any(c.devices for c in pod.containers.values()):
            await self.write_specifications()

    async def take_back(self, pod: "Pod") -> None:
        """The pod is gone: so are its volumes of huge pages, and the pages."""
        folder = f"{self.paths.run}/hugepages/{pod.name}"
        if os.path.isdir(folder):
            for name in os.listdir(folder):
                for _ in range(5):  # what podman leaves of a container may hold it for a moment yet
                    if (await run(self.loop, ["umount", f"{folder}/{name}"])).code == 0:
                        break
                    await self.loop.sleep(1.0)
                with contextlib.suppress(OSError):
                    os.rmdir(f"{folder}/{name}")
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        for key in HUGE_PAGES:
            self._pool(key, 0)

    # Devices.

    def _annotated(self, manifest: Message) -> list[str]:
        """Names of devices for all containers of a pod, from its annotations; podman does not read those."""
        annotations = manifest["metadata"].get("annotations") or {}
        values = [str(value) for key, value in annotations.items() if key.startswith("cdi.k8s.io/")]
        return [name.strip() for value in values for name in value.split(",") if name.strip()]

    def _devices(self, pod: "Pod", spec: Message, named: list[str]) -> None:
        known = self.known_devices()
        others = {d for p in self.pods.pods.values() if p is not pod for c in p.containers.values() for d in c.devices}
        given: set[str] = set()
        for container in all_containers(spec):
            limits, requests = amounts(container, "limits"), amounts(container, "requests")
            if named:
                limits = container.setdefault("resources", {}).setdefault("limits", limits)
            limits.update(dict.fromkeys(named, 1))
            mine: list[str] = []
            for key in [k for k in limits if "/" in k and "=" not in k]:
                count = int(parse_amount(limits.pop(key)))
                requests.pop(key, None)
                free = [d for d in known.get(key, ()) if d not in others and d not in given and d not in mine]
                if len(free) < count:
                    told = (
                        self._missing.get(key) or f"this guest has {len(known.get(key, ()))}, {len(free)} of them free"
                    )
                    raise Lacking("DeviceUnavailable", f"{container['name']}: {count} of {key} asked: {told}")
                mine += free[:count]
            for key in [k for k in limits if "=" in k]:
                kind = key.partition("=")[0]
                if kind in self._missing and kind not in known:
                    raise Lacking("DeviceUnavailable", f"{container['name']}: {key} asked: {self._missing[kind]}")
            limits.update(dict.fromkeys(mine, 1))
            record = pod.containers.get(container["name"])
            if record is not None:  # an init container has ended before the others begin: they may have the same
                record.devices = mine
                given.update(mine)

    def known_devices(self) -> dict[str, list[str]]:
        """Qualified names of the guest's devices by kind, but for "all". YAML is read as far as its lines tell."""
        found: dict[str, list[str]] = {}
        for folder in (self.paths.cdi, self.paths.run_cdi):
            for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                text = read_text(f"{folder}/{file}", 4 << 20)
                if file.endswith(".json"):
                    try:
                        specification = json.loads(text)
                        kind = str(specification["kind"])
                        names = [str(device["name"]) for device in specification["devices"]]
                    except (ValueError, KeyError, TypeError):
                        continue
                elif file.endswith((".yaml", ".yml")):
                    lines = [line.strip().removeprefix("- ").partition(":") for line in text.splitlines()]
                    kind = next((value.strip(" \"'") for key, _, value in lines if key == "kind"), "")
                    names = [value.strip(" \"'") for key, _, value in lines if key == "name"]
                else:
                    continue
                known = found.setdefault(kind, [])
                known += [f"{kind}={name}" for name in names if name != "all" and f"{kind}={name}" not in known]
        return found

    async def write_specifications(self) -> None:
        """Write down what this guest has now, one file for each kind. Somebody else's specification of a kind stands."""
        self._missing = {}
        os.makedirs(self.paths.cdi, exist_ok=True)
        mine = {f for f in os.listdir(self.paths.cdi) if f.startswith("casemate-")}
        devices = self._pci_devices()
        written: set[str] = set()
        tool = next(
            (f"{p}/nvidia-ctk" for p in BASE_ENV["PATH"].split(":") if os.access(f"{p}/nvidia-ctk", os.X_OK)), ""
        )
        if tool and any(vendor == "0x10de" and code.startswith("0x03") for _, vendor, _, code in devices):
            path = f"{self.paths.cdi}/casemate-nvidia-ctk.json"
            ended = await run(
                self.loop, [tool, "cdi", "generate", "--format=json", f"--output={path}"], timeout_s=120.0
            )
            if ended.code == 0:
                written.add("casemate-nvidia-ctk.json")
            else:
                self._missing[NVIDIA] = f"nvidia-ctk: {ended.reason()}"
        for file in mine - written:
            with contextlib.suppress(OSError):
                os.unlink(f"{self.paths.cdi}/{file}")
        taken = {*self.known_devices(), *self._missing}
        found: dict[str, Message] = {}
        for recipe in (*RECIPES, *self._recipes()):
            if recipe["kind"] not in taken:
                self._cook(recipe, devices, found)
        for kind, specification in found.items():
            file = f"casemate-{kind.replace('/', '-')}.json"
            write_text(f"{self.paths.cdi}/.{file}.new", json.dumps(specification))
            os.replace(f"{self.paths.cdi}/.{file}.new", f"{self.paths.cdi}/{file}")

    def _pci_devices(self) -> list[tuple[str, str, str, str]]:
        """(address, vendor, device, class) of each function, by address."""
        folder = f"{self.paths.sys}/bus/pci/devices"
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []

        def word(name: str, which: str) -> str:
            return read_text(f"{folder}/{name}/{which}", 16).strip()

        return [(name, word(name, "vendor"), word(name, "device"), word(name, "class")) for name in names]

    def _recipes(self) -> list[Message]:
        """Those that the guest's image declares."""
        folder, found = self.paths.recipes, []
        for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            try:
                recipe = json.loads(read_text(f"{folder}/{file}"))
                vendor, _, name = recipe["kind"].partition("/")
                if not vendor or not name or not isinstance(recipe.get("nodes", []), list):
                    raise ValueError("no kind vendor/class, or nodes are no list")
                found.append(recipe)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                log(f"{folder}/{file} is no recipe: {error!r}")
        return found

    def _cook(self, recipe: Message, pci: list[tuple[str, str, str, str]], found: dict[str, Message]) -> None:
        """Add the devices of one recipe to the specification of its kind."""
        kind = recipe["kind"]
        if "vendor" in recipe:
            wanted = recipe["vendor"], recipe.get("device", ""), recipe.get("class", "")
            places = [
                a
                for a, vendor, device, code in pci
                if vendor == wanted[0] and device.startswith(wanted[1]) and code.startswith(wanted[2])
            ]
        else:
            places = [""]
        made: list[Message] = []
        for n, address in enumerate(places):
            words = self._words(n, address)
            nodes = [self._node(node, words) for node in recipe.get("nodes", ())]
            absent = [node["hostPath"] for node in nodes if not self._there(node["hostPath"])]
            if absent:
                self._missing[kind] = f"{absent[0]} of {address or kind} is not there: is its driver loaded?"
                continue
            made.append({"name": str(n), "containerEdits": {"deviceNodes": nodes}})
        if not made:
            return
        self._missing.pop(kind, None)
        shared = [self._node(node, {}) for node in recipe.get("shared", ())]
        edits: Message = {"deviceNodes": [node for node in shared if self._there(node["hostPath"])]}
        edits["mounts"] = [
            {"hostPath": path, "containerPath": path, "options": ["ro", "nosuid", "nodev", "bind"]}
            for pattern in recipe.get("mounts", ())
            for path in self._glob(pattern)
        ]
        edits["env"] = [str(pair) for pair in recipe.get("env", ())]
        every = [node for device in made for node in device["containerEdits"]["deviceNodes"]]
        made.append({"name": "all", "containerEdits": {"deviceNodes": every}})
        kept = {key: value for key, value in edits.items() if value}
        found[kind] = {"cdiVersion": CDI_VERSION, "kind": kind, "devices": made, "containerEdits": kept}

    def _words(self, n: int, address: str) -> dict[str, str]:
        told = read_text(f"{self.paths.proc}/driver/nvidia/gpus/{address}/information") if address else ""
        minor = next((line.split()[-1] for line in told.splitlines() if line.startswith("Device Minor")), str(n))
        words = {"{n}": str(n), "{minor}": minor}
        folder = f"{self.paths.sys}/bus/pci/devices/{address}/drm"
        for name in sorted(os.listdir(folder)) if address and os.path.isdir(folder) else ():
            for prefix, word in (("renderD", "{render}"), ("card", "{card}")):
                if name.startswith(prefix):
                    words[word] = name
        return words

    @staticmethod
    def _node(node: Any, words: Mapping[str, str]) -> Message:
        path, source = (
            (node, node) if isinstance(node, str) else (str(node["path"]), str(node.get("from", node["path"])))
        )
        for word, text in words.items():
            path, source = path.replace(word, text), source.replace(word, text)
        return {"path": path, "hostPath": source}

    def _there(self, path: str) -> bool:
        return os.path.exists(f"{self.paths.root}{path}")

    def _glob(self, pattern: str) -> list[str]:
        import fnmatch  # here, since few guests need it

        folder, _, name = pattern.rpartition("/")
        where = f"{self.paths.root}{folder}"
        names = sorted(os.listdir(where)) if os.path.isdir(where) else []
        return [f"{folder}/{found}" for found in names if fnmatch.fnmatchcase(found, name)]

    # Huge pages.

    async def _pages(self, pod: "Pod", spec: Message, mounted: bool = False) -> None:
        held = pages_of(spec)
        for key, count in held.items():
            self._pool(key, count, pod)
        for volume in spec.get("volumes") or ():
            empty = volume.get("emptyDir") or {}
            medium = str(empty.get("medium") or "")
            if not medium.startswith("HugePages"):
                continue
            key = f"hugepages-{medium[10:]}" if medium[10:] else next(iter(held))
            folder = f"{self.paths.run}/hugepages/{pod.name}/{volume['name']}"
            is_mount = f" {folder} hugetlbfs " in read_text(self.paths.mounts)
            if is_mount and not mounted:
                await run(self.loop, ["umount", folder])
            if not is_mount or not mounted:
                limit = int(parse_amount(empty.get("sizeLimit") or held[key] * HUGE_PAGES[key][1]))
                os.makedirs(folder, mode=0o755, exist_ok=True)
                options = f"pagesize={HUGE_PAGES[key][2]},size={limit},mode=0777"
                ended = await run(self.loop, ["mount", "-t", "hugetlbfs", "-o", options, "casemate", folder])
                if ended.code != 0:
                    raise Lacking("HugePagesUnavailable", f"volume {volume['name']}: {ended.reason()}")
            del volume["emptyDir"]
            volume["hostPath"] = {"path": folder, "type": "Directory"}

    def _pool(self, key: str, count: int, pod: "Pod | None" = None) -> None:
        """Have the kernel keep as many pages as all pods hold, and what it kept when the guest booted. Raises Lacking."""
        folder = f"{self.paths.sys}/kernel/mm/hugepages/{HUGE_PAGES[key][0]}"
        path, floor_path = f"{folder}/nr_hugepages", f"{self.paths.run}/{key}.floor"
        others = [pages_of(p.spec()).get(key, 0) for p in self.pods.pods.values() if p is not pod and p.maybe_there]
        now = read_text(path, 32).strip()
        if not count and not os.path.exists(floor_path):
            return
        if not now.isdigit():
            raise Lacking("HugePagesUnavailable", f"{key}: this guest's processor or kernel has no such pages")
        if not os.path.exists(floor_path):
            write_text(floor_path, now)
        wanted = max(int(read_text(floor_path) or 0), count + sum(others))
        for again in (False, True):
            if again:
                write_text(f"{self.paths.proc}/sys/vm/compact_memory", "1")
            if int(now) != wanted:
                write_text(path, str(wanted))
                now = read_text(path, 32).strip() or "0"
            if not now.isdigit() or int(now) >= wanted or not count:
                break
        if count and (not now.isdigit() or int(now) < wanted):
            had = max(0, (int(now) if now.isdigit() else 0) - sum(others))
            raise Lacking("HugePagesUnavailable", f"{key}: {count} pages asked, the guest's memory yields {had}")

    # CPUs.

    def _cpus(self, pod: "Pod", spec: Message) -> None:
        online = parse_cpus(read_text(f"{self.paths.sys}/devices/system/cpu/online"))
        taken = {n for p in self.pods.pods.values() if p is not pod for c in p.containers.values() for n in c.cpus}
        for container in spec["containers"]:
            count = own_cpus(spec, container)
            free = sorted(online - taken)
            if count and count >= len(free):
                told = f"{len(online)} are online, {len(online & taken)} belong to others, and one stays with the guest"
                raise Lacking("CpusUnavailable", f"{container['name']}: {count} CPUs for itself asked: {told}")
            mine = free[len(free) - count :] if count else []  # the last ones: interrupts and boot like the first
            taken.update(mine)
            pod.containers[container["name"]].cpus = mine

    async def pin(self, pod: "Pod") -> Ended | None:
        """Between the making of containers and their start: podman keeps the set for every later start too. What failed,
        or None."""
        for container in pod.containers.values():
            if container.cpus:
                words = ["update", "--cpuset-cpus", format_cpus(set(container.cpus)), f"{pod.name}-{container.name}"]
                ended = await self.pods.podman(words)
                if ended.code != 0:
                    return ended
        return None

    def started(self, pod: "Pod", container: "Container") -> None:
        """A container runs: bound what it may have of huge pages, and take its CPUs from everybody else."""
        specs = [c for c in pod.spec().get("containers", ()) if c["name"] == container.name]
        limits = amounts(specs[0], "limits") if specs else {}
        pages = {key: int(parse_amount(limits[key])) for key in HUGE_PAGES if key in limits}
        if not container.cpus and not pages:
            return
        try:
            told = read_text(f"{self.paths.proc}/{self.pods.pid_of(container)}/cgroup")
        except LookupError:
            return  # it has ended already
        where = next((line[3:] for line in told.splitlines() if line.startswith("0::/")), "")
        parts = where.strip("/").split("/")
        depth = next((i + 1 for i, part in enumerate(parts) if part.endswith(container.id) and container.id), 0)
        if not depth:
            return
        for key, limit in pages.items():
            # without the controller its volumes are bounded still, by their size
            write_text(f"{self.paths.cgroup}/{'/'.join(parts[:depth])}/hugetlb.{HUGE_PAGES[key][3]}.max", str(limit))
        if container.cpus:
            problem = self._partition(pod, container, parts[:depth])
            if problem:
                text = (
                    f"CPUs {format_cpus(set(container.cpus))} are its own, but others are not kept off them: {problem}"
                )
                self.pods.helper.note(pod.name, container.name, "CpusNotExclusive", text, "Warning")

    def _partition(self, pod: "Pod", container: "Container", parts: list[str]) -> str:
        """Make the container's cgroup a partition (cgroup v2, "cpuset.cpus.partition"): its CPUs are in nobody else's set.

        Each cgroup above must hand them on first: the pod's those of its containers, the ones above those of all pods.
        """
        everybody = {n for p in self.pods.pods.values() for c in p.containers.values() for n in c.cpus}
        of_pod = {n for c in pod.containers.values() for n in c.cpus}
        path = self.paths.cgroup
        for level, part in enumerate(parts):
            path = f"{path}/{part}"
            left = len(parts) - 1 - level
            cpus = set(container.cpus) if not left else of_pod if left == 1 else everybody
            if not write_text(f"{path}/cpuset.cpus.exclusive", format_cpus(cpus)):
                return f"{part} takes no cpuset.cpus.exclusive (Linux 6.7 and later have it)"
        if not write_text(f"{path}/cpuset.cpus.partition", "root"):
            return f"{parts[-1]} takes no partition"
        state = read_text(f"{path}/cpuset.cpus.partition").strip()
        return "" if state == "root" else state


# --- what a guest does for itself --------------------------------------------------------------------------------------


def network_commands(text: str, later: list[str] | None = None) -> tuple[list[str], list[str], list[str]]:
    """The seed's network-config as lines for ``ip -batch``, name servers and search domains.

    Understands version 2 (netplan's form) written as JSON, which is what Casemate writes: interfaces found by
    ``match.macaddress`` (or by the name of the entry), ``set-name``, ``addresses``, ``routes``, ``gateway4``, ``mtu``,
    ``nameservers``. Raises ValueError for anything else. Addresses of interfaces that are not there are added to ``later``
    where it is given: the driver of a virtual function comes late.
    """
    config = json.loads(text)
    config = config.get("network", config)
    if config.get("version") != 2:
        raise ValueError("only version 2 is understood")
    links = {}
    for link in os.listdir("/sys/class/net"):
        links[read_text(f"/sys/class/net/{link}/address").strip().lower()] = link
    lines, servers, search = ["link set lo up"], [], []
    for entry, spec in config.get("ethernets", {}).items():
        mac = str(spec.get("match", {}).get("macaddress", "")).lower()
        name = links.get(mac) if mac else entry
        if name is None:
            if later is None:
                raise ValueError(f"no interface has the address {mac}")
            later.append(mac)
            continue
        if spec.get("dhcp4") or spec.get("dhcp6"):
            raise ValueError("addresses come from the manager, not by DHCP")
        wanted = str(spec.get("set-name", name))
        if wanted != name:
            lines += [f"link set {name} down", f"link set {name} name {wanted}"]
        if "mtu" in spec:
            lines.append(f"link set {wanted} mtu {int(spec['mtu'])}")
        lines.append(f"link set {wanted} up")
        lines += [f"addr replace {address} dev {wanted}" for address in spec.get("addresses", ())]
        routes = list(spec.get("routes", ()))
        if "gateway4" in spec:
            routes.append({"to": "default", "via": spec["gateway4"]})
        for route in routes:
            to = "default" if route["to"] in ("default", "0.0.0.0/0") else route["to"]
            lines.append(f"route replace {to} via {route['via']} dev {wanted} onlink")
        servers += spec.get("nameservers", {}).get("addresses", [])
        search += spec.get("nameservers", {}).get("search", [])
    if any(c in "\n\r" for line in (*lines, *servers, *search) for c in line):
        raise ValueError("a value holds a line break")
    return lines, servers, search


def hosts_file(text: str, hosts: Mapping[str, str]) -> str:
    """``/etc/hosts`` with our block of names (name -> address) replaced."""
    begin, end = "# casemate: begin\n", "# casemate: end\n"
    if begin in text and end in text:
        text = text[: text.index(begin)] + text[text.index(end) + len(end) :]
    lines = "".join(f"{address}\t{name}\n" for name, address in sorted(hosts.items()))
    return text + (begin + lines + end if lines else "")


def instance_env(meta: Mapping[str, Any], peers: Mapping[str, str]) -> str:
    """``/run/casemate/instance.env``: who this instance is and who its peers are, as lines that a shell can read."""
    words = {
        "CASEMATE_INSTANCE": meta.get("local-hostname", ""),
        "CASEMATE_ENVIRONMENT": meta.get("casemate-environment", ""),
        "CASEMATE_ORDINAL": meta.get("casemate-ordinal", ""),
        "CASEMATE_PEERS": " ".join(f"{name}={address}" for name, address in sorted(peers.items())),
    }
    # names, numbers and addresses: none of them holds what a shell would obey, and what does is left out
    good = {
        key: str(word)
        for key, word in words.items()
        if all(c.isascii() and (c.isalnum() or c in " .:=_-") for c in str(word))
    }
    return "".join(f'{key}="{word}"\n' for key, word in good.items())


class Volume:
    """A disk that outlives the guest. ``problem`` says why it is not mounted; empty: it is."""

    def __init__(self, name: str, serial: str, read_only: bool, loop: Loop) -> None:
        self.name, self.serial, self.read_only = name, serial, read_only
        self.problem = "is not mounted yet"
        self.growing = False
        self.wake = Signal(loop)


class Volumes:
    """Mounts the instance's volumes, by serial number, before the pods that use them run; grows their file systems.

    Nothing is ever formatted here: a volume comes with a file system. What its owner put there instead is mounted as it is, or
    not at all.
    """

    def __init__(self, helper: "Helper") -> None:
        self.helper, self.loop, self.paths = helper, helper.loop, helper.paths
        self.volumes: list[Volume] = []

    def start(self) -> None:
        """Mount what the seed names, and go on trying."""
        for entry in self.helper.meta().get("casemate-volumes") or ():
            name = str(entry["name"])
            if not name.replace("-", "").isalnum() or len(name) > 63:
                self.helper.note("", "", "VolumeNotMounted", f"{name[:64]!r} is not a name", "Warning")
                continue
            volume = Volume(name, str(entry["serial"]), bool(entry["readOnly"]), self.loop)
            self.volumes.append(volume)
            self.loop.start(self._keep(volume))

    def problem(self, manifest: Message) -> str:
        """Why a pod cannot run yet: a volume that it reaches by a path of the guest is not mounted."""
        waiting = [volume for volume in self.volumes if volume.problem]
        if not waiting:
            return ""
        for entry in manifest["spec"].get("volumes") or ():
            path = os.path.normpath(str((entry.get("hostPath") or {}).get("path") or "."))
            for volume in waiting:
                mount = f"{VOLUMES}/{volume.name}"
                if f"{path}/".startswith(f"{mount}/") or f"{mount}/".startswith(f"{path.rstrip('/')}/"):
                    return f"volume {volume.name} {volume.problem}"
        return ""

    def disks_changed(self) -> None:
        """The kernel tells of a disk: one may have come, or have grown."""
        for volume in self.volumes:
            if volume.problem:
                volume.wake.set()
            elif not volume.read_only:
                self.loop.start(self._grow(volume))

    async def _keep(self, volume: Volume) -> None:
        pause_s, tries, told = VOLUME_AGAIN_S, 0, ""
        while problem := await self._mount(volume):
            tries += 1
            if told != problem and (tries >= VOLUME_QUIET or not problem.startswith("has no disk")):
                self.helper.note("", "", "VolumeNotMounted", f"volume {volume.name} {problem}", "Warning")
                told = problem
            if problem != volume.problem:
                volume.problem = problem
                self._tell()
            await volume.wake.wait(pause_s)
            pause_s = min(VOLUME_AGAIN_MAX_S, 2 * pause_s)
        volume.problem = ""
        self._tell()
        if not volume.read_only:
            await self._grow(volume)

    def _tell(self) -> None:
        for pod in self.helper.pods.pods.values():
            pod.wake.set()

    def _mounted(self, target: str) -> bool:
        lines = read_text(self.paths.mounts).splitlines()
        return any(line.split(" ")[1:2] == [target] for line in lines)

    async def _mount(self, volume: Volume) -> str:
        """Why it cannot be mounted; empty where it is."""
        target = f"{self.paths.volumes}/{volume.name}"
        if self._mounted(target):
            return ""
        device = self.helper.disk(volume.serial)
        if not device:
            return f"has no disk with the serial number {volume.serial}"
        try:
            os.makedirs(target, exist_ok=True)
        except OSError as error:
            return f"has no folder: {error}"
        # Blocks that files give up go back to the host.
        options = ["ro", "ro,noload"] if volume.read_only else ["discard", "defaults"]
        reason = ""
        for option in options:
            ended = await run(self.loop, ["mount", "-o", option, device, target])
            if ended.code == 0:
                if option == "ro,noload":
                    # It was not unmounted when it was last written to, and its journal cannot be played without writing.
                    self.helper.note(
                        "", "", "VolumeUnclean", f"volume {volume.name} is read without its journal", "Warning"
                    )
                return ""
            reason = reason or ended.reason()
        return f"is not mounted: {reason}"

    async def _grow(self, volume: Volume) -> None:
        """Have its file system as large as its disk."""
        if volume.growing:
            return
        volume.growing = True
        try:
            device = self.helper.disk(volume.serial)
            while device and file_system_is_smaller(device):
                ended = await run(self.loop, ["resize2fs", device], timeout_s=600.0)
                if ended.code != 0 or file_system_is_smaller(device):
                    text = f"the file system of volume {volume.name} does not grow: {ended.reason()}"
                    self.helper.note("", "", "VolumeNotGrown", text, "Warning")
                    return
                self.helper.note("", "", "VolumeGrown", f"the file system of volume {volume.name} has grown")
        finally:
            volume.growing = False


def file_system_is_smaller(device: str) -> bool:
    """Whether a disk holds an ext4 that leaves a block or more of it unused. False for anything else, and for what is unknown."""
    try:
        with open(device, "rb", buffering=0) as disk:
            disk.seek(1024)
            head = disk.read(1024)
            size = disk.seek(0, os.SEEK_END)
    except OSError:
        return False
    if len(head) < 1024 or head[0x38:0x3A] != b"\x53\xef":
        return False
    low, log_block, incompatible, high = (
        int.from_bytes(head[at : at + 4], "little") for at in (0x04, 0x18, 0x60, 0x150)
    )
    blocks = low | (high << 32 if incompatible & 0x80 else 0)  # the feature 64bit
    return log_block <= 6 and size // (1024 << log_block) > blocks


class System:
    """Addresses at boot, processors that were added, and the state of cloud-init."""

    def __init__(self, helper: "Helper") -> None:
        self.helper, self.loop, self.paths = helper, helper.loop, helper.paths
        self.addresses: list[str] = []
        self.network_error = ""
        self.cloud: Message = {"status": "none", "errors": []}

    def start(self) -> None:
        """Begin to look after the guest."""
        self.online_processors()
        write_text(f"{self.paths.sys}/devices/system/memory/auto_online_blocks", "online")
        with contextlib.suppress(OSError):
            self._listen(15, 1, self._uevents)  # NETLINK_KOBJECT_UEVENT, the kernel's own group
            self._listen(0, 0x10 | 0x100, self._addresses_changed)  # NETLINK_ROUTE, IPv4 and IPv6 addresses
        self._watch_cloud_init()
        self.loop.start(self._network())

    def _listen(self, protocol: int, groups: int, handler: Callable[[list[bytes]], None]) -> None:
        channel = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, protocol)
        channel.bind((0, groups))

        def ready(_: int) -> None:
            messages = []
            with contextlib.suppress(OSError):  # would block, or some were lost: then we look anyway
                while True:
                    messages.append(channel.recv(65536))
            handler(messages)

        self.loop.watch(channel.fileno(), select.EPOLLIN, ready)
        self._channels = (*getattr(self, "_channels", ()), channel)

    def _uevents(self, messages: list[bytes]) -> None:
        if not messages or any(m.startswith(b"add@/devices/system/cpu/") for m in messages):
            self.online_processors()
        if not messages or any(b"virtio-ports" in m for m in messages):
            self.helper.port_appeared()
        if not messages or any(b"/block/" in m for m in messages):
            self.helper.volumes.disks_changed()

    def online_processors(self) -> None:
        """Bring every processor online that the host added."""
        folder = f"{self.paths.sys}/devices/system/cpu"
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(folder)):
                switch = f"{folder}/{name}/online"
                if name[3:].isdigit() and read_text(switch).strip() == "0" and write_text(switch, "1"):
                    self.helper.note("", "", "ProcessorOnline", name)

    async def _network(self) -> None:
        text, done = read_text(f"{self.paths.seed}/network-config"), f"{self.paths.run}/network-done"
        with contextlib.suppress(ValueError, AttributeError):
            name = json.loads(read_text(f"{self.paths.seed}/meta-data")).get("local-hostname")
            if name and not os.path.exists(done):
                write_text(self.paths.hostname, str(name))
                write_text(self.paths.etc_hostname, f"{name}\n")  # systemd sets it again from here
        if not os.path.exists(done):
            self._keys()
        if text and not os.path.exists(done):
            later: list[str] = []
            if await self._configure(text, later):
                end = time.monotonic() + NIC_WAIT_S
                while later and time.monotonic() < end:
                    await self.loop.sleep(0.5)
                    later.clear()
                    with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
                        network_commands(text, later)
                    if not later:
                        await self._configure(text, None)
                if later:
                    await self._configure(text, None)  # which says what is missing
                else:
                    write_text(done, "")
        await self._read_addresses()

    async def _configure(self, text: str, later: list[str] | None) -> bool:
        """Bring about the seed's network-config, for the interfaces that are there; whether it was understood."""
        try:
            lines, servers, search = network_commands(text, later)
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            self.network_error = f"network-config: {error}"
            self.helper.note("", "", "NetworkNotConfigured", self.network_error, "Warning")
            return False
        ended = await run(self.loop, ["ip", "-batch", "-"], "\n".join(lines).encode() + b"\n")
        self.network_error = "" if ended.code == 0 else ended.reason()
        if self.network_error:
            self.helper.note("", "", "NetworkNotConfigured", self.network_error, "Warning")
        if servers:
            told = "".join(f"nameserver {s}\n" for s in servers[:3])
            write_text(self.paths.resolv, told + (f"search {' '.join(search)}\n" if search else ""))
        return True

    def _keys(self) -> None:
        """The keys of the seed may log in as root; cloud-init would do the same, much later."""
        with contextlib.suppress(ValueError, AttributeError, TypeError, OSError):
            self.authorize(json.loads(read_text(f"{self.paths.seed}/meta-data")).get("public-keys") or [])

    def authorize(self, keys: list[str]) -> None:
        """Let these keys log in as root. Raises OSError."""
        if not keys:
            return
        os.makedirs(self.paths.ssh, mode=0o700, exist_ok=True)
        path = f"{self.paths.ssh}/authorized_keys"
        old = read_text(path)
        new = "\n" if old and not old.endswith("\n") else ""
        new += "".join(f"{key}\n" for key in map(str, keys) if key not in old)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as file:
            file.write(new)

    def _addresses_changed(self, _: list[bytes]) -> None:
        self.loop.start(self._read_addresses())

    async def _read_addresses(self) -> None:
        ended = await run(self.loop, ["ip", "-json", "address"])
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = []
            for link in json.loads(ended.out):
                found += [f"{link['ifname']}={a['local']}" for a in link.get("addr_info", ()) if a["scope"] == "global"]
            if found != self.addresses:
                self.addresses = found[:64]
                self.helper.tell({"t": "addresses", "addresses": self.addresses})

    def _watch_cloud_init(self) -> None:
        # Our own image runs cloud-init only for the sake of user-data; a stock image runs it, and then us.
        wanted = os.path.exists(f"{self.paths.run}/user-data")
        if not wanted and not os.path.isdir(self.paths.cloud):
            return
        os.makedirs(self.paths.cloud, exist_ok=True)
        self.helper.inotify.add(self.paths.cloud, IN_MOVED_TO | IN_CLOSE_WRITE, lambda _: self.read_cloud_init())
        self.read_cloud_init()

    def read_cloud_init(self) -> None:
        """Tell the host when cloud-init has got further."""
        state: Message = {"status": "running", "errors": []}
        text = read_text(f"{self.paths.cloud}/result.json")
        if text:
            try:
                errors = [str(e)[:MAX_TEXT] for e in json.loads(text)["v1"]["errors"]][:8]
            except (ValueError, KeyError, TypeError):
                return  # half written; the rename that finishes it is seen too
            state = {"status": "error" if errors else "done", "errors": errors}
        if state != self.cloud:
            self.cloud = state
            self.helper.tell({"t": "cloud-init", **state})
            self.helper.cloud_init_changed.set()


# --- the helper -------------------------------------------------------------------------------------------------------


class Helper:
    """What the host's messages do."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.loop = Loop()
        self.boot_id = read_text("/proc/sys/kernel/random/boot_id").strip()
        self.session = ""
        self.session_count = 0
        self.streams: dict[int, Stream] = {}
        self.power_action = ""
        self.inotify = Inotify(self.loop)
        self.port = Port(self.loop, self.on_frame, self.on_lost, self.fill)
        self.volumes = Volumes(self)
        self.pods = Pods(self)
        self.system = System(self)
        self.cloud_init_changed = Signal(self.loop)
        self._pods_told = True
        self._notes: deque[Message] = deque(maxlen=256)  # for the next session; the oldest go first
        self._jobs: deque[tuple[Message, bytes]] = deque()
        self._job_wake = Signal(self.loop)
        self._filling = False
        self._notes_wanted = False  # by a host that has taken our hello: to another they would be lost

    def start(self, socket_path: str) -> None:
        """Begin: the loop does the rest."""
        os.makedirs(self.paths.run, mode=0o700, exist_ok=True)
        self.system.start()
        self.volumes.start()
        self.pods.restore()
        self.loop.start(self._work())
        if socket_path:
            self.port.listen(socket_path)
        elif not self.port.open_device(self.paths.sys, self.paths.dev):
            log(f"no port {PORT_NAME} yet")

    def release_boot(self) -> None:
        """Let the rest of the system boot: on an emulated processor it waits for the first pods (the image's init)."""
        write_text(f"{self.paths.run}/go", "")

    def port_appeared(self) -> None:
        """The kernel has a new virtio port: perhaps it is ours."""
        if self.port.open_device(self.paths.sys, self.paths.dev):
            log(f"found the port {PORT_NAME}")

    # To the host.

    def tell(self, message: Message) -> None:
        """Send a control message, if there is a host."""
        if self.session:
            self.port.send(message)

    def note(self, pod: str, container: str, reason: str, message: str, severity: str = "Normal") -> None:
        """Something that the host may want to keep as an event. Kept for the next session when there is none."""
        text = {"t": "note", "pod": pod, "container": container, "reason": reason, "message": message[:MAX_TEXT]}
        self._notes.append({**text, "severity": severity, "time": time.time()})
        self._send_notes()

    def _send_notes(self) -> None:
        while self._notes_wanted and self._notes and self.port.queued < OUT_LOW:
            self.port.send(self._notes.popleft())

    def pods_changed(self) -> None:
        """The host is told of the pods, once for all the changes of a moment."""
        if self._pods_told:
            self._pods_told = False
            self.loop.after(0.02, self._tell_pods)

    def _tell_pods(self) -> None:
        if self.port.queued >= OUT_LOW:
            return  # told by `fill`, once there is room
        self._pods_told = True
        if self.session:
            reports = [pod.report() for pod in self.pods.pods.values()]
            self.port.send({"t": "pods", "revision": self.pods.revision}, json.dumps(reports).encode())

    def fill(self) -> None:
        """There is room on the port: what is urgent first, then one chunk of each stream in turn."""
        if self._filling or not self.session:
            return
        self._filling = True
        try:
            if not self._pods_told and self.port.queued < OUT_LOW:
                self._tell_pods()
            self._send_notes()
            sent = True
            while sent and self.port.queued < OUT_LOW:
                sent = False
                for stream in list(self.streams.values()):
                    if not stream.closed and self.port.queued < OUT_LOW:
                        sent = stream.pull() or sent
        finally:
            self._filling = False

    def log_complete(self, container: Container) -> None:
        """Nothing is added to this log any more: who follows it gets the rest, and its end."""
        for stream in self.streams.values():
            if isinstance(stream, LogStream) and stream.container is container:
                stream.follow = False
        self.loop.after(0.0, self.fill)

    # From the host.

    def on_lost(self) -> None:
        """The host has left: its streams end, and everything that would be told waits for the next."""
        self.session = ""
        self._notes_wanted = False
        for stream in list(self.streams.values()):
            stream.close()

    def on_frame(self, header: Message, payload: bytes) -> None:
        """One message. Nothing that it holds may end the helper."""
        try:
            handler = self.HANDLERS.get(header["t"])
            if header["t"] == "hello":
                self._hello(header)
            elif not self.session:
                return  # of a session that has ended
            elif handler is None:
                self.tell(
                    {"t": "done", "id": header.get("id", 0), "ok": False, "error": f"unknown: {header['t']}"[:80]}
                )
            else:
                handler(self, header, payload)
        except (KeyError, ValueError, TypeError, LookupError, OSError, AttributeError) as error:
            text = f"{header.get('t')}: {error}"[:MAX_TEXT]
            if isinstance(header.get("s"), int):
                stream = self.streams.get(header["s"])
                if stream is not None:
                    stream.close()
                self.tell({"t": "end", "s": header["s"], "error": text})
            else:
                self.tell({"t": "done", "id": header.get("id", 0), "ok": False, "error": text})

    def _hello(self, header: Message) -> None:
        self.on_lost()
        self._jobs.clear()
        self.session_count += 1
        self.session = str(header["session"])[:64]
        write_text(f"{self.paths.run}/greeted", "")
        self.tell(
            {
                "t": "hello",
                "v": PROTOCOL,
                "session": self.session,
                "boot_id": self.boot_id,
                "helper": VERSION,
                "revision": self.pods.revision,
                "cloud_init": self.system.cloud,
                "addresses": self.system.addresses,
                "network_error": self.system.network_error,
            }
        )
        self._pods_told = True
        self._tell_pods()

    def _want_notes(self, _: Message, __: bytes) -> None:
        self._notes_wanted = True
        self._send_notes()

    def _ping(self, header: Message, _: bytes) -> None:
        self.tell({"t": "pong", "id": header["id"]})

    def _queue(self, header: Message, payload: bytes) -> None:
        if len(self._jobs) >= 64:
            raise ValueError("too much is queued already")
        self._jobs.append((header, payload))
        self._job_wake.set()

    async def _work(self) -> None:
        """Loads and sets of pods, one after the other, so that images are there before the pods that need them."""
        while True:
            while not self._jobs:
                await self._job_wake.wait(None)
            header, payload = self._jobs.popleft()
            session = self.session
            error = ""
            try:
                if header["t"] == "load":
                    error = await self._load(header)
                else:
                    if header.get("after_cloud_init"):
                        while self.system.cloud["status"] == "running":
                            await self.cloud_init_changed.wait(None)
                    self._hosts(header.get("hosts") or {})
                    self.pods.apply(json.loads(payload), str(header["revision"]))
                    self.pods.settle()
            except (KeyError, ValueError, TypeError, OSError) as problem:
                error = f"{header['t']}: {problem!r}"
            if self.session == session:
                done = {"t": "done", "id": header.get("id", 0), "ok": not error}
                self.tell(done | ({"error": error[:MAX_TEXT]} if error else {}))

    async def _load(self, header: Message) -> str:
        for serial in map(str, header["serials"]):
            device = self.disk(serial)
            if not device:
                return f"no disk with the serial number {serial}"
            ended = await self.pods.load(device)
            if ended.code != 0:
                return f"podman load of {serial}: {ended.reason()}"
        return ""

    def disk(self, serial: str) -> str:
        """Device of the disk with this serial number; empty where there is none."""
        folder = f"{self.paths.sys}/block"
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(folder)):
                if read_text(f"{folder}/{name}/serial").strip() == serial:
                    return f"{self.paths.dev}/{name}"
        return ""

    def meta(self) -> Message:
        """The seed's meta-data."""
        try:
            meta = json.loads(read_text(f"{self.paths.seed}/meta-data") or "{}")
        except ValueError:
            return {}
        return meta if isinstance(meta, dict) else {}

    def _hosts(self, hosts: Message) -> None:
        names = {str(name): str(address) for name, address in hosts.items()}
        if any(c.isspace() or c == "#" for pair in names.items() for text in pair for c in text):
            raise ValueError("a host's name or address holds a blank")
        old = read_text(self.paths.hosts)
        new = hosts_file(old, names)
        if new != old:
            write_text(self.paths.hosts, new)
        text = instance_env(self.meta(), names)
        if read_text(self.paths.instance) != text:
            write_text(self.paths.instance, text)

    def _new_stream(self, header: Message) -> int:
        number = header["s"]
        if not isinstance(number, int) or number in self.streams:
            raise ValueError("a stream needs a number of its own")
        if len(self.streams) >= MAX_STREAMS:
            raise ValueError(f"{MAX_STREAMS} streams are open already")
        return number

    def _logs(self, header: Message, _: bytes) -> None:
        number = self._new_stream(header)
        container = self.pods.find(str(header["pod"]), str(header.get("container", "")))
        if not container.log_path or not os.path.exists(container.log_path):
            raise LookupError("the container has not been started yet")
        start, tail = header.get("from", 0), header.get("tail", -1)
        if isinstance(tail, int) and tail >= 0:
            start = max(int(start), tail_position(container.log_path, tail))
        stream = LogStream(
            self, number, int(header["credit"]), container, max(0, int(start)), bool(header.get("follow"))
        )
        if container.over():
            stream.follow = False
        self.streams[number] = stream
        opened = {"t": "opened", "s": number, "container": container.name}
        self.tell(opened | {"container_id": container.id, "starts": container.starts})
        self.fill()

    def _exec(self, header: Message, _: bytes) -> None:
        number = self._new_stream(header)
        container_id = None
        if header.get("pod"):
            container = self.pods.find(str(header["pod"]), str(header.get("container", "")))
            if container.state != "running":
                raise LookupError(f"container {container.name} is {container.state}")
            container_id = container.id
        stream = ExecStream(self, number, int(header["credit"]))
        self.streams[number] = stream
        stream.start(header, container_id)
        if not stream.closed:
            self.tell({"t": "opened", "s": number})
        self.fill()

    def _pid(self, header: Message, any_container: bool) -> int:
        """The process that stands for the pod and container of a request; 0 for the guest itself."""
        if not header.get("pod"):
            return 0
        pod, name = str(header["pod"]), str(header.get("container", ""))
        if any_container and not name and pod in self.pods.pods:  # they share the pod's network
            running = [c for c in self.pods.pods[pod].containers.values() if c.state == "running"]
            if running:
                return self.pods.pid_of(running[0])
        return self.pods.pid_of(self.pods.find(pod, name))

    def _dial(self, header: Message, _: bytes) -> None:
        number, port = self._new_stream(header), header["port"]
        if not isinstance(port, int) or not 0 < port < 65536:
            raise ValueError(f"no port {port}"[:80])
        sock = socket_in(self._pid(header, any_container=True))
        try:
            self.streams[number] = DialStream(self, number, int(header["credit"]), sock, port)
        except OSError as error:
            sock.close()
            raise OSError(f"port {port}: {error.strerror}") from error

    def _copy(self, header: Message, _: bytes) -> None:
        """Files in or out: a process of its own, since it changes its root and waits for disks."""
        number, pid = self._new_stream(header), self._pid(header, any_container=False)
        argv = [
            sys.executable,
            "-I",
            "-S",
            "-E",
            os.path.abspath(__file__),
            f"copy={'in' if header.get('into') else 'out'}",
        ]
        argv += [f"path={header['path']}", f"name={header.get('name', '')}", f"in=/proc/{pid}/root" if pid else "in=/"]
        stream = ExecStream(self, number, int(header["credit"]))
        self.streams[number] = stream
        stream.start({"argv": argv}, None)
        if not stream.closed:
            self.tell({"t": "opened", "s": number})
        self.fill()

    def _authorize(self, header: Message, _: bytes) -> None:
        """A key may log in as root; told are the keys by which the guest itself is known."""
        key = str(header["key"]).strip()
        if not key or "\n" in key or len(key) > 16384:
            raise ValueError("a key is one line")
        self.system.authorize([key])
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            names = sorted(
                n for n in os.listdir(self.paths.host_keys) if n.startswith("ssh_host_") and n.endswith(".pub")
            )
        found = [read_text(f"{self.paths.host_keys}/{name}", 4096).strip() for name in names]
        self.tell({"t": "done", "id": header["id"], "ok": True, "text": "\n".join(found)[:8192]})

    def _stream(self, header: Message, payload: bytes) -> None:
        stream = self.streams.get(header["s"])
        if stream is None:
            return  # it has just ended, and the host does not know yet
        kind = header["t"]
        if kind == "data":
            stream.data(payload)
        elif kind == "eof":
            stream.eof()
        elif kind == "credit":
            stream.grant(int(header["n"]))
        elif kind == "close":
            stream.close()
        elif isinstance(stream, ExecStream) and kind == "resize":
            stream.resize(_size(header, "rows", 24), _size(header, "cols", 80))
        elif isinstance(stream, ExecStream) and kind == "signal":
            number = int(header["sig"])
            if not 1 <= number <= 64:
                raise ValueError(f"no signal {number}")
            stream.signal(number)

    def _power(self, header: Message, _: bytes) -> None:
        under_way, self.power_action = self.power_action, {"shutdown": "poweroff", "reboot": "reboot"}[header["action"]]
        # Answered before it is done: then there may be nobody left to answer.
        self.tell({"t": "done", "id": header.get("id", 0), "ok": True})
        if not under_way:
            self.loop.start(self._power_down())

    async def _power_down(self) -> None:
        """What was asked for last. This helper is there before systemd is: until that listens it is asked again."""
        for _ in range(POWER_TRIES):
            ended = await run(self.loop, ["systemctl", self.power_action])
            if ended.code == 0:
                break
            await self.loop.sleep(POWER_AGAIN_S)
        else:
            self.note("", "", "PowerFailed", ended.reason(), "Warning")
        self.power_action = ""

    HANDLERS: Mapping[str, Callable[["Helper", Message, bytes], None]] = {
        "notes": _want_notes,
        "ping": _ping,
        "load": _queue,
        "apply": _queue,
        "logs": _logs,
        "exec": _exec,
        "dial": _dial,
        "copy": _copy,
        "authorize": _authorize,
        "power": _power,
        "data": _stream,
        "eof": _stream,
        "credit": _stream,
        "close": _stream,
        "resize": _stream,
        "signal": _stream,
    }


# --- files in and out -------------------------------------------------------------------------------------------------


def copy_main(options: Mapping[str, str]) -> int:
    """A process that copies one file or folder as a tar archive whose root is ``x``, and ends.

    0: all was copied; 1: not all; 4: there is no such file. What was not copied is told on standard error. Within a
    container its root is ours, so that no link of it leads out.
    """
    import tarfile  # before the root changes, and only here: it takes an emulated processor a second

    with contextlib.suppress(LookupError):
        "".encode("idna")  # the same for codecs that are imported when they are first used
    try:
        if not os.path.samestat(os.stat(options["in"]), os.stat("/")):
            os.chroot(options["in"])
            os.chdir("/")
        path = options["path"]
        if not path.startswith("/"):
            raise OSError(errno.EINVAL, "is not an absolute path", path)
        if options["copy"] == "out":
            return copy_out(tarfile, path)
        return copy_in(tarfile, path, options["name"])
    except (OSError, tarfile.TarError, EOFError) as error:
        name = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        os.write(2, f"{name}{text}\n".encode(errors="replace"))
        return 4 if isinstance(error, FileNotFoundError) else 1


def copy_out(tarfile: Any, path: str) -> int:
    """Write an archive of ``path`` to standard output. A link is followed where ``path`` itself is one, and nowhere else."""
    real, skipped = os.path.realpath(path), 0
    os.stat(real)
    with (
        os.fdopen(1, "wb", closefd=False) as out,
        tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        waiting = [(real, "x")]
        while waiting:
            here, name = waiting.pop()
            member = tar.gettarinfo(here, name)
            if member is not None and member.isdir():
                tar.addfile(member)
                waiting += [(f"{here}/{child}", f"{name}/{child}") for child in sorted(os.listdir(here), reverse=True)]
            elif member is not None and (member.isreg() or member.islnk()):
                with open(here, "rb") as file:
                    # Of a file that has another name in the archive too, the whole all the same: no links arrive.
                    member.type, member.linkname = tarfile.REGTYPE, ""
                    member.size = os.fstat(file.fileno()).st_size
                    tar.addfile(member, file)
            else:
                kind = "a symbolic link" if os.path.islink(here) else "neither a file nor a folder"
                os.write(2, f"{here}: is {kind}, and was not copied\n".encode(errors="replace"))
                skipped = 1
    return skipped


def copy_in(tarfile: Any, path: str, name: str) -> int:
    """Make ``path``, or ``name`` in the folder ``path``, from an archive on standard input.

    Each file is written beside its place and renamed: none is ever half there.
    """
    target = os.path.realpath(path)
    if os.path.isdir(target):
        if not name or "/" in name or name in (".", ".."):
            raise OSError(errno.EINVAL, "cannot be the name of a copy", name)
        target = os.path.join(target, name)
    elif path.endswith("/") or not os.path.isdir(os.path.dirname(target)):
        raise FileNotFoundError(errno.ENOENT, "is no folder", path if path.endswith("/") else os.path.dirname(target))
    folders = []
    with os.fdopen(0, "rb", closefd=False) as source, tarfile.open(fileobj=source, mode="r|") as tar:
        for member in tar:
            parts = member.name.split("/")
            if (
                parts[0] != "x"
                or any(part in ("", ".", "..") for part in parts[1:])
                or not (member.isreg() or member.isdir())
            ):
                raise OSError(errno.EPERM, "is refused: neither a file nor a folder of the copy", member.name)
            here = "/".join([target, *parts[1:]])
            for depth in range(1, len(parts)):
                if os.path.islink("/".join([target, *parts[1:depth]])):
                    raise OSError(errno.EPERM, "is refused: it would be written through a symbolic link", here)
            if member.isdir():
                os.makedirs(here, mode=0o700, exist_ok=True)
                folders.append((here, member))
                continue
            part = f"{here}.casemate-{os.getpid()}"
            content = tar.extractfile(member)
            try:
                with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                    while block := content.read(1 << 20):
                        file.write(block)
                    os.fchmod(file.fileno(), member.mode & 0o7777)
                os.utime(part, (member.mtime, member.mtime))
                os.rename(part, here)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                raise
    for here, member in reversed(folders):
        os.chmod(here, member.mode & 0o7777)
        os.utime(here, (member.mtime, member.mtime))
    return 0


def main(arguments: list[str]) -> int:
    """Run until SIGTERM. Arguments are ``name=value``: root, podman, crun, socket; all for tests."""
    options = dict(word.partition("=")[::2] for word in arguments)
    if "copy" in options:
        return copy_main(options)
    paths = Paths(options.get("root", ""), options.get("podman", "podman"), options.get("crun", "crun"))
    helper = Helper(paths)
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(helper.loop, "stopping", True))

    def woken(_: int) -> None:
        os.read(read, 64)

    helper.loop.watch(read, select.EPOLLIN, woken)
    helper.start(options.get("socket", ""))
    log(f"helper {VERSION} runs")
    helper.loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
