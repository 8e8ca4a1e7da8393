"""The store: what was acknowledged is there after a kill, one leader writes, a full disk refuses and reads on."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from casemate_core.spec.meta import Meta
from casemate_core.spec.views import EventView, ObjectRef
from casemate_manager.fleet.records import Drop, Put, Record, RequestRecord, key_of, kind_of
from casemate_manager.store.ports import Fenced, StoreDamaged, StoreFailed, StoreFull, Transaction
from casemate_manager.store.sqlite import SqliteStore
from support.small_fleet import SmallFleet, environment, image, network


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fleet.db"


def event(name: str) -> EventView:
    return EventView(Meta(name), ObjectRef("Host", "h"), "Test", "x")


def by_key(records: tuple[Record, ...]) -> dict[tuple[str, str], Record]:
    return {(kind_of(r), key_of(r)): r for r in records}


def test_every_kind_of_record_comes_back_as_it_was(path: Path) -> None:
    fleet = SmallFleet()
    fleet.apply(image(), network())
    fleet.join("h1", line="2s 8k/c 2t 64G 1G=4 gpu=2xH200:141G disk=1T")
    fleet.apply(environment(replicas=2, user_data="#!/bin/sh\n", pods=()))
    fleet.obey("h1")
    fleet.apply(environment(replicas=2, cpus=2))
    tables = ("environments", "specs", "instances", "placements", "hosts", "inventories", "requests", "images")
    records = [r for t in (*tables, "networks", "events") for r in getattr(fleet.state, t).values()]
    assert {kind_of(r) for r in records} >= {"Environment", "Revision", "Instance", "Placement", "Inventory", "Request"}
    store = SqliteStore(path)
    epoch = store.lead().epoch
    store.commit(epoch, [Transaction(1, tuple(Put(r) for r in records))])
    store.close()
    again = SqliteStore(path)
    stored = again.lead()
    again.close()
    assert (stored.epoch, stored.revision) == (epoch + 1, 1)
    assert by_key(stored.records) == by_key(tuple(records))


def test_drop_and_replace(path: Path) -> None:
    store = SqliteStore(path)
    epoch = store.lead().epoch
    store.commit(epoch, [Transaction(1, (Put(event("a")), Put(event("b")))), Transaction(2, (Drop("Event", "a"),))])
    assert [key_of(r) for r in store.load().records] == ["b"]
    store.close()


def test_the_change_log_tells_what_came_after_a_revision(path: Path) -> None:
    store = SqliteStore(path)
    epoch = store.lead().epoch
    for revision in range(1, 4):
        store.commit(epoch, [Transaction(revision, (Put(event(str(revision))),))])
    store.commit(epoch, [Transaction(4, (Drop("Event", "1"),))])
    assert [(c.revision, c.key, c.dropped) for c in store.changes(2, 10) or ()] == [(3, "3", False), (4, "1", True)]
    assert store.changes(4, 10) == []
    assert store.changes(5, 10) is None
    store.close()


def test_the_change_log_is_bounded_and_says_where_it_begins(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casemate_manager.store.sqlite.LOG_KEPT", 5)
    monkeypatch.setattr("casemate_manager.store.sqlite.LOG_CUT_EVERY", 10)
    store = SqliteStore(path)
    epoch = store.lead().epoch
    for revision in range(1, 11):
        store.commit(epoch, [Transaction(revision, (Put(event(str(revision))),))])
    assert store.changes(3, 10) is None
    assert len(store.changes(5, 10) or ()) == 5
    store.close()


def test_an_older_leader_is_fenced(path: Path) -> None:
    old, new = SqliteStore(path), SqliteStore(path)
    first = old.lead().epoch
    new.lead()
    with pytest.raises(Fenced):
        old.commit(first, [Transaction(1, (Put(event("a")),))])
    assert new.load().records == ()
    old.close()
    new.close()


def test_a_gap_in_revisions_is_refused_whole(path: Path) -> None:
    store = SqliteStore(path)
    epoch = store.lead().epoch
    with pytest.raises(StoreFailed):
        store.commit(epoch, [Transaction(1, (Put(event("a")),)), Transaction(3, (Put(event("b")),))])
    assert store.load().records == ()
    store.close()


def test_a_full_disk_refuses_writes_whole_and_reads_go_on(path: Path) -> None:
    store = SqliteStore(path)
    epoch = store.lead().epoch
    store.commit(epoch, [Transaction(1, (Put(event("a")),))])
    # SQLite's own limit on the file stands for the disk's: the error is the same one.
    assert store._db is not None
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")
    big = tuple(Put(RequestRecord(str(n), "x" * 5000, 0.0)) for n in range(100))
    with pytest.raises(StoreFull):
        store.commit(epoch, [Transaction(2, big)])
    assert [key_of(r) for r in store.load().records] == ["a"]
    store.commit(epoch, [Transaction(2, (Put(event("b")),))])
    store.close()


def test_a_damaged_file_is_said_and_not_served(path: Path) -> None:
    store = SqliteStore(path)
    epoch = store.lead().epoch
    store.commit(epoch, [Transaction(1, tuple(Put(event(f"{n:04}")) for n in range(500)))])
    store.close()
    data = bytearray(path.read_bytes())
    for offset in range(4096 * 3, len(data), 97):
        data[offset] ^= 0xFF
    path.write_bytes(data)
    damaged = SqliteStore(path)
    with pytest.raises(StoreDamaged):
        damaged.lead()
    damaged.close()


def test_a_record_of_no_known_shape_is_named(path: Path) -> None:
    store = SqliteStore(path)
    store.lead()
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO records VALUES ('Event', 'odd', 1, '{}')")
    db.close()
    again = SqliteStore(path)
    with pytest.raises(StoreDamaged, match="Event odd"):
        again.lead()
    again.close()


def test_the_file_is_for_its_owner_only(path: Path) -> None:
    store = SqliteStore(path)
    store.lead()
    store.close()
    assert path.stat().st_mode & 0o077 == 0


WRITER = """
import sys
from pathlib import Path
from casemate_core.spec.meta import Meta
from casemate_core.spec.views import EventView, ObjectRef
from casemate_manager.fleet.records import Put
from casemate_manager.store.ports import Transaction
from casemate_manager.store.sqlite import SqliteStore

store = SqliteStore(Path(sys.argv[1]))
stored = store.lead()
revision = stored.revision
print("ready", flush=True)
while True:
    group = [Transaction(revision + i, (Put(EventView(Meta(str(revision + i)), ObjectRef("Host", "h"), "T", "x" * 300)),))
             for i in range(1, 4)]
    store.commit(stored.epoch, group)
    revision += 3
    print(revision, flush=True)
"""


def test_what_was_acknowledged_is_there_after_a_kill_at_any_instant(path: Path) -> None:
    seed = random.Random(7)
    acknowledged = 0
    for _ in range(5):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(seed.uniform(0.01, 0.25))
        os.kill(child.pid, signal.SIGKILL)
        lines = child.stdout.read().split()
        child.wait()
        child.stdout.close()
        # The last line may have been cut while it was written.
        acknowledged = max([acknowledged, *(int(line) for line in lines[:-1])])
        store = SqliteStore(path)
        stored = store.lead()
        store.close()
        assert stored.revision >= acknowledged
        assert stored.revision % 3 == 0, "a group is there whole or not at all"
        assert len(stored.records) == stored.revision
    assert acknowledged > 0
