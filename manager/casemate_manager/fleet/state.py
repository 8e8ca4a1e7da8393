"""PURE. The records in memory, with the indexes by which the fleet finds them, and the invariants that they keep.

Theory of operation. A ``State`` changes only by ``fold`` of a batch that `machine.apply` made from it. The writer keeps two
over the same records: the *working* one, folded at once so that the next command of a group sees it, and the *committed*
one, folded after the commit, which is all that readers, watchers and sessions see. When a commit fails the working state
is thrown away. Records are frozen and shared; folding costs the size of the batch.

Indexes are derived and never stored. ``work`` names environments that may have something to do; it may name too many.
"""

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from casemate_core.audit import Link
from casemate_core.checkpoint import Checkpoint
from casemate_core.claims import HostClaims, volume_claim, volume_owner
from casemate_core.errors import InternalError
from casemate_core.gpu import GpuOrder
from casemate_core.spec.access import RoleBinding, Tenant, User
from casemate_core.spec.environment import Environment, EnvironmentSpec
from casemate_core.spec.fleet import Image, Network, Policy
from casemate_core.spec.meta import Meta
from casemate_core.spec.secret import Secret
from casemate_core.spec.views import EventView
from casemate_core.spec.volume import names
from casemate_manager.fleet.commands import Batch
from casemate_manager.fleet.holding import holds
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import (
    AccessKeyRecord,
    AuditCut,
    AuditHead,
    AuditMark,
    Drop,
    EnrolmentRecord,
    EnvironmentRecord,
    GpuRecord,
    HostRecord,
    InstanceRecord,
    InventoryRecord,
    OperationRecord,
    PlacementRecord,
    Put,
    Record,
    RequestRecord,
    RevisionRecord,
    TokenRecord,
    VolumeRecord,
    key_of,
    tenant_key,
)

EventIdentity = tuple[str, str, str, str, str, str]


def event_identity(event: EventView) -> EventIdentity:
    """What makes two events the same one, seen again."""
    ref = event.regarding
    return (ref.kind, ref.tenant, ref.name, event.reason, event.message, event.cause)


