"""What hosts and manager say to each other of GPUs: states, hand-overs, orders of operators.

What may live here: frozen values, and what follows from them alone. How a GPU comes from one state to the next is the agent's
(:mod:`casemate_agent.gpu.lifecycle`); what is done because of a state is the scheduler's.

Theory of operation. A GPU that is not clean, or of which nothing was told, is held: the scheduler sees it as taken, by an owner
that is no instance (:func:`hold`), so that nothing that finds places needs to know of states, and a refusal can name it.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from casemate_core.claims import Claim, GpuShare


class GpuPhase(StrEnum):
    """State of a GPU; the words of the schema. Unknown: its host has not told."""

    HOST_OWNED = "HostOwned"
    PREPARED = "Prepared"
    ATTACHED = "Attached"
    RETURNED = "Returned"
    SANITISING = "Sanitising"
    CHECKED = "Checked"
    FREE = "Free"
    QUARANTINED = "Quarantined"
    UNKNOWN = "Unknown"


ASSIGNABLE: Final = frozenset({GpuPhase.FREE, GpuPhase.HOST_OWNED})
"""In these it may be promised to an instance."""


class Result(StrEnum):
    """How a step or a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Rung(StrEnum):
    """A step of the ladder between two tenants."""

    RELEASED = "released"
    FUNCTION_RESET = "function-reset"
    BUS_RESET = "bus-reset"
    PROVED = "proved"
    SCRUB = "scrub"
    CHECKS = "checks"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a passport: what was looked at, how it ended, and the numbers that it followed from."""

    name: str
    result: Result
    evidence: str


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
class Passport:
    """The record of one hand-over. ``generation`` and ``climb`` name it: of one generation a GPU may be sanitised again."""

    uuid: str
    generation: int
    #: Who had it before; told to the platform team, not to the next tenant.
    tenant: str
    steps: tuple[Step, ...]
    clean: bool
    reason: str = ""
    climb: int = 0

    @property
    def ended_s(self) -> float:
        """When its last step had ended (seconds since the epoch); 0 where there is none."""
        return self.steps[-1].at_s + self.steps[-1].took_s if self.steps else 0.0

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


@dataclass(frozen=True, slots=True)
class GpuFigures:
    """What was read of a GPU last, at ``at_s`` (seconds since the epoch); None is unknown. ``told_by``: ``host`` or
    ``guest``, empty where nobody told more than the link, which the host sees at all times."""

    told_by: str = ""
    at_s: float = 0.0
    temperature_c: int | None = None
    power_w: float | None = None
    gpu_busy_percent: int | None = None
    memory_used_mib: int | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    rows_remapped: int | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    link_speed_gts: float | None = None
    link_speed_max_gts: float | None = None
    link_width: int | None = None
    link_width_max: int | None = None
    link_errors: int | None = None


@dataclass(frozen=True, slots=True)
class GpuState:
    """What a host says of one of its GPUs. ``owner``: uid of the instance that it is given to; ``since_s``: in this state."""

    uuid: str
    phase: GpuPhase
    owner: str = ""
    tenant: str = ""
    reason: str = ""
    generation: int = 0
    since_s: float = 0.0
    address: str = ""
    driver: str = ""
    health: str = "unknown"
    reasons: tuple[str, ...] = ()
    #: Order of an operator that was carried out last.
    order: str = ""
    passport: Passport | None = None
    figures: GpuFigures | None = None

    @property
    def held(self) -> str:
        """Why it is given to nobody; empty where it may be. One that carries slices and is to be held back when the last of
        them is gone takes no more of them."""
        if self.phase in ASSIGNABLE:
            return f"held back: {self.reason}" if self.reason else ""
        return f"{self.phase}{f': {self.reason}' if self.reason else ''}"


class GpuVerb(StrEnum):
    """What an operator asks of a GPU."""

    #: Out of quarantine, and through the ladder.
    RELEASE = "release"
    #: Out of use: at once where nobody has it, at its return where somebody has.
    QUARANTINE = "quarantine"
    #: Through the ladder now.
    SANITISE = "sanitise"


@dataclass(frozen=True, slots=True)
class GpuOrder:
    """The last that an operator asked of a GPU; ``uid`` tells it from the one before."""

    uuid: str
    uid: str
    verb: GpuVerb
    reason: str = ""


_HELD: Final = "gpu:"


def hold(uuid: str, why: str) -> Claim:
    """The claim that keeps a GPU from everybody. ``why`` is told where somebody asks for it."""
    return Claim(owner=f"{_HELD}{uuid}:{why}", gpus=(uuid,))


def hold_rest(uuid: str, why: str, used_milli: int) -> Claim:
    """The claim that keeps what is left of a GPU, of which others have slices, from everybody."""
    return Claim(owner=f"{_HELD}{uuid}:{why}", shares=(GpuShare(uuid, 1000 - used_milli),))


def held_because(owner: str) -> str:
    """``UUID: why`` of an owner that is a hold; empty for any other."""
    if not owner.startswith(_HELD):
        return ""
    uuid, _, why = owner.removeprefix(_HELD).partition(":")
    return f"{uuid} is {why}"
