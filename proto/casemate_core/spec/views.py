"""Read-only objects as the manager shows them: statuses, instances, pods, placements, events. Frozen, no behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from casemate_core.gpu import GpuState, Passport
from casemate_core.spec.instance import InstanceState, Nic, PodState
from casemate_core.spec.meta import Meta
from casemate_core.spec.realtime import Certificate, ProfileLine


@dataclass(frozen=True, slots=True)
class Condition:
    """One observation about an object. ``status`` is ``True``, ``False`` or ``Unknown``."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    since_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EnvironmentStatus:
    """The whole of an environment in one word and counts."""

    phase: str
    conditions: tuple[Condition, ...] = ()
    observed_generation: int = 0
    wanted: int = 0
    placed: int = 0
    running: int = 0
    ready: int = 0
    instances: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HostStatus:
    """What is known of a host."""

    phase: str
    conditions: tuple[Condition, ...] = ()
    agent_version: str = ""
    boot_id: str = ""
    kernel: str = ""
    virtualisation: str = ""
    cells: int = 0
    cores: int = 0
    threads: int = 0
    memory_mib: int = 0
    disk_mib: int = 0
    gpus: int = 0
    vfs: int = 0
    cpus_used_milli: int = 0
    memory_used_mib: int = 0
    instances: int = 0
    foreign: int = 0
    heard_s: float = 0.0
    drift: tuple[str, ...] = ()
    profile: tuple[ProfileLine, ...] = ()
    topology: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ImageStatus:
    """Where an image is."""

    hosts: int = 0
    environments: int = 0


@dataclass(frozen=True, slots=True)
class NetworkStatus:
    """Addresses of a network."""

    addresses_used: int = 0
    addresses: int = 0


@dataclass(frozen=True, slots=True)
class VolumeStatus:
    """Where a volume is, and who uses it. Amounts of None: not known."""

    phase: str
    host: str = ""
    environment: str = ""
    instance: str = ""
    allocated_mib: int | None = None
    capacity_mib: int | None = None
    format: str = ""
    device: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class TenantStatus:
    """What a tenant has asked for, by the names and in the units of its quotas."""

    used: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One VM: what the manager resolved, and what its host reports (None until it does)."""

    meta: Meta
    environment: str
    ordinal: int
    host: str
    nics: tuple[Nic, ...]
    cpus: int
    memory_mib: int
    image: str
    run: str
    phase: str
    conditions: tuple[Condition, ...] = ()
    state: InstanceState | None = None
    heard_s: float = 0.0
    volumes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PodView:
    """One pod of one instance; ``state`` None until the guest speaks of it."""

    meta: Meta
    environment: str
    instance: str
    host: str
    manifest: Mapping[str, Any]
    state: PodState | None = None


@dataclass(frozen=True, slots=True)
class PlacementView:
    """The exact resources of one host given to one instance."""

    meta: Meta
    instance: str
    instance_uid: str
    host: str
    epoch: int
    generation: int
    role: str
    claim: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """A reference to one object."""

    kind: str
    name: str
    tenant: str = ""
    uid: str = ""


@dataclass(frozen=True, slots=True)
class OperationView:
    """Something that was asked to be done once to an instance, and what came of it."""

    meta: Meta
    verb: str
    target: ObjectRef
    deadline_s: float
    phase: str
    grace_s: float | None = None
    reason: str = ""
    message: str = ""
    started_s: float = 0.0
    finished_s: float = 0.0
    host: str = ""
    certificate: Certificate | None = None
    #: Of a migrate: where it goes to.
    to_host: str = ""


@dataclass(frozen=True, slots=True)
class EventView:
    """Something that happened. ``meta.name`` is unique and sorts by time."""

    meta: Meta
    regarding: ObjectRef
    reason: str
    message: str
    severity: str = "Normal"
    time_s: float = 0.0
    source: str = "manager"
    cause: str = ""
    count: int = 1
    last_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GpuSliceView:
    """A slice of a GPU that an instance has: a profile's name, or thousandths with an ``m``."""

    instance: str
    share: str
    milli: int


@dataclass(frozen=True, slots=True)
class GpuView:
    """A GPU of a host: what its host's inventory has of it, what the host says (None until it does), and its hand-overs,
    oldest first."""

    meta: Meta
    host: str
    model: str
    memory_mib: int
    address: str
    phase: str
    instance: str = ""
    tenant: str = ""
    reason: str = ""
    order: str = ""
    state: GpuState | None = None
    passports: tuple[Passport, ...] = ()
    slices: tuple[GpuSliceView, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """One field that changes; values as JSON values, ``effect`` of live, restart, replace, immutable."""

    path: str
    before: Any = None
    after: Any = None
    effect: str = field(default="live")
