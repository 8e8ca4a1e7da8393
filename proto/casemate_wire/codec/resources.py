"""The envelope: what arrives from users as checked values, and what is shown to them as messages."""

from collections.abc import Callable
from typing import Any, assert_never

from casemate_core.errors import InvalidSpec, Violation
from casemate_core.spec.access import RoleBinding, Tenant, User, check_role_binding, check_tenant, check_user
from casemate_core.spec.environment import Environment, check_environment
from casemate_core.spec.fleet import (
    Host,
    Image,
    Network,
    Policy,
    check_host,
    check_image,
    check_network,
    check_policy,
)
from casemate_core.spec.meta import Meta
from casemate_core.spec.secret import Secret, check_secret
from casemate_core.spec.views import (
    EnvironmentStatus,
    EventView,
    GpuView,
    HostStatus,
    ImageStatus,
    InstanceView,
    NetworkStatus,
    OperationView,
    PlacementView,
    PodView,
    TenantStatus,
    VolumeStatus,
)
from casemate_core.spec.volume import Volume, check_volume
from casemate_wire import schema
from casemate_wire.codec import access, environment, fleet, gpus, views, volume
from casemate_wire.codec.check import check_message
from casemate_wire.v1 import operators_pb2 as pb

#: What users may apply in this release.
Object = Environment | Image | Network | Host | Policy | Tenant | User | RoleBinding | Secret | Volume
Status = EnvironmentStatus | ImageStatus | NetworkStatus | HostStatus | TenantStatus | VolumeStatus
View = InstanceView | PodView | PlacementView | OperationView | EventView | GpuView

_DECODERS: dict[str, tuple[Callable[[Any], Object], Callable[[Any], Any]]] = {
    "Environment": (environment.from_message, check_environment),
    "Image": (fleet.image_from_message, check_image),
    "Network": (fleet.network_from_message, check_network),
    "Host": (fleet.host_from_message, check_host),
    "Policy": (fleet.policy_from_message, check_policy),
    "Tenant": (access.tenant_from_message, check_tenant),
    "User": (access.user_from_message, check_user),
    "Secret": (access.secret_from_message, check_secret),
    "Volume": (volume.volume_from_message, check_volume),
    "RoleBinding": (access.role_binding_from_message, check_role_binding),
}


def from_message(resource: pb.Resource) -> Object:
    """The object that a user sent, checked for shape and meaning. Raises InvalidSpec with every violation found."""
    kind = schema.kind_of(resource)
    if not kind:
        raise InvalidSpec((Violation("object", "", "is missing", "send one object in each resource"),))
    if kind not in _DECODERS:
        problem = (
            "is written by the manager only" if kind in schema.READ_ONLY_KINDS else "is not served by this release"
        )
        raise InvalidSpec((Violation("kind", kind, problem, f"apply one of {', '.join(_DECODERS)}"),))
    message = schema.object_of(resource)
    subject = f"{kind.lower()}/{message.metadata.name}"  # type: ignore[attr-defined]
    found = tuple(check_message(message))
    if found:
        raise InvalidSpec(found, subject)
    decode, check = _DECODERS[kind]
    value = decode(message)
    if found := tuple(check(value)):
        raise InvalidSpec(found, subject)
    return value


def to_message(value: Object | View, status: Status | None = None) -> pb.Resource:
    """What is shown to users."""
    match value:
        case Environment():
            assert status is None or isinstance(status, EnvironmentStatus)
            return pb.Resource(environment=environment.to_message(value, status))
        case Image():
            assert status is None or isinstance(status, ImageStatus)
            return pb.Resource(image=fleet.image_to_message(value, status))
        case Network():
            assert status is None or isinstance(status, NetworkStatus)
            return pb.Resource(network=fleet.network_to_message(value, status))
        case Host():
            assert status is None or isinstance(status, HostStatus)
            return pb.Resource(host=fleet.host_to_message(value, status))
        case Policy():
            return pb.Resource(policy=fleet.policy_to_message(value))
        case Tenant():
            assert status is None or isinstance(status, TenantStatus)
            return pb.Resource(tenant=access.tenant_to_message(value, status))
        case User():
            return pb.Resource(user=access.user_to_message(value))
        case Secret():
            return pb.Resource(secret=access.secret_to_message(value))
        case Volume():
            assert status is None or isinstance(status, VolumeStatus)
            return pb.Resource(volume=volume.volume_to_message(value, status))
        case RoleBinding():
            return pb.Resource(role_binding=access.role_binding_to_message(value))
        case InstanceView():
            return pb.Resource(instance=views.instance_to_message(value))
        case PodView():
            return pb.Resource(pod=views.pod_to_message(value))
        case PlacementView():
            return pb.Resource(placement=views.placement_to_message(value))
        case OperationView():
            return pb.Resource(operation=views.operation_to_message(value))
        case GpuView():
            return pb.Resource(gpu=gpus.view_to_message(value))
        case EventView():
            return pb.Resource(event=views.event_to_message(value))
        case _:
            assert_never(value)


def kind_name(value: Object | View) -> str:
    """Kind of a value."""
    return schema.kind_of(to_message(value)) if isinstance(value, View) else type(value).__name__


def meta_of(value: Object | View) -> Meta:
    """Metadata of a value."""
    return value.meta
