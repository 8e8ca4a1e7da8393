"""A GPU between two tenants: its states as one table. PURE.

What may live here: the states, what moves a GPU from one to the next, and who may have it. How a step is carried out is a
driver's; when one is due is the agent's plan.

Theory of operation. The record of a GPU is on disk BEFORE the act that it announces, so after a crash the record is at most
ahead of the machine, never behind it: a GPU that a tenant may have touched is at least Attached on disk. Everything from
Attached on is *dirty* and stays so until Checked: whatever happens in between, a reboot of the host and the loss of a step
included, leads back to Returned, and the whole ladder is climbed again. No step is believed because it was begun.

A quarantined GPU leaves only by the word of an operator, and then by the ladder like any other. The diagram in the docs is
drawn from ``TABLE``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from casemate_core.errors import CallerError
from casemate_core.gpu import ASSIGNABLE, GpuPhase


class State(StrEnum):
    """State of a GPU; the words of the schema."""

    HOST_OWNED = "HostOwned"
    PREPARED = "Prepared"
    ATTACHED = "Attached"
    RETURNED = "Returned"
    SANITISING = "Sanitising"
    CHECKED = "Checked"
    FREE = "Free"
    QUARANTINED = "Quarantined"


class Event(StrEnum):
    """What moves it."""

    #: It is given to an instance: from here it is bound to vfio-pci.
    PREPARE = "prepare"
    #: The domain is about to start with it.
    ATTACH = "attach"
    #: The domain has ended, and no process holds the device.
    RETURN = "return"
    #: The ladder begins: reset, scrub, checks.
    SANITISE = "sanitise"
    #: Every step of the ladder was done in one go and none that is required failed.
    PASS = "pass"
    #: The passport is on disk.
    RELEASE = "release"
    #: The host's own driver takes it, for monitoring or for work of the host.
    TAKE = "take"
    #: The agent, or the host, began anew: what was under way is not known to be done.
    CRASH = "crash"
    QUARANTINE = "quarantine"
    #: It is not there any more; whatever comes back is dirty.
    LOSE = "lose"
    #: An operator lets it out of quarantine, to be sanitised.
    CLEAR = "clear"


S, E = State, Event
TABLE: Mapping[tuple[State, Event], State] = MappingProxyType(
    {
        (S.FREE, E.PREPARE): S.PREPARED,
        (S.FREE, E.TAKE): S.HOST_OWNED,
        (S.FREE, E.CRASH): S.FREE,
        (S.FREE, E.SANITISE): S.SANITISING,
        (S.FREE, E.QUARANTINE): S.QUARANTINED,
        (S.FREE, E.LOSE): S.RETURNED,
        (S.HOST_OWNED, E.PREPARE): S.PREPARED,
        (S.HOST_OWNED, E.RELEASE): S.FREE,
        (S.HOST_OWNED, E.SANITISE): S.SANITISING,
        (S.HOST_OWNED, E.CRASH): S.HOST_OWNED,
        (S.HOST_OWNED, E.QUARANTINE): S.QUARANTINED,
        (S.HOST_OWNED, E.LOSE): S.RETURNED,
        (S.PREPARED, E.ATTACH): S.ATTACHED,
        # never attached: nobody has touched it
        (S.PREPARED, E.RELEASE): S.FREE,
        (S.PREPARED, E.CRASH): S.PREPARED,
        (S.PREPARED, E.QUARANTINE): S.QUARANTINED,
        (S.PREPARED, E.LOSE): S.RETURNED,
        (S.ATTACHED, E.RETURN): S.RETURNED,
        # the domain outlives the agent, and is looked for: Return comes from an observation, never from a crash
        (S.ATTACHED, E.CRASH): S.ATTACHED,
        (S.RETURNED, E.SANITISE): S.SANITISING,
        (S.RETURNED, E.CRASH): S.RETURNED,
        (S.RETURNED, E.QUARANTINE): S.QUARANTINED,
        (S.SANITISING, E.PASS): S.CHECKED,
        (S.SANITISING, E.CRASH): S.RETURNED,
        (S.SANITISING, E.QUARANTINE): S.QUARANTINED,
        (S.CHECKED, E.RELEASE): S.FREE,
        # the passport may not be on disk
        (S.CHECKED, E.CRASH): S.RETURNED,
        (S.CHECKED, E.QUARANTINE): S.QUARANTINED,
        (S.QUARANTINED, E.CLEAR): S.RETURNED,
        (S.QUARANTINED, E.CRASH): S.QUARANTINED,
        (S.QUARANTINED, E.QUARANTINE): S.QUARANTINED,
    }
)
"""Every move there is; what is not in it is refused. An attached GPU is not quarantined: it is returned first."""

DIRTY = frozenset({S.ATTACHED, S.RETURNED, S.SANITISING, S.CHECKED})
"""A tenant's data or firmware may be on it."""


