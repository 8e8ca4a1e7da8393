"""Reads of committed state, for get, list and watch: objects of one kind by key, with their names for deleted ones.

One table, ``READERS``: a kind is served when it is in it. A reader yields ``(key, message)`` pairs; a key may give several
objects (the pods of an instance).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from casemate_core.errors import InvalidSpec, NotFound, Violation, shown
from casemate_core.selector import Selector
from casemate_core.spec.meta import TENANT_KINDS, Meta
from casemate_manager import views
from casemate_manager.fleet import gpus
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import InstanceRecord, instance_or_environment, tenant_key
from casemate_manager.fleet.state import State
from casemate_wire.codec import resources
from casemate_wire.v1 import operators_pb2 as pb

EVERYTHING = Selector()


@dataclass(frozen=True, slots=True)
class Found:
    """One object: what it is selected by, and how to show it (made only for those that are shown)."""

    meta: Meta
    owners: frozenset[str]
    show: Callable[[], pb.Resource]


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked for. Empty words ask for everything."""

    kind: str
    tenant: str = ""
    selector: Selector = EVERYTHING
    owner: str = ""
    name: str = ""
    #: What the caller may see, and how it is shown to him.
    sees: Callable[[str, Meta], bool] = lambda kind, meta: True
    shown: Callable[[pb.Resource], pb.Resource] = lambda resource: resource

    def wants(self, found: Found) -> bool:
        """Whether an object is asked for."""
        if self.tenant and self.kind in TENANT_KINDS and found.meta.tenant != self.tenant:
            return False
        if self.name and found.meta.name != self.name:
            return False
        if self.owner and self.owner not in found.owners:
            return False
        return self.selector.matches(found.meta.labels) and self.sees(self.kind, found.meta)

    def wanted_once(self, found: Found) -> bool:
        """Whether other labels are all that keeps an object out: it may have had them."""
        return not self.selector.matches(found.meta.labels) and replace(self, selector=EVERYTHING).wants(found)


