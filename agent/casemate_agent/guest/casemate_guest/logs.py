"""Logs of containers: read from a position, followed, and kept within bounds."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os

from .files import log
from .frames import CHUNK
from .kernel import IN_MODIFY, LIBC, PUNCH_HOLE_KEEP_SIZE
from .streams import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .containers import Container
    from .helper import Helper

LOG_KEEP = 16 << 20  # bytes kept of each container's log; up to twice that until it is trimmed


class LogStream(Stream):
    """A container's log from a position on, following it if asked."""

    def __init__(
        self, helper: Helper, number: int, credit: int, container: Container, start: int, follow: bool
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
