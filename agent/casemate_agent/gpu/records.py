"""What the agent remembers of one GPU, and what its administrator asks of GPUs. PURE.

What may live here: the record that the ledger keeps of a GPU beside its state, and the policy's types with their defaults.

Theory of operation. One file of the ledger a GPU. What cannot be seen by looking is in it: its state, who had it, what it
counted when it was handed over last, the steps of the climb under way, the last passports. It is on disk, fsynced, before the
act that it announces.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from casemate_agent.gpu.checks import HOT_C
from casemate_agent.gpu.lifecycle import Event, GpuRecord, move
from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.passport import Hygiene, Passport, Step
from casemate_agent.gpu.readings import GpuReading
from casemate_core.gpu import GpuFigures, GpuPhase, GpuState

MOST_PASSPORTS = 4
"""Passports kept on the host; the manager keeps more."""


class Response(StrEnum):
    """What is done about a GPU that is not well."""

    #: Told, and nothing else.
    TELL = "tell"
    #: It goes into quarantine: at once where nobody has it, else at its return.
    QUARANTINE = "quarantine"
    #: The host takes no new instances, too.
    CORDON = "cordon"


DEFAULT_HYGIENE: Final = Hygiene()


@dataclass(frozen=True, slots=True)
class GpuPolicy:
    """What the administrator of a host asks. ``held_limit_s``: so long a process may hold a device that is to come back."""

    hygiene: Hygiene = DEFAULT_HYGIENE
    broken: Response = Response.QUARANTINE
    suspect: Response = Response.TELL
    held_limit_s: float = 60.0
    #: Program and arguments that overwrite a GPU's memory; with it comes ``hygiene.scrub``.
    scrubber: tuple[str, ...] = ()
    #: The most that is done about what a guest alone says of its GPU.
    guest: Response = Response.TELL
    #: Between two questions to a guest about its GPUs; 0: none is asked.
    guest_health_s: float = 60.0
    #: From this temperature on a GPU is suspect.
    hot_c: int = HOT_C


DEFAULT_POLICY: Final = GpuPolicy()


@dataclass(frozen=True, slots=True)
class GpuEntry:
    """The record of one GPU; one file of the ledger."""

    record: GpuRecord
    since_s: float = 0.0
    #: Of the climb under way; with the next one they begin anew.
    steps: tuple[Step, ...] = ()
    #: The last ones, newest last.
    passports: tuple[Passport, ...] = ()
    climbs: int = 0
    #: At its last hand-over: what its counters are held against.
    reading: GpuReading | None = None
    link: LinkReading | None = None
    #: It goes into quarantine when it comes back, for this reason.
    condemned: str = ""
    #: Order of an operator that was taken last.
    order: str = ""

    @property
    def uuid(self) -> str:
        return self.record.uuid


def moved(entry: GpuEntry, event: Event, now_s: float, **words: str) -> GpuEntry:
    """The entry after an event. Raises NoSuchMove."""
    record = move(entry.record, event, **words)  # type: ignore[arg-type]
    return replace(entry, record=record, since_s=now_s if record.state is not entry.record.state else entry.since_s)


def with_passport(entry: GpuEntry, passport: Passport) -> GpuEntry:
    """With one more passport; the oldest goes where there are too many."""
    return replace(entry, passports=(*entry.passports, passport)[-MOST_PASSPORTS:])


def state_of(
    entry: GpuEntry, address: str, driver: str, health: str, reasons: tuple[str, ...], figures: GpuFigures | None = None
) -> GpuState:
    """What the manager is told of a GPU."""
    record = entry.record
    return GpuState(
        uuid=record.uuid,
        phase=GpuPhase(record.state.value),
        owner=record.owner,
        tenant=record.tenant,
        reason=record.reason or entry.condemned,
        generation=record.generation,
        since_s=entry.since_s,
        address=address,
        driver=driver,
        health=health,
        reasons=reasons,
        order=entry.order,
        passport=entry.passports[-1] if entry.passports else None,
        figures=figures,
    )