class Reader:
    """Looks objects up in one pair of committed state and observations."""

    def __init__(self, state: State, observed: Observed) -> None:
        self._state = state
        self._observed = observed

    def keys(self, kind: str) -> list[str]:
        """All keys of a kind, in the order of names. Raises InvalidSpec for a kind that has no objects to read."""
        state = self._state
        if kind in ("Instance", "Pod"):
            return [state.instance_names[name] for name in sorted(state.instance_names)]
        tables: dict[str, Iterable[str]] = {
            "Environment": state.environments,
            "Host": state.hosts,
            "Image": state.images,
            "Network": state.networks,
            "Policy": state.policies,
            "Tenant": state.tenants,
            "User": state.users,
            "RoleBinding": state.role_bindings,
            "Secret": state.secrets,
            "Volume": state.volumes,
            "Placement": state.placements,
            "Event": state.events,
            "Operation": state.operations,
            "GPU": state.gpu_hosts,
        }
        if kind not in tables:
            known = ", ".join(sorted([*tables, "Instance", "Pod"]))
            raise InvalidSpec(
                (Violation("kind", shown(kind), "is not served by this release", f"ask for one of {known}"),)
            )
        return sorted(tables[kind])

    def find(self, kind: str, key: str) -> Iterator[Found]:
        """The objects of a key; nothing where it is gone."""
        state, observed = self._state, self._observed
        if kind == "Environment" and (environment := state.environments.get(key)):
            value = environment.environment
            yield Found(
                value.meta,
                frozenset(),
                lambda: resources.to_message(value, views.environment_status(state, observed, environment)),
            )
        elif kind == "Host" and (host := state.hosts.get(key)):
            yield Found(
                host.host.meta,
                frozenset(),
                lambda: resources.to_message(host.host, views.host_status(state, observed, host)),
            )
        elif kind == "Image" and (image := state.images.get(key)):
            yield Found(
                image.meta, frozenset(), lambda: resources.to_message(image, views.image_status(state, observed, key))
            )
        elif kind == "Network" and (network := state.networks.get(key)):
            yield Found(
                network.meta, frozenset(), lambda: resources.to_message(network, views.network_status(state, key))
            )
        elif kind == "Policy" and (policy := state.policies.get(key)):
            yield Found(policy.meta, frozenset(), lambda: resources.to_message(policy))
        elif kind == "Tenant" and (tenant := state.tenants.get(key)):
            yield Found(
                tenant.meta, frozenset(), lambda: resources.to_message(tenant, views.tenant_status(state, tenant))
            )
        elif kind == "User" and (user := state.users.get(key)):
            yield Found(user.meta, frozenset(), lambda: resources.to_message(user))
        elif kind == "Secret" and (secret := state.secrets.get(key)):
            yield Found(secret.meta, frozenset(), lambda: resources.to_message(secret))
        elif kind == "Volume" and (volume := state.volumes.get(key)):
            its = views.volume_status(state, observed, volume)
            owners = frozenset({its.environment, its.instance, its.host} - {""})
            yield Found(volume.volume.meta, owners, lambda: resources.to_message(volume.volume, its))
        elif kind == "RoleBinding" and (binding := state.role_bindings.get(key)):
            yield Found(binding.meta, frozenset({binding.role}), lambda: resources.to_message(binding))
        elif kind == "Event" and (event := state.events.get(key)):
            yield Found(event.meta, frozenset({event.regarding.name}), lambda: resources.to_message(event))
        elif kind == "GPU" and (gpu := gpus.view(state, observed, key)) is not None:
            owners = frozenset({gpu.host, gpu.instance.partition("/")[2], gpu.model})
            yield Found(gpu.meta, owners, lambda: resources.to_message(gpu))
        elif kind == "Operation" and (operation := state.operations.get(key)):
            told = views.operation_view(state, operation)
            environment_name = operation.instance.rpartition("-")[0]
            owners = frozenset({operation.instance, operation.host, environment_name})
            yield Found(told.meta, owners, lambda: resources.to_message(told))
        elif kind == "Placement" and (placement := state.placements.get(key)):
            view = views.placement_view(state, placement)
            yield Found(view.meta, frozenset({view.host, view.instance}), lambda: resources.to_message(view))
        elif kind in ("Instance", "Pod") and (instance := state.instances.get(key)):
            yield from self._of_instance(kind, instance)

    def _of_instance(self, kind: str, record: InstanceRecord) -> Iterator[Found]:
        if kind == "Instance":
            view = views.instance_view(self._state, self._observed, record)
            yield Found(view.meta, frozenset({view.environment, view.host}), lambda: resources.to_message(view))
            return
        for pod in views.pod_views(self._state, self._observed, record):
            owners = frozenset({pod.environment, pod.instance, pod.host})
            yield Found(pod.meta, owners, partial(resources.to_message, pod))

    def get(self, kind: str, tenant: str, name: str) -> pb.Resource:
        """One object by name. Raises NotFound, or InvalidSpec for a kind that has no objects to read."""
        for key in self._keys_by_name(kind, tenant, name):
            for found in self.find(kind, key):
                if found.meta.name == name and (kind not in TENANT_KINDS or found.meta.tenant == tenant):
                    if kind == "Host":
                        host = self._state.hosts[key]
                        status = views.host_status(self._state, self._observed, host, topology=True)
                        return resources.to_message(host.host, status)
                    if kind == "GPU" and (gpu := gpus.view(self._state, self._observed, key, whole=True)) is not None:
                        return resources.to_message(gpu)
                    return found.show()
        raise NotFound(kind, name)

    def _keys_by_name(self, kind: str, tenant: str, name: str) -> list[str]:
        """Keys that may have the object: one, where names lead to it directly."""
        if kind in ("Environment", "Operation", "Secret", "Volume"):
            return [tenant_key(tenant, name)]
        if kind in ("Instance", "Pod"):
            uid = self._state.instance_names.get(tenant_key(tenant, name.partition(".")[0] if kind == "Pod" else name))
            return [uid] if uid else []
        if kind == "Placement":
            uid = self._state.instance_names.get(tenant_key(tenant, name))
            return list(self._state.instance_placements.get(uid, {})) if uid else []
        if kind not in ("Host", "Image", "Network", "Policy", "Tenant", "User", "RoleBinding", "Event", "GPU"):
            self.keys(kind)  # refuses a kind that is not served
        return [name]

    def instance(self, tenant: str, name: str) -> InstanceRecord:
        """See `instance_named`."""
        return instance_named(self._state, tenant, name)


def instance_named(state: State, tenant: str, name: str) -> InstanceRecord:
    """An instance by its name, or the only instance of the environment of that name. Raises NotFound, InvalidSpec."""
    if uid := state.instance_names.get(tenant_key(tenant, name)):
        return state.instances[uid]
    environment = state.environments.get(tenant_key(tenant, name))
    if environment is None:
        raise NotFound(instance_or_environment(name), name)
    instances = list(state.instances_of(environment.environment.meta.uid))
    if len(instances) == 1:
        return instances[0]
    if not instances:
        raise NotFound("Instance", f"{name}-0")
    names = ", ".join(i.meta.name for i in instances[:5])
    raise InvalidSpec((Violation("instance", shown(name), f"has {len(instances)} instances", f"name one: {names}"),))
