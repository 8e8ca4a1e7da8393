"""PURE. What is shown: the records together with what hosts last said, in the closed set of phase words.

Unknown is said, not guessed: what runs on a host that is not heard from is Unknown, with the host's last words kept in its
conditions.
"""

from collections.abc import Iterator

from casemate_core.spec.environment import Environment
from casemate_core.spec.fleet import Host, Image, Network
from casemate_core.spec.instance import Phase, PodState
from casemate_core.spec.meta import Meta
from casemate_core.spec.views import (
    Condition,
    EnvironmentStatus,
    HostStatus,
    ImageStatus,
    InstanceView,
    NetworkStatus,
    PlacementView,
    PodView,
)
from casemate_manager.fleet.draft import make_uid
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import EnvironmentRecord, InstanceRecord, PlacementRecord
from casemate_manager.fleet.state import State

#: Phases in which a VM runs.
RUNNING = frozenset({Phase.RUNNING, Phase.READY})


def instance_phase(state: State, observed: Observed, instance: InstanceRecord) -> Phase:
    """One word for an instance."""
    if state.is_ending(instance):
        return Phase.DELETING
    placement = state.placement_of(instance.meta.uid)
    if placement is None:
        return Phase.PENDING
    seen = observed.instances.get(instance.meta.uid)
    host = observed.host(placement.host)
    if not host.connected:
        # Placed and never reported on is known to have been decided; whether it was done is not.
        return Phase.UNKNOWN
    if seen is None or seen.state is None or seen.host != placement.host:
        return Phase.PLACED if host.whole else Phase.UNKNOWN
    if not host.whole:
        return Phase.UNKNOWN
    return seen.state.phase


def instance_view(state: State, observed: Observed, instance: InstanceRecord) -> InstanceView:
    """An instance as it is shown."""
    spec = state.spec_of(instance)
    placement = state.placement_of(instance.meta.uid)
    seen = observed.instances.get(instance.meta.uid)
    return InstanceView(
        instance.meta,
        instance.environment,
        instance.ordinal,
        placement.host if placement else "",
        instance.nics,
        spec.cpu.count,
        spec.memory.size_mib,
        spec.image,
        spec.run,
        instance_phase(state, observed, instance).value,
        tuple(_instance_conditions(state, observed, instance, placement)),
        seen.state if seen else None,
        seen.heard_s if seen else 0.0,
    )


def _instance_conditions(
    state: State, observed: Observed, instance: InstanceRecord, placement: PlacementRecord | None
) -> Iterator[Condition]:
    if placement is None:
        attempt = observed.attempts.get(instance.meta.uid)
        if attempt is not None:
            yield Condition("Scheduled", "False", "Unschedulable", attempt.message, attempt.at_s)
        else:
            yield Condition("Scheduled", "False", "Waiting", "not tried yet", instance.meta.created_s)
        return
    yield Condition("Scheduled", "True", "Placed", f"on host {placement.host}", placement.created_s)
    host = observed.host(placement.host)
    if not host.connected:
        yield Condition("Ready", "Unknown", "HostUnknown", f"host {placement.host} is not heard from", host.heard_s)
    elif (seen := observed.instances.get(instance.meta.uid)) is not None and seen.state is not None:
        told = seen.state
        ready = "True" if told.phase is Phase.READY else "False"
        yield Condition("Ready", ready, told.reason or told.phase.value, told.message, told.since_s)
        yield Condition("GuestReady", "True" if told.guest_ready else "False", told.cloud_init, "", told.since_s)
    yield from _behind(state.environment_of(instance), instance)


def _behind(record: EnvironmentRecord, instance: InstanceRecord) -> Iterator[Condition]:
    changed = record.environment.meta.created_s
    if instance.restart_generation < record.restart_generation:
        yield Condition(
            "RestartPending", "True", "SpecChanged", "changes wait until it is stopped and started", changed
        )
    if instance.replace_generation < record.replace_generation:
        yield Condition("ReplacePending", "True", "SpecChanged", "changes wait for a new instance", changed)


