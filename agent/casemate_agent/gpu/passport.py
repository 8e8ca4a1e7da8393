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

from casemate_agent.gpu.checks import Check, Result, verdict
from casemate_agent.gpu.readings import Card, Proof
from casemate_core.gpu import Passport, Rung, Step

__all__ = ["Card", "Climb", "Hygiene", "Passport", "Rung", "Step", "climb", "passport"]


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


def proof_step(proof: Proof) -> tuple[Result, str, tuple[Check, ...]]:
    """How the rung *proved* ended. A card without a register that only a reset clears has not been seen to forget: that is
    unknown, it stands in the passport, and ``reset-seen`` may be required."""
    if not proof.answers:
        return Result.FAILED, "it does not answer", ()
    if proof.found != proof.expected:
        return Result.FAILED, f"it says that it is {proof.found}, and was {proof.expected}", ()
    if proof.kept is None:
        seen = Check("reset-seen", Result.UNKNOWN, "no register of it shows that it was reset")
    elif proof.kept:
        return Result.FAILED, f"it still has what was set before: {proof.mark}", ()
    else:
        seen = Check("reset-seen", Result.PASSED, f"{proof.mark} is not set any more")
    return Result.PASSED, f"answers as {proof.found}; {seen.evidence}", (seen,)


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


def passport(uuid: str, generation: int, tenant: str, steps: Iterable[Step], end: Climb, number: int = 0) -> Passport:
    """The record of a climb that came to its end."""
    if end.next is not None:
        raise ValueError(f"the climb goes on with {end.next}")
    return Passport(uuid, generation, tenant, tuple(steps), end.clean, end.reason, number)
