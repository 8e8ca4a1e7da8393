"""Serial consoles: one terminal of QEMU's for each instance, and any number of readers of it.

What may live here: the pty that QEMU made for a domain's serial port, opened while somebody looks, and what it prints,
given to all of them. Whose pty it is, libvirt says (`find`). Nothing is interpreted: a console is raw.

Theory of operation. The first reader opens the pty, the last one closes it. The guest is never held up by who reads: each
reader has room for `KEPT` bytes, beyond which its oldest go and are counted. Typing is the other way round: it waits until
the guest takes it, one call after the other. When QEMU ends, the pty hangs up, and all readers have reached the end. The
number of a pty is used again, so libvirt is asked once more after it was opened: were it another's by now, QEMU's would
have ended.
"""

import asyncio
import contextlib
import os
import termios
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from casemate_agent.drivers.sideports import ConsoleRefused, ConsoleSession
from casemate_core.errors import MachineError

KEPT = 256 * 1024
"""Bytes that wait for one reader."""
READ = 16 * 1024


class ConsoleFailed(MachineError):
    """The console could not be opened or written to."""

    reason = "ConsoleFailed"


class Reader:
    """What one reader of a console has not taken yet."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._lost = 0
        self._ended = False
        self._news = asyncio.Event()

    def put(self, data: bytes) -> None:
        """The console printed this."""
        self._waiting.append(data)
        self._size += len(data)
        while self._size > self._kept:
            gone = self._waiting.popleft()
            self._size -= len(gone)
            self._lost += len(gone)
        self._news.set()

    def end(self) -> None:
        """The console is gone."""
        self._ended = True
        self._news.set()

    async def output(self) -> AsyncIterator[bytes | int]:
        """See `sideports.ConsoleSession`."""
        while True:
            while self._lost or self._waiting:
                if self._lost:
                    lost, self._lost = self._lost, 0
                    yield lost
                    continue
                data = self._waiting.popleft()
                self._size -= len(data)
                yield data
            if self._ended:
                return
            self._news.clear()
            await self._news.wait()


class _Terminal:
    """An open pty and its readers."""

    def __init__(self, path: str, fd: int, gone: Callable[["_Terminal"], None]) -> None:
        self.path, self._fd, self._gone = path, fd, gone
        self.readers: set[Reader] = set()
        self._loop = asyncio.get_running_loop()
        self._typing = asyncio.Lock()
        self._writable: asyncio.Future[None] | None = None
        self._loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, READ)
        except BlockingIOError:
            return
        except OSError:  # QEMU has ended: the terminal hung up
            data = b""
        if not data:
            self.close()
            return
        for reader in self.readers:
            reader.put(data)

    async def type(self, data: bytes) -> None:
        """Write all of it. Raises ConsoleFailed where the console is gone."""
        async with self._typing:
            while data:
                if self._fd < 0:
                    raise ConsoleFailed("the console is gone")
                try:
                    data = data[os.write(self._fd, data) :]
                except BlockingIOError:
                    self._writable = writable = self._loop.create_future()
                    self._loop.add_writer(self._fd, _wake, writable)
                    try:
                        await writable
                    finally:
                        self._writable = None
                        if self._fd >= 0:
                            self._loop.remove_writer(self._fd)
                except OSError as error:
                    raise ConsoleFailed(f"the console does not take input: {error.strerror}") from error

    def leave(self, reader: Reader) -> None:
        """A reader goes; the last one closes the terminal."""
        self.readers.discard(reader)
        reader.end()
        if not self.readers:
            self.close()

    def close(self) -> None:
        """Let go of the pty: all readers have reached the end."""
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        os.close(self._fd)
        self._fd = -1
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        for reader in self.readers:
            reader.end()
        self._gone(self)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


class _Session:
    """One reader's hold of a terminal."""

    def __init__(self, terminal: _Terminal, reader: Reader) -> None:
        self._terminal, self._reader = terminal, reader

    def output(self) -> AsyncIterator[bytes | int]:
        return self._reader.output()

    async def input(self, data: bytes) -> None:
        await self._terminal.type(data)

    async def close(self) -> None:
        self._terminal.leave(self._reader)


class PtyConsoles:
    """``sideports.Consoles``. ``find(uid, deadline_s)`` is the path of a running domain's pty, or empty."""

    def __init__(self, find: Callable[[str, float], Awaitable[str]]) -> None:
        self._find = find
        self._terminals: dict[str, _Terminal] = {}
        self._opening = asyncio.Lock()

    async def open(self, uid: str, deadline_s: float) -> ConsoleSession:
        """A reader more. Raises ConsoleRefused, ConsoleFailed, Unavailable, DeadlineExceeded."""
        async with self._opening:
            path = await self._find(uid, deadline_s)
            if not path:
                raise ConsoleRefused("the instance is not running, so it has no console")
            terminal = self._terminals.get(uid)
            if terminal is not None and terminal.path != path:
                terminal.close()
                terminal = None
            if terminal is None:
                terminal = await self._terminal(uid, path, deadline_s)
            reader = Reader()
            terminal.readers.add(reader)
            return _Session(terminal, reader)

    async def _terminal(self, uid: str, path: str, deadline_s: float) -> _Terminal:
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ConsoleFailed(f"cannot open the console {path}: {error.strerror}") from error
        try:
            if await self._find(uid, deadline_s) != path:
                raise ConsoleRefused("the instance was ended or started anew meanwhile")
            _make_raw(fd)
        except BaseException:
            os.close(fd)
            raise

        def gone(terminal: _Terminal) -> None:
            if self._terminals.get(uid) is terminal:
                del self._terminals[uid]

        terminal = self._terminals[uid] = _Terminal(path, fd, gone)
        return terminal

    async def aclose(self) -> None:
        """Let go of all consoles."""
        for terminal in list(self._terminals.values()):
            terminal.close()


def _make_raw(fd: int) -> None:
    """No echo and no editing by the host's kernel: what the guest prints must not come back to it as input."""
    with contextlib.suppress(termios.error):
        mode = termios.tcgetattr(fd)
        mode[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON)
        mode[1] &= ~termios.OPOST
        mode[2] = (mode[2] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
        mode[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        termios.tcsetattr(fd, termios.TCSANOW, mode)
