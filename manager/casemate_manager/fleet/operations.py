"""PURE. What is done once to instances: asked for, given to hosts one at a time, and followed to its end.

Theory of operation. An operation is a durable record. While it is *open* its order is part of the instance's desired
record, so that a host gets it however often its stream breaks, and the host's word on it is part of what it tells of the
instance; both are levels, and nothing is sent twice or lost. An instance has at most one open operation. It is closed when
its host has told the end, or when the instance is gone. An operation whose deadline is over on a host that is not heard
is Unknown, for those who wait, and stays open: the host may have carried it out, and will say.

Operations of one environment wait for their turn (`release`) where its update strategy is rolling.
"""

import hashlib
import json
from dataclasses import replace
from typing import Final

from casemate_core.errors import Conflict, InvalidSpec, NotFound, Violation, shown
from casemate_core.plain import from_plain, to_plain
from casemate_core.spec.instance import Phase
from casemate_core.spec.meta import DEFAULT_TENANT, Meta
from casemate_core.spec.operation import ENDED, Order, OrderPhase, OrderState, Verb
from casemate_core.spec.views import ObjectRef
from casemate_manager.fleet import moves
from casemate_manager.fleet.commands import Batch, OperateAnswer, OperateInstances
from casemate_manager.fleet.draft import MAX_RECORDS, Draft, instance_ref, make_uid
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.placing import Placer
from casemate_manager.fleet.records import (
    EnvironmentRecord,
    InstanceRecord,
    OperationRecord,
    PlacementRecord,
    RequestRecord,
    instance_or_environment,
    tenant_key,
)
from casemate_manager.fleet.requests import answered, check_key
from casemate_manager.fleet.state import State

DEFAULT_TIMEOUT_S: Final = 600.0
MAX_TIMEOUT_S: Final = 86400.0
MAX_GRACE_S: Final = 3600.0
#: How long a certify measures: a second shows that it works, an hour what happens once an hour.
DEFAULT_DURATION_S: Final = 30.0
MAX_DURATION_S: Final = 3600.0
#: What a guest needs beside the measurement itself, to begin and to answer.
AROUND_S: Final = 15.0
#: Instances of one request; with what else is written for them they stay within one batch.
MAX_INSTANCES: Final = 40
#: A host that is connected says by itself that a deadline is over; so long is waited for its word.
WORD_S: Final = 30.0

_ENDS = {OrderPhase.DONE: "Done", OrderPhase.FAILED: "Failed", OrderPhase.UNKNOWN: "Unknown"}


def operate(state: State, observed: Observed, command: OperateInstances, now_s: float, placer: Placer) -> Batch:
    """Ask for something to be done once. Raises InvalidSpec, NotFound, Conflict, KeyReused."""
    check_key(command.request_key)
    plain = [command.tenant, command.name, command.verb, command.grace_s, command.timeout_s, command.uid]
    if command.duration_s:
        plain.append(command.duration_s)
    if command.to_host:
        plain.append(command.to_host)
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    if (known := state.requests.get(command.request_key)) is not None:
        return Batch(answer=from_plain(OperateAnswer, answered(known, digest)))
    verb = _check(command)
    instances, environment = _instances(state, command)
    draft = Draft(state, observed, now_s)
    for instance in instances:
        _check_instance(state, instance, verb)
    if verb is Verb.MIGRATE:
        return _migrate(draft, instances, command, digest, placer)
    # A measurement takes nobody down: all of them at once.
    one_by_one = (
        verb is not Verb.CERTIFY
        and environment is not None
        and environment.environment.spec.update_strategy is not None
    )
    refs = tuple(_ask(draft, instance, verb, command, released=not one_by_one) for instance in instances)
    answer = OperateAnswer(refs, draft.revision)
    draft.put(RequestRecord(command.request_key, digest, now_s, to_plain(answer)))
    return draft.batch(answer)


