"""PURE. What users apply and delete: preconditions, references between objects, changes with their effect, idempotency.

All or nothing: every violation of every object is collected before anything is written. Instances are not made here but
by `advance`, so that what one request writes stays bounded, whatever it asks for.
"""

import hashlib
import ipaddress
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from casemate_core.cause import cause_of
from casemate_core.errors import Conflict, InternalError, InvalidSpec, NotFound, Violation, shown
from casemate_core.plain import from_plain, to_plain
from casemate_core.quantity import format_mib
from casemate_core.spec.access import RoleBinding, Tenant, User
from casemate_core.spec.environment import Environment
from casemate_core.spec.fleet import Host, Image, Network, Policy
from casemate_core.spec.meta import DEFAULT_TENANT, Meta
from casemate_core.spec.secret import Secret, references
from casemate_core.spec.views import Change, ObjectRef
from casemate_core.spec.volume import Volume
from casemate_manager.fleet import quotas, volumes
from casemate_manager.fleet.commands import (
    Applied,
    ApplyAnswer,
    ApplyResources,
    Batch,
    DeleteAnswer,
    DeleteResource,
    Object,
)
from casemate_manager.fleet.draft import MAX_RECORDS, Draft, make_uid
from casemate_manager.fleet.observed import CapacityChanged, ForgetHost, Observed
from casemate_manager.fleet.records import (
    EnvironmentRecord,
    HostRecord,
    Record,
    RequestRecord,
    RevisionRecord,
    VolumeRecord,
    tenant_key,
)
from casemate_manager.fleet.requests import answered, check_key
from casemate_manager.fleet.state import State, named

#: Objects of one request; with their records of change and the request's own they stay within one batch.
MAX_OBJECTS: Final = 60
#: Changed paths that an event names.
MOST_PATHS: Final = 8
#: Kinds that can be deleted.
DELETABLE: Final = (
    "Environment",
    "Image",
    "Network",
    "Host",
    "Policy",
    "Tenant",
    "User",
    "RoleBinding",
    "Secret",
    "Volume",
)

#: What changes between two versions of an object, with the effect of each field (:mod:`casemate_wire.diff`).
Diff = Callable[[Object | None, Object], tuple[Change, ...]]
#: Violations that only the policy engine can see (expressions that do not compile).
PolicyCheck = Callable[[Policy], Iterable[Violation]]


@dataclass(frozen=True, slots=True)
class ObjectRules:
    """What the fleet is given to judge objects with."""

    diff: Diff
    check_policy: PolicyCheck


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
    given = _Given(state, command.objects)
    quotas.check(state, command.objects, given.tenants)
    results = []
    for one in command.objects:
        one = _with_defaults(given, one)
        old = _stored(state, one)
        if isinstance(one, Secret):
            one = _with_texts(one, old)
        _check_preconditions(one, old)
        _check_references(state, observed, given, one, old, rules)
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
                _subject(one),
            )
        seen.add(key)


def _digest(command: ApplyResources) -> str:
    plain = [[type(o).__name__, to_plain(o)] for o in command.objects]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _subject(one: Object) -> str:
    return f"{type(one).__name__.lower()}/{one.meta.name}"


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
        raise Conflict(f"{_subject(one)} was to be changed at version {version}, and {has}: read it and apply again")
    if old is not None and old.meta.deleting_s:
        raise Conflict(f"{_subject(one)} is being deleted; wait until it is gone, then apply again")


# --- references -------------------------------------------------------------------------------------------------------


class _Given:
    """Images, networks, volumes and tenants as they will be after the request."""

    def __init__(self, state: State, objects: tuple[Object, ...]) -> None:
        self.objects = objects
        self.volumes = {
            **{key: record.volume for key, record in state.volumes.items()},
            # What is there keeps what the manager writes of it.
            **{k: o for o in objects if isinstance(o, Volume) and (k := _key(o)) not in state.volumes},
        }
        self.images = {**state.images, **{o.meta.name: o for o in objects if isinstance(o, Image)}}
        self.networks = {**state.networks, **{o.meta.name: o for o in objects if isinstance(o, Network)}}
        self.secrets = {
            **state.secrets,
            **{tenant_key(o.meta.tenant, o.meta.name): o for o in objects if isinstance(o, Secret) and o.sealed},
        }
        self.tenants = {**state.tenants, **{o.meta.name: o for o in objects if isinstance(o, Tenant)}}


