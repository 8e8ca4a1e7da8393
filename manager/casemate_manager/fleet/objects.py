"""PURE. What users apply and delete: preconditions, references between objects, changes with their effect, idempotency.

All or nothing: every violation of every object is collected before anything is written. Instances are not made here but
by `advance`, so that what one request writes stays bounded, whatever it asks for.
"""

import hashlib
import json
from dataclasses import replace
from typing import Final

from casemate_core.cause import cause_of
from casemate_core.errors import Conflict, InvalidSpec, Violation, shown
from casemate_core.plain import from_plain, to_plain
from casemate_core.spec.access import RoleBinding, Tenant, User
from casemate_core.spec.environment import Environment
from casemate_core.spec.fleet import Host, Image, Network, Policy
from casemate_core.spec.meta import Meta
from casemate_core.spec.secret import Secret
from casemate_core.spec.views import Change, ObjectRef
from casemate_core.spec.volume import Volume
from casemate_manager.fleet import quotas
from casemate_manager.fleet.commands import (
    Applied,
    ApplyAnswer,
    ApplyResources,
    Batch,
    Object,
)
from casemate_manager.fleet.draft import MAX_RECORDS, Draft, make_uid
from casemate_manager.fleet.observed import CapacityChanged, Observed
from casemate_manager.fleet.records import (
    EnvironmentRecord,
    HostRecord,
    Record,
    RequestRecord,
    RevisionRecord,
    VolumeRecord,
    tenant_key,
)
from casemate_manager.fleet.references import (
    Given,
    ObjectRules,
    check_references,
    key_of_object,
    subject,
    with_defaults,
    with_texts,
)
from casemate_manager.fleet.requests import answered, check_key
from casemate_manager.fleet.state import State, named

#: Objects of one request; with their records of change and the request's own they stay within one batch.
MAX_OBJECTS: Final = 60
#: Changed paths that an event names.
MOST_PATHS: Final = 8


def apply_resources(
    state: State, observed: Observed, command: ApplyResources, now_s: float, rules: ObjectRules
) -> Batch:
    """Make or change objects. Raises InvalidSpec, Conflict, KeyReused."""
    digest = _digest(command)
    if not command.dry_run:
        check_key(command.request_key)
        if (known := state.requests.get(command.request_key)) is not None:
            return Batch(answer=from_plain(ApplyAnswer, answered(known, digest)))
    _check_count(command.objects)
    draft = Draft(state, observed, now_s)
    given = Given(state, command.objects)
    quotas.check(state, command.objects, given.tenants)
    results = []
    for one in command.objects:
        one = with_defaults(given, one)
        old = _stored(state, one)
        if isinstance(one, Secret):
            one = with_texts(one, old)
        _check_preconditions(one, old)
        check_references(state, observed, given, one, old, rules)
        results.append(_apply_one(draft, one, old, command.seed, rules, cause_of(command.request_key)))
    if command.dry_run:
        return Batch(answer=ApplyAnswer(tuple(results), 0))
    told = tuple(replace(r, object=None) for r in results)
    answer = ApplyAnswer(told, draft.revision)
    draft.put(RequestRecord(command.request_key, digest, now_s, to_plain(answer)))
    if len(draft) > MAX_RECORDS:
        raise InvalidSpec(
            (Violation("resources", str(len(command.objects)), "change too much at once", "apply fewer"),)
        )
    _tell(draft, told, command)
    return draft.batch(answer)


def _tell(draft: Draft, results: tuple[Applied, ...], command: ApplyResources) -> None:
    """The first line of the story of each environment: who asked for what. As many as there is room for in the batch."""
    who = command.by or "the manager"
    for result in results:
        if result.ref.kind != "Environment" or result.action == "unchanged" or len(draft) >= MAX_RECORDS:
            continue
        if result.action == "created":
            message = f"{who} asked for it"
        else:
            # Paths alone: a value may be a secret.
            paths = sorted({change.path for change in result.changes})
            more = f" and {len(paths) - MOST_PATHS} more" if len(paths) > MOST_PATHS else ""
            message = f"{who} changed {', '.join(paths[:MOST_PATHS])}{more}"
        draft.event(result.ref, result.action.capitalize(), message, cause=cause_of(command.request_key))


def _check_count(objects: tuple[Object, ...]) -> None:
    if not 1 <= len(objects) <= MAX_OBJECTS:
        raise InvalidSpec(
            (Violation("resources", str(len(objects)), "is out of range", f"apply 1 to {MAX_OBJECTS} objects at once"),)
        )
    seen: set[tuple[str, str, str]] = set()
    for i, one in enumerate(objects):
        key = (type(one).__name__, one.meta.tenant, one.meta.name)
        if key in seen:
            raise InvalidSpec(
                (Violation(f"resources[{i}]", named(one.meta), "is there twice", "apply each object once"),),
                subject(one),
            )
        seen.add(key)