def _migrate(
    draft: Draft, instances: list[InstanceRecord], command: OperateInstances, digest: str, placer: Placer
) -> Batch:
    """A place is reserved with the operation itself: one instance at a time, whose way is known before it begins."""
    if len(instances) > 1:
        names = ", ".join(i.meta.name for i in instances[:4])
        found = Violation("name", command.name, f"has {len(instances)} instances", f"name one of them: {names}")
        raise InvalidSpec((found,))
    planned = moves.plan(draft.state, draft.observed, instances[0], command.to_host, placer)
    refs = (_ask(draft, instances[0], Verb.MIGRATE, command, released=True, planned=planned),)
    answer = OperateAnswer(refs, draft.revision)
    draft.put(RequestRecord(command.request_key, digest, draft.now_s, to_plain(answer)))
    return draft.batch(answer)


def _check(command: OperateInstances) -> Verb:
    try:
        verb = Verb(command.verb)
    except ValueError:
        words = ", ".join(v.value for v in Verb)
        raise InvalidSpec((Violation("verb", shown(command.verb), "is not known", f"write one of {words}"),)) from None
    violations = []
    if not 1 <= command.timeout_s <= MAX_TIMEOUT_S:
        violations.append(Violation("timeout", f"{command.timeout_s:g}", "is out of range", "write 1s to 24h"))
    if command.grace_s is not None:
        if verb not in (Verb.STOP, Verb.RESTART, Verb.REBUILD):
            violations.append(
                Violation("grace", f"{command.grace_s:g}", f"means nothing to {verb.value}", "leave it out")
            )
        elif not 0 <= command.grace_s <= MAX_GRACE_S:
            violations.append(Violation("grace", f"{command.grace_s:g}", "is out of range", "write 0s to 1h"))
    violations += _check_duration(command, verb)
    if command.to_host and verb is not Verb.MIGRATE:
        violations.append(Violation("toHost", shown(command.to_host), f"means nothing to {verb.value}", "leave it out"))
    if violations:
        raise InvalidSpec(tuple(violations))
    return verb


def _check_duration(command: OperateInstances, verb: Verb) -> list[Violation]:
    if verb is not Verb.CERTIFY:
        if command.duration_s:
            return [Violation("duration", f"{command.duration_s:g}", f"means nothing to {verb.value}", "leave it out")]
        return []
    duration_s = command.duration_s or DEFAULT_DURATION_S
    if not 1 <= duration_s <= MAX_DURATION_S:
        return [Violation("duration", f"{duration_s:g}", "is out of range", "write 1s to 1h")]
    if duration_s + AROUND_S > command.timeout_s:
        need = f"write at least {duration_s + AROUND_S:g}s, or a shorter duration"
        return [Violation("timeout", f"{command.timeout_s:g}", f"is too short to measure for {duration_s:g} s", need)]
    return []


def _instances(state: State, command: OperateInstances) -> tuple[list[InstanceRecord], EnvironmentRecord | None]:
    """The instances that are meant: one by its name, or all of an environment."""
    key = tenant_key(command.tenant or DEFAULT_TENANT, command.name)
    if uid := state.instance_names.get(key):
        found, environment = [state.instances[uid]], None
        meta = found[0].meta
    elif (environment := state.environments.get(key)) is not None:
        meta = environment.environment.meta
        found = [i for i in state.instances_of(meta.uid) if not i.meta.deleting_s]
        if not found:
            raise Conflict(f"environment {command.name} has no instances")
    else:
        raise NotFound(instance_or_environment(command.name), command.name)
    if command.uid and command.uid != meta.uid:
        raise Conflict(f"{command.name} has uid {meta.uid}, not {shown(command.uid)}")
    if len(found) > MAX_INSTANCES:
        raise InvalidSpec(
            (
                Violation(
                    "name",
                    command.name,
                    f"has {len(found)} instances",
                    f"name instances, at most {MAX_INSTANCES} at once",
                ),
            )
        )
    return found, environment


