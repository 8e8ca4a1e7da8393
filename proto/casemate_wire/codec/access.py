"""Tenant, User, RoleBinding, Secret ⇄ messages."""

from collections.abc import Mapping

from casemate_core.errors import InvalidSpec, Violation, shown
from casemate_core.quantity import BadQuantity, format_mib, format_millicpus
from casemate_core.spec.access import SIZES, BadScope, RoleBinding, Tenant, User, parse_quota, parse_scope
from casemate_core.spec.secret import Secret
from casemate_core.spec.views import TenantStatus
from casemate_wire.codec.basics import meta_from_message, meta_to_message
from casemate_wire.v1 import fleet_pb2 as pb

API = "casemate/v1"


def tenant_from_message(message: pb.Tenant) -> Tenant:
    """A checked message as a value. Raises InvalidSpec for a quota that is no quantity."""
    quotas: dict[str, int] = {}
    found: list[Violation] = []
    for name, text in sorted(message.spec.quotas.items()):
        try:
            quotas[name] = parse_quota(name, text)
        except BadQuantity as bad:
            found.append(Violation(f"spec.quotas[{shown(name)}]", shown(text), bad.problem, bad.remedy))
    if found:
        raise InvalidSpec(tuple(found), f"tenant/{message.metadata.name}")
    return Tenant(meta_from_message("Tenant", message.metadata), quotas)


def tenant_to_message(tenant: Tenant, status: TenantStatus | None = None) -> pb.Tenant:
    """The value, and its status where there is one."""
    return pb.Tenant(
        api_version=API,
        kind="Tenant",
        metadata=meta_to_message(tenant.meta),
        spec=pb.TenantSpec(quotas=_quantities(tenant.quotas)),
        status=pb.TenantStatus(used=_quantities(status.used)) if status else None,
    )


def _quantities(amounts: Mapping[str, int]) -> dict[str, str]:
    return {name: quota_text(name, amount) for name, amount in amounts.items()}


def quota_text(name: str, amount: int) -> str:
    """An amount as it is written under this name."""
    if name == "cpus":
        return format_millicpus(amount)
    return format_mib(amount) if name in SIZES else str(amount)


def user_from_message(message: pb.User) -> User:
    """A checked message as a value."""
    spec = message.spec
    return User(meta_from_message("User", message.metadata), spec.type or "person", spec.disabled, spec.tenant)


def user_to_message(user: User) -> pb.User:
    """The value."""
    return pb.User(
        api_version=API,
        kind="User",
        metadata=meta_to_message(user.meta),
        spec=pb.UserSpec(type=user.type, disabled=user.disabled, tenant=user.tenant),
    )


def role_binding_from_message(message: pb.RoleBinding) -> RoleBinding:
    """A checked message as a value. Raises InvalidSpec for a scope that is none."""
    spec = message.spec
    try:
        scope = parse_scope(spec.scope)
    except BadScope:
        raise InvalidSpec(
            (
                Violation(
                    "spec.scope",
                    shown(spec.scope),
                    "is no scope",
                    "write fleet, tenant/<name> or environment/<tenant>/<name>",
                ),
            ),
            f"rolebinding/{message.metadata.name}",
        ) from None
    return RoleBinding(meta_from_message("RoleBinding", message.metadata), spec.role, tuple(spec.users), scope)


def role_binding_to_message(binding: RoleBinding) -> pb.RoleBinding:
    """The value."""
    return pb.RoleBinding(
        api_version=API,
        kind="RoleBinding",
        metadata=meta_to_message(binding.meta),
        spec=pb.RoleBindingSpec(role=binding.role, users=binding.users, scope=str(binding.scope)),
    )


def secret_from_message(message: pb.Secret) -> Secret:
    """A checked message as a value, with what the user wrote; it is sealed before anything else is done with it."""
    return Secret(meta_from_message("Secret", message.metadata), data=dict(message.spec.data))


def secret_to_message(secret: Secret) -> pb.Secret:
    """The value, without its texts."""
    return pb.Secret(
        api_version=API,
        kind="Secret",
        metadata=meta_to_message(secret.meta),
        spec=pb.SecretSpec(fingerprints=secret.fingerprints),
    )
