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
    #: Move it to another host while it runs.
    MIGRATE = "migrate"


class Stage(StrEnum):
    """How far a migration has come, as its two hosts are told (docs/adr/025-a-migration-is-two-placements.md)."""

    #: The target makes ready; the source does nothing yet.
    PREPARE = "prepare"
    #: The source may send it. It arrives frozen, and goes on there only once it has been switched over.
    TRANSFER = "transfer"
    #: The source is to give it up, and to say what came of it.
    CANCEL = "cancel"
    #: The source has said that it is gone there; the target says whether it has arrived.
    SETTLE = "settle"


@dataclass(frozen=True, slots=True)
class Move:
    """The two hosts of a migration. ``address``: where the target waits for the source, ``host:port``, once it does."""

    source: str
    target: str
    stage: Stage = Stage.PREPARE
    address: str = ""


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
    #: Of a MIGRATE: both of its hosts have the same order, and each knows by its placement's role which it is.
    move: Move | None = None


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
    #: Of a MIGRATE, by its target: where it waits for the source, ``host:port``; empty while it does not.
    address: str = ""
