"""PURE. The audit record of a command, made in the batch that carries it out: without a record there is no change.

Theory of operation. `machine.apply` hands every batch here before it leaves. What somebody asked for (`By`), or the manager
itself (with nobody's name), gets a record of what it changed; so does a host's word of drift. What follows from such acts by
itself (`FOLLOWS`) has its events and no record. Any other command is audited: a new one cannot be forgotten.

Once in `MARK_EVERY` records a mark keeps the chain's place and time. Retention cuts at marks, so that it need not read the chain.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from casemate_core.audit import MAX_DETAIL, MAX_TARGETS, AuditRecord, Link, chained
from casemate_core.checkpoint import Checkpoint
from casemate_core.errors import InternalError, shown
from casemate_manager.fleet.acts import Actor, By
from casemate_manager.fleet.commands import (
    Advance,
    ApplyAnswer,
    Batch,
    ChangeAccessKey,
    Command,
    DeleteAnswer,
    Expire,
    GpuAnswer,
    HostFacts,
    HostGone,
    HostHello,
    HostInventory,
    HostNote,
    KeepCheckpoint,
    KeyAnswer,
    NoteAct,
    OrderGpu,
)
from casemate_manager.fleet.draft import MAX_RECORDS
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import (
    AuditCut,
    AuditHead,
    AuditMark,
    Drop,
    EnvironmentRecord,
    Put,
    RecordChange,
    key_of,
    kind_of,
)
from casemate_manager.fleet.state import State

#: What hosts say and what follows from acts by itself.
FOLLOWS: Final = (HostHello, HostInventory, HostFacts, HostNote, HostGone, KeepCheckpoint, Advance, Expire)
MARK_EVERY: Final = 1000
DAY_S: Final = 86400.0
#: How long records are kept.
KEPT_S: Final = 400 * DAY_S
#: Signed places of the chain that are kept in the store.
CHECKPOINTS_KEPT: Final = 256
#: Kinds of records that are bookkeeping of other ones.
_INNER: Final = frozenset({"Request", "Revision", "Event", "Audit", "AuditHead", "AuditMark", "AuditCut", "Checkpoint"})
SYSTEM: Final = "manager"


def audited(state: State, observed: Observed, command: Command | By, batch: Batch, now_s: float) -> Batch:
    """The batch with its audit record, where it needs one."""
    actor, inner = (command.actor, command.command) if isinstance(command, By) else (None, command)
    if isinstance(inner, HostFacts):
        record = _drift(observed, inner, now_s)
    elif isinstance(inner, FOLLOWS) or (not batch.records and not isinstance(inner, NoteAct)):
        return batch
    elif isinstance(inner, NoteAct):
        record = AuditRecord(0, now_s, "", "", inner.act, inner.outcome, inner.targets, inner.tenants, inner.detail)
    else:
        record = _of_change(state, inner, batch, now_s)
    if record is None:
        return batch
    return _with(state, batch, _signed(record, actor))


def _signed(record: AuditRecord, actor: Actor | None) -> AuditRecord:
    """The record with who did it and bounded texts."""
    record = replace(
        record,
        targets=tuple(shown(t) if len(t) > 300 else t for t in record.targets[:MAX_TARGETS]),
        detail=record.detail[:MAX_DETAIL],
    )
    if actor is None:
        return record if record.actor else replace(record, actor=SYSTEM, how="manager")
    principal = actor.principal
    return replace(
        record,
        actor=principal.name,
        how=principal.how,
        address=actor.address,
        client=actor.client,
        request=actor.request,
    )


def _with(state: State, batch: Batch, record: AuditRecord) -> Batch:
    revision = batch.revision or state.revision + 1
    record = chained(replace(record, revision=revision), state.audit)
    more: list[RecordChange] = [Put(record), Put(AuditHead("head", record.sequence, record.digest))]
    last = state.audit_marks[-1] if state.audit_marks else None
    if last is None or record.sequence - last.sequence >= MARK_EVERY or record.time_s - last.time_s >= DAY_S:
        more.append(Put(AuditMark(record.sequence, record.digest, record.time_s)))
    return replace(batch, records=(*batch.records, *more), revision=revision)


def _of_change(state: State, command: Command, batch: Batch, now_s: float) -> AuditRecord:
    act = type(command).__name__
    detail = ""
    match batch.answer:
        case ApplyAnswer(results):
            act = "apply"
            done = [r for r in results if r.action != "unchanged"]
            targets = [f"{_name(r.ref.kind, r.ref.tenant, r.ref.name)} {r.action}" for r in done]
            tenants = {r.ref.tenant for r in done if r.ref.tenant}
            # Paths, and never values: what was written may be in confidence.
            detail = ", ".join(dict.fromkeys(change.path for r in done for change in r.changes))
        case DeleteAnswer(ref):
            act = "delete"
            targets, tenants = [_name(ref.kind, ref.tenant, ref.name)], {ref.tenant} - {""}
        case KeyAnswer(key):
            act = "key"
            targets, tenants = [f"accesskey/{key.id} of user/{key.user}"], set()
            detail = command.change if isinstance(command, ChangeAccessKey) else "create"
        case GpuAnswer() if isinstance(command, OrderGpu):
            act, targets, tenants = "gpu", [f"gpu/{command.gpu}"], set()
            detail = f"{command.verb}: {command.reason}" if command.reason else command.verb
        case _:
            found = list(_touched(state, batch))
            targets = [f"{kind.lower()}/{key} {what}" for kind, key, what, _ in found]
            tenants = {tenant for _, _, _, tenant in found if tenant}
    if len(targets) > MAX_TARGETS:
        detail = f"{len(targets)} objects; {detail}"
    return AuditRecord(0, now_s, "", "", act, "done", tuple(targets), tuple(sorted(tenants)), detail)


def _name(kind: str, tenant: str, name: str) -> str:
    return f"{kind.lower()}/{tenant}/{name}" if tenant else f"{kind.lower()}/{name}"


def _touched(state: State, batch: Batch) -> Iterator[tuple[str, str, str, str]]:
    """Kind, key, what became of it, tenant: of the records of a change whose answer says nothing."""
    for change in batch.records:
        if isinstance(change, Put):
            kind, key, what = kind_of(change.record), key_of(change.record), "changed"
            meta = getattr(change.record, "meta", None)
            tenant = meta.tenant if meta else ""
            if isinstance(change.record, EnvironmentRecord):
                tenant = change.record.environment.meta.tenant
        else:
            kind, key, what, tenant = change.kind, change.key, "ended", ""
            if kind == "Environment":
                tenant = key.partition("/")[0]
            elif kind == "Instance" and key in state.instances:
                tenant = state.instances[key].meta.tenant
        if kind not in _INNER:
            yield kind, key, what, tenant


def _drift(observed: Observed, command: HostFacts, now_s: float) -> AuditRecord | None:
    """What a host found to be otherwise than its ledger says, and is about to repair; or has repaired."""
    seen = observed.host(command.host)
    report = command.facts.host
    if report is None or not seen.connected or seen.session != command.session:
        return None
    before = set(seen.report.drift) if seen.report else set()
    after = set(report.drift)
    if before == after:
        return None
    lines = [f"found: {d}" for d in sorted(after - before)] + [f"gone: {d}" for d in sorted(before - after)]
    host = command.host
    outcome = "found" if after - before else "repaired"
    return AuditRecord(0, now_s, f"host/{host}", "host", "drift", outcome, (f"host/{host}",), (), "; ".join(lines))


def forgotten(state: State, now_s: float) -> tuple[RecordChange, ...]:
    """Changes that forget what is older than it is kept: up to the last mark that is; none where there is none."""
    old = [mark for mark in state.audit_marks if now_s - mark.time_s > KEPT_S and mark.sequence < state.audit.sequence]
    if not old:
        return ()
    last = old[-1]
    marks = tuple(Drop("AuditMark", key_of(mark)) for mark in old[: MAX_RECORDS // 4])
    cut = AuditCut("cut", last.sequence, last.digest, now_s)
    return (Put(cut), Drop("Audit", f"{last.sequence:016d}"), *marks)


def keep(state: State, command: KeepCheckpoint) -> Batch:
    """Keep a checkpoint, beside the last ones before it. Raises InternalError for one of another chain."""
    checkpoint = command.checkpoint
    newest = last_checkpoint(state)
    if checkpoint.sequence > state.audit.sequence:
        raise InternalError(f"record {checkpoint.sequence} is signed, and the chain ends at {state.audit.sequence}")
    if newest is not None and newest.sequence >= checkpoint.sequence:
        return Batch()
    surplus = list(state.checkpoints)[: max(0, len(state.checkpoints) + 1 - CHECKPOINTS_KEPT)]
    drops = tuple(Drop("Checkpoint", key) for key in surplus[: MAX_RECORDS - 1])
    return Batch((Put(checkpoint), *drops), state.revision + 1)


def last_checkpoint(state: State) -> Checkpoint | None:
    """The newest signed place of the chain; None where there is none."""
    return next(reversed(state.checkpoints.values()), None)


def begin_of(state: State) -> Link:
    """Where the chain that is kept begins."""
    cut = state.audit_cut
    return Link(cut.sequence, cut.digest) if cut else Link()