def _with_defaults(given: _Given, one: Object) -> Object:
    """What an object leaves to others, written out, so that what is stored says exactly what is claimed."""
    if isinstance(one, Environment) and not one.spec.disk_mib and (image := given.images.get(one.spec.image)):
        return replace(one, spec=replace(one.spec, disk_mib=image.spec.size_mib))
    return one


def _with_texts(one: Secret, old: Object | None) -> Secret:
    """What was sealed before stays where nothing is written anew: labels are changed without knowing the texts."""
    if one.data:
        raise InternalError(f"secret {named(one.meta)} came here unsealed")
    if one.sealed:
        return one
    if not isinstance(old, Secret):
        raise InvalidSpec(
            (Violation("spec.data", "", "is missing", "write the texts, by key"),), f"secret/{one.meta.name}"
        )
    return replace(one, sealed=old.sealed)


def _key(one: Object) -> str:
    return tenant_key(one.meta.tenant, one.meta.name)


def _check_references(
    state: State, observed: Observed, given: _Given, one: Object, old: Object | None, rules: ObjectRules
) -> None:
    match one:
        case Environment():
            others = [o for o in given.objects if isinstance(o, Environment)]
            found = (
                *_check_environment(given, one),
                *volumes.check_environment(state, given.volumes, others, one),
            )
        case Volume():
            found = tuple(volumes.check_change(state, observed, one, given.objects))
        case Secret():
            found = tuple(_check_secret(state, one))
        case Network():
            found = tuple(_check_network(given, one)) if old is None else ()
        case Policy():
            found = tuple(rules.check_policy(one))
        case _:
            found = ()
    if found:
        raise InvalidSpec(found, _subject(one))


def _check_environment(given: _Given, one: Environment) -> Iterator[Violation]:
    spec = one.spec
    yield from _check_image(given, "spec.image", spec.image, "disk")
    image = given.images.get(spec.image)
    if image is not None and not spec.disk_mib:
        yield Violation(
            "spec.disk.size",
            "",
            f"is missing, and image {spec.image} does not say its size",
            "write a size such as 8Gi",
        )
    elif image is not None and spec.disk_mib < image.spec.size_mib:
        least = format_mib(image.spec.size_mib)
        yield Violation(
            "spec.disk.size", format_mib(spec.disk_mib), f"is smaller than image {spec.image}", f"write {least} or more"
        )
    for i, name in enumerate(spec.archives):
        yield from _check_image(given, f"spec.archives[{i}]", name, "oci-archive")
    for i, nic in enumerate(spec.nics):
        if nic.network not in given.networks:
            yield Violation(f"spec.nics[{i}].network", nic.network, "is not known", _one_of("network", given.networks))
        elif (kind := given.networks[nic.network].spec.type) != _NETWORK_OF[nic.type]:
            fitting = {n for n, net in given.networks.items() if net.spec.type == _NETWORK_OF[nic.type]}
            yield Violation(
                f"spec.nics[{i}].network",
                nic.network,
                f"is a network of type {kind}, and the interface is of type {nic.type}",
                _one_of(f"network of type {_NETWORK_OF[nic.type]}", fitting),
            )
    for path, name, key in references(spec.pods):
        secret = given.secrets.get(tenant_key(one.meta.tenant, name))
        if secret is None:
            yield Violation(f"{path}.name", name, "is no secret of this tenant", "apply the secret first")
        elif key and key not in secret.sealed:
            yield Violation(f"{path}.key", key, f"is not in secret {name}", _one_of("key", secret.sealed))
    longest = len(one.meta.name) + 1 + len(str(max(spec.replicas - 1, 0)))
    if longest > 63:
        yield Violation(
            "metadata.name", one.meta.name, "leaves no room for the number of an instance", "use a shorter name"
        )


#: Type of an interface to the type of network that it attaches to.
_NETWORK_OF = {"bridge": "nat", "sriov": "physical"}


