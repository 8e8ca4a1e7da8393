"""PURE. What users see: records and what hosts say of them, joined into the objects and statuses of the schema.

Theory of operation. Nothing here is stored. A view is made from the committed records and the last words of the hosts each
time somebody looks; so it can be no staler than what was heard. What is not known is said to be unknown: on a host that is
not connected every instance is Unknown, whatever it said last.

Phases are a closed set each; the first rule that holds, in the order of the code, gives the word.
"""

import ipaddress
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from casemate_core.claims import HostClaims
from casemate_core.quantity import format_seconds
from casemate_core.spec.access import Tenant
from casemate_core.spec.instance import InstanceState, Phase
from casemate_core.spec.meta import Meta
from casemate_core.spec.pod import pod_name
from casemate_core.spec.views import (
    Condition,
    EnvironmentStatus,
    HostStatus,
    ImageStatus,
    InstanceView,
    NetworkStatus,
    ObjectRef,
    OperationView,
    PlacementView,
    PodView,
    TenantStatus,
    VolumeStatus,
)
from casemate_core.spec.volume import device_of
from casemate_manager.fleet import quotas, volumes
from casemate_manager.fleet.observed import HostSeen, Observed
from casemate_manager.fleet.records import (
    EnvironmentRecord,
    HostRecord,
    InstanceRecord,
    OperationRecord,
    PlacementRecord,
    VolumeRecord,
    key_of,
)
from casemate_manager.fleet.state import State

_RUNNING = frozenset({Phase.RUNNING.value, Phase.READY.value})


def _condition(kind: str, holds: bool | None, reason: str = "", message: str = "", since_s: float = 0.0) -> Condition:
    status = "Unknown" if holds is None else str(holds)
    return Condition(kind, status, reason, message, since_s)


# --- instances --------------------------------------------------------------------------------------------------------


def instance_state(state: State, observed: Observed, record: InstanceRecord) -> InstanceState | None:
    """What the host that the instance is placed on said of it last; None where it has not, or where it has no trace of it."""
    placement = state.placement_of(record.meta.uid)
    seen = observed.instances.get(record.meta.uid)
    if placement is None or seen is None or seen.host != placement.host:
        return None
    return seen.state


def instance_phase(state: State, observed: Observed, record: InstanceRecord) -> str:
    """One word for an instance."""
    placement = state.placement_of(record.meta.uid)
    ending = state.is_ending(record)
    if placement is None:
        return Phase.DELETING.value if ending else Phase.PENDING.value
    if not observed.host(placement.host).connected:
        return Phase.UNKNOWN.value
    if ending:
        return Phase.DELETING.value
    said = instance_state(state, observed, record)
    return Phase.PLACED.value if said is None else said.phase.value


def instance_view(state: State, observed: Observed, record: InstanceRecord) -> InstanceView:
    """An instance with all that is known of it."""
    uid = record.meta.uid
    environment = state.environment_of(record).environment
    spec = state.spec_of(record)
    placement = state.placement_of(uid)
    said = instance_state(state, observed, record)
    seen = observed.instances.get(uid)
    return InstanceView(
        meta=_with_labels(record.meta, environment.meta),
        environment=environment.meta.name,
        ordinal=record.ordinal,
        host=placement.host if placement else "",
        nics=record.nics,
        cpus=spec.cpu.count,
        memory_mib=spec.memory.size_mib,
        image=spec.image,
        run=spec.run,
        phase=instance_phase(state, observed, record),
        conditions=tuple(_instance_conditions(state, observed, record, placement, said)),
        state=said,
        heard_s=seen.heard_s if seen and said else 0.0,
        volumes=tuple(use.volume for use in record.volumes),
    )


def _with_labels(meta: Meta, environment: Meta) -> Meta:
    """Instances and pods carry the labels of their environment, so that one selector finds all of them."""
    return Meta(
        name=meta.name,
        tenant=meta.tenant,
        labels=environment.labels,
        annotations=meta.annotations,
        uid=meta.uid,
        generation=meta.generation,
        resource_version=meta.resource_version,
        created_s=meta.created_s,
        deleting_s=meta.deleting_s,
    )


