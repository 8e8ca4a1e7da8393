"""The last lines that a process logged, kept in memory: what a support bundle has of its log, wherever the rest went."""

import logging
from collections import deque
from typing import Final

MOST_LINES: Final = 2000
MOST_BYTES: Final = 512 * 1024


class LogTail(logging.Handler):
    """Keeps what its root logger writes, bounded in lines and bytes; the oldest go first."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=MOST_LINES)
        self._bytes = 0

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)[:8192]
        if len(self._lines) == MOST_LINES:
            self._bytes -= len(self._lines.popleft())
        self._lines.append(line)
        self._bytes += len(line)
        while self._bytes > MOST_BYTES:
            self._bytes -= len(self._lines.popleft())

    def text(self) -> str:
        """The lines, oldest first."""
        return "".join(f"{line}\n" for line in list(self._lines))


def kept() -> str:
    """The lines of this process; empty where none are kept."""
    tails = [handler for handler in logging.getLogger().handlers if isinstance(handler, LogTail)]
    return tails[0].text() if tails else ""
