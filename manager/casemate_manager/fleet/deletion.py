"""PURE. What users delete: what is used by others is not, and what runs is ended first."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from casemate_core.cause import cause_of
from casemate_core.errors import Conflict, InvalidSpec, NotFound, Violation, shown
from casemate_core.plain import from_plain, to_plain
from casemate_core.spec.meta import DEFAULT_TENANT, Meta
from casemate_core.spec.secret import references
from casemate_core.spec.views import ObjectRef
from casemate_manager.fleet import volumes
from casemate_manager.fleet.commands import (
    Batch,
    DeleteAnswer,
    DeleteResource,
)
from casemate_manager.fleet.draft import Draft
from casemate_manager.fleet.objects import ref_to
from casemate_manager.fleet.observed import CapacityChanged, ForgetHost, Observed
from casemate_manager.fleet.records import (
    RequestRecord,
    tenant_key,
)
from casemate_manager.fleet.requests import answered, check_key
from casemate_manager.fleet.state import State, named

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
                draft.event(ref_to(kind, meta), "Deleting", asked, cause=cause)
            placed = any(i.meta.uid in state.instance_placements for i in state.instances_of(meta.uid))
            return ref_to(kind, meta), placed
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
            draft.event(ref_to(kind, meta), "Deleted", "the secret was deleted")
            return ref_to(kind, meta), False
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
            draft.event(ref_to(kind, meta), word, f"{told}{by}", cause=cause_of(command.request_key))
            return ref_to(kind, meta), pending
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
    draft.event(
        ref_to(kind, meta), "Deleted", f"the {kind.lower()} was deleted{by}", cause=cause_of(command.request_key)
    )
    return ref_to(kind, meta), False


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
