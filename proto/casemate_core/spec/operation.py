"""What is done once to an instance, and is not a level: restart, reboot, reset, rebuild, stop within a given grace.

Vocabulary of manager and agent; nothing here decides. An order travels within the instance's desired record, at most one
at a time, and its state within what the host reports, so that neither is lost by a death or a broken stream. An order
names the process and the boot of the guest that it was given for: on others it has already come true, so that one which
arrives twice has one effect. See docs/adr/010-operations.md.
"""

from dataclasses import dataclass
from enum import StrEnum

from casemate_core.spec.realtime import Certificate


class Verb(StrEnum):
    """What can be done once to an instance."""

    STOP = "stop"
    RESTART = "restart"
    REBOOT = "reboot"
    RESET = "reset"
    REBUILD = "rebuild"
    #: Measure the latency in its guest; nothing of the instance changes.
    CERTIFY = "certify"


class OrderPhase(StrEnum):
    """How far it has come. ``Unknown``: whether it took effect could not be found out."""

    PENDING = "Pending"
    RUNNING = "Running"
    DONE = "Done"
    FAILED = "Failed"
    UNKNOWN = "Unknown"


ENDED = frozenset({OrderPhase.DONE, OrderPhase.FAILED, OrderPhase.UNKNOWN})


@dataclass(frozen=True, slots=True)
class Order:
    """An operation as a host gets it.

    ``grace_s`` None: the instance's own. ``pid``, ``guest_boot_id``: what it was given for, as far as it was known.
    ``begun``: the host has said that it began.
    """

    uid: str
    verb: Verb
    deadline_s: float
    grace_s: float | None = None
    pid: int = 0
    guest_boot_id: str = ""
    begun: bool = False
    #: CERTIFY: how long is measured, in seconds.
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class OrderState:
    """What a host says of the order that it has. Times in seconds since the epoch, 0 where it has not come to it."""

    uid: str
    phase: OrderPhase
    reason: str = ""
    message: str = ""
    started_s: float = 0.0
    finished_s: float = 0.0
    #: What a CERTIFY has measured.
    certificate: Certificate | None = None
