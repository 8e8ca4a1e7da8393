"""Who edits the store behind a stopped manager is found, by signatures and by what hosts have kept, whatever else he edits."""

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from casemate_core.audit import AuditRecord, Link, chained
from casemate_core.checkpoint import witnessed_from_json
from casemate_core.plain import from_plain, to_plain
from casemate_core.spec.access import FLEET
from casemate_manager.access import Principal
from casemate_manager.fleet.auditing import CHECKPOINTS_KEPT, last_checkpoint
from casemate_manager.fleet.commands import KeepCheckpoint
from casemate_manager.keyring import Keyring
from casemate_manager.notary import doubt_of
from casemate_manager.store.sqlite import SqliteStore
from casemate_wire.signing import Notary
from support.gatekeeping import House, bind, hosted, house

KEYS = Keyring(b"k" * 32)
PLAIN = {**os.environ, "CASEMATE_INSECURE_LOOPBACK": "1"}


async def root(context: Any) -> Principal:
    return Principal("admin", "certificate")


@asynccontextmanager
async def signing(path: Path, keyring: Keyring = KEYS) -> Any:
    async with house(store=SqliteStore(path), authenticate=root, keyring=keyring, sign_every_s=0.02) as found:
        yield found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(90):
        while not condition():
            await asyncio.sleep(0.01)


def kept(folder: Path, host: str = "h1") -> Any:
    path = folder / host / "ledger" / "witness.json"
    return witnessed_from_json(path.read_bytes()) if path.exists() else witnessed_from_json(b"{}")


async def verified(found: House, *more: str) -> tuple[int, str]:
    address = f"127.0.0.1:{found.manager.port}"
    command = [sys.executable, "-m", "casemate_cli", "--manager", address, "audit", "--verify", *more]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=100, env=PLAIN)
    return done.returncode, done.stdout + done.stderr


def head_is_kept(found: House, folder: Path, host: str = "h1") -> bool:
    said = kept(folder, host).kept
    return bool(said) and said[-1].link == found.manager.writer.state.audit


# --- what somebody does who has the store's file ----------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[list[AuditRecord]], list[AuditRecord]], *, checkpoints: bool) -> None:
    """Exchange the chain for another, whole in itself: digests, head and all. ``checkpoints``: forget what was signed too."""
    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT data FROM audit ORDER BY sequence").fetchall()
        records = change([from_plain(AuditRecord, json.loads(data)) for (data,) in rows])
        at = Link()
        db.execute("DELETE FROM audit")
        for record in records:
            record = chained(record, at)
            at = record.link
            plain = json.dumps(to_plain(record))
            db.execute("INSERT INTO audit VALUES (?, ?, ?)", (record.sequence, record.revision, plain))
        head = json.dumps({"name": "head", "sequence": at.sequence, "digest": at.digest})
        db.execute("UPDATE records SET data = ? WHERE kind = 'AuditHead'", (head,))
        if checkpoints:
            db.execute("DELETE FROM records WHERE kind = 'Checkpoint'")
    db.close()


def altered(records: list[AuditRecord]) -> list[AuditRecord]:
    return [replace(records[0], actor="nobody"), *records[1:]]


def dropped(records: list[AuditRecord]) -> list[AuditRecord]:
    return records[:1] + records[2:]


def reordered(records: list[AuditRecord]) -> list[AuditRecord]:
    return [records[1], records[0], *records[2:]]


def cut_off(records: list[AuditRecord]) -> list[AuditRecord]:
    return records[:-2]


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("change", [altered, dropped, reordered, cut_off])
async def test_a_chain_that_was_made_anew_behind_a_stopped_manager_is_found(
    tmp_path: Path, change: Callable[[list[AuditRecord]], list[AuditRecord]], checkpoints: bool
) -> None:
    path = tmp_path / "f.db"
    async with signing(path) as found, hosted(found, tmp_path, "h1"):
        for number in range(4):
            await found.put(bind(f"v{number}", "viewer", FLEET, "vic"))
        await until(lambda: head_is_kept(found, tmp_path))
        evidence = kept(tmp_path)
    rewritten(path, change, checkpoints=checkpoints)
    async with signing(path) as found, hosted(found, tmp_path, "h1"):
        if checkpoints:
            # A manager that knows of no signature signs what it finds; the host's copy is what tells.
            await until(lambda: last_checkpoint(found.manager.writer.state) is not None)
        code, told = await verified(found)
        assert code == 1 and "broken: host h1 has" in told, told
        assert ("broken: the manager has" in told) == (not checkpoints), told
        assert kept(tmp_path).kept[: len(evidence.kept)] == evidence.kept
        if change is cut_off and checkpoints:
            await until(lambda: bool(kept(tmp_path).breaks))


