"""No change without its audit record, in the same commit; denied attempts and sessions are written down; nothing is lost."""

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import grpc
import pytest

from casemate_core.audit import AuditRecord, Link, verify
from casemate_core.errors import Unavailable
from casemate_core.spec.access import FLEET, Scope
from casemate_manager.access import Principal
from casemate_manager.fleet import auditing
from casemate_manager.fleet.acts import Actor, By
from casemate_manager.fleet.commands import (
    ApplyResources,
    Command,
    DeleteResource,
    Expire,
    HostFacts,
    NoteAct,
)
from casemate_manager.fleet.machine import apply
from casemate_manager.fleet.records import Put
from casemate_manager.store.ports import StoreFull, Transaction
from casemate_manager.store.sqlite import SqliteStore
from casemate_wire.codec.audit import link_from_message, record_from_message, record_to_message
from casemate_wire.stream import Facts, HostReport
from casemate_wire.v1 import audit_pb2, audit_pb2_grpc
from casemate_wire.v1 import operators_pb2 as pb
from support.gatekeeping import House, as_user, bind, house
from support.small_fleet import SmallFleet, environment, image, network

#: The command line speaks plain text only when it is told to.
PLAIN = {**os.environ, "CASEMATE_INSECURE_LOOPBACK": "1"}
ANN = Actor(Principal("ann", "certificate"), "ipv4:10.0.0.9:4711", "casemate/1", "req-1")


def records(batch: Any) -> list[AuditRecord]:
    return [c.record for c in batch.records if isinstance(c, Put) and isinstance(c.record, AuditRecord)]


def batch_of(made: SmallFleet, command: Command | By) -> Any:
    return made.fold(apply(made.state, made.observed, command, made.now_s, made.rules))


def test_every_command_is_audited_or_follows_from_others_by_name() -> None:
    """A new command is audited unless somebody adds it to FOLLOWS, which is read here."""
    follows = {c.__name__ for c in auditing.FOLLOWS}
    assert follows == {
        "HostHello",
        "HostInventory",
        "HostFacts",
        "HostNote",
        "HostGone",
        "Advance",
        "Expire",
        "KeepCheckpoint",
    }
    assert follows < {c.__name__ for c in get_args(Command)}


def test_a_change_and_its_record_are_one_batch_and_say_who_and_what_but_no_values() -> None:
    made = SmallFleet()
    root = Actor(Principal("admin", "certificate"), ANN.address, ANN.client, ANN.request)
    made.rules = type(made.rules)(made.rules.objects, made.rules.placer, frozenset({"admin"}))
    made.apply(image(), network())
    batch = batch_of(made, By(root, ApplyResources("k1", (environment("a", user_data="#!/bin/sh\npassword"),), "s")))
    (record,) = records(batch)
    assert (record.actor, record.how, record.address, record.client, record.request) == (
        "admin",
        "certificate",
        "ipv4:10.0.0.9:4711",
        "casemate/1",
        "req-1",
    )
    assert (record.act, record.outcome, record.targets) == ("apply", "done", ("environment/default/a created",))
    assert record.revision == batch.revision and record.tenants == ("default",)
    batch = batch_of(
        made, By(root, ApplyResources("k2", (environment("a", user_data="#!/bin/sh\npassword", memory_mib=1024),), "s"))
    )
    (record,) = records(batch)
    assert record.targets == ("environment/default/a changed",) and record.detail == "spec.memory.size"
    batch = batch_of(made, By(root, DeleteResource("k3", "Environment", "default", "a")))
    assert records(batch)[0].targets == ("environment/default/a",)
    assert "password" not in str([records(b) for b in (batch,)])


def test_what_changes_nothing_has_no_record() -> None:
    made = SmallFleet()
    made.apply(image(), network())
    again = ApplyResources("same", (environment("a"),), "s")
    assert records(batch_of(made, again))
    assert not records(batch_of(made, again))
    assert not records(batch_of(made, ApplyResources("dry", (environment("b"),), "s", dry_run=True)))


def test_the_chain_runs_on_through_every_command_and_a_reload() -> None:
    made = SmallFleet()
    chain: list[AuditRecord] = []
    fold = made.fold

    def folding(batch: Any) -> Any:
        chain.extend(records(batch))
        return fold(batch)

    made.fold = folding  # type: ignore[method-assign]
    made.apply(image(), network())
    made.join("h1")
    for n in range(5):
        made.apply(environment(f"e{n}"))
    made.delete("Environment", "e1")
    made.do(NoteAct("denied", "denied", ("x",)))
    assert [r.act for r in chain] == ["apply"] * 6 + ["delete", "denied"]
    assert verify(chain, Link(), made.state.audit) == []


def test_drift_that_a_host_finds_and_repairs_is_written_with_the_facts() -> None:
    made = SmallFleet()
    made.join("h1")

    def facts(*drift: str) -> list[AuditRecord]:
        return records(batch_of(made, HostFacts("h1", 1, Facts(2, False, (), (), HostReport(drift=drift)))))

    (found,) = facts("GuardMissing: u1: 0 of 1 taps have their rules")
    assert (found.actor, found.act, found.outcome) == ("host/h1", "drift", "found")
    assert "GuardMissing: u1" in found.detail
    assert facts("GuardMissing: u1: 0 of 1 taps have their rules") == []
    (gone,) = facts()
    assert gone.outcome == "repaired" and "gone: GuardMissing" in gone.detail