@dataclass(slots=True)
class State:
    """All records. ``epoch`` is the manager's term, ``revision`` counts the batches that were folded."""

    epoch: int
    revision: int = 0
    environments: dict[str, EnvironmentRecord] = field(default_factory=dict)
    specs: dict[str, RevisionRecord] = field(default_factory=dict)
    instances: dict[str, InstanceRecord] = field(default_factory=dict)
    placements: dict[str, PlacementRecord] = field(default_factory=dict)
    hosts: dict[str, HostRecord] = field(default_factory=dict)
    inventories: dict[str, InventoryRecord] = field(default_factory=dict)
    gpus: dict[str, GpuRecord] = field(default_factory=dict)
    requests: dict[str, RequestRecord] = field(default_factory=dict)
    tokens: dict[str, TokenRecord] = field(default_factory=dict)
    enrolments: dict[str, EnrolmentRecord] = field(default_factory=dict)
    images: dict[str, Image] = field(default_factory=dict)
    networks: dict[str, Network] = field(default_factory=dict)
    policies: dict[str, Policy] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    users: dict[str, User] = field(default_factory=dict)
    role_bindings: dict[str, RoleBinding] = field(default_factory=dict)
    operations: dict[str, OperationRecord] = field(default_factory=dict)
    events: dict[str, EventView] = field(default_factory=dict)
    secrets: dict[str, Secret] = field(default_factory=dict)
    volumes: dict[str, VolumeRecord] = field(default_factory=dict)
    access_keys: dict[str, AccessKeyRecord] = field(default_factory=dict)
    #: Head of the audit chain (its records are in the store alone), its marks by sequence, and where what is kept begins.
    audit: Link = field(default_factory=Link)
    audit_marks: list[AuditMark] = field(default_factory=list)
    audit_cut: AuditCut | None = None
    #: Signed places of the chain, oldest first.
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    # --- derived ---
    #: User or ``group:NAME`` -> name of a role binding -> the binding.
    bindings_of: dict[str, dict[str, RoleBinding]] = field(default_factory=dict)
    #: Tenant -> keys of its environments.
    tenant_environments: dict[str, dict[str, None]] = field(default_factory=dict)
    environment_keys: dict[str, str] = field(default_factory=dict)
    tenant_volumes: dict[str, dict[str, None]] = field(default_factory=dict)
    host_volumes: dict[str, dict[str, None]] = field(default_factory=dict)
    #: Key of a volume -> keys of the environments whose specs name it, and uids of the instances that use it.
    volume_askers: dict[str, dict[str, None]] = field(default_factory=dict)
    volume_users: dict[str, dict[str, None]] = field(default_factory=dict)
    environment_instances: dict[str, dict[int, str]] = field(default_factory=dict)
    instance_names: dict[str, str] = field(default_factory=dict)
    instance_placements: dict[str, dict[str, PlacementRecord]] = field(default_factory=dict)
    host_placements: dict[str, dict[str, PlacementRecord]] = field(default_factory=dict)
    claims: dict[str, HostClaims] = field(default_factory=dict)
    #: Network name -> address as a number -> uid of the instance that has it.
    addresses: dict[str, dict[int, str]] = field(default_factory=dict)
    cursors: dict[str, int] = field(default_factory=dict)
    macs: dict[str, str] = field(default_factory=dict)
    pending: dict[str, None] = field(default_factory=dict)
    #: Environment's uid -> revision at which its row of instances or an address in it last changed.
    row_revisions: dict[str, int] = field(default_factory=dict)
    event_names: dict[EventIdentity, str] = field(default_factory=dict)
    work: dict[str, None] = field(default_factory=dict)
    #: Instance's uid -> key of its open operation, and revision at which an operation of it last changed.
    open_keys: dict[str, str] = field(default_factory=dict)
    operation_revisions: dict[str, int] = field(default_factory=dict)
    #: Host of each GPU, by UUID; and by host the last orders, by UUID.
    gpu_hosts: dict[str, str] = field(default_factory=dict)
    gpu_orders: dict[str, Mapping[str, GpuOrder]] = field(default_factory=dict)
    #: Keys of environments with a lifetime, or with a notice of its end.
    lifetimes: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(cls, epoch: int, revision: int, records: Iterable[Record]) -> "State":
        """The state that was stored. Raises InternalError where records contradict each other."""
        state = cls(epoch)
        for record in sorted(records, key=_load_order):
            state._put(record)
        state.revision = revision
        state.row_revisions = dict.fromkeys(state.environment_keys, revision)
        state.work = dict.fromkeys(state.environments)
        if broken := state.check():
            raise InternalError("the stored records contradict each other: " + "; ".join(broken[:10]))
        return state

    def fold(self, batch: Batch) -> None:
        """Take what a batch does. It must have been made from this state."""
        if batch.records:
            self.revision = batch.revision
        for change in batch.records:
            if isinstance(change, Put):
                self._put(change.record)
            else:
                self._drop(change)
        for key in batch.done:
            self.work.pop(key, None)
        for key in batch.wake:
            if key in self.environments:
                self.work[key] = None

    # --- reading ------------------------------------------------------------------------------------------------------

    def environment_of(self, instance: InstanceRecord) -> EnvironmentRecord:
        """The environment of an instance."""
        return self.environments[self.environment_keys[instance.environment_uid]]

    def instances_of(self, environment_uid: str) -> Iterator[InstanceRecord]:
        """Instances of an environment, by ordinal."""
        row = self.environment_instances.get(environment_uid, {})
        return (self.instances[row[ordinal]] for ordinal in sorted(row))

    def placement_of(self, uid: str) -> PlacementRecord | None:
        """The active placement of an instance."""
        return next((p for p in self.instance_placements.get(uid, {}).values() if p.role == "active"), None)

    def is_ending(self, instance: InstanceRecord) -> bool:
        """Whether the instance is to end: by itself, or with its environment."""
        return bool(instance.meta.deleting_s or self.environment_of(instance).environment.meta.deleting_s)

    def open_operation(self, uid: str) -> OperationRecord | None:
        """The operation of an instance that has not come to its end."""
        key = self.open_keys.get(uid)
        return self.operations[key] if key is not None else None

    def open_operations(self) -> Iterator[OperationRecord]:
        """All operations that have not come to their end."""
        return (self.operations[key] for key in list(self.open_keys.values()))

    def spec_of(self, instance: InstanceRecord) -> EnvironmentSpec:
        """The spec that is in force for an instance: live fields are today's, others those that it was made with."""
        record = self.environment_of(instance)
        now = record.environment.spec
        restart = self._spec_at(record, instance.restart_generation, record.restart_generation)
        replaced = self._spec_at(record, instance.replace_generation, record.replace_generation)
        if restart is now and replaced is now:
            return now
        return EnvironmentSpec(
            cpu=restart.cpu,
            memory=restart.memory,
            image=replaced.image,
            replicas=now.replicas,
            nics=restart.nics,
            archives=restart.archives,
            disk_mib=replaced.disk_mib,
            pods=now.pods,
            ssh_keys=replaced.ssh_keys,
            user_data=replaced.user_data,
            run=now.run,
            placement=now.placement,
            priority=now.priority,
            virtualisation=restart.virtualisation,
            gang=now.gang,
            on_crash=now.on_crash,
            crash_limit=now.crash_limit,
            stop_grace_s=now.stop_grace_s,
            lifetime_s=now.lifetime_s,
            protected=now.protected,
            isolated=restart.isolated,
            update_strategy=now.update_strategy,
            devices=restart.devices,
            volumes=restart.volumes,
            gpus=restart.gpus,
        )

    def _spec_at(self, record: EnvironmentRecord, generation: int, current: int) -> EnvironmentSpec:
        if generation >= current:
            return record.environment.spec
        return self.specs[f"{record.environment.meta.uid}/{generation}"].spec

    def host_claims(self, host: str, observed: Observed) -> HostClaims:
        """Who holds what on a host, foreign VMs and GPUs that are held back included."""
        claims = self.claims.get(host, HostClaims.empty())
        report = observed.host(host).report
        if report is not None and report.foreign_claims:
            claims = HostClaims.of([*claims, *report.foreign_claims], claims.epoch)
        inventory = self.inventories.get(host)
        if report is not None and inventory is not None and inventory.topology.gpus:
            for held in holds(inventory.topology, report, self.gpu_orders.get(host, {}), claims):
                claims = claims.add(replace(held, epoch=claims.epoch))
        return claims

    # --- folding ------------------------------------------------------------------------------------------------------

    def _put(self, record: Record) -> None:
        key = key_of(record)
        match record:
            case EnvironmentRecord():
                self._ask_for_volumes(key, record)
                self.environments[key] = record
                self.tenant_environments.setdefault(record.environment.meta.tenant, {})[key] = None
                self.environment_keys[record.environment.meta.uid] = key
                self.work[key] = None
                if record.environment.spec.lifetime_s or record.notice_end_s:
                    self.lifetimes[key] = None
                else:
                    self.lifetimes.pop(key, None)
            case OperationRecord():
                self._put_operation(key, record)
            case RevisionRecord():
                self.specs[key] = record
            case InstanceRecord():
                self._put_instance(record)
            case PlacementRecord():
                self._put_placement(key, record)
            case HostRecord():
                self.hosts[key] = record
            case InventoryRecord():
                self._put_inventory(key, record)
            case GpuRecord():
                self._put_gpu(key, record)
            case RequestRecord():
                self.requests[key] = record
            case TokenRecord():
                self.tokens[key] = record
            case EnrolmentRecord():
                self.enrolments[key] = record
            case Image():
                self.images[key] = record
            case Network():
                self.networks[key] = record
            case Policy():
                self.policies[key] = record
            case Tenant():
                self.tenants[key] = record
            case User():
                self.users[key] = record
            case RoleBinding():
                self._unbind(key)
                self.role_bindings[key] = record
                for subject in record.users:
                    self.bindings_of.setdefault(subject, {})[key] = record
            case Secret():
                self.secrets[key] = record
            case VolumeRecord():
                self._put_volume(key, record)
            case AccessKeyRecord():
                self.access_keys[key] = record
            case AuditHead():
                self.audit = Link(record.sequence, record.digest)
            case AuditMark():
                self.audit_marks.append(record)
            case AuditCut():
                self.audit_cut = record
            case Checkpoint():
                self.checkpoints[key] = record
            case EventView():
                self.events[key] = record
                self.event_names[event_identity(record)] = key

    def _put_inventory(self, key: str, record: InventoryRecord) -> None:
        if (old := self.inventories.get(key)) is not None:
            for gpu in old.topology.gpus:
                if self.gpu_hosts.get(gpu.uuid) == key:
                    del self.gpu_hosts[gpu.uuid]
        self.inventories[key] = record
        self.gpu_hosts |= {gpu.uuid: key for gpu in record.topology.gpus}

    def _put_gpu(self, key: str, record: GpuRecord) -> None:
        old = self.gpus.get(key)
        self.gpus[key] = record
        if old is not None and old.host == record.host and old.order == record.order:
            return
        if old is not None:
            self.gpu_orders[old.host] = {u: o for u, o in self.gpu_orders.get(old.host, {}).items() if u != key}
        if record.order is not None:
            self.gpu_orders[record.host] = {**self.gpu_orders.get(record.host, {}), key: record.order}

    def _unbind(self, key: str) -> None:
        known = self.role_bindings.pop(key, None)
        for subject in known.users if known else ():
            self.bindings_of[subject].pop(key, None)
            if not self.bindings_of[subject]:
                del self.bindings_of[subject]

    def _ask_for_volumes(self, key: str, record: EnvironmentRecord | None) -> None:
        """Bring the index of who names a volume in line with what an environment's spec is now; None: it is gone."""
        known = self.environments.get(key)
        old, new = known.environment if known else None, record.environment if record else None
        for one, asks in ((old, False), (new, True)):
            if one is not None:
                for _, name in names(one.spec.volumes, one.spec.replicas):
                    _mark(self.volume_askers, tenant_key(one.meta.tenant, name), key, asks)

    def _use_volumes(self, record: InstanceRecord, used: bool) -> None:
        for use in record.volumes:
            _mark(self.volume_users, tenant_key(record.meta.tenant, use.volume), record.meta.uid, used)

    def _put_volume(self, key: str, record: VolumeRecord | None) -> None:
        """Write a volume, or forget it, and hold its room on its host, where that has changed."""
        old = self.volumes.pop(key, None)
        if record is not None:
            self.volumes[key] = record
        now, was = _room(record), _room(old)
        if was is not None:
            _mark(self.tenant_volumes, was[0], key, False)
        if now is not None:
            _mark(self.tenant_volumes, now[0], key, True)
        if now == was:
            return
        if was is not None and was[1]:
            _mark(self.host_volumes, was[1], key, False)
            self.claims[was[1]] = self.claims[was[1]].remove(volume_owner(was[2]))
        if now is not None and now[1]:
            _mark(self.host_volumes, now[1], key, True)
            claims = self.claims.get(now[1], HostClaims.empty())
            # It carries the epoch that the host's claims have: no term of a manager ends it.
            self.claims[now[1]] = claims.add(volume_claim(now[2], now[3], claims.epoch))

    def _put_instance(self, record: InstanceRecord) -> None:
        uid = record.meta.uid
        old = self.instances.get(uid)
        if old is not None:
            self._free_addresses(old)
            self._use_volumes(old, False)
        self._use_volumes(record, True)
        if old is None or old.nics != record.nics:
            self.row_revisions[record.environment_uid] = self.revision
        self.instances[uid] = record
        self.environment_instances.setdefault(record.environment_uid, {})[record.ordinal] = uid
        self.instance_names[tenant_key(record.meta.tenant, record.meta.name)] = uid
        for nic in record.nics:
            number = int(ipaddress.IPv4Address(nic.address))
            self.addresses.setdefault(nic.network, {})[number] = uid
            self.cursors[nic.network] = number
            self.macs[nic.mac] = uid
        if uid not in self.instance_placements:
            self.pending[uid] = None
        self._wake(record)

    def _put_operation(self, key: str, record: OperationRecord) -> None:
        uid = record.instance_uid
        self.operations[key] = record
        if not record.closed:
            self.open_keys[uid] = key
        elif self.open_keys.get(uid) == key:
            del self.open_keys[uid]
        if uid in self.instances:
            # one may be loaded that outlived its instance
            self.operation_revisions[uid] = max(record.meta.resource_version, self.operation_revisions.get(uid, 0))
            self._wake(self.instances[uid])

    def _free_addresses(self, record: InstanceRecord) -> None:
        for nic in record.nics:
            self.addresses[nic.network].pop(int(ipaddress.IPv4Address(nic.address)), None)
            self.macs.pop(nic.mac, None)

    def _put_placement(self, key: str, record: PlacementRecord) -> None:
        old = self.placements.get(key)
        if old is not None:
            self.claims[old.host] = self.claims[old.host].remove(old.claim.owner)
        self.placements[key] = record
        self.instance_placements.setdefault(record.instance_uid, {})[key] = record
        self.host_placements.setdefault(record.host, {})[key] = record
        self.claims[record.host] = self.claims.get(record.host, HostClaims.empty()).add(record.claim)
        self.pending.pop(record.instance_uid, None)

    def _drop(self, change: Drop) -> None:
        kind, key = change.kind, change.key
        if kind == "Instance":
            self._drop_instance(key)
        elif kind == "Placement":
            record = self.placements.pop(key)
            uid = record.instance_uid
            del self.instance_placements[uid][key]
            if not self.instance_placements[uid]:
                del self.instance_placements[uid]
                if uid in self.instances:
                    self.pending[uid] = None
            del self.host_placements[record.host][key]
            self.claims[record.host] = self.claims[record.host].remove(record.claim.owner)
            if uid in self.instances:
                self._wake(self.instances[uid])
        elif kind == "Volume":
            self._put_volume(key, None)
        elif kind == "Environment":
            self._ask_for_volumes(key, None)
            environment = self.environments.pop(key).environment
            del self.environment_keys[environment.meta.uid]
            del self.tenant_environments[environment.meta.tenant][key]
            self.environment_instances.pop(environment.meta.uid, None)
            self.row_revisions.pop(environment.meta.uid, None)
            self.work.pop(key, None)
            self.lifetimes.pop(key, None)
        elif kind == "RoleBinding":
            self._unbind(key)
        elif kind == "AuditMark":
            self.audit_marks = [mark for mark in self.audit_marks if mark.sequence != int(key)]
        elif kind == "Audit":
            pass  # the head stays, and no other is held here
        elif kind == "Event":
            event = self.events.pop(key)
            if self.event_names.get(event_identity(event)) == key:
                del self.event_names[event_identity(event)]
        else:
            del self._table(kind)[key]

    def _drop_instance(self, uid: str) -> None:
        record = self.instances.pop(uid)
        self._free_addresses(record)
        self._use_volumes(record, False)
        self.row_revisions[record.environment_uid] = self.revision
        row = self.environment_instances.get(record.environment_uid, {})
        if row.get(record.ordinal) == uid:
            del row[record.ordinal]
        name = tenant_key(record.meta.tenant, record.meta.name)
        if self.instance_names.get(name) == uid:
            del self.instance_names[name]
        self.pending.pop(uid, None)
        self.operation_revisions.pop(uid, None)
        self._wake(record)

    def _wake(self, record: InstanceRecord) -> None:
        if key := self.environment_keys.get(record.environment_uid):
            self.work[key] = None

    def holds(self, kind: str, key: str) -> bool:
        """Whether there is a record of this key. Those of the audit chain are not held here, and count as known."""
        if kind.startswith("Audit"):
            return True
        tables: dict[str, Any] = {
            "Environment": self.environments,
            "Instance": self.instances,
            "Placement": self.placements,
            "RoleBinding": self.role_bindings,
            "Event": self.events,
        }
        return key in tables[kind] if kind in tables else key in self._table(kind)

    def _table(self, kind: str) -> dict[str, Record]:
        tables: dict[str, Any] = {
            "Revision": self.specs,
            "Host": self.hosts,
            "Inventory": self.inventories,
            "GPU": self.gpus,
            "Request": self.requests,
            "Token": self.tokens,
            "Enrolment": self.enrolments,
            "Image": self.images,
            "Network": self.networks,
            "Policy": self.policies,
            "Tenant": self.tenants,
            "AccessKey": self.access_keys,
            "Checkpoint": self.checkpoints,
            "Secret": self.secrets,
            "Volume": self.volumes,
            "User": self.users,
            "Operation": self.operations,
        }
        table: dict[str, Record] = tables[kind]
        return table

    # --- invariants ---------------------------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """Every broken invariant, in words; empty where all hold."""
        return [*self._check_instances(), *self._check_placements(), *self._check_volumes()]

    def _check_instances(self) -> Iterator[str]:
        addresses: dict[tuple[str, str], str] = {}
        macs: dict[str, str] = {}
        ordinals: dict[tuple[str, int], str] = {}
        for uid, record in self.instances.items():
            if record.environment_uid not in self.environment_keys:
                yield f"instance {uid} has no environment"
                continue
            environment = self.environment_of(record)
            for generation, current in (
                (record.restart_generation, environment.restart_generation),
                (record.replace_generation, environment.replace_generation),
            ):
                if generation < current and f"{record.environment_uid}/{generation}" not in self.specs:
                    yield f"instance {uid} is of generation {generation}, whose spec is gone"
            if ordinals.setdefault((record.environment_uid, record.ordinal), uid) != uid:
                yield f"ordinal {record.ordinal} of {record.environment} has two instances"
            for nic in record.nics:
                if addresses.setdefault((nic.network, nic.address), uid) != uid:
                    yield f"address {nic.address} of {nic.network} has two owners"
                if macs.setdefault(nic.mac, uid) != uid:
                    yield f"MAC {nic.mac} has two owners"
                network = self.networks.get(nic.network)
                if network is None:
                    yield f"instance {uid} has an interface on {nic.network}, which is gone"
                elif ipaddress.IPv4Address(nic.address) not in ipaddress.IPv4Network(network.spec.subnet):
                    yield f"address {nic.address} is not of {nic.network}"
                elif nic.address == network.gateway:
                    yield f"address {nic.address} of instance {uid} is the gateway's"
        given = sum(len(numbers) for numbers in self.addresses.values())
        if given != len(addresses):
            yield f"{given} addresses are indexed and {len(addresses)} given"

    def _check_volumes(self) -> Iterator[str]:
        for key, record in self.volumes.items():
            if record.host and record.host not in self.hosts:
                yield f"volume {key} is on {record.host}, which is gone"
            if len(users := self.volume_users.get(key, {})) > 1:
                yield f"volume {key} has {len(users)} users"
        for uid, instance in self.instances.items():
            for use in instance.volumes:
                volume = self.volumes.get(tenant_key(instance.meta.tenant, use.volume))
                if volume is None:
                    yield f"instance {uid} uses volume {use.volume}, which is gone"
                    continue
                for placement in self.instance_placements.get(uid, {}).values():
                    if placement.host != volume.host:
                        yield f"instance {uid} is on {placement.host}, and its volume {use.volume} on {volume.host or 'no host'}"

    def _check_placements(self) -> Iterator[str]:
        active: dict[str, str] = {}
        for key, record in self.placements.items():
            if record.instance_uid not in self.instances:
                yield f"placement {key} has no instance"
            if record.host not in self.hosts:
                yield f"placement {key} is on {record.host}, which is gone"
            if record.role == "active" and active.setdefault(record.instance_uid, key) != key:
                yield f"instance {record.instance_uid} has two active placements"
            if record.epoch > self.epoch:
                yield f"placement {key} is of epoch {record.epoch}, after {self.epoch}"
            if record.claim.owner != record.instance_uid or record.claim.epoch != record.epoch:
                yield f"placement {key} carries a claim of {record.claim.owner}, epoch {record.claim.epoch}"
        for host, claims in self.claims.items():
            inventory = self.inventories.get(host)
            if inventory is not None and len(claims):
                yield from (f"host {host}: {violation}" for violation in claims.check(inventory.topology))
        for uid, key in self.open_keys.items():
            if self.operations[key].closed or uid not in self.instances:
                yield f"operation {key} of instance {uid} counts as open and is not"
        open_ = [r for r in self.operations.values() if not r.closed]
        if len(open_) != len(self.open_keys):
            yield f"{len(open_)} operations are open and {len(self.open_keys)} instances have one"
        waiting = {uid for uid in self.instances if uid not in self.instance_placements}
        if waiting != set(self.pending):
            yield "the index of waiting instances is wrong"


