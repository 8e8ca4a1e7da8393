"""PURE. The fleet as a state machine: `apply(state, command, now) → Batch`. The one door.

Everything that happens to the fleet is a command: what users ask, what hosts say, and the work that follows from both.
A command that cannot be carried out raises and changes nothing.
"""

from dataclasses import dataclass, replace
from typing import Final, assert_never

from casemate_manager.access import grants_of
from casemate_manager.fleet import (
    acts,
    advance,
    auditing,
    deletion,
    due,
    enrolment,
    gpus,
    hosts,
    keys,
    objects,
    operations,
)
from casemate_manager.fleet.acts import By
from casemate_manager.fleet.commands import (
    Advance,
    ApplyResources,
    Batch,
    ChangeAccessKey,
    Command,
    CreateToken,
    DeleteResource,
    Due,
    Expire,
    HostFacts,
    HostGone,
    HostHello,
    HostInventory,
    HostNote,
    KeepCheckpoint,
    MakeAccessKey,
    NoteAct,
    OperateInstances,
    OrderGpu,
    RenewEnrolment,
    RevokeHost,
    RevokeToken,
    UseToken,
)
from casemate_manager.fleet.draft import MAX_RECORDS, Draft
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.placing import Placer
from casemate_manager.fleet.records import Put
from casemate_manager.fleet.references import ObjectRules
from casemate_manager.fleet.state import State

#: How long an answered request is known by its key.
REQUEST_KEPT_S: Final = 86400.0
#: Answered requests and events kept at most, the newest ones. Where there are more, one in so many goes with the surplus:
#: else every single event beyond the limit would have all of them looked through.
REQUESTS_KEPT: Final = 100_000
EVENTS_KEPT: Final = 10_000
ONE_IN: Final = 20
#: Operations that are over are kept so long, and so many.
OPERATIONS_KEPT_S: Final = 7 * 86400.0
OPERATIONS_KEPT: Final = 10_000


@dataclass(frozen=True, slots=True)
class Rules:
    """What the fleet is given besides its state: how to judge objects, and how to place."""

    objects: ObjectRules
    placer: Placer
    #: Users who are platform administrators by the manager's own settings.
    admins: frozenset[str] = frozenset()


def apply(state: State, observed: Observed, command: Command | By, now_s: float, rules: Rules) -> Batch:
    """What a command does. Raises the errors of ``casemate_core.errors`` where it cannot be done; nothing changes then.

    ``now_s``: seconds since the epoch. Fold the batch into the state (and its sightings into ``observed``) before the
    next command.
    """
    inner = command.command if isinstance(command, By) else command
    if isinstance(command, By):
        grants = grants_of(command.actor.principal, state.bindings_of, state.users, rules.admins)
        acts.check(state, grants, inner)
        if isinstance(inner, ApplyResources | DeleteResource | OperateInstances):
            inner = replace(inner, by=command.actor.principal.name)
    batch = _apply(state, observed, inner, now_s, rules)
    return auditing.audited(state, observed, command, batch, now_s)


def _apply(state: State, observed: Observed, command: Command, now_s: float, rules: Rules) -> Batch:
    match command:
        case NoteAct():
            return Batch()
        case ApplyResources():
            return objects.apply_resources(state, observed, command, now_s, rules.objects)
        case DeleteResource():
            return deletion.delete_resource(state, observed, command, now_s)
        case OperateInstances():
            return operations.operate(state, observed, command, now_s, rules.placer)
        case MakeAccessKey():
            return keys.make(state, observed, command, now_s)
        case ChangeAccessKey():
            return keys.change(state, observed, command, now_s)
        case OrderGpu():
            return gpus.order(state, observed, command, now_s)
        case HostHello():
            return hosts.hello(state, observed, command, now_s)
        case HostInventory():
            return hosts.inventory(state, observed, command, now_s)
        case HostFacts():
            return hosts.facts(state, observed, command, now_s)
        case HostNote():
            return hosts.note(state, observed, command, now_s)
        case HostGone():
            return hosts.gone(state, observed, command, now_s)
        case CreateToken():
            return enrolment.create_token(state, observed, command, now_s)
        case RevokeToken():
            return enrolment.revoke_token(state, observed, command, now_s)
        case UseToken():
            return enrolment.use_token(state, observed, command, now_s)
        case RenewEnrolment():
            return enrolment.renew(state, observed, command, now_s)
        case RevokeHost():
            return enrolment.revoke_host(state, observed, command, now_s)
        case KeepCheckpoint():
            return auditing.keep(state, command)
        case Advance():
            return advance.advance(state, observed, now_s, rules.placer)
        case Due():
            return due.come_due(state, observed, now_s)
        case Expire():
            return _expire(state, observed, now_s)
        case _:
            assert_never(command)


def is_crowded(state: State) -> bool:
    """Whether `Expire` has something to do before its time."""
    return len(state.events) > EVENTS_KEPT or len(state.requests) > REQUESTS_KEPT


def _expire(state: State, observed: Observed, now_s: float) -> Batch:
    draft = Draft(state, observed, now_s)
    surplus = _surplus(len(state.requests), REQUESTS_KEPT)
    # in the order of their answers, so that the first that may stay ends the search
    for number, (key, request) in enumerate(state.requests.items()):
        if number == MAX_RECORDS // 2 or (number >= surplus and now_s - request.at_s <= REQUEST_KEPT_S):
            break
        draft.drop("Request", key)
    surplus = _surplus(len(state.operations), OPERATIONS_KEPT)
    for number, (key, operation) in enumerate(state.operations.items()):
        young = now_s - operation.meta.created_s <= OPERATIONS_KEPT_S
        if number == MAX_RECORDS // 4 or (number >= surplus and young):
            break
        if operation.closed:
            draft.drop("Operation", key)
    for change in auditing.forgotten(state, now_s):
        if isinstance(change, Put):
            draft.put(change.record)
        else:
            draft.drop(change.kind, change.key)
    surplus = min(_surplus(len(state.events), EVENTS_KEPT), MAX_RECORDS - len(draft))
    if surplus > 0:
        for name in sorted(state.events)[:surplus]:
            draft.drop("Event", name)
    return draft.batch()


def _surplus(count: int, kept: int) -> int:
    return count - kept + kept // ONE_IN if count > kept else 0
