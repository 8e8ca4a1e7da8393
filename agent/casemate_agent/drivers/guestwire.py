"""What a guest may say, as frozen types: the border behind which nothing of a guest is raw any more.

PURE. The helper inside a guest can be replaced by whoever is root there, so each of its messages is hostile until it has
passed here: the right shape, finite numbers, closed sets of words, bounded lengths, text without control characters.
What does not pass raises `Rejected`, which the channel counts. Frames themselves (``encode``, ``Decoder``) are shared
with the helper, since a second copy would only differ by accident; docs/guest-protocol.md has the table of messages.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from casemate_core.spec.instance import ContainerState, PodState

MAX_NAME = 253
MAX_TEXT = 1024
MAX_PODS = 256
MAX_CONTAINERS = 64
MAX_LOG_TEXT = 256 * 1024
MAX_POSITION = 1 << 62
MAX_ANSWER = 8192

POD_PHASES = frozenset({"Pending", "Running", "Succeeded", "Failed"})
CONTAINER_STATES = frozenset({"waiting", "running", "terminated"})
CLOUD_INIT = frozenset({"none", "running", "done", "error"})
SEVERITIES = frozenset({"Normal", "Warning"})


class Rejected(ValueError):
    """A guest's message is not what it may be; the text is ours and holds nothing of the guest's."""


_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def clean(text: str, limit: int) -> str:
    """``text`` fit for a terminal or a page: control characters (but the tab) and those that turn the direction of
    writing become visible escapes; at most ``limit`` characters."""
    escaped = _CONTROL.sub(
        lambda found: f"\\u{ord(found[0]):04x}" if ord(found[0]) > 0xFF else f"\\x{ord(found[0]):02x}", text
    )
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


# --- plain values -----------------------------------------------------------------------------------------------------


def _text(message: Mapping[str, Any], name: str, limit: int = MAX_TEXT) -> str:
    value = message.get(name, "")
    if not isinstance(value, str):
        raise Rejected(f"{name} is no text")
    return clean(value, limit)


def _word(message: Mapping[str, Any], name: str, words: frozenset[str]) -> str:
    value = message.get(name)
    if not isinstance(value, str) or value not in words:
        raise Rejected(f"{name} is none of {', '.join(sorted(words))}")
    return value


def _number(message: Mapping[str, Any], name: str, low: int, high: int, default: int | None = None) -> int:
    value = message.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Rejected(f"{name} is no whole number from {low} to {high}")
    return value


def _time(message: Mapping[str, Any], name: str) -> float:
    value = message.get(name, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Rejected(f"{name} is no time")
    if not 0 <= value < 1 << 40:
        raise Rejected(f"{name} is outside of all times")
    return float(value)


def _flag(message: Mapping[str, Any], name: str) -> bool:
    value = message.get(name, False)
    if not isinstance(value, bool):
        raise Rejected(f"{name} is neither true nor false")
    return value


def _list(value: object, name: str, limit: int) -> Sequence[Any]:
    if not isinstance(value, list) or len(value) > limit:
        raise Rejected(f"{name} is no list of at most {limit}")
    return value


def _texts(message: Mapping[str, Any], name: str, limit: int) -> tuple[str, ...]:
    found = _list(message.get(name, []), name, limit)
    if not all(isinstance(text, str) for text in found):
        raise Rejected(f"{name} is no list of texts")
    return tuple(clean(text, MAX_TEXT) for text in found)


def _object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Rejected(f"{name} is no object")
    return value


# --- messages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Here:
    """The helper has started: whatever session there was is over."""


@dataclass(frozen=True, slots=True)
class CloudInit:
    """How far cloud-init has got (none, running, done, error), and what it complained about."""

    status: str
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hello:
    """The helper's answer to our greeting; ``session`` is the one that we chose."""

    version: int
    session: str
    boot_id: str
    helper: str
    revision: str
    cloud_init: CloudInit
    #: As ``interface=address``.
    addresses: tuple[str, ...]
    network_error: str


