"""PURE. What a host should have, resolved from the records: specs, images, networks, addresses, placements.

A host's record of an instance changes when any record that it is made of does; `affected` says which, so that sessions
are told what changed and nothing else.
"""

from collections.abc import Iterable

from casemate_core.spec.environment import Environment
from casemate_core.spec.fleet import Network
from casemate_core.spec.instance import (
    DesiredInstance,
    HostNetwork,
    ImageRef,
    Peer,
    Placement,
    Run,
    Virtualisation,
)
from casemate_core.spec.secret import Secret, references
from casemate_core.spec.volume import with_paths
from casemate_manager.fleet import moves, operations, volumes
from casemate_manager.fleet.commands import Batch
from casemate_manager.fleet.records import (
    Drop,
    EnvironmentRecord,
    GpuRecord,
    InstanceRecord,
    OperationRecord,
    PlacementRecord,
    Put,
    VolumeRecord,
    key_of,
    tenant_key,
)
from casemate_manager.fleet.state import State

#: Peers are told to instances of environments of at most so many: each record names all others.
MAX_PEERS = 256


def desired_instance(state: State, placement: PlacementRecord) -> DesiredInstance:
    """One instance, as its host should have it."""
    instance = state.instances[placement.instance_uid]
    record = state.environment_of(instance)
    environment = record.environment
    spec = state.spec_of(instance)
    row = state.environment_instances[environment.meta.uid]
    peers: tuple[Peer, ...] = ()
    if len(row) <= MAX_PEERS:
        others = (state.instances[row[o]] for o in sorted(row) if row[o] != instance.meta.uid)
        peers = tuple(Peer(o.meta.name, o.nics[0].address if o.nics else "") for o in others)
    order, operation = operations.order_of(state, instance, placement), state.open_operation(instance.meta.uid)
    return DesiredInstance(
        uid=instance.meta.uid,
        tenant=instance.meta.tenant,
        environment=environment.meta.name,
        name=instance.meta.name,
        ordinal=instance.ordinal,
        generation=environment.meta.generation,
        run=Run.STOPPED if instance.held else Run(spec.run),
        cpus=spec.cpu.count,
        memory_mib=spec.memory.size_mib,
        disk_mib=spec.disk_mib,
        image=_image(state, spec.image),
        placement=Placement(placement.claim, placement.epoch, placement.generation, placement.role),
        archives=tuple(_image(state, name) for name in spec.archives),
        nics=instance.nics,
        pods=tuple(with_paths(pod) for pod in spec.pods),
        ssh_keys=spec.ssh_keys,
        user_data=spec.user_data,
        virtualisation=Virtualisation(spec.virtualisation),
        cpu_policy=spec.cpu.policy,
        page_kib=spec.memory.hugepages_kib,
        peers=peers,
        order=order,
        disk=instance.disks,
        on_crash=spec.on_crash,
        crash_limit=spec.crash_limit,
        stop_grace_s=spec.stop_grace_s,
        volumes=volumes.refs(state, instance),
        # While something is done once, what happens follows from that.
        cause=operation.meta.name if operation is not None and order is not None else record.cause,
    )


def _image(state: State, name: str) -> ImageRef:
    image = state.images[name].spec
    return ImageRef(name, image.type, image.file, image.format, image.kernel, image.initrd, image.cmdline)


def networks(state: State, host: str) -> tuple[HostNetwork, ...]:
    """Networks that the host's instances attach to."""
    names = {
        nic.network
        for placement in state.host_placements.get(host, {}).values()
        for nic in state.instances[placement.instance_uid].nics
    }
    found = (state.networks[name] for name in sorted(names))
    return tuple(HostNetwork(n.meta.name, n.spec.type, n.spec.subnet, n.gateway, n.spec.mtu) for n in found)


def whole(state: State, host: str) -> tuple[tuple[DesiredInstance, ...], tuple[str, ...]]:
    """All that a host should have, and the instances that it should end."""
    return some(state, host, {p.instance_uid for p in state.host_placements.get(host, {}).values()})


