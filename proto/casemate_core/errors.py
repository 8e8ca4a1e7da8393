"""Errors, by whose fault they are: the caller's, the machine's, or our own.

Every error that crosses a border of Casemate is one of three roots. A border (the CLI, a gRPC handler, the execution of
an action) converts by root alone: a ``CallerError`` is told to the caller with the field and the remedy, a
``MachineError`` becomes a condition of the object and is tried again, an ``InternalError`` is a defect of Casemate and is
logged with its story. Errors carry data; the sentence is derived from it.

Refusals to place are no errors: they are results (:mod:`casemate_core.reasons`).
"""

from dataclasses import dataclass
from typing import final


class CasemateError(Exception):
    """Root of the three roots. Raised only through them."""

    #: One word for programs, stable across releases.
    reason: str = "Error"


class CallerError(CasemateError):
    """What was asked cannot be done as it was asked; asking the same again will fail again."""

    reason = "Invalid"


class MachineError(CasemateError):
    """The machine did not do what was right to ask of it; a later try may succeed."""

    reason = "MachineFailed"


class InternalError(CasemateError):
    """Casemate contradicts itself: an invariant is broken."""

    reason = "Internal"


@final
@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with one field of what was given.

    ``path`` is the field as the user wrote it (``spec.memory.size``, ``spec.pods[0].spec.containers[1].image``),
    ``value`` what stood there (shortened), ``problem`` one clause that says what is wrong, ``remedy`` one clause that says
    what to write instead.
    """

    path: str
    value: str
    problem: str
    remedy: str = ""

    def __str__(self) -> str:
        shown = f" {self.value!r}" if self.value else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.path}:{shown} {self.problem}{remedy}"


MAX_SHOWN = 80


def shown(value: object) -> str:
    """``value`` as it may be quoted in an error: one line, no control characters, at most 80 characters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: MAX_SHOWN + 1])
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


class InvalidSpec(CallerError):
    """A manifest or a request has fields that are wrong; carries all of them, not only the first."""

    reason = "Invalid"

    def __init__(self, violations: tuple[Violation, ...], subject: str = "") -> None:
        if not violations:
            raise InternalError("InvalidSpec without a violation")
        self.violations = violations
        #: What was refused, as ``environment/hello``, where that is known.
        self.subject = subject
        super().__init__("; ".join(map(str, violations)))


class NotFound(CallerError):
    """There is no such object."""

    reason = "NotFound"

    def __init__(self, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name
        super().__init__(f"{kind} {shown(name)!r} not found")


class Conflict(CallerError):
    """The object changed since the caller read it, or stands in the way of what was asked."""

    reason = "Conflict"


class Unavailable(MachineError):
    """A part that is needed does not answer in time; it may soon."""

    reason = "Unavailable"


class DeadlineExceeded(MachineError):
    """The machine took longer than the deadline of the call; whether the call had its effect is unknown."""

    reason = "DeadlineExceeded"
