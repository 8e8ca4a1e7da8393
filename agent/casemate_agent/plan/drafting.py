"""The plan of one instance while it is made: what it stands on, and what it holds. PURE.

What may live here: the types that :mod:`casemate_agent.plan.converge` and :mod:`casemate_agent.plan.orders` share, and questions
about them. Decisions are theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from casemate_agent.actions import Action, Certify, Transfer
from casemate_agent.drivers.ports import DomainFacts, DomainPhase
from casemate_agent.gpu.records import DEFAULT_POLICY, GpuEntry, GpuPolicy
from casemate_agent.ledger.records import GuestView, InstanceRecord, Note, Observation
from casemate_core.spec.instance import InstanceState, Phase
from casemate_core.spec.realtime import ProfileLine

if TYPE_CHECKING:
    from casemate_agent.plan.pool import Pool

ACTIVE = frozenset({DomainPhase.RUNNING, DomainPhase.PAUSED, DomainPhase.SHUTTING_DOWN})


@dataclass(frozen=True, slots=True)
class Settings:
    """Times of an agent, in seconds, and limits."""

    #: A guest asked to power off has so long.
    stop_grace_s: float = 60.0
    #: It is asked again so often: a guest that is still booting drops the first.
    stop_ask_again_s: float = 10.0
    #: A domain that ran so long before it ended by itself starts afresh in its back-off.
    stable_s: float = 600.0
    backoff_base_s: float = 1.0
    backoff_cap_s: float = 300.0
    #: So many failures of the same action in a row are told as phase Failed; it is tried on.
    failed_after: int = 3
    #: Unused images are removed while less of the store's disk than this is free.
    low_disk_fraction: float = 0.1
    #: Threads of VMs that somebody moved are bound again; else it is only told.
    repair_affinities: bool = True
    #: ``off``: the real-time profile is neither judged nor applied; ``report``: judged; ``apply``: what may be set is set.
    realtime: str = "report"
    #: Huge pages that the kernel lost are asked for again; else it is only told.
    repair_pages: bool = False
    #: What is asked of GPUs between tenants.
    gpu: GpuPolicy = DEFAULT_POLICY


@dataclass(frozen=True, slots=True)
class InstancePlan:
    """What to do about one instance, in order, and what to report.

    ``base`` is the record that was planned from, ``record`` the one that is on disk BEFORE the first action runs; where
    they are equal and there are no actions, nothing happens. ``wake_s``: look again then (seconds since the epoch).
    """

    base: InstanceRecord
    record: InstanceRecord
    state: InstanceState
    actions: tuple[Action, ...] = ()
    wake_s: float = inf
    notes: tuple[Note, ...] = ()
    drift: tuple[str, ...] = ()
    #: A measurement that is to be under way, beside whatever else is.
    measure: Certify | None = None
    #: A transfer to another host that is to be under way.
    move: Transfer | None = None


@dataclass(slots=True)
class Draft:
    """The plan while it is being made; lives within one call."""

    record: InstanceRecord
    domain: DomainFacts | None
    guest: GuestView
    observed: Observation
    settings: Settings
    pool: "Pool"
    #: The ledger's records of GPUs.
    gpus: Mapping[str, GpuEntry] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    drift: list[str] = field(default_factory=list)
    wake_s: float = inf
    phase: Phase = Phase.UNKNOWN
    reason: str = ""
    message: str = ""
    #: Why its process is to end although it should run: an order wants another one. Empty: it is not.
    down: str = ""
    #: A latency that an order wants measured.
    measure: Certify | None = None
    #: What an order wants sent.
    move: Transfer | None = None
    #: What threads and memory of the instance need, read back.
    profile: tuple[ProfileLine, ...] = ()

    @property
    def now(self) -> float:
        return self.observed.time_s

    @property
    def active(self) -> bool:
        return self.domain is not None and self.domain.phase in ACTIVE

    @property
    def grace_s(self) -> float:
        """How long the guest has to power off: as the order under way says, or its environment, or this agent."""
        desired, order = self.record.desired, self.record.order
        asked = desired.order
        if asked is not None and order is not None and order.uid == asked.uid and asked.grace_s is not None:
            return asked.grace_s
        return self.settings.stop_grace_s if desired.stop_grace_s is None else desired.stop_grace_s

    def note(self, reason: str, message: str, severity: str = "Normal") -> None:
        self.notes.append(Note(self.record.uid, reason, message, severity))

    def says(self, phase: Phase, reason: str = "", message: str = "") -> None:
        self.phase, self.reason, self.message = phase, reason, message

    def wake(self, at_s: float) -> None:
        self.wake_s = min(self.wake_s, at_s)