def _check_secret(state: State, one: Secret) -> Iterator[Violation]:
    """Keys that pods name stay: a pod whose secret is gone would not start again."""
    for key in state.tenant_environments.get(one.meta.tenant, ()):
        environment = state.environments[key].environment
        for _, name, wanted in references(environment.spec.pods):
            if name == one.meta.name and wanted and wanted not in one.sealed:
                yield Violation(
                    f"spec.data[{wanted}]", "", f"is named by environment {environment.meta.name}", "keep the key"
                )


def _check_image(given: _Given, path: str, name: str, kind: str) -> Iterator[Violation]:
    image = given.images.get(name)
    if image is None:
        fitting = {n for n, i in given.images.items() if i.spec.type == kind}
        yield Violation(path, name, "is not known", _one_of("image", fitting))
    elif image.spec.type != kind:
        yield Violation(path, name, f"is an image of type {image.spec.type}", f"name one of type {kind}")


def _one_of(what: str, names: Iterable[str]) -> str:
    known = sorted(names)
    if not known:
        return f"apply the {what} first"
    return f"name one of {', '.join(known[:8])}{', …' if len(known) > 8 else ''}"


def _check_network(given: _Given, one: Network) -> Iterator[Violation]:
    subnet = ipaddress.IPv4Network(one.spec.subnet)
    for name, other in given.networks.items():
        if name != one.meta.name and subnet.overlaps(ipaddress.IPv4Network(other.spec.subnet)):
            yield Violation(
                "spec.subnet",
                one.spec.subnet,
                f"overlaps {other.spec.subnet} of network {name}",
                "choose a subnet of its own",
            )


# --- writing ----------------------------------------------------------------------------------------------------------


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
            raise InvalidSpec(fixed, _subject(one))
        if not changes:
            return Applied(_ref(kind, old.meta), "unchanged", object=old)
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
    return Applied(_ref(kind, meta), "changed" if old else "created", changes if old else (), warnings, stored)


def _ref(kind: str, meta: Meta) -> ObjectRef:
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
            there = draft.state.volumes.get(_key(stored))
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


# --- deletion ---------------------------------------------------------------------------------------------------------


def delete_resource(state: State, observed: Observed, command: DeleteResource, now_s: float) -> Batch:
    """End an object. Raises NotFound, Conflict, InvalidSpec."""
    check_key(command.request_key)
    plain = [command.kind, command.tenant, command.name, command.uid]
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    if (known := state.requests.get(command.request_key)) is not None:
        return Batch(answer=from_plain(DeleteAnswer, answered(known, digest)))
    draft = Draft(state, observed, now_s)
    ref, pending = _delete(draft, command)
    answer = DeleteAnswer(ref, pending, draft.revision)
    draft.put(RequestRecord(command.request_key, digest, now_s, to_plain(answer)))
    return draft.batch(answer)


