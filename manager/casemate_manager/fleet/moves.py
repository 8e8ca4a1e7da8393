"""PURE. Migrations: an instance that runs is moved to another host, as two placements and one order to both hosts.

Theory of operation (docs/adr/025). The instance keeps its active placement, and gets a second one, ``incoming``, which the
real scheduler finds and the ledger holds from the first moment on. Both hosts are told by level-triggered records; both get
the operation's order, with the stage that it is in::

    prepare ──target waits──▶ transfer ──source: gone here──▶ settle ──target: it is here──▶ (switched) Done
       │                         │ │                            │
       │ target: cannot          │ └ deadline, target: cannot   └ target: it is not here
       ▼                         ▼                              ▼
    (given up) Failed ◀── source: still here ── cancel        back ──target: no trace──▶ Failed, the source goes on

What arrives at the target is frozen, and only a host whose placement is *active* lets it go on. The placement becomes active
by one commit, after the source has said, from its disk, that nothing of the instance runs there any more and will be started.
So at no instant two hosts may run it, whatever is lost, late or dead; and a source whose word was not needed goes on by
itself. Where the source is already gone and nothing has arrived, the source goes on only when the target has said that it
holds no trace (``back``). A placement that is of no more use is ``outgoing``: its host ends what it has of it, and it is dropped.

What cannot move is refused before anything is reserved, by name and constraint.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Final

from casemate_core.errors import Conflict, NotFound
from casemate_core.spec.instance import Phase
from casemate_core.spec.operation import ENDED, Move, Order, OrderPhase, OrderState, Stage, Verb
from casemate_manager.fleet.draft import Draft, instance_ref
from casemate_manager.fleet.observed import CapacityChanged, Observed
from casemate_manager.fleet.placing import Overlay, Placed, Placer, Unplaced, closed_because, stamp_for
from casemate_manager.fleet.records import HostRecord, InstanceRecord, OperationRecord, PlacementRecord
from casemate_manager.fleet.state import State

ACTIVE: Final = "active"
INCOMING: Final = "incoming"
OUTGOING: Final = "outgoing"
#: The target lets go of what has not arrived, before the source, which is off, goes on.
BACK: Final = "back"
#: States in which an instance has a guest that can be sent.
_MOVABLE: Final = frozenset({Phase.STARTING, Phase.RUNNING, Phase.READY})


class CannotMove(Conflict):
    """The instance, or the fleet, does not allow this migration; the message names the constraint."""

    reason = "CannotMove"


@dataclass(frozen=True, slots=True)
class Plan:
    """A migration that may begin: from where, and the place at the other host."""

    source: PlacementRecord
    found: Placed


# --- before it begins -------------------------------------------------------------------------------------------------


def fixed_because(state: State, observed: Observed, instance: InstanceRecord) -> str:
    """What keeps an instance on its host whatever other hosts there are, in words; empty where nothing does."""
    placement = state.placement_of(instance.meta.uid)
    if placement is None:
        return "it is not placed on a host"
    claim = placement.claim
    if claim.gpus:
        return f"it has {len(claim.gpus)} GPUs passed through, whose state cannot be sent"
    if claim.shares:
        return f"it has {len(claim.shares)} shares of GPUs passed through, whose state cannot be sent"
    if claim.vfs:
        return f"it has {len(claim.vfs)} virtual functions of a NIC passed through, whose state cannot be sent"
    if claim.devices:
        return f"it has {len(claim.devices)} devices passed through, whose state cannot be sent"
    if instance.volumes:
        names = ", ".join(use.volume for use in instance.volumes)
        return f"its volumes ({names}) are on its host's own disk, and stay there"
    if len(state.instance_placements[instance.meta.uid]) > 1:
        return "a host has not yet let go of it after its last move"
    seen = observed.instances.get(instance.meta.uid)
    if not observed.host(placement.host).connected:
        return f"its host {placement.host} is not heard from"
    said = seen.state if seen is not None and seen.host == placement.host else None
    if said is None or said.phase not in _MOVABLE:
        phase = said.phase.value if said is not None else "unknown"
        return f"it does not run ({phase}), and what is off would need its disk carried alone, which is not done yet"
    return ""


def closed_to(
    state: State, observed: Observed, instance: InstanceRecord, source: HostRecord, target: HostRecord
) -> str:
    """What keeps an instance of one host from another whatever is free there; empty where nothing does."""
    placement = state.placement_of(instance.meta.uid)
    ours, theirs = observed.host(source.host.meta.name).report, observed.host(target.host.meta.name).report
    if source is target or placement is None:
        return "it is there already"
    if (closed := closed_because(state, observed, target, state.spec_of(instance))) is not None:
        return closed[1]
    if ours is None or not ours.passage:
        return f"its host {source.host.meta.name} takes part in no migrations (passage is not set for its agent)"
    if theirs is None or not theirs.passage:
        return "host takes part in no migrations (passage is not set for its agent)"
    if source.virtualisation != target.virtualisation:
        return f"host runs guests by {target.virtualisation or 'nothing yet'}, not by {source.virtualisation}"
    if placement.claim.vcpus and source.virtualisation == "kvm" and ours.cpu != theirs.cpu:
        return f"host has another CPU ({theirs.cpu or 'unknown'}) than the {ours.cpu or 'unknown'} that its guest sees"
    return ""


def plan(state: State, observed: Observed, instance: InstanceRecord, to_host: str, placer: Placer) -> Plan:
    """Where an instance can move. Raises CannotMove, NotFound."""
    name = instance.meta.name
    if why := fixed_because(state, observed, instance):
        raise CannotMove(f"instance {name} cannot move: {why}")
    placement = state.placement_of(instance.meta.uid)
    assert placement is not None
    source = state.hosts[placement.host]
    if to_host and to_host not in state.hosts:
        raise NotFound("host", to_host)
    closed = {
        host: closed_to(state, observed, instance, source, state.hosts[host])
        for host in ([to_host] if to_host else state.hosts)
    }
    open_ = frozenset(host for host, why in closed.items() if not why)
    if to_host and not open_:
        raise CannotMove(f"instance {name} cannot move to {to_host}: {closed[to_host]}")
    if not open_:
        counts = Counter(why for host, why in closed.items() if host != placement.host)
        told = "; ".join(f"{count}: {why}" for why, count in counts.most_common()) or "there is no other host"
        raise CannotMove(f"instance {name} cannot move to any host: {told}")
    environment = state.environment_of(instance).environment
    overlay = Overlay(state, observed)
    # It stands in nobody's way that it is itself still on its host.
    overlay.remove(placement.host, instance.meta.uid)
    found = placer.place(overlay, environment, state.spec_of(instance), stamp_for(state, instance), open_)
    if isinstance(found, Unplaced):
        raise CannotMove(f"instance {name} cannot move to {to_host or 'any host'}: {found.message}")
    return Plan(placement, found)


def begin(draft: Draft, instance: InstanceRecord, record: OperationRecord, planned: Plan) -> OperationRecord:
    """Reserve the place at the target, and make the operation's first stage."""
    stamp = stamp_for(draft.state, instance)
    draft.put(
        PlacementRecord(
            instance.meta.uid,
            planned.found.host,
            planned.found.claim,
            stamp.epoch,
            stamp.generation,
            INCOMING,
            draft.now_s,
            draft.revision,
        )
    )
    meta = replace(instance.meta, resource_version=draft.revision)
    draft.put(replace(instance, meta=meta, placements=stamp.generation))
    return replace(
        record,
        target=planned.found.host,
        stage=Stage.PREPARE.value,
        phase=OrderPhase.RUNNING.value,
        started_s=draft.now_s,
        message=f"{planned.found.host} makes ready",
    )