def test_retention_cuts_at_marks_and_what_is_kept_verifies_from_there() -> None:
    made = SmallFleet()
    kept: dict[int, AuditRecord] = {}
    fold = made.fold

    def folding(batch: Any) -> Any:
        kept.update({r.sequence: r for r in records(batch)})
        for change in batch.records:
            if not isinstance(change, Put) and change.kind == "Audit":
                for sequence in [s for s in kept if s <= int(change.key)]:
                    del kept[sequence]
        return fold(batch)

    made.fold = folding  # type: ignore[method-assign]
    for day in range(10):
        for n in range(3):
            made.do(NoteAct("denied", "denied", (f"{day}-{n}",)))
        made.now_s += auditing.DAY_S
    made.now_s += auditing.KEPT_S - 5 * auditing.DAY_S
    made.do(Expire())
    assert 0 < len(kept) < 30 and min(kept) > 1
    assert verify([kept[s] for s in sorted(kept)], auditing.begin_of(made.state), made.state.audit) == []
    assert all(mark.sequence > auditing.begin_of(made.state).sequence for mark in made.state.audit_marks)


# --- in the store -----------------------------------------------------------------------------------------------------


class Full(SqliteStore):
    """The real store, on a disk that is full when it is told to be."""

    full = False

    def lead(self) -> Any:
        if self.full:
            raise StoreFull("no room")
        return super().lead()

    def commit(self, epoch: int, transactions: Sequence[Transaction]) -> None:
        if self.full:
            raise StoreFull("no room")
        super().commit(epoch, transactions)


async def listed(found: House, user: str = "root", **request: Any) -> list[AuditRecord]:
    stub = audit_pb2_grpc.AuditStub(found.channel)
    call = stub.Records(audit_pb2.AuditRequest(**request), metadata=as_user(user), timeout=60)
    return [record_from_message(message) async for message in call]


async def ends(found: House) -> tuple[Link, Link]:
    stub = audit_pb2_grpc.AuditStub(found.channel)
    answer = await stub.Ends(audit_pb2.AuditEndsRequest(), metadata=as_user("root"))
    return link_from_message(answer.begin), link_from_message(answer.head)


async def test_an_auditor_reads_filters_and_verifies_over_the_wire(tmp_path: Path) -> None:
    async with house(store=SqliteStore(tmp_path / "f.db")) as found:
        await found.put(bind("v", "viewer", Scope("own"), "vic"), bind("a", "tenant-admin", Scope("own"), "ann"))
        request = pb.DeleteRequest(request_key="d1", kind="Environment", tenant="own", name="hello")
        with pytest.raises(grpc.aio.AioRpcError):
            await found.stub.Delete(request, metadata=as_user("vic", x_request_id="rq-7", user_agent="evil/1"))
        await found.stub.Delete(request, metadata=as_user("ann"))
        everything = await listed(found)
        begin, head = await ends(found)
        assert verify(everything, begin, head) == []
        (denied,) = await listed(found, act="denied")
        assert (denied.actor, denied.request, denied.outcome) == ("vic", "rq-7", "denied")
        assert denied.address.startswith("ipv4:127.0.0.1") and "grpc" in denied.client
        (deleted,) = await listed(found, actor="ann")
        assert deleted.targets == ("environment/own/hello",)
        assert await listed(found, target="environment/own/hello", act="delete") == [deleted]
        assert await listed(found, last=1) == everything[-1:]
        assert [r.sequence for r in await listed(found, after=everything[-2].sequence)] == [everything[-1].sequence]


async def test_a_tenants_admin_reads_the_audit_of_his_tenant_and_no_more(tmp_path: Path) -> None:
    async with house(store=SqliteStore(tmp_path / "f.db")) as found:
        await found.put(bind("a", "tenant-admin", Scope("own"), "ann"), bind("v", "viewer", Scope("own"), "vic"))
        for tenant in ("own", "foreign"):
            request = pb.DeleteRequest(request_key=f"d-{tenant}", kind="Environment", tenant=tenant, name="hello")
            await found.stub.Delete(request, metadata=as_user("root"))
        assert {r.tenants for r in await listed(found, "ann")} == {("own",)}
        for who in ("vic", "nobody"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await listed(found, who)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.aio.AioRpcError):
            await listed(found, "ann", tenant="foreign")


async def test_following_shows_records_as_they_are_written(tmp_path: Path) -> None:
    async with house(store=SqliteStore(tmp_path / "f.db")) as found:
        stub = audit_pb2_grpc.AuditStub(found.channel)
        request = audit_pb2.AuditRequest(follow=True, act="delete")
        call = stub.Records(request, metadata=as_user("root"), timeout=60)
        reading = asyncio.create_task(call.read())
        await found.stub.Delete(
            pb.DeleteRequest(request_key="d", kind="Environment", tenant="own", name="hello"), metadata=as_user("root")
        )
        assert (await reading).targets == ["environment/own/hello"]
        call.cancel()


