"""Who there is and what he may do: Tenant, User, RoleBinding. Frozen types and the rules of meaning.

A role is a set of permissions and a scope is where they hold; both are decided on in the manager (`casemate_manager.access`).
A tenant that nobody made has no quotas: names of tenants need no object.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from casemate_core.errors import Violation, shown
from casemate_core.quantity import BadQuantity, parse_mib, parse_millicpus
from casemate_core.spec.meta import NAME_REMEDY, Meta, check_meta, check_name

MAX_QUOTAS: Final = 64
MAX_USERS: Final = 1000
MAX_SUBJECT: Final = 256
#: Plain names of quotas; those of GPUs by model are ``gpus/<model>``.
QUOTAS: Final = ("cpus", "memory", "gpus", "vfs", "environments", "volumes", "storage", "priority")
#: Those that are sizes.
SIZES: Final = ("memory", "storage")
#: Stands before the name of a group of an identity provider, where a user is named.
GROUP: Final = "group:"
ROLES: Final = ("viewer", "console", "operator", "tenant-admin", "platform-admin")
_COUNT = re.compile(r"-?[0-9]{1,9}\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant as it is stored. ``quotas`` in the units of their names: ``cpus`` in thousandths, sizes in MiB, counts."""

    meta: Meta
    quotas: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class User:
    """A person or a program. ``tenant`` is whose administrators may keep its access keys."""

    meta: Meta
    type: str = "person"
    disabled: bool = False
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Scope:
    """Where a role holds: the fleet, one tenant, or one environment of a tenant."""

    tenant: str = ""
    environment: str = ""

    def __str__(self) -> str:
        if not self.tenant:
            return "fleet"
        return f"environment/{self.tenant}/{self.environment}" if self.environment else f"tenant/{self.tenant}"

    def covers(self, other: "Scope") -> bool:
        """Whether what holds here holds there."""
        if not self.tenant:
            return True
        return self.tenant == other.tenant and self.environment in ("", other.environment)


FLEET: Final = Scope()


@dataclass(frozen=True, slots=True)
class RoleBinding:
    """A role given to users (and groups, as ``group:NAME``) in a scope."""

    meta: Meta
    role: str
    users: tuple[str, ...]
    scope: Scope = FLEET


class BadScope(ValueError):
    """The text names no scope."""


def parse_scope(text: str) -> Scope:
    """``fleet``, ``tenant/NAME`` or ``environment/TENANT/NAME``. Raises BadScope."""
    kind, *names = text.split("/")
    if any(True for name in names for _ in check_name("", name)):
        raise BadScope(text)
    match kind, names:
        case "fleet", []:
            return FLEET
        case "tenant", [tenant]:
            return Scope(tenant)
        case "environment", [tenant, environment]:
            return Scope(tenant, environment)
    raise BadScope(text)


def parse_quota(name: str, text: str) -> int:
    """A quota in the unit of its name. Raises BadQuantity."""
    if name == "cpus":
        return parse_millicpus(text)
    if name in SIZES:
        return parse_mib(text)
    if not _COUNT.match(text) or (name != "priority" and text.startswith("-")):
        raise BadQuantity("is not a whole number", "write a number such as 10")
    return int(text)


def check_tenant(tenant: Tenant) -> Iterator[Violation]:
    """Violations of the rules of meaning."""
    yield from check_meta("Tenant", tenant.meta)
    if len(tenant.quotas) > MAX_QUOTAS:
        yield Violation("spec.quotas", str(len(tenant.quotas)), "are too many", f"keep at most {MAX_QUOTAS}")
    for name in tenant.quotas:
        kind, slash, model = name.partition("/")
        if name not in QUOTAS and not (kind == "gpus" and slash and model and len(model) <= 128):
            yield Violation(
                f"spec.quotas[{shown(name)}]", "", "is no quota", f"write one of {', '.join(QUOTAS)}, gpus/<model>"
            )


def check_user(user: User) -> Iterator[Violation]:
    """Violations of the rules of meaning."""
    yield from check_meta("User", user.meta)
    if user.tenant:
        yield from check_name("spec.tenant", user.tenant)


def check_role_binding(binding: RoleBinding) -> Iterator[Violation]:
    """Violations of the rules of meaning."""
    yield from check_meta("RoleBinding", binding.meta)
    if binding.role == "platform-admin" and binding.scope != FLEET:
        yield Violation("spec.scope", str(binding.scope), "does not go with the role platform-admin", "write fleet")
    if binding.role == "tenant-admin" and (binding.scope == FLEET or binding.scope.environment):
        yield Violation(
            "spec.scope", str(binding.scope), "does not go with the role tenant-admin", "write tenant/<name>"
        )
    if not binding.users:
        yield Violation("spec.users", "", "is missing", "name at least one user, or group:NAME")
    if len(binding.users) > MAX_USERS:
        yield Violation("spec.users", str(len(binding.users)), "are too many", f"keep at most {MAX_USERS}, or a group")
    for i, name in enumerate(binding.users):
        if not name.removeprefix(GROUP) or len(name) > MAX_SUBJECT or not name.isprintable() or " " in name:
            yield Violation(f"spec.users[{i}]", shown(name), "names nobody", NAME_REMEDY)