# --- what hosts are told ----------------------------------------------------------------------------------------------


def order_of(record: OperationRecord, placement: PlacementRecord) -> Order | None:
    """The order of a migration for the host of one of its placements."""
    if placement.role == OUTGOING or (placement.role == INCOMING and record.stage == BACK):
        return None
    stage = Stage.SETTLE if record.stage == BACK else Stage(record.stage)
    return Order(
        record.meta.uid,
        Verb.MIGRATE,
        record.deadline_s,
        begun=record.left,
        move=Move(record.host, record.target, stage, record.address),
    )


# --- what hosts say ---------------------------------------------------------------------------------------------------


def told(draft: Draft, host: str, instance: InstanceRecord, record: OperationRecord, said: OrderState) -> None:
    """One of the two hosts says how far the order has come."""
    if host == record.target:
        _target_said(draft, instance, record, said)
    elif host == record.host:
        _source_said(draft, instance, record, said)


def _target_said(draft: Draft, instance: InstanceRecord, record: OperationRecord, said: OrderState) -> None:
    match record.stage:
        case Stage.PREPARE if said.phase in ENDED:
            _give_up(draft, instance, record, said)
        case Stage.PREPARE if said.address:
            _stage(
                draft,
                replace(record, stage=Stage.TRANSFER.value, address=said.address),
                f"{record.host} sends it to {record.target}",
            )
        case Stage.TRANSFER if said.phase in ENDED:
            _stage(draft, replace(record, stage=Stage.CANCEL.value), f"{record.target}: {said.message}")
        case Stage.TRANSFER if said.address and said.address != record.address:
            _stage(draft, replace(record, address=said.address), record.message)
        case Stage.SETTLE if said.phase is OrderPhase.DONE:
            _switch(draft, instance, record)
        case Stage.SETTLE if said.phase in ENDED:
            _back(draft, instance, record, said)
        case _:
            pass