def _delete(draft: Draft, command: DeleteResource) -> tuple[ObjectRef, bool]:
    state, kind, name = draft.state, command.kind, command.name
    match kind:
        case "Environment":
            key = tenant_key(command.tenant or DEFAULT_TENANT, name)
            record = state.environments.get(key)
            meta = _expected(command, record.environment.meta if record else None)
            assert record is not None
            if record.environment.spec.protected:
                raise Conflict(
                    f"environment {name} is protected: set spec.protected to false first, for example with casemate edit"
                )
            if not meta.deleting_s:
                meta = replace(meta, deleting_s=draft.now_s, resource_version=draft.revision)
                cause = cause_of(command.request_key)
                draft.put(replace(record, environment=replace(record.environment, meta=meta), cause=cause))
                asked = f"{command.by} asked for its deletion" if command.by else "deletion was asked for"
                draft.event(_ref(kind, meta), "Deleting", asked, cause=cause)
            placed = any(i.meta.uid in state.instance_placements for i in state.instances_of(meta.uid))
            return _ref(kind, meta), placed
        case "Image":
            image = state.images.get(name)
            meta = _expected(command, image.meta if image else None)
            _refuse_used(command, _users_of_image(state, name))
        case "Network":
            network = state.networks.get(name)
            meta = _expected(command, network.meta if network else None)
            _refuse_used(command, _users_of_network(state, name))
        case "Policy":
            policy = state.policies.get(name)
            meta = _expected(command, policy.meta if policy else None)
            draft.sightings.append(CapacityChanged())
        case "Secret":
            key = tenant_key(command.tenant or DEFAULT_TENANT, name)
            secret = state.secrets.get(key)
            meta = _expected(command, secret.meta if secret else None)
            _refuse_used(command, _users_of_secret(state, meta.tenant, name))
            draft.drop(kind, key)
            draft.event(_ref(kind, meta), "Deleted", "the secret was deleted")
            return _ref(kind, meta), False
        case "Volume":
            key = tenant_key(command.tenant or DEFAULT_TENANT, name)
            volume = state.volumes.get(key)
            meta = _expected(command, volume.volume.meta if volume else None)
            volumes.refuse_used(state, key)
            by = f" by {command.by}" if command.by else ""
            meta, pending = volumes.delete(draft, key)
            word, told = (
                ("Deleting", "its deletion was asked for") if pending else ("Deleted", "the volume was deleted")
            )
            draft.event(_ref(kind, meta), word, f"{told}{by}", cause=cause_of(command.request_key))
            return _ref(kind, meta), pending
        case "Tenant":
            tenant = state.tenants.get(name)
            meta = _expected(command, tenant.meta if tenant else None)
            _refuse_used(
                command,
                (named(state.environments[k].environment.meta) for k in state.tenant_environments.get(name, ())),
            )
        case "User":
            user = state.users.get(name)
            meta = _expected(command, user.meta if user else None)
        case "RoleBinding":
            binding = state.role_bindings.get(name)
            meta = _expected(command, binding.meta if binding else None)
        case "Host":
            host = state.hosts.get(name)
            meta = _expected(command, host.host.meta if host else None)
            _refuse_host(draft, name)
        case _:
            raise InvalidSpec(
                (Violation("kind", shown(kind), "cannot be deleted", f"name one of {', '.join(DELETABLE)}"),)
            )
    draft.drop(kind, name)
    by = f" by {command.by}" if command.by else ""
    draft.event(_ref(kind, meta), "Deleted", f"the {kind.lower()} was deleted{by}", cause=cause_of(command.request_key))
    return _ref(kind, meta), False


def _expected(command: DeleteResource, meta: Meta | None) -> Meta:
    if meta is None:
        raise NotFound(command.kind, command.name)
    if command.uid and command.uid != meta.uid:
        raise Conflict(f"{command.kind.lower()} {command.name} has uid {meta.uid}, not {shown(command.uid)}")
    return meta


def _users_of_image(state: State, name: str) -> Iterator[str]:
    for record in state.environments.values():
        specs = [record.environment.spec, *(state.spec_of(i) for i in state.instances_of(record.environment.meta.uid))]
        if any(name == spec.image or name in spec.archives for spec in specs):
            yield named(record.environment.meta)


def _users_of_secret(state: State, tenant: str, name: str) -> Iterator[str]:
    for key in state.tenant_environments.get(tenant, ()):
        environment = state.environments[key].environment
        if any(secret == name for _, secret, _ in references(environment.spec.pods)):
            yield named(environment.meta)


def _users_of_network(state: State, name: str) -> Iterator[str]:
    given = {state.instances[uid].environment_uid for uid in state.addresses.get(name, {}).values()}
    for record in state.environments.values():
        if record.environment.meta.uid in given or any(n.network == name for n in record.environment.spec.nics):
            yield named(record.environment.meta)


def _refuse_used(command: DeleteResource, users: Iterable[str]) -> None:
    names = sorted(users)
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise Conflict(
            f"{command.kind.lower()} {command.name} is used by environment {', '.join(names[:5])}{more}:"
            " delete or change them first"
        )


def _refuse_host(draft: Draft, name: str) -> None:
    count = len(draft.state.host_placements.get(name, {}))
    if count:
        raise Conflict(f"host {name} holds {count} instances: delete their environments first")
    if kept := volumes.held_by(draft.state, name):
        raise Conflict(f"host {name} has the data of volume {kept[0]} ({len(kept)} in all): delete them first")
    if draft.observed.host(name).connected:
        raise Conflict(f"host {name} is connected: stop its agent first")
    # What was to be deleted on it is gone with it.
    for key in draft.state.host_volumes.get(name, {}):
        draft.drop("Volume", key)
    if name in draft.state.inventories:
        draft.drop("Inventory", name)
    if name in draft.state.enrolments:
        draft.drop("Enrolment", name)
    draft.sightings += [ForgetHost(name), CapacityChanged()]