@dataclass(frozen=True, slots=True)
class Addresses:
    """The guest's addresses have changed; each as ``interface=address``."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pods:
    """All pods as they are."""

    revision: str
    pods: tuple[PodState, ...]


@dataclass(frozen=True, slots=True)
class Note:
    """Something that happened in the guest, worth an event."""

    pod: str
    container: str
    reason: str
    message: str
    severity: str
    time_s: float


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to a request; ``error`` is empty when it was done."""

    id: int
    error: str
    #: What was asked for, where that is a text.
    text: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream is open; for a log, of which container, and the positions at which that was started."""

    stream: int
    container_id: str
    starts: tuple[int, ...]
    #: Its name; empty where an older helper does not say.
    container: str = ""


@dataclass(frozen=True, slots=True)
class LogChunk:
    """Whole lines of a log file, from ``position`` to ``next``."""

    stream: int
    position: int
    next: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes of a log, from ``start`` to ``end``, that are gone, and how many lines that were."""

    stream: int
    start: int
    end: int
    lines: int


@dataclass(frozen=True, slots=True)
class Data:
    """Output of a command."""

    stream: int
    channel: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Eof:
    """Nothing more comes from the port; it may still take."""

    stream: int


@dataclass(frozen=True, slots=True)
class Credit:
    """The command has taken so many bytes of its input."""

    stream: int
    amount: int


@dataclass(frozen=True, slots=True)
class End:
    """A stream is over; ``code`` is the exit status of a command, ``error`` why it could not be had."""

    stream: int
    code: int | None
    error: str


GuestMessage = (
    Here | Hello | Addresses | CloudInit | Pods | Note | Done | Opened | LogChunk | Gap | Data | Eof | Credit | End
)

_STREAM = (0, 1 << 53)


def _cloud_init(message: Mapping[str, Any]) -> CloudInit:
    return CloudInit(_word(message, "status", CLOUD_INIT), _texts(message, "errors", 16))


def _hello(message: Mapping[str, Any], _: bytes) -> Hello:
    return Hello(
        version=_number(message, "v", 1, 1 << 16),
        session=_text(message, "session", 64),
        boot_id=_text(message, "boot_id", 64),
        helper=_text(message, "helper", 64),
        revision=_text(message, "revision", 256),
        cloud_init=_cloud_init(_object(message.get("cloud_init"), "cloud_init")),
        addresses=_texts(message, "addresses", 64),
        network_error=_text(message, "network_error"),
    )


def _container(value: object) -> ContainerState:
    message = _object(value, "container")
    return ContainerState(
        name=_text(message, "name", MAX_NAME),
        image=_text(message, "image"),
        state=_word(message, "state", CONTAINER_STATES),
        ready=_flag(message, "ready"),
        restarts=_number(message, "restarts", 0, 1 << 31),
        exit_code=_number(message, "exit_code", -(1 << 31), 1 << 31),
        reason=_text(message, "reason", 128),
        message=_text(message, "message"),
        started_s=_time(message, "started"),
        finished_s=_time(message, "finished"),
    )


def _pod(value: object) -> PodState:
    message = _object(value, "pod")
    return PodState(
        name=_text(message, "name", MAX_NAME),
        phase=_word(message, "phase", POD_PHASES),
        ready=_flag(message, "ready"),
        reason=_text(message, "reason", 128),
        message=_text(message, "message"),
        started_s=_time(message, "started"),
        containers=tuple(map(_container, _list(message.get("containers"), "containers", MAX_CONTAINERS))),
    )


def _pods(message: Mapping[str, Any], payload: bytes) -> Pods:
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise Rejected("the pods are no JSON") from error
    return Pods(_text(message, "revision", 256), tuple(map(_pod, _list(found, "pods", MAX_PODS))))


def _note(message: Mapping[str, Any], _: bytes) -> Note:
    return Note(
        pod=_text(message, "pod", MAX_NAME),
        container=_text(message, "container", MAX_NAME),
        reason=_text(message, "reason", 128),
        message=_text(message, "message"),
        severity=_word(message, "severity", SEVERITIES),
        time_s=_time(message, "time"),
    )


def _done(message: Mapping[str, Any], _: bytes) -> Done:
    ok = _flag(message, "ok")
    error = "" if ok else _text(message, "error") or "refused without a reason"
    text = message.get("text", "")
    if not isinstance(text, str) or len(text) > MAX_ANSWER:
        raise Rejected(f"text is no text of at most {MAX_ANSWER}")
    return Done(_number(message, "id", *_STREAM), error, text)


