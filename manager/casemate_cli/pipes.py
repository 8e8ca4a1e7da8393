"""Bytes between a person's terminal and a stream of the manager: what `exec`, `console` and the like share.

What may live here: the queue of what is to be sent, standard input as it is typed, the terminal in raw mode, and the form
that a guest's bytes take where they do not go to a terminal.
"""

import codecs
import os
import queue
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from casemate_cli import term

T = TypeVar("T")

#: Bytes of standard input in one message.
CHUNK = 32 * 1024
#: Messages that wait to be sent; a reader of standard input stops there.
QUEUED = 16


class Outbox(Generic[T]):
    """What is to be sent on a stream. gRPC takes it from a thread of its own."""

    def __init__(self, first: T) -> None:
        self._waiting: queue.Queue[T | None] = queue.Queue(QUEUED)
        self._waiting.put(first)

    def put(self, item: T) -> None:
        """Send; waits while nothing is taken."""
        self._waiting.put(item)

    def try_put(self, item: T) -> None:
        """Send, or drop where nothing is taken: a second try of the person will find room or none."""
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            return

    def end(self) -> None:
        """Nothing more; what was not taken is dropped."""
        with self._waiting.mutex:
            self._waiting.queue.clear()
            self._waiting.not_full.notify_all()
        self._waiting.put(None)

    def __iter__(self) -> Iterator[T]:
        while (item := self._waiting.get()) is not None:
            yield item


def read_stdin(take: Callable[[bytes], bool], ended: Callable[[], None]) -> None:
    """Hand standard input over in a thread of its own, until its end or until ``take`` says that it is enough."""

    def read() -> None:
        while data := os.read(0, CHUNK):
            if not take(data):
                return
        ended()

    threading.Thread(target=read, name="stdin", daemon=True).start()


class Terminated(BaseException):
    """A signal asked us to end; the terminal is restored on the way out."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def raw_terminal(*, catch: bool = False) -> Iterator[None]:
    """Keys go on as they are typed. ``catch``: SIGTERM and SIGHUP become `Terminated`, so that the terminal is restored."""
    import termios
    import tty

    def terminated(number: int, _: Any) -> None:
        raise Terminated(number)

    before = termios.tcgetattr(0)
    handlers = {n: signal.signal(n, terminated) for n in (signal.SIGTERM, signal.SIGHUP)} if catch else {}
    tty.setraw(0, termios.TCSADRAIN)  # what was typed ahead stays
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Escaped:
    """A guest's bytes as text for a pipe or a file: lines and tabs stay, whatever else a terminal would obey is escaped."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._return = False

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """The text of some more bytes; a character, or the end of a line, may be cut between two calls."""
        text = ("\r" if self._return else "") + self._decoder.decode(data, final)
        text = re.sub("\r+", "\r", text)  # a terminal that is given \\r\\n by a program adds one more
        self._return = text.endswith("\r") and not final
        text = text.removesuffix("\r") if self._return else text
        return term.clean(text.replace("\r\n", "\n"), keep="\n\t")


class Printer:
    """Where a guest's bytes go: as they are to a terminal, escaped elsewhere."""

    def __init__(self) -> None:
        self._raw = sys.stdout.isatty()
        self._escaped = Escaped()

    def write(self, data: bytes) -> None:
        """Show it now. Raises ReaderGone."""
        if self._raw:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        term.out(self._escaped.feed(data), end="")
        term.flush()
