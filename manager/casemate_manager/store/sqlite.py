"""The fleet's records in one SQLite file.

Theory of operation. One connection, used by the writer's thread only. WAL with synchronous=FULL: a commit returns after
its fsync, so what was acknowledged survives the power going (SQLite documentation, "PRAGMA synchronous"). Several batches
are one transaction: the fsync is shared by all that waited for it. The transaction begins by reading the epoch under the
write lock, which fences a manager that was replaced. Records are JSON by their type hints; a column says their revision.
The change log holds the last `LOG_KEPT` lines.

The schema is changed by migrations (sqlite-utils), each in a transaction with the note that it was applied.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sqlite_utils import Database, Migrations

from casemate_core.audit import AuditRecord
from casemate_core.plain import BadPlain, from_plain, to_plain
from casemate_manager.fleet.records import KINDS, Drop, Put, Record, key_of, kind_of
from casemate_manager.store.ports import (
    Fenced,
    Logged,
    Stored,
    StoreDamaged,
    StoreFailed,
    StoreFull,
    Transaction,
)

#: Lines of the change log that are kept.
LOG_KEPT = 100_000
#: The log is cut once in so many revisions.
LOG_CUT_EVERY = 1000

migrations = Migrations("casemate_manager")


@migrations()
def m001_records(db: Database) -> None:
    """Records by kind and key, the change log, and one row of bookkeeping."""
    db.execute(
        "CREATE TABLE records (kind TEXT NOT NULL, key TEXT NOT NULL, revision INTEGER NOT NULL, data TEXT NOT NULL,"
        " PRIMARY KEY (kind, key)) WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE changes (revision INTEGER NOT NULL, line INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL,"
        " dropped INTEGER NOT NULL, PRIMARY KEY (revision, line)) WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE leader (one INTEGER PRIMARY KEY CHECK (one = 1), epoch INTEGER NOT NULL, revision INTEGER NOT NULL)"
    )
    db.execute("INSERT INTO leader VALUES (1, 0, 0)")


@migrations()
def m002_audit(db: Database) -> None:
    """The audit chain in a table of its own: it is read in parts, and never held in memory."""
    db.execute("CREATE TABLE audit (sequence INTEGER PRIMARY KEY, revision INTEGER NOT NULL, data TEXT NOT NULL)")


@contextmanager
def _translated() -> Iterator[None]:
    """SQLite's errors as the port's."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY):
            raise StoreFull(f"the store cannot be written: {error}") from error
        raise StoreFailed(f"the store failed: {error}") from error
    except sqlite3.DatabaseError as error:
        raise StoreDamaged(f"the store's file is damaged: {error}") from error