def environment_status(state: State, observed: Observed, record: EnvironmentRecord) -> EnvironmentStatus:
    """The whole of an environment in one word and counts."""
    environment = record.environment
    instances = list(state.instances_of(environment.meta.uid))
    lasting = [i for i in instances if not i.meta.deleting_s]
    phases = [instance_phase(state, observed, i) for i in lasting]
    placed = sum(state.placement_of(i.meta.uid) is not None for i in lasting)
    return EnvironmentStatus(
        environment_phase(environment, phases, any(i.meta.uid in observed.attempts for i in lasting)),
        tuple(_environment_conditions(state, observed, record, lasting)),
        environment.meta.generation,
        environment.spec.replicas,
        placed,
        sum(phase in RUNNING for phase in phases),
        sum(phase is Phase.READY for phase in phases),
        tuple(i.meta.name for i in instances),
    )


def environment_phase(environment: Environment, phases: list[Phase], refused: bool) -> str:
    """One word for an environment whose instances are in these phases; ``refused``: one of them did not fit."""
    wanted = environment.spec.replicas
    if environment.meta.deleting_s:
        return "Deleting"
    if Phase.UNKNOWN in phases:
        return "Unknown"
    if environment.spec.run == "stopped" or not wanted:
        return "Stopped" if all(p in (Phase.STOPPED, Phase.PENDING) for p in phases) else "Stopping"
    failed, ready = phases.count(Phase.FAILED), phases.count(Phase.READY)
    waiting = phases.count(Phase.PENDING) + max(wanted - len(phases), 0)
    if failed:
        return "Failed" if failed == len(phases) else "Degraded"
    if waiting == wanted:
        return "Pending" if refused else "Scheduling"
    if ready and ready < wanted and (waiting or Phase.STOPPED in phases):
        return "Degraded"
    if ready >= wanted:
        return "Ready"
    if not waiting and all(p in RUNNING for p in phases):
        return "Running"
    return "Starting"


def _environment_conditions(
    state: State, observed: Observed, record: EnvironmentRecord, instances: list[InstanceRecord]
) -> Iterator[Condition]:
    refused = [observed.attempts[i.meta.uid] for i in instances if i.meta.uid in observed.attempts]
    if refused:
        yield Condition("Scheduled", "False", "Unschedulable", refused[0].message, refused[0].at_s)
    elif instances and all(state.placement_of(i.meta.uid) for i in instances):
        yield Condition("Scheduled", "True", "Placed", "", max(i.meta.created_s for i in instances))
    hosts = {p.host for i in instances if (p := state.placement_of(i.meta.uid))}
    if away := sorted(h for h in hosts if not observed.host(h).connected):
        yield Condition("Ready", "Unknown", "HostUnknown", f"not heard from: {', '.join(away)}")
    pending = {c.type: c for i in instances for c in _behind(record, i)}
    yield from pending.values()


