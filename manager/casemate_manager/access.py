"""PURE. Who may do what: one table of roles, one of kinds, one of RPCs, and the question that all of them answer.

Theory of operation. A *permission* is asked for in a *scope* (the fleet, a tenant, an environment). A principal has a
permission there if one of his role bindings carries it in a scope that covers the one asked about. Nothing is allowed by
absence: an RPC without a row is refused to everybody, and a test fails.

What is refused must not tell what is there. Where the caller may not even read, the answer is the one for an object that does
not exist; where he may read but not act, it is a denial that names the permission.

Development mode (plaintext on loopback, no token shown) is the principal `DEVELOPMENT`, who may do everything; `casemate
whoami` and the manager's log say so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from casemate_core.errors import CallerError, CasemateError, NotFound
from casemate_core.spec.access import FLEET, GROUP, RoleBinding, Scope, User


class Permission(StrEnum):
    """What can be allowed."""

    #: Even to who shows no identity.
    ANYONE = "anyone"
    #: To every known principal, about himself or about what is public.
    SIGNED_IN = "signed-in"
    #: To hosts alone, by their certificate; judged where their streams are served.
    HOST = "host"
    #: See what environments stand on: images, networks, classes. In any scope.
    USE = "use"
    READ = "read"
    LOGS = "logs"
    #: Change environments and what belongs to them.
    WRITE = "write"
    SECRETS = "secrets"
    #: Run commands in containers and guests.
    EXEC = "exec"
    CONSOLE = "console"
    #: Cordon and drain, taints and labels of hosts.
    OPERATE = "operate"
    #: Give roles, keep access keys.
    GRANT = "grant"
    AUDIT = "audit"
    #: Everything that the platform team keeps: tenants, users, images, networks, policies.
    MANAGE = "manage"


P = Permission
_VIEWER: Final = frozenset({P.USE, P.READ, P.LOGS})
_OPERATOR: Final = _VIEWER | {P.WRITE, P.SECRETS, P.OPERATE}
_TENANT_ADMIN: Final = _OPERATOR | {P.EXEC, P.CONSOLE, P.GRANT, P.AUDIT}
#: Role → permissions. An operator has no way into guests: that is a role of its own, which can be bound to one environment.
ROLES: Final[Mapping[str, frozenset[Permission]]] = {
    "viewer": _VIEWER,
    "console": _VIEWER | {P.EXEC, P.CONSOLE},
    "operator": _OPERATOR,
    "tenant-admin": _TENANT_ADMIN,
    "platform-admin": _TENANT_ADMIN | {P.MANAGE},
}

#: Kind → permissions to read it and to write it, in the scope of the object (`scope_of`).
KINDS: Final[Mapping[str, tuple[Permission, Permission]]] = {
    "Environment": (P.READ, P.WRITE),
    "Instance": (P.READ, P.WRITE),
    "Pod": (P.READ, P.WRITE),
    "Placement": (P.READ, P.WRITE),
    "Event": (P.READ, P.WRITE),
    "Operation": (P.READ, P.WRITE),
    "Volume": (P.READ, P.WRITE),
    "SecurityGroup": (P.READ, P.WRITE),
    "Secret": (P.READ, P.SECRETS),
    "Host": (P.READ, P.OPERATE),
    "GPU": (P.READ, P.OPERATE),
    "Class": (P.USE, P.MANAGE),
    "Image": (P.USE, P.MANAGE),
    "Network": (P.USE, P.MANAGE),
    "Policy": (P.READ, P.MANAGE),
    "Reservation": (P.READ, P.MANAGE),
    "Tenant": (P.READ, P.MANAGE),
    "User": (P.READ, P.MANAGE),
    "RoleBinding": (P.READ, P.GRANT),
}
#: Kinds of which only those see anything who may read the fleet.
FLEET_KINDS: Final = frozenset({"Host", "GPU", "Policy", "Reservation"})


class Where(StrEnum):
    """How the scope of a call is found."""

    NOWHERE = "nowhere"
    FLEET = "fleet"
    #: The tenant and environment (or instance) that the request names; in a stream, its first message.
    NAMED = "named"
    #: Each object of the request, by its kind.
    OBJECTS = "objects"
    #: The answer holds what the caller may see, and nothing else.
    VISIBLE = "visible"


@dataclass(frozen=True, slots=True)
class Row:
    """What a call needs. ``permission`` is the kind's own where the scope is that of objects.

    ``ticket``: the action for which it needs a ticket besides; empty where it needs none.
    """

    permission: Permission
    where: Where = Where.NOWHERE
    ticket: str = ""


#: Full name of each method → what it needs. A new RPC gets its row here.
RPCS: Final[Mapping[str, Row]] = {
    "/casemate.v1.Fleet/Apply": Row(P.WRITE, Where.OBJECTS),
    "/casemate.v1.Fleet/Get": Row(P.READ, Where.OBJECTS),
    "/casemate.v1.Fleet/List": Row(P.READ, Where.VISIBLE),
    "/casemate.v1.Fleet/Watch": Row(P.READ, Where.VISIBLE),
    "/casemate.v1.Fleet/Delete": Row(P.WRITE, Where.OBJECTS),
    "/casemate.v1.Fleet/Operate": Row(P.WRITE, Where.NAMED),
    "/casemate.v1.Fleet/Logs": Row(P.LOGS, Where.NAMED),
    "/casemate.v1.Fleet/Exec": Row(P.EXEC, Where.NAMED, "exec"),
    "/casemate.v1.Fleet/Events": Row(P.READ, Where.VISIBLE),
    "/casemate.v1.Fleet/Explain": Row(P.SIGNED_IN),
    "/casemate.v1.Fleet/Why": Row(P.READ, Where.NAMED),
    "/casemate.v1.Fleet/Top": Row(P.READ, Where.FLEET),
    "/casemate.v1.Fleet/Version": Row(P.SIGNED_IN),
    "/casemate.v1.Identity/WhoAmI": Row(P.SIGNED_IN),
    # Of access keys and tokens: one's own, or with `grant` where their user is looked after; judged for each.
    "/casemate.v1.Identity/CreateKey": Row(P.SIGNED_IN),
    "/casemate.v1.Identity/ListKeys": Row(P.SIGNED_IN),
    "/casemate.v1.Identity/ChangeKey": Row(P.SIGNED_IN),
    "/casemate.v1.Identity/RotateKey": Row(P.SIGNED_IN),
    "/casemate.v1.Identity/IssueToken": Row(P.SIGNED_IN),
    "/casemate.v1.Audit/Records": Row(P.AUDIT, Where.VISIBLE),
    "/casemate.v1.Audit/Ends": Row(P.AUDIT, Where.FLEET),
    "/casemate.v1.Audit/Witnesses": Row(P.AUDIT, Where.FLEET),
    # Where the name leads to; the permission of the action that is named is judged there.
    "/casemate.v1.Channels/Admit": Row(P.READ, Where.NAMED),
    "/casemate.v1.Channels/Console": Row(P.CONSOLE, Where.NAMED, "console"),
    "/casemate.v1.Channels/ConsoleLog": Row(P.LOGS, Where.NAMED),
    "/casemate.v1.Channels/Forward": Row(P.EXEC, Where.NAMED, "forward"),
    "/casemate.v1.Channels/Copy": Row(P.EXEC, Where.NAMED, "copy"),
    "/casemate.v1.Channels/Authorize": Row(P.EXEC, Where.NAMED, "authorize"),
    "/casemate.v1.Gpus/Order": Row(P.OPERATE, Where.FLEET),
    "/casemate.v1.HostAccess/CreateHostToken": Row(P.OPERATE, Where.FLEET),
    "/casemate.v1.HostAccess/ListHostTokens": Row(P.OPERATE, Where.FLEET),
    "/casemate.v1.HostAccess/RevokeHostToken": Row(P.OPERATE, Where.FLEET),
    "/casemate.v1.HostAccess/RevokeHost": Row(P.OPERATE, Where.FLEET),
    "/casemate.v1.HostAccess/ListAuthorities": Row(P.MANAGE, Where.FLEET),
    "/casemate.v1.HostAccess/RollAuthority": Row(P.MANAGE, Where.FLEET),
    "/casemate.v1.HostAccess/RetireAuthority": Row(P.MANAGE, Where.FLEET),
    # Who joins has no identity yet: a token, or a request signed by the host's own key, says what he may.
    "/casemate.host.v1.Enrolment/Roots": Row(P.ANYONE),
    "/casemate.host.v1.Enrolment/Enrol": Row(P.ANYONE),
    "/casemate.host.v1.Enrolment/Renew": Row(P.ANYONE),
    "/casemate.v1.Support/Collect": Row(P.MANAGE, Where.FLEET),
    "/casemate.v1.HostCare/Fsck": Row(P.OPERATE, Where.FLEET),
    "/casemate.host.v1.HostLink/Session": Row(P.HOST),
    "/casemate.host.v1.HostLink/Channel": Row(P.HOST),
    "/casemate.host.v1.HostLink/MigrationCertificate": Row(P.HOST),
    "/grpc.health.v1.Health/Check": Row(P.ANYONE),
    "/grpc.health.v1.Health/List": Row(P.ANYONE),
    "/grpc.health.v1.Health/Watch": Row(P.ANYONE),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Row(P.SIGNED_IN),
}

#: Action of a ticket → the permission that it needs.
ACTIONS: Final[Mapping[str, Permission]] = {row.ticket: row.permission for row in RPCS.values() if row.ticket}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. ``how`` he showed it: ``certificate``, ``token``, ``key``, ``oidc``, or ``development``."""

    name: str
    how: str
    groups: tuple[str, ...] = ()

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names by which role bindings may mean him."""
        return (self.name, *(GROUP + group for group in self.groups))


DEVELOPMENT: Final = Principal("development", "development")


class Denied(CallerError):
    """The caller is known and may not do that."""

    reason = "PermissionDenied"

    def __init__(self, principal: str, permission: Permission, what: str) -> None:
        self.permission = permission
        super().__init__(f"{principal} may not {permission} {what}: ask for a role that may, see docs/access.md")


class Hidden(NotFound):
    """The caller may not read it: told as what is not there, and written down as what it is."""


class Unauthenticated(CallerError):
    """Who calls is not known."""

    reason = "Unauthenticated"


@dataclass(frozen=True, slots=True)
class Grants:
    """What one principal may do: permissions, each with the scope in which it holds."""

    principal: Principal
    roles: tuple[tuple[str, Scope], ...] = ()
    everything: bool = False

    def allows(self, permission: Permission, scope: Scope = FLEET) -> bool:
        """Whether he may, there."""
        if self.everything or permission in (P.ANYONE, P.SIGNED_IN):
            return True
        if permission is P.USE:
            return bool(self.roles)
        return any(permission in ROLES[role] and held.covers(scope) for role, held in self.roles)

    def anywhere(self, permission: Permission, tenant: str) -> bool:
        """Whether he may in the tenant or in any environment of it; in any tenant where none is named."""
        return self.everything or any(
            permission in ROLES[role] and (not tenant or held.tenant in ("", tenant)) for role, held in self.roles
        )


def grants_of(
    principal: Principal,
    bindings_of: Mapping[str, Mapping[str, RoleBinding]],
    users: Mapping[str, User],
    admins: frozenset[str] = frozenset(),
) -> Grants:
    """What a principal may do by the role bindings. ``admins`` are platform administrators by the manager's own settings."""
    if principal == DEVELOPMENT:
        return Grants(principal, everything=True)
    user = users.get(principal.name)
    if user is not None and user.disabled:
        return Grants(principal)
    bound = [b for subject in principal.subjects for b in bindings_of.get(subject, {}).values()]
    roles = [(b.role, b.scope) for b in bound]
    if principal.name in admins:
        roles.append(("platform-admin", FLEET))
    return Grants(principal, tuple(dict.fromkeys(roles)))