class SqliteStore:
    """Records in the file ``path``, made where it is missing (mode 0600: records carry what users gave in confidence)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None

    def _connect(self) -> sqlite3.Connection:
        if self._db is None:
            self._path.touch(mode=0o600)
            with _translated():
                db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=5.0)
                try:
                    db.execute("PRAGMA journal_mode=WAL")
                    db.execute("PRAGMA synchronous=FULL")
                    db.execute("PRAGMA foreign_keys=ON")
                    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
                    if found != "ok":
                        raise StoreDamaged(f"{self._path}: {found}")
                    migrations.apply(Database(db))
                except BaseException:
                    db.close()
                    raise
            self._db = db
        return self._db

    def lead(self) -> Stored:
        """See `Store`."""
        db = self._connect()
        with self._transaction(db):
            db.execute("UPDATE leader SET epoch = epoch + 1")
        return self.load()

    def load(self) -> Stored:
        """See `Store`."""
        db = self._connect()
        with _translated():
            db.execute("BEGIN")
            try:
                epoch, revision = db.execute("SELECT epoch, revision FROM leader").fetchone()
                rows = db.execute("SELECT kind, key, data FROM records").fetchall()
            finally:
                db.execute("ROLLBACK")
        return Stored(epoch, revision, tuple(_decode(*row) for row in rows))

    def commit(self, epoch: int, transactions: Sequence[Transaction]) -> None:
        """See `Store`."""
        db = self._connect()
        with self._transaction(db):
            leader, revision = db.execute("SELECT epoch, revision FROM leader").fetchone()
            if leader != epoch:
                raise Fenced(f"the store is led by epoch {leader}; this manager's is {epoch}")
            for transaction in transactions:
                if transaction.revision != revision + 1:
                    raise StoreFailed(f"revision {transaction.revision} does not follow {revision}")
                revision = transaction.revision
            self._write(db, transactions)
            db.execute("UPDATE leader SET revision = ?", (revision,))
            if transactions and revision // LOG_CUT_EVERY != (transactions[0].revision - 1) // LOG_CUT_EVERY:
                lines = "SELECT revision FROM changes ORDER BY revision DESC, line DESC LIMIT 1 OFFSET ?"
                db.execute(f"DELETE FROM changes WHERE revision <= ({lines})", (LOG_KEPT,))

    def _write(self, db: sqlite3.Connection, transactions: Sequence[Transaction]) -> None:
        """All of them at once: of a record that several change, only what is left in the end is written."""
        rows: dict[tuple[str, str], tuple[str, str, int, str] | None] = {}
        log: list[tuple[int, int, str, str, bool]] = []
        audit: list[tuple[int, int, str]] = []
        forgotten = -1
        for transaction in transactions:
            for line, change in enumerate(transaction.changes):
                if isinstance(change, Put):
                    kind, key = kind_of(change.record), key_of(change.record)
                    if isinstance(change.record, AuditRecord):
                        audit.append((change.record.sequence, transaction.revision, _encode(change.record)))
                        continue
                    rows[kind, key] = (kind, key, transaction.revision, _encode(change.record))
                else:
                    kind, key = change.kind, change.key
                    if kind == "Audit":  # retention: this one and all before it
                        forgotten = max(forgotten, int(key))
                        continue
                    rows[kind, key] = None
                log.append((transaction.revision, line, kind, key, isinstance(change, Drop)))
        db.executemany("DELETE FROM records WHERE kind = ? AND key = ?", [k for k, row in rows.items() if row is None])
        db.executemany(
            "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", [r for r in rows.values() if r is not None]
        )
        db.executemany("INSERT INTO audit VALUES (?, ?, ?)", audit)
        if forgotten >= 0:
            db.execute("DELETE FROM audit WHERE sequence <= ?", (forgotten,))
        db.executemany("INSERT INTO changes VALUES (?, ?, ?, ?, ?)", log)

    def changes(self, after: int, limit: int) -> list[Logged] | None:
        """See `Store`."""
        db = self._connect()
        with _translated():
            oldest, newest = db.execute(
                "SELECT (SELECT min(revision) FROM changes), (SELECT revision FROM leader)"
            ).fetchone()
            if after > newest or (after < newest and (oldest is None or after < oldest - 1)):
                return None
            rows = db.execute(
                "SELECT revision, kind, key, dropped FROM changes WHERE revision > ? ORDER BY revision, line LIMIT ?",
                (after, limit),
            ).fetchall()
        return [Logged(revision, kind, key, bool(dropped)) for revision, kind, key, dropped in rows]

    def audit(self, after: int, limit: int) -> list[AuditRecord]:
        """See `Store`."""
        db = self._connect()
        with _translated():
            rows = db.execute(
                "SELECT sequence, data FROM audit WHERE sequence > ? ORDER BY sequence LIMIT ?", (after, limit)
            ).fetchall()
        records = []
        for sequence, data in rows:
            record = _decode("Audit", str(sequence), data)
            if not isinstance(record, AuditRecord):
                raise StoreDamaged(f"audit record {sequence} is a {type(record).__name__}")
            records.append(record)
        return records

    @contextmanager
    def _transaction(self, db: sqlite3.Connection) -> Iterator[None]:
        with _translated():
            try:
                db.execute("BEGIN IMMEDIATE")
                yield
                db.execute("COMMIT")
            except BaseException:
                # Whether a failed COMMIT was durable only the file knows: the next use opens it again.
                self._drop_connection()
                raise

    def _drop_connection(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def close(self) -> None:
        """See `Store`. Folds the write-ahead log into the file."""
        self._drop_connection()


def _encode(record: Record) -> str:
    return json.dumps(to_plain(record), separators=(",", ":"), ensure_ascii=False)


def _decode(kind: str, key: str, data: str) -> Record:
    try:
        record: Record = from_plain(KINDS[kind], json.loads(data), ignore_unknown=True)
    except (KeyError, ValueError, BadPlain) as error:
        raise StoreDamaged(f"record {kind} {key} cannot be read: {error}") from error
    return record