def since(state: State, host: str, revision: int) -> tuple[tuple[DesiredInstance, ...], tuple[str, ...]]:
    """What changed after a revision. Instances to end are told always: the host confirms each."""
    uids = set()
    for placement in state.host_placements.get(host, {}).values():
        instance = state.instances[placement.instance_uid]
        record = state.environment_of(instance)
        environment = record.environment
        changed = max(
            record.told_revision,
            placement.revision,
            instance.meta.resource_version,
            environment.meta.resource_version,
            state.row_revisions.get(environment.meta.uid, 0),
            _secrets_revision(state, environment),
            volumes.revision(state, instance),
            state.operation_revisions.get(instance.meta.uid, 0),
        )
        if changed > revision or state.is_ending(instance) or placement.role == moves.OUTGOING:
            uids.add(placement.instance_uid)
    return some(state, host, uids)


def _secrets_revision(state: State, environment: Environment) -> int:
    """At which revision a secret that its pods name last changed."""
    names = {tenant_key(environment.meta.tenant, name) for _, name, _ in references(environment.spec.pods)}
    return max((state.secrets[n].meta.resource_version for n in names if n in state.secrets), default=0)


def some(state: State, host: str, uids: Iterable[str]) -> tuple[tuple[DesiredInstance, ...], tuple[str, ...]]:
    """Of these instances: what the host should have, and which ones it should end. Of a gang that has not its whole place
    yet a host hears nothing."""
    keep, end = [], []
    for uid in sorted(uids):
        placement = next((p for p in state.instance_placements.get(uid, {}).values() if p.host == host), None)
        instance = state.instances[uid]
        if placement is None or state.is_ending(instance) or placement.role == moves.OUTGOING:
            end.append(uid)
        elif state.environment_of(instance).is_told(instance):
            keep.append(desired_instance(state, placement))
    return tuple(keep), tuple(end)


def affected(state: State, batch: Batch) -> dict[str, set[str]]:
    """Hosts whose desired state a batch changes, with the instances. ``state`` is the one before the batch is folded,
    so that what it forgets is still known; placements that it makes are read from the batch."""
    hosts: dict[str, set[str]] = {}
    #: Hosts that are told although none of their instances changed.
    told: set[str] = set()

    def wake(uid: str) -> None:
        for placement in state.instance_placements.get(uid, {}).values():
            hosts.setdefault(placement.host, set()).add(uid)

    environments: dict[str, None] = {}
    for change in batch.records:
        match change:
            case Put(EnvironmentRecord() as record):
                environments[record.environment.meta.uid] = None
            case Put(PlacementRecord() as placement):
                hosts.setdefault(placement.host, set()).add(placement.instance_uid)
            case Put(OperationRecord() as operation):
                wake(operation.instance_uid)
            case Put(InstanceRecord() as instance):
                old = state.instances.get(instance.meta.uid)
                if old is not None:
                    wake(instance.meta.uid)
                if old is None or old.nics != instance.nics:
                    environments[instance.environment_uid] = None  # its peers' records name it
            case Put(Secret() as secret):
                for key in state.tenant_environments.get(secret.meta.tenant, ()):
                    user = state.environments[key].environment
                    if any(name == secret.meta.name for _, name, _ in references(user.spec.pods)):
                        environments[user.meta.uid] = None
            case Put(VolumeRecord() as volume):
                if volume.host and volume.volume.meta.deleting_s:
                    hosts.setdefault(volume.host, set())
                    told.add(volume.host)
                for uid in state.volume_users.get(key_of(volume), ()):
                    wake(uid)
            case Put(GpuRecord() as gpu):
                if (known := state.gpus.get(gpu.uuid)) is None or known.order != gpu.order:
                    hosts.setdefault(gpu.host, set())
                    told.add(gpu.host)
            case Put(Network() as network):
                for uid in state.addresses.get(network.meta.name, {}).values():
                    wake(uid)
            case Drop("Instance", uid):
                environments[state.instances[uid].environment_uid] = None
            case _:
                pass
    for environment in environments:
        for uid in state.environment_instances.get(environment, {}).values():
            wake(uid)
    dropped = {c.key for c in batch.records if isinstance(c, Drop) and c.kind == "Instance"}
    for uids in hosts.values():
        uids -= dropped
    return {host: uids for host, uids in hosts.items() if uids or host in told}