def environment_in(kind: str, name: str) -> str:
    """The environment that an object of this kind and name belongs to; empty where it is of the whole tenant."""
    match kind:
        case "Environment":
            return name
        case "Instance" | "Placement" | "Pod" | "Operation":
            return name.partition(".")[0].rpartition("-")[0]
        case _:
            return ""


def scope_of(kind: str, tenant: str, name: str) -> Scope:
    """The scope of a tenant's object, or of a tenant itself; the fleet for everything else.

    Of a RoleBinding and a User the object says it (`scope_of_binding`, `scope_of_user`).
    """
    if kind == "Tenant":
        return Scope(name)
    return Scope(tenant, environment_in(kind, name)) if tenant else FLEET


def scope_of_binding(binding: RoleBinding | None) -> Scope:
    """Where a role is given."""
    return FLEET if binding is None else binding.scope


def scope_of_user(user: User | None) -> Scope:
    """Whose administrators look after a user."""
    return Scope(user.tenant) if user is not None and user.tenant else FLEET


def refusal(grants: Grants, permission: Permission, scope: Scope, kind: str, name: str) -> CasemateError:
    """How to say no: as if there were nothing, to who may not read; by name of the permission, to who may."""
    readable = grants.allows(KINDS[kind][0] if kind in KINDS else P.READ, scope)
    if permission in (P.READ, P.USE) or not readable:
        return Hidden(kind, name)
    return Denied(grants.principal.name, permission, f"{kind.lower()} {name}")


def denied_in(grants: Grants, permission: Permission, scope: Scope) -> Denied:
    """The denial for a scope that the caller named himself: the same whether it exists or not."""
    return Denied(grants.principal.name, permission, f"in {scope}")