def _instance_conditions(
    state: State,
    observed: Observed,
    record: InstanceRecord,
    placement: PlacementRecord | None,
    said: InstanceState | None,
) -> Iterator[Condition]:
    attempt = observed.attempts.get(record.meta.uid)
    if placement is not None:
        yield _condition("Scheduled", True, "Placed", f"on host {placement.host}", placement.created_s)
    elif attempt is not None:
        yield _condition("Scheduled", False, "Unschedulable", attempt.message, attempt.at_s)
    else:
        yield _condition("Scheduled", False, "Waiting", "not looked at yet")
    if placement is not None and not observed.host(placement.host).connected:
        yield _condition("HostHeard", False, "HostUnknown", f"host {placement.host} is not heard from")
    if said is None:
        return
    running = said.phase.value in _RUNNING
    yield _condition("Running", running, said.reason or said.phase.value, said.message, said.since_s)
    yield _condition("GuestReady", said.guest_ready, "HelperConnected" if said.guest_ready else "HelperSilent")
    if said.cloud_init and said.cloud_init != "none":
        done = {"done": True, "error": False}.get(said.cloud_init)
        yield _condition("CloudInit", done, said.cloud_init.title(), said.cloud_init_message)
    if (operation := state.open_operation(record.meta.uid)) is not None:
        message = f"{operation.verb}: {operation.phase}" + (f": {operation.message}" if operation.message else "")
        yield _condition("Operating", True, operation.meta.name, message, operation.started_s)
    environment = state.environment_of(record)
    if record.replace_generation < environment.replace_generation:
        yield _condition("Current", False, "NeedsReplace", "fields that need a new root disk have changed")
    elif record.restart_generation < environment.restart_generation:
        yield _condition("Current", False, "NeedsRestart", "fields that need a restart have changed")
    else:
        yield _condition("Current", True)


# --- pods and placements ----------------------------------------------------------------------------------------------


def pod_views(state: State, observed: Observed, record: InstanceRecord) -> Iterator[PodView]:
    """The pods of an instance: those that its environment asks for, with what the guest says of them."""
    environment = state.environment_of(record).environment
    placement = state.placement_of(record.meta.uid)
    said = instance_state(state, observed, record)
    connected = placement is not None and observed.host(placement.host).connected
    states = {p.name: p for p in said.pods} if said and connected else {}
    for manifest in environment.spec.pods:
        name = pod_name(manifest)
        meta = Meta(
            name=f"{record.meta.name}.{name}",
            tenant=record.meta.tenant,
            labels=environment.meta.labels,
            uid=f"{record.meta.uid}/{name}",
            created_s=record.meta.created_s,
            resource_version=record.meta.resource_version,
        )
        host = placement.host if placement else ""
        yield PodView(meta, environment.meta.name, record.meta.name, host, manifest, states.get(name))


def placement_view(state: State, record: PlacementRecord) -> PlacementView:
    """A placement with its exact claim."""
    instance = state.instances[record.instance_uid]
    meta = Meta(
        name=instance.meta.name,
        tenant=instance.meta.tenant,
        labels=state.environment_of(instance).environment.meta.labels,
        uid=f"{record.instance_uid}/{record.generation}",
        generation=record.generation,
        resource_version=record.revision,
        created_s=record.created_s,
    )
    return PlacementView(
        meta,
        instance.meta.name,
        record.instance_uid,
        record.host,
        record.epoch,
        record.generation,
        record.role,
        record.claim.to_dict(),
    )


def operation_view(state: State, record: OperationRecord) -> OperationView:
    """An operation, with what its host has said of it."""
    instance = state.instances.get(record.instance_uid)
    labels = state.environment_of(instance).environment.meta.labels if instance is not None else {}
    return OperationView(
        replace(record.meta, labels=labels),
        record.verb,
        ObjectRef("Instance", record.instance, record.meta.tenant, record.instance_uid),
        record.deadline_s,
        record.phase,
        record.grace_s,
        record.reason,
        record.message,
        record.started_s,
        record.finished_s,
        record.host,
        record.certificate,
        record.target,
    )


# --- environments -----------------------------------------------------------------------------------------------------