def _digest(command: ApplyResources) -> str:
    plain = [[type(o).__name__, to_plain(o)] for o in command.objects]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _stored(state: State, one: Object) -> Object | None:
    match one:
        case Environment():
            record = state.environments.get(tenant_key(one.meta.tenant, one.meta.name))
            return record.environment if record else None
        case Image():
            return state.images.get(one.meta.name)
        case Network():
            return state.networks.get(one.meta.name)
        case Policy():
            return state.policies.get(one.meta.name)
        case Tenant():
            return state.tenants.get(one.meta.name)
        case User():
            return state.users.get(one.meta.name)
        case Secret():
            return state.secrets.get(tenant_key(one.meta.tenant, one.meta.name))
        case RoleBinding():
            return state.role_bindings.get(one.meta.name)
        case Volume():
            volume = state.volumes.get(tenant_key(one.meta.tenant, one.meta.name))
            return volume.volume if volume else None
        case Host():
            host = state.hosts.get(one.meta.name)
            return host.host if host else None


def _check_preconditions(one: Object, old: Object | None) -> None:
    version = one.meta.resource_version
    if version and (old is None or old.meta.resource_version != version):
        has = "it does not exist" if old is None else f"it has version {old.meta.resource_version}"
        raise Conflict(f"{subject(one)} was to be changed at version {version}, and {has}: read it and apply again")
    if old is not None and old.meta.deleting_s:
        raise Conflict(f"{subject(one)} is being deleted; wait until it is gone, then apply again")


def _apply_one(draft: Draft, one: Object, old: Object | None, seed: str, rules: ObjectRules, cause: str) -> Applied:
    kind = type(one).__name__
    changes = rules.diff(old, one)
    if old is not None:
        fixed = tuple(
            Violation(
                c.path,
                shown(json.dumps(c.after, ensure_ascii=False)),
                "cannot be changed",
                "delete the object and apply it again under the same or another name",
            )
            for c in changes
            if c.effect == "immutable"
        )
        if fixed:
            raise InvalidSpec(fixed, subject(one))
        if not changes:
            return Applied(ref_to(kind, old.meta), "unchanged", object=old)
    spec_changed = old is None or any(c.path.startswith("spec") for c in changes)
    meta = Meta(
        one.meta.name,
        one.meta.tenant,
        one.meta.labels,
        one.meta.annotations,
        old.meta.uid if old else make_uid(kind, one.meta.tenant, one.meta.name, seed),
        (old.meta.generation if old else 0) + spec_changed,
        draft.revision,
        old.meta.created_s if old else draft.now_s,
    )
    stored = replace(one, meta=meta)
    warnings = _write(draft, stored, old, changes, cause)
    return Applied(ref_to(kind, meta), "changed" if old else "created", changes if old else (), warnings, stored)


def ref_to(kind: str, meta: Meta) -> ObjectRef:
    return ObjectRef(kind, meta.name, meta.tenant, meta.uid)


def _write(
    draft: Draft, stored: Object, old: Object | None, changes: tuple[Change, ...], cause: str
) -> tuple[str, ...]:
    record: Record
    match stored:
        case Environment():
            return _write_environment(draft, stored, changes if old else (), cause)
        case Host():
            known = draft.state.hosts.get(stored.meta.name)
            record = replace(known, host=stored) if known else HostRecord(stored)
            draft.sightings.append(CapacityChanged())
        case Policy() | Tenant():
            record = stored
            draft.sightings.append(CapacityChanged())
        case Volume():
            there = draft.state.volumes.get(key_of_object(stored))
            record = replace(there, volume=stored) if there else VolumeRecord(stored)
        case _:
            record = stored
    draft.put(record)
    return ()


def _write_environment(draft: Draft, stored: Environment, changes: tuple[Change, ...], cause: str) -> tuple[str, ...]:
    state, generation = draft.state, stored.meta.generation
    known = state.environments.get(tenant_key(stored.meta.tenant, stored.meta.name))
    if known is None:
        told = 0 if stored.spec.gang else -1
        draft.put(EnvironmentRecord(stored, generation, generation, cause=cause, gang_told=told))
        return ()
    effects = {c.effect for c in changes}
    restart = generation if "restart" in effects else known.restart_generation
    replaced = generation if "replace" in effects else known.replace_generation
    warnings: list[str] = []
    old = known.environment
    if effects & {"restart", "replace"}:
        _keep_spec(draft, known)
        placed = any(i.meta.uid in state.instance_placements for i in state.instances_of(old.meta.uid))
        for effect, how in (
            ("restart", "take effect when an instance is next stopped and started"),
            ("replace", "take effect on new instances, and on those that are rebuilt"),
        ):
            paths = [c.path for c in changes if c.effect == effect]
            if paths and placed and stored.spec.update_strategy is None:
                warnings.append(f"{', '.join(paths)}: {how}")
    if changes:
        # A changed environment may fit where it did not.
        draft.sightings.append(CapacityChanged())
    draft.put(replace(known, environment=stored, restart_generation=restart, replace_generation=replaced, cause=cause))
    return tuple(warnings)


def _keep_spec(draft: Draft, known: EnvironmentRecord) -> None:
    """Keep the old spec for the instances that still carry fields of it.

    Instances say the generation at which they took their fields; a spec is kept under each generation that they name.
    """
    state, uid = draft.state, known.environment.meta.uid
    current = {
        generation
        for instance in state.instances_of(uid)
        for generation in (instance.restart_generation, instance.replace_generation)
        if generation >= min(known.restart_generation, known.replace_generation)
    }
    for generation in current:
        if f"{uid}/{generation}" not in state.specs:
            draft.put(RevisionRecord(uid, generation, known.environment.spec))