def host_status(state: State, observed: Observed, host: Host) -> HostStatus:
    """What is known of a host."""
    name = host.meta.name
    record, seen = state.hosts[name], observed.host(name)
    inventory = state.inventories.get(name)
    topology = inventory.topology if inventory else None
    claims = state.host_claims(name, observed)
    usage = claims.usage
    report = seen.report
    conditions = list(report.conditions) if report else []
    if record.held:
        conditions.append(Condition("Held", "True", "Clone", record.held))
    if host.spec.cordoned:
        conditions.append(Condition("Schedulable", "False", "Cordoned", "no new instances are placed here"))
    return HostStatus(
        phase=host_phase(state, observed, name),
        conditions=tuple(conditions),
        agent_version=record.agent_version,
        boot_id=record.boot_id,
        kernel=record.kernel,
        virtualisation=record.virtualisation,
        cells=len(topology.cells) if topology else 0,
        cores=len(topology.cores) if topology else 0,
        threads=len(topology.online) if topology else 0,
        memory_mib=topology.memory_mib if topology else 0,
        disk_mib=topology.disk_mib if topology else 0,
        gpus=len(topology.gpus) if topology else 0,
        vfs=sum(len(pf.vfs) for pf in topology.pfs) if topology else 0,
        cpus_used_milli=usage.owned.bit_count() * 1000 + sum(usage.shared_milli.values()),
        memory_used_mib=sum(usage.charged_mib.values())
        + sum(count * page_kib // 1024 for (_, page_kib), count in usage.pages.items()),
        instances=len(state.host_placements.get(name, {})),
        foreign=report.foreign if report else 0,
        heard_s=seen.heard_s,
        drift=report.drift if report else (),
        topology=topology.to_dict() if topology else None,
    )


def host_phase(state: State, observed: Observed, name: str) -> str:
    """One word for a host."""
    seen = observed.host(name)
    if not seen.connected:
        return "Unknown"
    if name not in state.inventories or not seen.whole:
        return "Joining"
    if seen.report and any(c.type == "Ready" and c.status == "False" for c in seen.report.conditions):
        return "NotReady"
    return "Ready"


def image_status(state: State, image: Image) -> ImageStatus:
    """Environments that use an image, and hosts that hold instances made from it."""
    name = image.meta.name
    users = [
        r
        for r in state.environments.values()
        if name == r.environment.spec.image or name in r.environment.spec.archives
    ]
    hosts = {
        p.host
        for r in users
        for uid in state.environment_instances.get(r.environment.meta.uid, {}).values()
        for p in state.instance_placements.get(uid, {}).values()
    }
    return ImageStatus(len(hosts), len(users))


def network_status(state: State, network: Network) -> NetworkStatus:
    """Addresses given out, and the number there are (network, broadcast and gateway are not given out)."""
    prefix = int(network.spec.subnet.rpartition("/")[2])
    return NetworkStatus(len(state.addresses.get(network.meta.name, {})), 2 ** (32 - prefix) - 3)


def pod_views(state: State, observed: Observed, instance: InstanceRecord) -> Iterator[PodView]:
    """Pods of an instance: those of its spec, and those that the guest still speaks of."""
    environment = state.environment_of(instance).environment
    placement = state.placement_of(instance.meta.uid)
    seen = observed.instances.get(instance.meta.uid)
    told: dict[str, PodState] = {p.name: p for p in seen.state.pods} if seen and seen.state else {}
    known = placement is not None and observed.host(placement.host).connected
    for manifest in environment.spec.pods:
        name = str(manifest["metadata"]["name"])
        pod = told.get(name)
        if pod is not None and not known:
            pod = PodState(pod.name, "Unknown", False, "HostUnknown", "its host is not heard from", pod.started_s)
        meta = Meta(
            f"{instance.meta.name}.{name}",
            instance.meta.tenant,
            manifest["metadata"].get("labels") or {},
            uid=make_uid("pod", instance.meta.uid, name),
            generation=environment.meta.generation,
            resource_version=max(environment.meta.resource_version, instance.meta.resource_version),
            created_s=instance.meta.created_s,
        )
        yield PodView(
            meta, environment.meta.name, instance.meta.name, placement.host if placement else "", manifest, pod
        )


def placement_view(state: State, placement: PlacementRecord) -> PlacementView:
    """A placement as it is shown, named as its instance."""
    instance = state.instances[placement.instance_uid]
    meta = Meta(
        instance.meta.name,
        instance.meta.tenant,
        uid=make_uid("placement", placement.instance_uid, str(placement.generation)),
        generation=placement.generation,
        resource_version=placement.revision,
        created_s=placement.created_s,
    )
    return PlacementView(
        meta,
        instance.meta.name,
        placement.instance_uid,
        placement.host,
        placement.epoch,
        placement.generation,
        placement.role,
        placement.claim.to_dict(),
    )