def _check_instance(state: State, instance: InstanceRecord, verb: Verb) -> None:
    name, run = instance.meta.name, state.environment_of(instance).environment.spec.run
    if state.is_ending(instance):
        raise Conflict(f"instance {name} is being deleted")
    if state.placement_of(instance.meta.uid) is None:
        raise Conflict(f"instance {name} is not placed on a host yet: see casemate why {name}")
    if (known := state.open_operation(instance.meta.uid)) is not None:
        raise Conflict(
            f"instance {name} has operation {known.meta.name} ({known.verb}, {known.phase}) under way: wait for its end"
        )
    if verb is Verb.STOP and run != "stopped":
        raise Conflict(f"instance {name} should run (run: {run}): set run: stopped first, as casemate stop does")
    if verb in (Verb.RESTART, Verb.REBOOT, Verb.RESET, Verb.CERTIFY, Verb.MIGRATE) and run != "started":
        raise Conflict(f"instance {name} should not run (run: {run}): start its environment first")


def _ask(
    draft: Draft,
    instance: InstanceRecord,
    verb: Verb,
    command: OperateInstances,
    *,
    released: bool,
    planned: moves.Plan | None = None,
) -> ObjectRef:
    state, uid = draft.state, make_uid("operation", instance.meta.uid, command.seed)
    placement = state.placement_of(instance.meta.uid)
    meta = Meta(
        # begins with its instance's, as a pod's does: who may see that instance may see it
        f"{instance.meta.name}.{verb.value}-{uid[:8]}{uid[9:13]}",
        instance.meta.tenant,
        uid=uid,
        generation=1,
        resource_version=draft.revision,
        created_s=draft.now_s,
    )
    record = OperationRecord(
        meta,
        verb.value,
        instance.meta.uid,
        instance.meta.name,
        instance.environment_uid,
        placement.host if placement else "",
        command.timeout_s,
        command.grace_s,
        duration_s=(command.duration_s or DEFAULT_DURATION_S) if verb is Verb.CERTIFY else 0.0,
    )
    if verb is Verb.REBUILD:
        draft.put(rebuilt(draft, instance))
    if planned is not None:
        record = moves.begin(draft, instance, record, planned)
    draft.put(_released(draft, record) if released else record)
    asked = f"{command.by} asked for {verb.value}" if command.by else f"{verb.value} was asked for"
    draft.event(instance_ref(instance), f"{verb.value.title()}Asked", asked, cause=meta.name)
    return ObjectRef("Operation", meta.name, meta.tenant, uid)


def rebuilt(draft: Draft, instance: InstanceRecord) -> InstanceRecord:
    """The instance with another root disk, of its environment's present image. Raises Conflict."""
    state = draft.state
    current = state.environment_of(instance).replace_generation
    changed = replace(
        instance,
        disks=instance.disks + 1,
        replace_generation=max(instance.replace_generation, current),
        meta=replace(instance.meta, resource_version=draft.revision, generation=instance.meta.generation + 1),
    )
    if state.spec_of(changed).disk_mib != state.spec_of(instance).disk_mib:
        raise Conflict(
            f"spec.disk.size of {instance.environment} has changed, which needs another placement:"
            " set spec.updateStrategy, which brings it to each instance"
        )
    return changed


def _released(draft: Draft, record: OperationRecord) -> OperationRecord:
    """Given to its host from now on, for what is known to run there now."""
    seen = draft.observed.instances.get(record.instance_uid)
    said = seen.state if seen is not None else None
    return replace(
        record,
        released=True,
        deadline_s=draft.now_s + record.timeout_s,
        pid=said.pid if said else 0,
        guest_boot_id=said.guest_boot_id if said else "",
    )