def _opened(message: Mapping[str, Any], _: bytes) -> Opened:
    starts = _list(message.get("starts", []), "starts", 64)
    if not all(isinstance(s, int) and 0 <= s <= MAX_POSITION for s in starts):
        raise Rejected("starts are no positions")
    number, container_id = _number(message, "s", *_STREAM), _text(message, "container_id", 128)
    return Opened(number, container_id, tuple(starts), _text(message, "container", 128))


def _log(message: Mapping[str, Any], payload: bytes) -> LogChunk:
    position = _number(message, "pos", 0, MAX_POSITION)
    after = _number(message, "next", 0, MAX_POSITION)
    if after != position + len(payload) or not payload.endswith(b"\n"):
        raise Rejected("the positions of a log do not match its bytes")
    return LogChunk(_number(message, "s", *_STREAM), position, after, payload)


def _gap(message: Mapping[str, Any], _: bytes) -> Gap:
    start, end = _number(message, "from", 0, MAX_POSITION), _number(message, "to", 0, MAX_POSITION)
    if end < start:
        raise Rejected("a gap ends before it begins")
    return Gap(_number(message, "s", *_STREAM), start, end, _number(message, "lines", 0, MAX_POSITION, 0))


def _data(message: Mapping[str, Any], payload: bytes) -> Data:
    return Data(_number(message, "s", *_STREAM), _word(message, "ch", frozenset({"out", "err"})), payload)


def _end(message: Mapping[str, Any], _: bytes) -> End:
    code = _number(message, "code", -(1 << 31), 1 << 31) if "code" in message else None
    return End(_number(message, "s", *_STREAM), code, _text(message, "error"))


_PARSERS: Mapping[str, Callable[[Mapping[str, Any], bytes], GuestMessage]] = {
    "here": lambda message, payload: Here(),
    "hello": _hello,
    "addresses": lambda message, payload: Addresses(_texts(message, "addresses", 64)),
    "cloud-init": lambda message, payload: _cloud_init(message),
    "pods": _pods,
    "note": _note,
    "done": _done,
    "pong": lambda message, payload: Done(_number(message, "id", *_STREAM), ""),
    "opened": _opened,
    "log": _log,
    "gap": _gap,
    "data": _data,
    "eof": lambda message, payload: Eof(_number(message, "s", *_STREAM)),
    "credit": lambda message, payload: Credit(_number(message, "s", *_STREAM), _number(message, "n", 1, 1 << 30)),
    "end": _end,
}


def parse(header: Mapping[str, Any], payload: bytes) -> GuestMessage:
    """One message of a guest. Raises `Rejected`, and nothing else, whatever it is given."""
    kind = header.get("t", "")
    parser = _PARSERS.get(kind) if isinstance(kind, str) else None
    if parser is None:
        raise Rejected("no such message")
    return parser(header, payload)


# --- log lines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of the container's log file. ``partial``: conmon broke it, the rest follows. ``end``: position after it."""

    time_s: float
    stream: str
    partial: bool
    text: bytes
    end: int


def log_lines(chunk: LogChunk) -> list[LogLine]:
    """Take a chunk of conmon's log format apart: ``<RFC 3339 time> stdout|stderr F|P <text>`` a line.

    Lines of another shape are kept whole, without a time: losing them would be worse.
    """
    lines = []
    end = chunk.position
    for raw in chunk.data[:-1].split(b"\n"):
        end += len(raw) + 1
        fields = raw.split(b" ", 3)
        if len(fields) == 4 and fields[1] in (b"stdout", b"stderr") and fields[2] in (b"F", b"P"):
            lines.append(LogLine(_stamp(fields[0]), fields[1].decode(), fields[2] == b"P", fields[3], end))
        else:
            lines.append(LogLine(0.0, "stdout", False, raw, end))
    return lines


def _stamp(text: bytes) -> float:
    """Seconds since the epoch, with nanoseconds cut to microseconds; 0 for what is no time."""
    found = re.fullmatch(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", text)
    if found is None:
        return 0.0
    fraction = (found[2] or b".0")[:7].decode()
    zone = "+00:00" if found[3] == b"Z" else found[3].decode()
    try:
        return datetime.fromisoformat(found[1].decode() + f".{fraction[1:]:0<6}" + zone).timestamp()
    except (ValueError, OverflowError):
        return 0.0
