"""`casemate` on a terminal of its own, and a person before it."""

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Mapping
from typing import Protocol

import pytest

WITHIN_S = 60.0


class HasEnvironment(Protocol):
    """A fleet."""

    @property
    def environ(self) -> Mapping[str, str]: ...


class Terminal:
    """`casemate` on a terminal of its own, and a person before it."""

    def __init__(self, fleet: HasEnvironment, *arguments: str) -> None:
        self.screen = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(
                sys.executable, [sys.executable, "-m", "casemate_cli", *arguments], {**fleet.environ, "TERM": "xterm"}
            )

    def until(self, text: bytes) -> None:
        give_up_s = time.monotonic() + WITHIN_S
        while text not in self.screen:
            left_s = give_up_s - time.monotonic()
            assert left_s > 0, self.screen
            if select.select([self.fd], [], [], left_s)[0]:
                self.screen += self._read()

    def _read(self) -> bytes:
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # the program has gone
            data = b""
        assert data, self.screen
        return data

    def resize(self, rows: int, columns: int) -> None:
        """The window gets another size."""
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def end(self) -> int:
        """Its exit code, once it has ended by itself."""
        give_up_s = time.monotonic() + WITHIN_S
        while time.monotonic() < give_up_s:
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    self.screen += os.read(self.fd, 65536)
                except OSError:
                    pass
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)
        pytest.fail(f"it did not end: {self.screen!r}")
