"""PURE. Who is let in: session counters, and whether a host may resume."""

from enum import StrEnum

from casemate_wire.stream import (
    Hello,
)


def next_counter(stored: int | None, now_s: float) -> int:
    """The session counter for the next dial: one more than the stored one.

    A host that lost its counter starts at the wall clock in seconds, which is more than any counter that began there
    and was raised once a dial.
    """
    return int(now_s) if stored is None else stored + 1


class Admission(StrEnum):
    """What becomes of a Hello."""

    WELCOME = "welcome"
    SUPERSEDE = "supersede"
    STALE = "stale"
    CLONE = "clone"


def admit(last_counter: int, connected: bool, counter: int) -> Admission:
    """Decide on a Hello with session ``counter`` for a host whose highest counter so far is ``last_counter`` (0: none).

    ``connected``: a stream with ``last_counter`` is open, as far as the manager knows.
    """
    if counter < last_counter:
        return Admission.STALE
    if counter == last_counter and last_counter > 0:
        # An agent raises its counter before each dial, so two streams with one counter are two machines.
        return Admission.CLONE
    return Admission.SUPERSEDE if connected else Admission.WELCOME


def resumable(hello: Hello, epoch: int, revision: int) -> bool:
    """Whether the desired state may be told as what changed since the host's revision."""
    return hello.epoch == epoch and 0 < hello.revision <= revision