def release(draft: Draft, environment: EnvironmentRecord, free: int) -> int:
    """Give the next waiting operations of an environment to their hosts, as many as may be down. Returns how many."""
    state, given = draft.state, 0
    for instance in state.instances_of(environment.environment.meta.uid):
        if given >= free or len(draft) + 2 > MAX_RECORDS:
            break
        record = state.open_operation(instance.meta.uid)
        if record is not None and not record.released:
            draft.put(_touched(draft, _released(draft, record)))
            given += 1
    return given


def order_of(state: State, instance: InstanceRecord, placement: PlacementRecord) -> Order | None:
    """The order that the host of one of an instance's placements should have."""
    record = state.open_operation(instance.meta.uid)
    if record is None or not record.released:
        return None
    if record.verb == Verb.MIGRATE:
        return moves.order_of(record, placement)
    return Order(
        record.meta.uid,
        Verb(record.verb),
        record.deadline_s,
        record.grace_s,
        record.pid,
        record.guest_boot_id,
        begun=record.started_s > 0,
        duration_s=record.duration_s,
    )


def _touched(draft: Draft, record: OperationRecord) -> OperationRecord:
    return replace(record, meta=replace(record.meta, resource_version=draft.revision))


def told(draft: Draft, host: str, instance: InstanceRecord, said: OrderState) -> None:
    """A host says how far the order that it has has come."""
    record = draft.state.open_operation(instance.meta.uid)
    if record is None or record.meta.uid != said.uid:
        return
    if record.verb == Verb.MIGRATE:
        moves.told(draft, host, instance, record, said)
        return
    new = replace(
        record,
        phase=said.phase.value,
        reason=said.reason,
        message=said.message,
        started_s=said.started_s,
        finished_s=said.finished_s,
        closed=said.phase in ENDED,
        certificate=said.certificate,
    )
    if new != record:
        _put(draft, instance, record, new)


def _put(draft: Draft, instance: InstanceRecord, old: OperationRecord, new: OperationRecord) -> None:
    draft.put(_touched(draft, new))
    end = _ENDS.get(OrderPhase(new.phase))
    if end is not None and new.phase != old.phase:
        draft.event(
            instance_ref(instance),
            f"{new.verb.title()}{end}",
            new.message or f"{new.verb} has ended",
            warning=end != "Done",
            cause=new.meta.name,
            source=new.host or "manager",
        )


def forget(draft: Draft, instance: InstanceRecord) -> None:
    """The instance is gone, and with it what was asked of it."""
    record = draft.state.open_operation(instance.meta.uid)
    if record is not None:
        new = replace(
            record,
            phase="Failed",
            reason="InstanceGone",
            message="the instance is gone",
            finished_s=draft.now_s,
            closed=True,
        )
        draft.put(_touched(draft, new))


def overdue(draft: Draft) -> None:
    """Operations whose deadline is over while their host is not heard: nobody knows what came of them."""
    for record in draft.state.open_operations():
        if len(draft) + 3 > MAX_RECORDS:
            return
        migrates = record.verb == Verb.MIGRATE
        if migrates and draft.now_s > record.deadline_s and moves.overdue(draft, record):
            continue
        host = moves.waits_for(record) if migrates else record.host
        late = record.released and draft.now_s > record.deadline_s + WORD_S
        if not late or record.phase == OrderPhase.UNKNOWN or draft.observed.host(host).connected:
            continue
        new = replace(
            record,
            phase=OrderPhase.UNKNOWN.value,
            reason="HostUnknown",
            message=f"host {host} is not heard from; it may have been carried out",
            finished_s=draft.now_s,
        )
        _put(draft, draft.state.instances[record.instance_uid], record, new)


def unavailable(state: State, observed: Observed, instance: InstanceRecord) -> bool:
    """Whether an instance is down, or about to be, as an update strategy counts."""
    uid = instance.meta.uid
    record = state.open_operation(uid)
    if instance.held or (record is not None and record.released and record.verb != Verb.CERTIFY):
        return True
    seen = observed.instances.get(uid)
    return seen is None or seen.state is None or seen.state.phase is not Phase.READY
