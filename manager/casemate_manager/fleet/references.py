"""PURE. What an applied object may name: others that are there or come with it. And what it is given where it names nothing."""

import ipaddress
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from casemate_core.errors import InternalError, InvalidSpec, Violation
from casemate_core.quantity import format_mib
from casemate_core.spec.access import Tenant
from casemate_core.spec.environment import Environment
from casemate_core.spec.fleet import Image, Network, Policy
from casemate_core.spec.secret import Secret, references
from casemate_core.spec.views import Change
from casemate_core.spec.volume import Volume
from casemate_manager.fleet import volumes
from casemate_manager.fleet.commands import (
    Object,
)
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import (
    tenant_key,
)
from casemate_manager.fleet.state import State, named

#: What changes between two versions of an object, with the effect of each field (:mod:`casemate_wire.diff`).
Diff = Callable[[Object | None, Object], tuple[Change, ...]]
#: Violations that only the policy engine can see (expressions that do not compile).
PolicyCheck = Callable[[Policy], Iterable[Violation]]


@dataclass(frozen=True, slots=True)
class ObjectRules:
    """What the fleet is given to judge objects with."""

    diff: Diff
    check_policy: PolicyCheck


def subject(one: Object) -> str:
    return f"{type(one).__name__.lower()}/{one.meta.name}"


class Given:
    """Images, networks, volumes and tenants as they will be after the request."""

    def __init__(self, state: State, objects: tuple[Object, ...]) -> None:
        self.objects = objects
        self.volumes = {
            **{key: record.volume for key, record in state.volumes.items()},
            # What is there keeps what the manager writes of it.
            **{k: o for o in objects if isinstance(o, Volume) and (k := key_of_object(o)) not in state.volumes},
        }
        self.images = {**state.images, **{o.meta.name: o for o in objects if isinstance(o, Image)}}
        self.networks = {**state.networks, **{o.meta.name: o for o in objects if isinstance(o, Network)}}
        self.secrets = {
            **state.secrets,
            **{tenant_key(o.meta.tenant, o.meta.name): o for o in objects if isinstance(o, Secret) and o.sealed},
        }
        self.tenants = {**state.tenants, **{o.meta.name: o for o in objects if isinstance(o, Tenant)}}


def with_defaults(given: Given, one: Object) -> Object:
    """What an object leaves to others, written out, so that what is stored says exactly what is claimed."""
    if isinstance(one, Environment) and not one.spec.disk_mib and (image := given.images.get(one.spec.image)):
        return replace(one, spec=replace(one.spec, disk_mib=image.spec.size_mib))
    return one


def with_texts(one: Secret, old: Object | None) -> Secret:
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


def key_of_object(one: Object) -> str:
    return tenant_key(one.meta.tenant, one.meta.name)


def check_references(
    state: State, observed: Observed, given: Given, one: Object, old: Object | None, rules: ObjectRules
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
        raise InvalidSpec(found, subject(one))


def _check_environment(given: Given, one: Environment) -> Iterator[Violation]:
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


def _check_image(given: Given, path: str, name: str, kind: str) -> Iterator[Violation]:
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


def _check_network(given: Given, one: Network) -> Iterator[Violation]:
    subnet = ipaddress.IPv4Network(one.spec.subnet)
    for name, other in given.networks.items():
        if name != one.meta.name and subnet.overlaps(ipaddress.IPv4Network(other.spec.subnet)):
            yield Violation(
                "spec.subnet",
                one.spec.subnet,
                f"overlaps {other.spec.subnet} of network {name}",
                "choose a subnet of its own",
            )