class NoSuchMove(CallerError):
    """The state does not allow it. Carries the story of the GPU."""

    reason = "GpuNoSuchMove"

    def __init__(self, record: "GpuRecord", event: Event) -> None:
        self.record, self.event = record, event
        story = " → ".join(map(str, record.story))
        super().__init__(f"GPU {record.uuid} is {record.state} and cannot {event}; it went {story}")


STORY = 12
"""States kept for whoever asks how it came to this."""


@dataclass(frozen=True, slots=True)
class GpuRecord:
    """What the ledger holds of one GPU. ``owner`` is the uid of the instance it is given to, ``tenant`` who had it last."""

    uuid: str
    state: State = State.HOST_OWNED
    owner: str = ""
    tenant: str = ""
    #: Why it is in quarantine.
    reason: str = ""
    #: Counts its hand-overs: a step of an older one has no effect on a newer one.
    generation: int = 0
    story: tuple[State, ...] = (State.HOST_OWNED,)

    @property
    def dirty(self) -> bool:
        """Somebody's traces may be on it: it is given to nobody else."""
        return self.state in DIRTY

    @property
    def assignable(self) -> bool:
        """It may be promised to an instance."""
        return GpuPhase(self.state) in ASSIGNABLE


def first_seen(uuid: str) -> GpuRecord:
    """A GPU of which this host has no record: new, or the record was lost. Who had it is not known, so it is dirty."""
    return GpuRecord(uuid, State.RETURNED, story=(State.RETURNED,))


def held(uuid: str, owner: str, tenant: str) -> GpuRecord:
    """A GPU without a record that a running domain of ours has."""
    return GpuRecord(uuid, State.ATTACHED, owner, tenant, generation=1, story=(State.ATTACHED,))


def move(
    record: GpuRecord,
    event: Event,
    *,
    owner: str = "",
    tenant: str = "",
    reason: str = "",
    generation: int | None = None,
) -> GpuRecord:
    """The record after an event; raises NoSuchMove, and then nothing has changed.

    ``owner`` and ``tenant`` go with Prepare, ``reason`` with Quarantine. ``generation``: whoever reports the end of a step
    names the hand-over that it was begun for.
    """
    to = TABLE.get((record.state, event))
    if to is None or (generation is not None and generation != record.generation):
        raise NoSuchMove(record, event)
    if event is Event.PREPARE and not (owner and tenant):
        raise ValueError("a GPU is prepared for an instance of a tenant")
    story = record.story if to is record.state else (*record.story, to)[-STORY:]
    moved = replace(record, state=to, story=story)
    match event:
        case Event.PREPARE:
            return replace(moved, owner=owner, tenant=tenant, generation=record.generation + 1, reason="")
        case Event.RETURN | Event.RELEASE | Event.TAKE | Event.LOSE:
            return replace(moved, owner="")
        case Event.QUARANTINE:
            return replace(moved, owner="", reason=reason or record.reason)
        case Event.CLEAR:
            return replace(moved, reason="")
    return moved


def diagram() -> str:
    """The table as a Mermaid state diagram, for the docs."""
    lines = ["stateDiagram-v2", "    [*] --> Returned"]
    lines += [f"    {state} --> {to}: {event}" for (state, event), to in TABLE.items() if state is not to]
    return "\n".join(lines)
