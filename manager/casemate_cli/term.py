"""The terminal: data to standard output, talk to standard error, colour and movement only where a person looks.

Text that a manager, a host or a guest chose is hostile: `clean` turns everything that a terminal would obey into visible
escapes. Colour is used on a terminal only and never where ``NO_COLOR`` is set (no-color.org) or ``TERM`` is ``dumb``.
"""

import os
import sys
import threading
import time
from types import TracebackType
from typing import IO, Self

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36", "dim": "2", "bold": "1"}
_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


def clean(text: str, keep: str = "") -> str:
    """`text` with everything that is not printable written as ``\\xNN`` or ``\\uNNNN``; characters of `keep` stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def _escape(c: str) -> str:
    point = ord(c)
    if c == "\n":
        return "\\n"
    if c == "\t":
        return "\\t"
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def is_terminal(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal that understands more than lines."""
    try:
        return stream.isatty() and os.environ.get("TERM", "") != "dumb"
    except ValueError:  # closed
        return False


def wants_colour(stream: IO[str]) -> bool:
    """Whether colour may be written to `stream`."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def paint(text: str, colour: str, stream: IO[str] | None = None) -> str:
    """`text` in `colour` where the stream (standard output if not given) takes it."""
    if not colour or not wants_colour(stream if stream is not None else sys.stdout):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


class ReaderGone(Exception):
    """Whoever read our standard output has closed it, as `head` does: there is nothing left to do, and no error."""


def out(text: str, end: str = "\n") -> None:
    """Data, to standard output. The caller has cleaned it where a terminal may obey it. Raises ReaderGone."""
    try:
        sys.stdout.write(text + end)
    except BrokenPipeError:
        raise ReaderGone from None


def flush() -> None:
    """Have what was written so far seen now. Raises ReaderGone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGone from None


def say(text: str, colour: str = "") -> None:
    """Talk, to standard error: cleaned, one line."""
    sys.stderr.write(paint(clean(text), colour, sys.stderr) + "\n")
    sys.stderr.flush()


class Progress:
    """Says what is going on: a moving line on a terminal, a plain line for each change elsewhere.

    Used as a context manager. `update` replaces the text; `done` ends with a line that stays.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._started_s = time.monotonic()
        self._moving = is_terminal(sys.stderr)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._width = 0

    def __enter__(self) -> Self:
        if self._moving:
            self._thread = threading.Thread(target=self._spin, name="progress", daemon=True)
            self._thread.start()
        else:
            say(self._text)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._halt()

    def update(self, text: str) -> None:
        """Something changed."""
        if text == self._text:
            return
        self._text = text
        if not self._moving:
            say(text)

    def done(self, text: str = "") -> None:
        """It is over: leaves one line that says so, with the seconds it took."""
        self._halt()
        took_s = time.monotonic() - self._started_s
        say(f"✓ {text or self._text} ({took_s:.1f} s)", "green")

    def _halt(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()

    def _spin(self) -> None:
        beat = 0
        while not self._stop.wait(0.1):
            took_s = time.monotonic() - self._started_s
            columns = _columns()
            line = f"{_FRAMES[beat % len(_FRAMES)]} {clean(self._text)} ({took_s:.0f} s)"[: columns - 1]
            sys.stderr.write("\r\x1b[2K" + line)
            sys.stderr.flush()
            beat += 1


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