def environment_status(state: State, observed: Observed, record: EnvironmentRecord) -> EnvironmentStatus:
    """The whole of an environment in one word, and the counts behind it."""
    environment = record.environment
    instances = [i for i in state.instances_of(environment.meta.uid) if not i.meta.deleting_s]
    phases = Counter(instance_phase(state, observed, i) for i in instances)
    placed = sum(state.placement_of(i.meta.uid) is not None for i in instances)
    ready = phases[Phase.READY.value]
    running = ready + phases[Phase.RUNNING.value]
    return EnvironmentStatus(
        phase=_environment_phase(record, instances, phases),
        conditions=tuple(_environment_conditions(state, observed, record, instances, ready)),
        observed_generation=environment.meta.generation,
        wanted=environment.spec.replicas,
        placed=placed,
        running=running,
        ready=ready,
        instances=tuple(i.meta.name for i in instances),
    )


def _environment_phase(record: EnvironmentRecord, instances: list[InstanceRecord], phases: Counter[str]) -> str:
    environment = record.environment
    wanted = environment.spec.replicas
    if environment.meta.deleting_s:
        return "Deleting"
    if environment.spec.run == "stopped":
        return "Stopping" if any(phases[p] for p in (*_RUNNING, "Stopping", "Starting", "Paused")) else "Stopped"
    if phases[Phase.UNKNOWN.value]:
        return "Unknown"
    if phases[Phase.FAILED.value]:
        return "Failed" if phases[Phase.FAILED.value] == len(instances) else "Degraded"
    if phases[Phase.READY.value] == wanted and len(instances) == wanted:
        return "Ready"
    if phases[Phase.PENDING.value]:
        return "Degraded" if phases[Phase.READY.value] else "Pending"
    if environment.spec.run == "paused" and instances:
        paused = phases[Phase.PAUSED.value]
        return "Paused" if paused and paused + phases[Phase.STOPPED.value] == len(instances) else "Degraded"
    if len(instances) < wanted or phases[Phase.PLACED.value]:
        return "Scheduling"
    running = phases[Phase.RUNNING.value] + phases[Phase.READY.value]
    return "Running" if running == len(instances) else "Starting"


def _environment_conditions(
    state: State, observed: Observed, record: EnvironmentRecord, instances: list[InstanceRecord], ready: int
) -> Iterator[Condition]:
    wanted = record.environment.spec.replicas
    waiting = [i for i in instances if state.placement_of(i.meta.uid) is None]
    if waiting:
        attempt = observed.attempts.get(waiting[0].meta.uid)
        message = attempt.message if attempt else "not looked at yet"
        reason = "Unschedulable" if attempt else "Waiting"
        yield _condition("Scheduled", False, reason, message, attempt.at_s if attempt else 0.0)
    else:
        yield _condition("Scheduled", len(instances) == wanted, "Placed" if len(instances) == wanted else "Waiting")
    failed = next((s for i in instances if (s := instance_state(state, observed, i)) and s.phase is Phase.FAILED), None)
    message = failed.message if failed else f"{ready} of {wanted} instances are ready"
    yield _condition("Ready", ready == wanted and len(instances) == wanted, failed.reason if failed else "", message)
    if record.notice_end_s:
        message = f"its lifetime of {format_seconds(record.environment.spec.lifetime_s)} ends soon: it is deleted then"
        yield _condition("Ending", True, "LifetimeEnding", message, record.notice_end_s)
    behind = sum(
        i.replace_generation < record.replace_generation or i.restart_generation < record.restart_generation
        for i in instances
    )
    if behind:
        yield _condition("Current", False, "Behind", f"{behind} instances run with earlier fields until they restart")


# --- the platform team's kinds ----------------------------------------------------------------------------------------


def host_status(state: State, observed: Observed, record: HostRecord, *, topology: bool = False) -> HostStatus:
    """A host, what is on it, and what is known of it. ``topology``: with the whole of it, as `describe` asks."""
    name = record.host.meta.name
    seen = observed.host(name)
    inventory = state.inventories.get(name)
    claims = state.claims.get(name, HostClaims.empty())
    report = seen.report
    made_of = inventory.topology if inventory else None
    return HostStatus(
        phase=_host_phase(record, seen.connected, inventory is not None and seen.whole),
        conditions=_host_conditions(record, seen),
        agent_version=record.agent_version,
        boot_id=record.boot_id,
        kernel=record.kernel,
        virtualisation=record.virtualisation,
        cells=len(made_of.cells) if made_of else 0,
        cores=len(made_of.cores) if made_of else 0,
        threads=len(made_of.online) if made_of else 0,
        memory_mib=made_of.memory_mib if made_of else 0,
        disk_mib=made_of.disk_mib if made_of else 0,
        gpus=len(made_of.gpus) if made_of else 0,
        vfs=sum(len(pf.vfs) for pf in made_of.pfs) if made_of else 0,
        cpus_used_milli=sum(len(c.owned) * 1000 + sum(s.milli for s in c.shared) for c in claims),
        memory_used_mib=sum(c.memory_mib for c in claims),
        instances=len(state.host_placements.get(name, {})),
        foreign=report.foreign if report else 0,
        heard_s=seen.heard_s,
        drift=report.drift if report and seen.connected else (),
        profile=report.profile if report and seen.connected else (),
        topology=made_of.to_dict() if made_of and topology else None,
    )


