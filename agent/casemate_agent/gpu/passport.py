"""What was done to a GPU between two tenants, step by step, and what the next step is. PURE.

What may live here: the ladder as a function from what is known to the next rung, and the passport that comes of it. The
acts themselves (reset, scrub, reading) are drivers'.

Theory of operation. :func:`climb` is asked after each step with all steps so far, and answers with the next rung, or that the
GPU is clean, or why it is held back. The rungs, in order:

1. *released*: no process of the host holds the device. Where one does it is named, and waited for up to a limit.
2. *reset*: a function-level reset. Where the device has none, or its reset is not proved, a reset of its bus, but only where
   every function on that bus belongs to this hand-over: a bus reset resets all of them.
3. *proved*: after the reset the device answers, with the identity that it had, and what was set before is not set any more.
4. *scrub*: whatever is configured to overwrite its memory. Without one the step is told as not made.
5. *checks*: what the host's own driver tells (:mod:`casemate_agent.gpu.checks`), where it may hold the card.

A rung that failed is not tried twice, except that a bus reset may follow a function reset. A passport says what is *not*
proven as plainly as what is: a reset is no proof that memory was emptied, and no check here looks at firmware.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from casemate_agent.gpu.checks import Check, Result, verdict


class Rung(StrEnum):
    """A step of the ladder."""

    RELEASED = "released"
    FUNCTION_RESET = "function-reset"
    BUS_RESET = "bus-reset"
    PROVED = "proved"
    SCRUB = "scrub"
    CHECKS = "checks"


@dataclass(frozen=True, slots=True)
class Step:
    """One step as it was made. ``at_s`` seconds since the epoch, ``took_s`` seconds."""

    rung: Rung
    result: Result
    evidence: str
    at_s: float = 0.0
    took_s: float = 0.0
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, slots=True)
class Card:
    """What decides the way up, as the host sees the device now."""

    #: Processes of the host that hold it, with their names: ``4711 (nvidia-smi)``.
    holders: tuple[str, ...] = ()
    #: Ways in which the kernel can reset it, as ``reset_method`` in sysfs lists them (Linux 5.15 and newer).
    methods: tuple[str, ...] = ()
    #: Functions on its bus that do not belong to this hand-over, by address.
    strangers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hygiene:
    """What the platform team asks of a hand-over. ``required``: checks and rungs that must have passed; unknown is not
    enough for them."""

    scrub: bool = False
    driver_checks: bool = True
    required: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Climb:
    """The answer: ``next`` rung, or ``clean``, or the ``reason`` for which it is held back."""

    next: Rung | None = None
    clean: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Passport:
    """The record of one hand-over, kept for good."""

    uuid: str
    generation: int
    #: Who had it before; told to the platform team, not to the next tenant.
    tenant: str
    steps: tuple[Step, ...]
    clean: bool
    reason: str = ""

    @property
    def not_proven(self) -> tuple[str, ...]:
        """What nobody may take this passport for."""
        missing = ["that its firmware is what its maker shipped"]
        scrubbed = any(s.rung is Rung.SCRUB and s.result is Result.PASSED for s in self.steps)
        if not scrubbed:
            missing.insert(0, "that its memory was emptied: nothing overwrote it")
        missing += [
            f"{check.name}: {check.evidence}"
            for step in self.steps
            for check in step.checks
            if check.result is Result.UNKNOWN
        ]
        return tuple(missing)


def climb(steps: Iterable[Step], card: Card, hygiene: Hygiene) -> Climb:
    """The next rung after ``steps``, which are of one uninterrupted climb, in order."""
    made = tuple(steps)
    last = made[-1] if made else None
    tried = {step.rung for step in made}
    if last is None or (last.rung is Rung.RELEASED and last.result is not Result.PASSED):
        if last is not None:
            return Climb(reason=f"still held: {last.evidence}")
        return Climb(next=Rung.RELEASED)
    if card.holders:
        return Climb(reason=f"held by {', '.join(card.holders[:4])}")
    match last.rung:
        case Rung.RELEASED:
            return _reset(card, tried, "")
        case Rung.FUNCTION_RESET | Rung.BUS_RESET:
            return Climb(next=Rung.PROVED) if last.result is Result.PASSED else _reset(card, tried, last.evidence)
        case Rung.PROVED:
            if last.result is not Result.PASSED:
                return _reset(card, tried, last.evidence)
            return Climb(next=Rung.SCRUB) if hygiene.scrub else _after_scrub(made, hygiene)
        case Rung.SCRUB:
            if last.result is not Result.PASSED:
                return Climb(reason=f"scrub: {last.evidence}")
            return _after_scrub(made, hygiene)
        case Rung.CHECKS:
            return _end(made, hygiene)


def _reset(card: Card, tried: set[Rung], evidence: str) -> Climb:
    """The gentlest reset that was not tried yet."""
    if "flr" in card.methods and Rung.FUNCTION_RESET not in tried:
        return Climb(next=Rung.FUNCTION_RESET)
    why = f"{evidence}; " if evidence else ""
    if Rung.BUS_RESET in tried:
        return Climb(reason=f"{why}no reset is left to try")
    if "bus" not in card.methods:
        return Climb(reason=f"{why}the kernel knows no other reset of it ({', '.join(card.methods) or 'none'})")
    if card.strangers:
        shared = ", ".join(card.strangers[:4])
        return Climb(reason=f"{why}a bus reset would reset others on its bus too: {shared}")
    return Climb(next=Rung.BUS_RESET)


def _after_scrub(made: tuple[Step, ...], hygiene: Hygiene) -> Climb:
    return Climb(next=Rung.CHECKS) if hygiene.driver_checks else _end(made, hygiene)


def _end(made: tuple[Step, ...], hygiene: Hygiene) -> Climb:
    """All that is required is there, or what is not."""
    found = [check for step in made for check in step.checks]
    # A reset that failed and was followed by one that passed is no reason: what counts is where a rung stands last.
    standing = {step.rung: step for step in made}
    found += [
        Check(step.rung, step.result, step.evidence) for step in standing.values() if step.rung in hygiene.required
    ]
    held = verdict(found, hygiene.required)
    if held:
        return Climb(reason="; ".join(f"{check.name}: {check.evidence}" for check in held[:4]))
    return Climb(clean=True)


def passport(uuid: str, generation: int, tenant: str, steps: Iterable[Step], end: Climb) -> Passport:
    """The record of a climb that came to its end."""
    if end.next is not None:
        raise ValueError(f"the climb goes on with {end.next}")
    return Passport(uuid, generation, tenant, tuple(steps), end.clean, end.reason)
