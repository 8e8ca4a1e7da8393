"""What the manager measures: its families, and how commands and commits are counted. PURE.

The gauges, which are read off the state when somebody scrapes, are made in :mod:`casemate_manager.api.metrics`.
"""

from typing import Final

from casemate_core.errors import CasemateError, InternalError
from casemate_core.metrics import Family, Meter, counter, gauge, histogram
from casemate_core.spec.views import EventView
from casemate_manager.fleet.commands import Batch, Command, HostFacts, Turned, Welcomed
from casemate_manager.fleet.observed import Tried
from casemate_manager.fleet.records import PlacementRecord, Put, key_of
from casemate_manager.fleet.state import State

BUILD: Final = gauge("casemate_build_info", "1, with the version of this process.", "component", "version")
# --- placing ---
PLACEMENTS: Final = counter("casemate_placements_total", "Placements that were committed.")
REFUSED: Final = counter(
    "casemate_placements_refused_total", "Placements that a host refused for lack of resources; it stays 0."
)
UNPLACED: Final = counter(
    "casemate_placement_failures_total", "Tries to place an instance on a fleet that had no room for it."
)
# --- the one writer ---
COMMANDS: Final = counter(
    "casemate_commands_total", "Commands by kind, and whether they were taken.", "command", "outcome"
)
QUEUE: Final = gauge("casemate_commands_waiting", "Commands that wait for the writer.")
COMMIT_S: Final = histogram(
    "casemate_commit_duration_seconds", "Time that the store takes to make a group of commands durable."
)
COMMITS_FAILED: Final = counter("casemate_commit_failures_total", "Commits that failed; each ends the manager's term.")
DELTAS: Final = counter("casemate_host_deltas_total", "Reports of what hosts observe, whole or as changes.")
EPOCH: Final = gauge("casemate_epoch", "Term that this manager leads.")
REVISION: Final = gauge("casemate_revision", "Revision of the committed state.")
LEADING: Final = gauge("casemate_leading", "1 while commands are taken, 0 while the store cannot be written.")
# --- who asks ---
RPCS: Final = counter("casemate_rpcs_total", "Calls that have ended, by method and gRPC's code.", "method", "code")
RPC_S: Final = histogram(
    "casemate_rpc_duration_seconds",
    "Time from a request to its answer, of calls that do not stream, by method and gRPC's code.",
    "method",
    "code",
)
# --- who is connected ---
SESSIONS: Final = gauge("casemate_sessions", "Hosts whose stream is up.")
HELLOS: Final = counter("casemate_hellos_total", "Hosts that dialled, by what they were told.", "answer")
WATCHERS: Final = gauge("casemate_watchers", "Streams of changes that are watched, by kind of object.", "kind")
# --- the fleet ---
HOSTS: Final = gauge("casemate_hosts", "Hosts by phase.", "phase")
ENVIRONMENTS: Final = gauge("casemate_environments", "Environments by phase.", "phase")
INSTANCES: Final = gauge("casemate_instances", "Instances by phase.", "phase")
HOST_DRIFT: Final = gauge(
    "casemate_host_drift", "Differences between ledger and reality that connected hosts report, by kind.", "kind"
)
THREADS: Final = gauge(
    "casemate_capacity_threads", "Threads that may be given away, by what has become of them.", "state"
)
MEMORY: Final = gauge("casemate_capacity_memory_bytes", "Memory outside huge pages, by what has become of it.", "state")
GPUS: Final = gauge("casemate_capacity_gpus", "GPUs by what has become of them.", "state")
VFS: Final = gauge("casemate_capacity_vfs", "Virtual functions by what has become of them.", "state")
STRANDED_THREADS: Final = gauge(
    "casemate_stranded_threads", "Free threads that nobody can use well, by cause.", "cause"
)
STRANDED_MEMORY: Final = gauge(
    "casemate_stranded_memory_bytes", "Free memory that nobody can use well, by cause.", "cause"
)
STRANDED_PAGES: Final = gauge(
    "casemate_stranded_pages", "Free huge pages that nobody can use well, by cause and size.", "cause", "page_bytes"
)
STRANDED_GPUS: Final = gauge("casemate_stranded_gpus", "Free GPUs that nobody can use well, by cause.", "cause")
STRANDED_VFS: Final = gauge(
    "casemate_stranded_vfs", "Free virtual functions that nobody can use well, by cause.", "cause"
)
STRANDED_DEVICES: Final = gauge(
    "casemate_stranded_devices", "Other free PCI functions that nobody can use well, by cause.", "cause"
)

FAMILIES: Final[tuple[Family, ...]] = tuple(value for value in list(globals().values()) if isinstance(value, Family))


def count_command(meter: Meter, command: Command, error: CasemateError | None) -> None:
    """Count a command that was applied, or refused by ``error``."""
    outcome = "taken" if error is None else "failed" if isinstance(error, InternalError) else "refused"
    meter.add(COMMANDS, type(command).__name__, outcome)
    if isinstance(command, HostFacts) and error is None:
        meter.add(DELTAS)


def count_batch(meter: Meter, state: State, batch: Batch) -> None:
    """Count what a committed batch did. Call it before it is folded into ``state``: that tells new records from changed ones."""
    for change in batch.records:
        match change:
            case Put(PlacementRecord() as placement) if key_of(placement) not in state.placements:
                meter.add(PLACEMENTS)
            case Put(EventView(reason="PlacementRefused")):
                meter.add(REFUSED)
    for sighting in batch.sightings:
        if isinstance(sighting, Tried) and sighting.attempt is not None:
            meter.add(UNPLACED)
    match batch.answer:
        case Welcomed(resume=resume):
            meter.add(HELLOS, "resumed" if resume else "whole")
        case Turned():
            meter.add(HELLOS, "turned")