def _mark(index: dict[str, dict[str, None]], key: str, member: str, there: bool) -> None:
    """Put a member under a key of an index, or take it out."""
    if there:
        index.setdefault(key, {})[member] = None
    elif (members := index.get(key)) is not None:
        members.pop(member, None)
        if not members:
            del index[key]


def _room(record: VolumeRecord | None) -> tuple[str, str, str, int] | None:
    """Of a volume: tenant, host, uid and size, which are what the indexes are made from."""
    if record is None:
        return None
    meta = record.volume.meta
    return meta.tenant, record.host, meta.uid, record.volume.spec.size_mib


def _load_order(record: Record) -> tuple[int, float, str]:
    """(what others refer to first; placements by epoch, since claims refuse to go back; requests as they were answered; key)"""
    match record:
        case RequestRecord():
            return 0, record.at_s, key_of(record)
        case InstanceRecord():
            return 1, 0, key_of(record)
        case PlacementRecord():
            return 2, record.epoch, key_of(record)
        case OperationRecord():
            return 3, 0, key_of(record)
        case _:
            return 0, 0, key_of(record)


def named(meta: Meta) -> str:
    """``tenant/name`` or ``name``, for messages."""
    return f"{meta.tenant}/{meta.name}" if meta.tenant else meta.name


def environment_named(state: State, tenant: str, name: str) -> Environment | None:
    """An environment by its name."""
    record = state.environments.get(tenant_key(tenant, name))
    return record.environment if record else None
