"""PURE. A batch in the making: what a command's handler reads (the state with its own changes on top) and writes.

Identities are made here from the command's seed, so that one command on one state always makes the same batch.
"""

import hashlib
import ipaddress
import uuid
from collections.abc import Container
from dataclasses import replace

from casemate_core.errors import CasemateError
from casemate_core.spec.environment import NicSpec
from casemate_core.spec.fleet import Network
from casemate_core.spec.instance import Nic
from casemate_core.spec.meta import Meta
from casemate_core.spec.views import EventView, ObjectRef
from casemate_manager.fleet.commands import Answer, Batch, Effect
from casemate_manager.fleet.observed import Observed, Sighting
from casemate_manager.fleet.records import (
    Drop,
    EnvironmentRecord,
    InstanceRecord,
    Put,
    Record,
    RecordChange,
    key_of,
    kind_of,
    tenant_key,
)
from casemate_manager.fleet.state import State, event_identity

#: Records of one batch; etcd takes 128 operations in a transaction by default.
MAX_RECORDS = 128
MAX_MESSAGE = 1024


class AddressesExhausted(CasemateError):
    """A network has no address left."""

    reason = "AddressesExhausted"


def make_uid(*parts: str) -> str:
    """A UUID (RFC 9562, version 8: by our own rule) from what makes the object unique."""
    digest = bytearray(hashlib.sha256("\0".join(parts).encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(digest)))


def make_mac(uid: str, index: int, attempt: int) -> str:
    """A locally administered unicast MAC address (IEEE 802: second-lowest bit of the first octet) for life."""
    digest = hashlib.sha256(f"{uid}/{index}/{attempt}".encode()).digest()
    octets = [digest[0] & 0xFC | 0x02, *digest[1:6]]
    return ":".join(f"{octet:02x}" for octet in octets)


class Draft:
    """Collects the changes of one batch on top of a state."""

    def __init__(self, state: State, observed: Observed, now_s: float) -> None:
        self.state = state
        self.observed = observed
        self.now_s = now_s
        #: The store's revision if this batch is committed.
        self.revision = state.revision + 1
        self.effects: list[Effect] = []
        self.sightings: list[Sighting] = []
        self.done: list[str] = []
        self._changes: dict[tuple[str, str], RecordChange] = {}
        self._taken: dict[str, set[int]] = {}
        self._macs: set[str] = set()
        self._cursors: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._changes)

    def put(self, record: Record) -> None:
        """Write a record."""
        self._changes[kind_of(record), key_of(record)] = Put(record)

    def drop(self, kind: str, key: str) -> None:
        """Forget a record."""
        self._changes[kind, key] = Drop(kind, key)

    def is_dropped(self, kind: str, key: str) -> bool:
        """Whether this batch forgets the record."""
        return isinstance(self._changes.get((kind, key)), Drop)

    @property
    def changed(self) -> Container[tuple[str, str]]:
        """(kind, key) of the records that this batch writes or forgets."""
        return self._changes

    def batch(self, answer: Answer = None) -> Batch:
        """The batch."""
        records = tuple(self._changes.values())
        return Batch(
            records,
            self.revision if records else 0,
            answer,
            tuple(self.sightings),
            tuple(self.effects),
            tuple(self.done),
        )

    # --- events -------------------------------------------------------------------------------------------------------

    def event(
        self,
        regarding: ObjectRef,
        reason: str,
        message: str,
        *,
        warning: bool = False,
        cause: str = "",
        source: str = "manager",
        time_s: float = 0.0,
        name: str = "",
    ) -> None:
        """Record that something happened. The same again raises the count of the event that is there."""
        time_s = time_s or self.now_s
        if not cause and source == "manager":
            cause = self.cause_of(regarding)
        message = message[:MAX_MESSAGE]
        # Sorts by time; the digest tells events of one millisecond apart and makes a repeat the same record.
        digest = hashlib.sha256(f"{source}/{name or (self.revision, len(self))}".encode()).hexdigest()[:12]
        event = EventView(
            Meta(
                f"{int(time_s * 1000):013d}-{digest}",
                tenant=regarding.tenant,
                uid=make_uid("event", source, digest, str(time_s)),
                resource_version=self.revision,
                created_s=self.now_s,
            ),
            regarding,
            reason,
            message,
            "Warning" if warning else "Normal",
            time_s,
            source,
            cause,
            1,
            time_s,
        )
        known = self.state.event_names.get(event_identity(event))
        if known is not None and not self.is_dropped("Event", known):
            first = self.state.events[known]
            if first.meta.name == event.meta.name:
                return
            self.put(
                replace(
                    first,
                    meta=replace(first.meta, resource_version=self.revision),
                    cause=cause,
                    count=first.count + 1,
                    last_s=time_s,
                )
            )
            return
        self.put(event)

    def cause_of(self, ref: ObjectRef) -> str:
        """What the present state of an environment, or of an instance of one, follows from; empty for anything else."""
        key = tenant_key(ref.tenant, ref.name)
        if ref.kind == "Instance":
            instance = self.state.instances.get(self.state.instance_names.get(key, ""))
            if instance is None:
                return ""
            key = self.state.environment_keys.get(instance.environment_uid, "")
        elif ref.kind != "Environment":
            return ""
        change = self._changes.get(("Environment", key))
        record = change.record if isinstance(change, Put) else self.state.environments.get(key)
        return record.cause if isinstance(record, EnvironmentRecord) else ""

    # --- addresses ----------------------------------------------------------------------------------------------------

    def nic(self, uid: str, index: int, network: Network, wanted: NicSpec) -> Nic:
        """A new interface: MAC by the instance's uid, next free address. Raises AddressesExhausted."""
        subnet = ipaddress.IPv4Network(network.spec.subnet)
        name = network.meta.name
        return Nic(
            name,
            self._mac(uid, index),
            str(ipaddress.IPv4Address(self._address(name, subnet, network.gateway))),
            subnet.prefixlen,
            network.gateway,
            network.spec.dns,
            network.spec.mtu,
            wanted.type,
            wanted.vlan,
            wanted.trust,
            wanted.min_rate_mbps,
            wanted.max_rate_mbps,
            wanted.pod,
        )

    def _mac(self, uid: str, index: int) -> str:
        attempt = 0
        while (mac := make_mac(uid, index, attempt)) in self.state.macs or mac in self._macs:
            attempt += 1
        self._macs.add(mac)
        return mac

    def _address(self, name: str, subnet: ipaddress.IPv4Network, gateway: str) -> int:
        """The next address after the one given last, so that one that was returned is not given again at once."""
        used = self.state.addresses.get(name, {})
        taken = self._taken.setdefault(name, set())
        first, last = int(subnet.network_address) + 1, int(subnet.broadcast_address) - 1
        kept = int(ipaddress.IPv4Address(gateway))
        if len(used) + len(taken) >= last - first:
            raise AddressesExhausted(f"network {name} has no address left of {subnet}")
        number = self._cursors.get(name, self.state.cursors.get(name, first - 1))
        while True:
            number = number + 1 if first <= number + 1 <= last else first
            if number != kept and number not in used and number not in taken:
                break
        taken.add(number)
        self._cursors[name] = number
        return number


def instance_ref(record: InstanceRecord) -> ObjectRef:
    """Reference to an instance."""
    return ObjectRef("Instance", record.meta.name, record.meta.tenant, record.meta.uid)
