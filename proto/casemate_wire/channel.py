"""PURE. What goes over a side stream of a host: logs and commands, as values.

An agent dials a channel when the manager asks for one (``OpenChannel``), says its ticket, and from then on frames go both
ways until one side ends the stream. A channel of kind ``logs`` sends ``LogLine`` frames; one of kind ``exec``
takes ``Stdin``, ``Eof``, ``Resize`` and ``Signal`` and sends ``Output`` frames, then ``ExitCode``. Either ends with ``Eof``
or with ``Failed``, after which the manager closes the stream. How much is in flight is bounded by the transport (HTTP/2
flow control): a frame is written when there is room.

A ``console`` and a ``forward`` channel begin with ``Opened``. The console sends ``Output`` and, where its reader was too
slow, ``Lost``; ``Eof`` ends it. A ``forward`` channel carries ``Stdin`` and ``Output``; here ``Eof`` ends one direction, and
``ExitCode`` says that both have ended. A ``copy`` is like an ``exec`` whose input or output is an archive. ``authorize``
answers with ``Output`` and ``ExitCode``.

Parameters of ``OpenChannel``: for ``logs`` ``pod``, ``container`` (may be empty), ``follow``, ``tail`` (lines; 0: all that
are kept), ``since_s``, ``previous``, ``after`` and ``log`` (go on behind this line of this log); for ``exec`` ``argv``,
``pod`` (empty: the guest itself), ``container``, ``tty``, ``rows``, ``columns``, ``environment``; for ``forward`` ``pod``,
``container``, ``port``; for ``copy`` ``pod``, ``container``, ``into``, ``path``, ``name``; for ``authorize`` ``key``.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Ticket:
    """First frame of the agent: which request this channel answers. ``nonce``: as in ``Hello``."""

    ticket: str = field(repr=False)
    nonce: bytes = b""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a container's log. ``lost`` lines are missing before it; -1: nobody knows how many. ``log`` names the log
    that ``sequence`` counts in."""

    time_s: float
    pod: str
    container: str
    sequence: int
    text: str
    stream: str = "stdout"
    lost: int = 0
    log: str = ""


@dataclass(frozen=True, slots=True)
class Stdin:
    data: bytes


@dataclass(frozen=True, slots=True)
class Eof:
    """No more standard input; from an agent: nothing more at all."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a command wrote; ``stream`` is ``stdout`` or ``stderr``."""

    stream: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Signal:
    number: int


@dataclass(frozen=True, slots=True)
class ExitCode:
    code: int


@dataclass(frozen=True, slots=True)
class Lost:
    """So many bytes of a console are missing here."""

    size: int


@dataclass(frozen=True, slots=True)
class Opened:
    """The console or the connection is there."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The channel ends because of this."""

    message: str


Frame = Ticket | LogLine | Stdin | Eof | Output | Resize | Signal | ExitCode | Lost | Opened | Failed