async def test_a_chain_that_went_back_is_an_event_and_a_condition_of_the_host(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    async with signing(path) as found, hosted(found, tmp_path, "h1"):
        for number in range(8):
            await found.put(bind(f"v{number}", "viewer", FLEET, "vic"))
        await until(lambda: head_is_kept(found, tmp_path))
    rewritten(path, lambda records: records[:2], checkpoints=True)
    async with signing(path) as found, hosted(found, tmp_path, "h1"):
        state, observed = found.manager.writer.state, found.manager.writer.observed

        def conditions() -> list[Any]:
            report = observed.host("h1").report
            return [c for c in report.conditions if c.type == "AuditChain"] if report else []

        await until(lambda: bool(conditions()))
        assert conditions()[0].status == "False" and "went back from record" in conditions()[0].message
        await until(lambda: any(e.reason == "AuditChainBroken" for e in state.events.values()))
        code, told = await verified(found)
        assert code == 1 and "host h1 wrote down: the audit chain went back" in told
    agent = [sys.executable, "-m", "casemate_agent", "witness", "--state-dir", str(tmp_path / "h1")]
    shown = await asyncio.to_thread(subprocess.run, agent, capture_output=True, text=True, timeout=100)
    assert shown.returncode == 1 and "doubtful: the audit chain went back" in shown.stdout
    done = await asyncio.to_thread(subprocess.run, [*agent, "--accept"], capture_output=True, timeout=100)
    assert done.returncode == 0
    assert not kept(tmp_path).kept and list((tmp_path / "h1" / "ledger").glob("witness-*.json"))


async def test_a_whole_chain_is_signed_and_witnessed_and_its_key_can_be_demanded(tmp_path: Path) -> None:
    async with signing(tmp_path / "f.db") as found, hosted(found, tmp_path, "h1", "h2"):
        await until(lambda: all(head_is_kept(found, tmp_path, host) for host in ("h1", "h2")))
        code, told = await verified(found)
        key = Notary(KEYS.key("audit-checkpoints")).public
        assert code == 0 and f"by key {key}" in told and "witnessed: by 2 of 2 hosts" in told, told
        assert (await verified(found, "--key", key))[0] == 0
        assert (await verified(found, "--key", "00" * 32))[0] == 1
        assert (tmp_path / "h1" / "ledger" / "witness.json").stat().st_mode & 0o777 == 0o600
    # The store's file alone, under a manager with another key: neither it nor the host believes the other.
    async with signing(tmp_path / "f.db", Keyring(b"o" * 32)) as found, hosted(found, tmp_path, "h1"):
        doubt = await doubt_of(found.manager.writer, Notary(Keyring(b"o" * 32).key("audit-checkpoints")))
        assert "signed by another key" in doubt
        code, told = await verified(found)
        assert code == 1 and "signed by another key" in told


async def test_hosts_that_do_not_answer_are_named_and_are_no_break(tmp_path: Path) -> None:
    async with signing(tmp_path / "f.db") as found:
        async with hosted(found, tmp_path, "h1"):
            await until(lambda: head_is_kept(found, tmp_path))
        await until(lambda: len(found.manager.sessions) == 0)
        code, told = await verified(found)
        assert code == 0 and "witnessed: by 0 of 1 hosts" in told
        assert "host h1 does not say what it keeps: the host is not connected" in told


async def test_the_store_keeps_the_last_signed_places(tmp_path: Path) -> None:
    notary = Notary(b"n" * 32)
    async with house(store=SqliteStore(tmp_path / "f.db")) as found:
        writer = found.manager.writer
        for number in range(1, CHECKPOINTS_KEPT + 10):
            while writer.state.audit.sequence < number:
                await found.put(bind(f"v{number}", "viewer", FLEET, "vic"))
            await writer.submit(KeepCheckpoint(notary.sign(writer.state.audit, 1.0)))
        assert len(writer.state.checkpoints) == CHECKPOINTS_KEPT
        newest = last_checkpoint(writer.state)
        assert newest is not None and newest.link == writer.state.audit
        sequence = writer.state.audit.sequence
        await writer.submit(KeepCheckpoint(newest))  # told again
        assert writer.state.audit.sequence == sequence and len(writer.state.checkpoints) == CHECKPOINTS_KEPT
    async with house(store=SqliteStore(tmp_path / "f.db")) as found:
        state = found.manager.writer.state
        assert list(state.checkpoints) == sorted(state.checkpoints) and len(state.checkpoints) == CHECKPOINTS_KEPT
