"""PURE. Who asked: a command in the name of a caller, and whether he may have it done.

Judged in the one door, on the state that the command would change: a role that was taken away before is not used after.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from casemate_core.errors import InvalidSpec, Violation
from casemate_core.spec.access import FLEET, RoleBinding, Scope, User
from casemate_core.spec.meta import DEFAULT_TENANT, TENANT_KINDS
from casemate_core.spec.operation import Verb
from casemate_manager.access import (
    KINDS,
    Denied,
    Grants,
    Permission,
    Principal,
    denied_in,
    refusal,
    scope_of,
    scope_of_binding,
    scope_of_user,
)
from casemate_manager.fleet import keys
from casemate_manager.fleet.commands import (
    ApplyResources,
    ChangeAccessKey,
    Command,
    DeleteResource,
    MakeAccessKey,
    Object,
    OperateInstances,
)
from casemate_manager.fleet.state import State


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asked, and from where: what an audit record says of him."""

    principal: Principal
    address: str = ""
    client: str = ""
    request: str = ""


@dataclass(frozen=True, slots=True)
class By:
    """A command in the name of somebody. It is judged, and it is audited."""

    actor: Actor
    command: Command


def check(state: State, grants: Grants, command: Command) -> None:
    """Whether the caller may have this done. Raises Denied, NotFound, InvalidSpec; other commands were judged by their RPC."""
    if grants.everything:
        return
    match command:
        case ApplyResources():
            for one in command.objects:
                _check_write(state, grants, one)
        case DeleteResource():
            _check_delete(state, grants, command)
        case OperateInstances(verb=Verb.MIGRATE) if not grants.allows(Permission.OPERATE):
            # It takes room of a host, and says of hosts what they are.
            raise Denied(grants.principal.name, Permission.OPERATE, "hosts, which a migration chooses between")
        case MakeAccessKey() | ChangeAccessKey():
            keys.check(state, grants, command)
        case _:
            pass


def _check_write(state: State, grants: Grants, one: Object) -> None:
    kind, name = type(one).__name__, one.meta.name
    permission = KINDS[kind][1]
    for scope in _scopes(state, one):
        if not grants.allows(permission, scope):
            raise denied_in(grants, permission, scope)
    if isinstance(one, RoleBinding) and not grants.allows(permission):
        known = state.role_bindings.get(name)
        prefix = f"{one.scope.tenant}-"
        if not name.startswith(prefix):
            raise InvalidSpec(
                (
                    Violation(
                        "metadata.name", name, "is not a name for a role in one tenant", f"begin it with {prefix}"
                    ),
                ),
                f"rolebinding/{name}",
            )
        if known is not None and not grants.allows(permission, known.scope):
            raise Denied(grants.principal.name, permission, f"rolebinding {name}")


def _scopes(state: State, one: Object) -> Iterator[Scope]:
    match one:
        case RoleBinding():
            yield one.scope
        case User():
            yield FLEET
        case _:
            yield scope_of(type(one).__name__, one.meta.tenant, one.meta.name)


def _check_delete(state: State, grants: Grants, command: DeleteResource) -> None:
    kind, name = command.kind, command.name
    if kind not in KINDS:
        return  # refused for what it is
    scope = object_scope(state, kind, command.tenant, name)
    permission = KINDS[kind][1]
    if not grants.allows(permission, scope):
        raise refusal(grants, permission, scope, kind, name)


def object_scope(state: State, kind: str, tenant: str, name: str) -> Scope:
    """The scope of an object, found by its name."""
    if kind == "RoleBinding":
        return scope_of_binding(state.role_bindings.get(name))
    if kind == "User":
        return scope_of_user(state.users.get(name))
    if kind == "Event":
        event = state.events.get(name)
        return scope_of(event.regarding.kind, event.regarding.tenant, event.regarding.name) if event else FLEET
    return scope_of(kind, (tenant or DEFAULT_TENANT) if kind in TENANT_KINDS else "", name)
