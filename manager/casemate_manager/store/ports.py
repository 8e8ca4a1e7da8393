"""What the writer asks of a store: load, commit, look back. Owned by the manager; stores decide nothing.

A store keeps the fleet's records and their revisions for one leader at a time. Opening it makes the caller the leader:
the epoch is raised durably, and from then on commits of older epochs fail (fencing). Methods block; the writer calls
them on one thread of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from casemate_core.audit import AuditRecord
from casemate_core.errors import InternalError, MachineError
from casemate_manager.fleet.records import Record, RecordChange


class StoreFailed(MachineError):
    """A commit did not succeed, or whether it did is not known. The state must be loaded again."""

    reason = "StoreFailed"


class StoreFull(StoreFailed):
    """There is no room left; nothing was written."""

    reason = "StoreFull"


class Fenced(StoreFailed):
    """Another manager leads: a newer epoch is in the store."""

    reason = "Fenced"


class StoreDamaged(InternalError):
    """What is stored cannot be read as it was written."""

    reason = "StoreDamaged"


@dataclass(frozen=True, slots=True)
class Stored:
    """What was loaded: the epoch that the caller now leads, and every record but those of the audit chain."""

    epoch: int
    revision: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Transaction:
    """The record changes of one batch, and the revision after them."""

    revision: int
    changes: tuple[RecordChange, ...]


@dataclass(frozen=True, slots=True)
class Logged:
    """One line of the change log."""

    revision: int
    kind: str
    key: str
    dropped: bool


class Store(Protocol):
    """Records on disk."""

    def lead(self) -> Stored:
        """Raise the epoch and load everything. Raises StoreFailed, StoreFull, StoreDamaged."""
        ...

    def load(self) -> Stored:
        """Load everything without leading, for reading on while nothing can be written."""
        ...

    def commit(self, epoch: int, transactions: Sequence[Transaction]) -> None:
        """Make all of them durable, or none. Raises Fenced, StoreFull, StoreFailed."""
        ...

    def changes(self, after: int, limit: int) -> list[Logged] | None:
        """The log after a revision, oldest first; None where it does not go back so far."""
        ...

    def audit(self, after: int, limit: int) -> list[AuditRecord]:
        """Audit records after a sequence, in the order in which they are stored. Raises StoreDamaged."""
        ...

    def close(self) -> None: ...