async def test_a_command_in_a_guest_is_written_down_before_it_runs_and_not_run_where_it_cannot_be(
    tmp_path: Path,
) -> None:
    store = Full(tmp_path / "f.db")
    async with house(store=store) as found:
        writer = found.manager.writer
        seen: list[tuple[str, int]] = []

        async def opening(*args: Any) -> Any:
            seen.append(("open", writer.state.audit.sequence))
            raise Unavailable("no host")

        from casemate_manager.api import side
        from casemate_manager.api.audits import Scribe, SessionScribe

        class Opener:
            open = staticmethod(opening)

        log = SessionScribe(Scribe(writer), ANN, "0123456789ab")
        record = next(iter(writer.state.instances.values()))
        before = writer.state.audit.sequence
        with pytest.raises(Unavailable, match="no host"):
            await side.opened(Opener(), log, "h1", "exec", record, {}, "sh")
        assert seen == [("open", before + 1)]
        last = (await listed(found))[-2:]
        assert [(r.act, r.outcome, r.detail) for r in last] == [
            ("exec", "done", "sh; ticket 0123456789ab"),
            ("exec", "ended", "did not open"),
        ]
        store.full = True
        with pytest.raises(Unavailable):
            await side.opened(Opener(), log, "h1", "exec", record, {}, "sh")
        assert len(seen) == 1
        store.full = False
        while not writer.leading:
            await asyncio.sleep(0.01)


async def test_on_a_full_disk_changes_are_refused_and_reads_go_on(tmp_path: Path) -> None:
    store = Full(tmp_path / "f.db")
    async with house(store=store) as found:
        store.full = True
        request = pb.DeleteRequest(request_key="d", kind="Environment", tenant="own", name="hello")
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await found.stub.Delete(request, metadata=as_user("root"))
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        got = await found.stub.Get(
            pb.GetRequest(kind="Environment", tenant="own", name="hello"), metadata=as_user("root")
        )
        assert not got.environment.metadata.HasField("deleting")
        with pytest.raises(grpc.aio.AioRpcError) as denied:
            await found.stub.Delete(request, metadata=as_user("nobody"))
        assert denied.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)
        count = len(await listed(found))
        store.full = False
        while not found.manager.writer.leading:
            await asyncio.sleep(0.01)
        await found.stub.Delete(request, metadata=as_user("root"))
        begin, head = await ends(found)
        everything = await listed(found)
        assert len(everything) == count + 1 and verify(everything, begin, head) == []


def _tampered(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as db:
        for statement in statements:
            db.execute(statement)
    db.close()


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM audit WHERE sequence = 2",
        "DELETE FROM audit WHERE sequence = (SELECT max(sequence) FROM audit)",
        "DELETE FROM audit WHERE sequence = 1",
        "UPDATE audit SET data = replace(data, '\"manager\"', '\"nobody\"') WHERE sequence = 2",
        "UPDATE audit SET data = replace(data, 'created', 'changed') WHERE sequence = 1",
    ],
)
async def test_who_writes_into_the_stores_file_is_found(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "f.db"
    async with house(store=SqliteStore(path)) as found:
        await found.put(bind("v", "viewer", FLEET, "vic"))
    _tampered(path, statement)
    async with house(store=SqliteStore(path)) as found:
        begin, head = await ends(found)
        assert verify(await listed(found), begin, head)


async def test_the_command_line_verifies_and_exports(tmp_path: Path) -> None:
    async with house(store=SqliteStore(tmp_path / "f.db"), authenticate=_root) as found:

        def casemate(*arguments: str) -> "subprocess.CompletedProcess[str]":
            address = f"127.0.0.1:{found.manager.port}"
            command = [sys.executable, "-m", "casemate_cli", "--manager", address, "audit", *arguments]
            return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=PLAIN)

        whole = await asyncio.to_thread(casemate, "--verify")
        assert whole.returncode == 0 and whole.stdout.startswith("whole: "), whole.stderr
        noted = whole.stdout.split()[-1]
        exported = await asyncio.to_thread(casemate, "-o", "json", "--act", "apply")
        lines = [json.loads(line) for line in exported.stdout.splitlines()]
        assert lines and lines[0]["act"] == "apply" and len(lines[0]["digest"]) == 64
        assert (await asyncio.to_thread(casemate, "--verify", "--since-digest", noted)).returncode == 0
        forged = noted[:-1] + ("0" if noted[-1] != "0" else "1")
        assert (await asyncio.to_thread(casemate, "--verify", "--since-digest", forged)).returncode == 1
        table = await asyncio.to_thread(casemate)
        assert "environment/own/hello created" in table.stdout


async def _root(context: Any) -> Principal:
    return Principal("admin", "certificate")


def test_records_cross_the_wire_as_they_are() -> None:
    record = AuditRecord(7, 1.25, "a", "b", "c", "d", ("e",), ("f",), "g", "h", "i", "j", 9, "k", "l")
    assert record_from_message(record_to_message(record)) == record