def _source_said(draft: Draft, instance: InstanceRecord, record: OperationRecord, said: OrderState) -> None:
    if record.left or record.stage not in (Stage.PREPARE, Stage.TRANSFER, Stage.CANCEL) or said.phase not in ENDED:
        return
    if said.phase is OrderPhase.DONE:
        _stage(
            draft,
            replace(record, stage=Stage.SETTLE.value, left=True),
            f"gone from {record.host}; {record.target} looks whether it is there",
        )
    else:
        # Why it was cancelled says more than that it was.
        why = said if record.stage != Stage.CANCEL else replace(said, message=record.message or said.message)
        _give_up(draft, instance, record, why)


def _stage(draft: Draft, record: OperationRecord, message: str) -> None:
    new = replace(record, phase=OrderPhase.RUNNING.value, finished_s=0.0, message=message)
    draft.put(replace(new, meta=replace(new.meta, resource_version=draft.revision)))


def _switch(draft: Draft, instance: InstanceRecord, record: OperationRecord) -> None:
    """The one instant of the migration: what was incoming is active, what was active is to be let go of."""
    for placement in draft.state.instance_placements[instance.meta.uid].values():
        role = ACTIVE if placement.host == record.target else OUTGOING
        draft.put(replace(placement, role=role, revision=draft.revision))
    meta = replace(instance.meta, resource_version=draft.revision)
    draft.put(replace(instance, meta=meta))
    took_s = draft.now_s - record.started_s
    message = f"moved from {record.host} to {record.target} in {took_s:.1f} s"
    _close(draft, instance, record, OrderPhase.DONE, "", message)


def _give_up(draft: Draft, instance: InstanceRecord, record: OperationRecord, said: OrderState) -> None:
    """It has not left its source, which goes on; what is reserved at the target is let go of."""
    _let_go(draft, instance, record)
    reason = said.reason or said.phase.value
    _close(draft, instance, record, OrderPhase.FAILED, reason, f"it goes on at {record.host}: {said.message}")


def _back(draft: Draft, instance: InstanceRecord, record: OperationRecord, said: OrderState) -> None:
    """It has left its source and has not arrived: the source starts it again, when the target holds no trace of it."""
    _let_go(draft, instance, record)
    _stage(draft, replace(record, stage=BACK, reason=said.reason), f"{record.target}: {said.message}")


def _let_go(draft: Draft, instance: InstanceRecord, record: OperationRecord) -> None:
    for placement in draft.state.instance_placements[instance.meta.uid].values():
        if placement.host == record.target and placement.role == INCOMING:
            draft.put(replace(placement, role=OUTGOING, revision=draft.revision))


def _close(
    draft: Draft, instance: InstanceRecord, record: OperationRecord, phase: OrderPhase, reason: str, message: str
) -> None:
    meta = replace(record.meta, resource_version=draft.revision)
    draft.put(
        replace(
            record,
            meta=meta,
            phase=phase.value,
            reason=reason,
            message=message[:1000],
            finished_s=draft.now_s,
            closed=True,
        )
    )
    done = phase is OrderPhase.DONE
    word = "MigrateDone" if done else "MigrateFailed"
    draft.event(instance_ref(instance), word, message, warning=not done, cause=record.meta.name)


def gone(draft: Draft, host: str, instance: InstanceRecord) -> bool:
    """A host holds no trace of an instance that it was to let go of; whether that was so."""
    state, uid = draft.state, instance.meta.uid
    mine = [(k, p) for k, p in state.instance_placements[uid].items() if p.host == host]
    if not mine or any(p.role == ACTIVE for _, p in mine):
        return False
    for key, placement in mine:
        if placement.role == OUTGOING:
            draft.drop("Placement", key)
            draft.sightings.append(CapacityChanged())
    record = state.open_operation(uid)
    if record is not None and record.stage == BACK and host == record.target:
        _close(
            draft,
            instance,
            record,
            OrderPhase.FAILED,
            record.reason or "NotArrived",
            f"it is started again at {record.host}: {record.message}",
        )
    return True


# --- by the clock -----------------------------------------------------------------------------------------------------


def overdue(draft: Draft, record: OperationRecord) -> bool:
    """The deadline is over: what has not begun is given up, what is under way is cancelled. Whether that was done."""
    instance = draft.state.instances[record.instance_uid]
    late = OrderState(record.meta.uid, OrderPhase.FAILED, "DeadlineExceeded", f"not done in {record.timeout_s:g} s")
    if record.stage == Stage.PREPARE:
        _give_up(draft, instance, record, late)
        return True
    if record.stage == Stage.TRANSFER:
        _stage(draft, replace(record, stage=Stage.CANCEL.value), late.message)
        return True
    return False


def waits_for(record: OperationRecord) -> str:
    """The host whose word a migration waits for."""
    return record.host if record.stage in (Stage.TRANSFER, Stage.CANCEL) else record.target
