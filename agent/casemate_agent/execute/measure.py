"""Measures the latency in a guest: runs cyclictest there by the guest's helper, and reads what it says.

What may live here: the commands, in their order, and the bounds of what is taken of their output. What the words mean is
:mod:`casemate_agent.realtime.certificate`'s.
"""

from collections.abc import Callable

from casemate_agent.actions import Certify
from casemate_agent.drivers.ports import GuestRefused, Guests
from casemate_agent.execute.guestrun import NOT_FOUND, GuestSaysTooMuch, run_in_guest
from casemate_agent.realtime.certificate import MAX_OUTPUT_BYTES, MISSING, BadMeasurement, Told, arguments, certificate
from casemate_core.errors import CallerError
from casemate_core.spec.realtime import Certificate

MAX_WORDS_BYTES = 4096
SHORT_S = 10.0


class ToolMissing(CallerError):
    """The guest has nothing to measure with."""

    reason = "ToolMissing"


async def measure(guests: Guests, action: Certify, now: Callable[[], float], deadline_s: float) -> Certificate:
    """Run it; the certificate. Raises ToolMissing, BadMeasurement, Unavailable."""
    kernel = await _words(guests, action.uid, ("uname", "-r"))
    before = await _words(guests, action.uid, ("cat", "/proc/loadavg"))
    argv = arguments(action.duration_s)
    try:
        code, output, errors = await _run(guests, action.uid, argv, deadline_s, MAX_OUTPUT_BYTES)
    except GuestRefused as error:
        raise ToolMissing(f"{MISSING}: {error}") from error
    if code == NOT_FOUND:
        raise ToolMissing(f"{MISSING}: {errors.strip()[:200]}")
    if code:
        raise BadMeasurement(f"cyclictest ended with {code}: {(errors or output).strip()[-300:]}")
    after = await _words(guests, action.uid, ("cat", "/proc/loadavg"))
    told = Told(output, kernel, " ".join(before.split()[:3]), " ".join(after.split()[:3]))
    return certificate(action.order, action.duration_s, now(), told, action.under)


async def _words(guests: Guests, uid: str, argv: tuple[str, ...]) -> str:
    """What a small command says; empty where it is not there: a certificate can do without."""
    try:
        code, output, _ = await _run(guests, uid, argv, SHORT_S, MAX_WORDS_BYTES)
    except GuestRefused:
        return ""
    return output.strip()[:200] if code == 0 else ""


async def _run(
    guests: Guests, uid: str, argv: tuple[str, ...], deadline_s: float, most_bytes: int
) -> tuple[int | None, str, str]:
    """Exit code, output and errors of a command in the guest itself."""
    try:
        return await run_in_guest(guests, uid, argv, deadline_s, most_bytes)
    except GuestSaysTooMuch as error:
        raise BadMeasurement(str(error)) from error