def _host_conditions(record: HostRecord, seen: HostSeen) -> tuple[Condition, ...]:
    """What a host says of itself; ``Ready`` is always among it. Of one that is not heard nothing else is known."""
    if record.held:
        return (Condition("Ready", "False", "Held", record.held),)
    if not seen.connected:
        if not record.boot_id:
            return (Condition("Ready", "False", "NeverJoined", "no agent has come as this host yet"),)
        return (Condition("Ready", "Unknown", "NotHeard", "the host's agent is not connected", seen.heard_s),)
    told = seen.report.conditions if seen.report else ()
    if any(condition.type == "Ready" for condition in told):
        return told
    return (Condition("Ready", "Unknown", "NotTold", "the host has not said yet how it is"), *told)


def _host_phase(record: HostRecord, connected: bool, told: bool) -> str:
    if record.held:
        return "NotReady"
    if not connected:
        return "Unknown" if record.boot_id else "Joining"
    return "Ready" if told else "Joining"


def image_status(state: State, observed: Observed, name: str) -> ImageStatus:
    """Who uses an image."""
    users = [
        r
        for r in state.environments.values()
        if name == r.environment.spec.image or name in r.environment.spec.archives
    ]
    hosts = {
        p.host
        for r in users
        for i in state.instances_of(r.environment.meta.uid)
        if (p := state.placement_of(i.meta.uid))
    }
    return ImageStatus(hosts=len(hosts), environments=len(users))


def volume_status(state: State, observed: Observed, record: VolumeRecord) -> VolumeStatus:
    """Where a volume is, and who uses it. Of the data is told what its host said last."""
    key, meta = key_of(record), record.volume.meta
    users = sorted(state.instances[uid].meta.name for uid in state.volume_users.get(key, ()))
    askers = sorted(state.environments[k].environment.meta.name for k in state.volume_askers.get(key, ()))
    heard, facts = volumes.facts_of(observed, record)
    connected = bool(record.host) and observed.host(record.host).connected
    phase, message = "Available", ""
    if meta.deleting_s:
        phase = "Deleting"
        message = f"waits for host {record.host}" + ("" if connected else ", which is not heard from")
    elif not record.host:
        phase, message = "Pending", "is given a host with the first instance that uses it"
    elif not connected:
        phase, message = "Unknown", f"host {record.host} is not heard from"
    elif record.made and heard and facts is None:
        phase, message = "Lost", f"host {record.host} does not find its data"
    elif users:
        phase = "Bound"
        if facts is not None and facts.size_mib < record.volume.spec.size_mib:
            message = "grows while it is attached for writing, or at the next start of its instance"
    elif facts is not None and facts.size_mib < record.volume.spec.size_mib:
        message = "grows with the next start of an instance that uses it"
    return VolumeStatus(
        phase,
        record.host,
        askers[0] if askers else state.instances[next(iter(state.volume_users[key]))].environment if users else "",
        users[0] if users else "",
        facts.allocated_mib if facts is not None else None,
        facts.size_mib if facts is not None else None,
        volumes.FORMAT,
        device_of(meta.uid),
        message,
    )


def tenant_status(state: State, tenant: Tenant) -> TenantStatus:
    """What a tenant has asked for, and what it holds of the devices that its quotas name."""
    return TenantStatus(quotas.used(state, tenant.meta.name, tenant.quotas))


def network_status(state: State, name: str) -> NetworkStatus:
    """Addresses of a network: given out, and all that can be (without network, broadcast and gateway)."""
    subnet = ipaddress.IPv4Network(state.networks[name].spec.subnet)
    return NetworkStatus(len(state.addresses.get(name, {})), subnet.num_addresses - 3)
