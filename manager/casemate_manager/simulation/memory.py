"""A store in memory that keeps to the port's rules: what a simulation of many placements stands on, where disks would rule it.

May live here: that store. It outlives the managers that lead it, as a file would; nothing outlives the process.
"""

from collections.abc import Sequence

from casemate_core.audit import AuditRecord
from casemate_manager.fleet.records import Put, Record, key_of, kind_of
from casemate_manager.store.ports import Fenced, Logged, Stored, StoreFailed, Transaction


class MemoryStore:
    """See `casemate_manager.store.ports.Store`. Keeps no log: whoever asks for it is told that it does not go back."""

    def __init__(self) -> None:
        self._epoch = self._revision = 0
        self._records: dict[tuple[str, str], Record] = {}

    def lead(self) -> Stored:
        """See `Store`."""
        self._epoch += 1
        return self.load()

    def load(self) -> Stored:
        """See `Store`. In the order of a file's: by kind and key."""
        return Stored(
            self._epoch, self._revision, tuple(self._records[key] for key in sorted(self._records) if key[0] != "Audit")
        )

    def commit(self, epoch: int, transactions: Sequence[Transaction]) -> None:
        """See `Store`."""
        if epoch != self._epoch:
            raise Fenced(f"the store is led by epoch {self._epoch}; this manager's is {epoch}")
        revisions = [transaction.revision for transaction in transactions]
        if revisions != list(range(self._revision + 1, self._revision + 1 + len(revisions))):
            raise StoreFailed(f"revisions {revisions[:3]} do not follow {self._revision}")
        for transaction in transactions:
            for change in transaction.changes:
                if isinstance(change, Put):
                    self._records[kind_of(change.record), key_of(change.record)] = change.record
                elif change.kind == "Audit":
                    for key in [k for k in self._records if k[0] == "Audit" and k[1] <= change.key]:
                        del self._records[key]
                else:
                    self._records.pop((change.kind, change.key), None)
            self._revision = transaction.revision

    def changes(self, after: int, limit: int) -> list[Logged] | None:
        """See `Store`."""
        return [] if after == self._revision else None

    def audit(self, after: int, limit: int) -> list[AuditRecord]:
        """See `Store`."""
        found = sorted(
            (r for r in self._records.values() if isinstance(r, AuditRecord) and r.sequence > after),
            key=lambda r: r.sequence,
        )
        return found[:limit]

    def close(self) -> None:
        """See `Store`."""
