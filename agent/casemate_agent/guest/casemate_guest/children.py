"""Processes that the helper starts, and how they ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal

from .frames import MAX_TEXT
from .loop import Future

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .loop import Loop


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
