"""PURE. What the manager remembers over its own death: one frozen type for each kind of durable record.

Observed state is not here: hosts tell it again (:mod:`casemate_manager.fleet.observed`). Each record has a kind and a key,
unique for its kind, and a plain form by its type hints (:mod:`casemate_core.plain`), which is what stores write. A field
is added with a default; a key never changes its meaning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from casemate_core.audit import AuditRecord
from casemate_core.checkpoint import Checkpoint
from casemate_core.claims import Claim
from casemate_core.gpu import GpuOrder, Passport
from casemate_core.spec.access import RoleBinding, Tenant, User
from casemate_core.spec.environment import Environment, EnvironmentSpec
from casemate_core.spec.fleet import Host, Image, Network, Policy, Taint
from casemate_core.spec.instance import Nic
from casemate_core.spec.meta import Meta
from casemate_core.spec.realtime import Certificate
from casemate_core.spec.secret import Secret
from casemate_core.spec.views import EventView
from casemate_core.spec.volume import Attached, Volume
from casemate_core.topology import Topology


@dataclass(frozen=True, slots=True)
class EnvironmentRecord:
    """An environment, and the generations at which fields that need a restart or new instances last changed."""

    environment: Environment
    restart_generation: int
    replace_generation: int
    #: The end of its lifetime that was told ahead (seconds since the epoch); 0: none was.
    notice_end_s: float = 0.0
    #: What its last change follows from (casemate_core.cause).
    cause: str = ""
    #: Of a gang: its instances below this ordinal are placed, all of them, and their hosts are told; what others hold
    #: is reserved. -1: there is nothing to wait for. ``told_revision`` is when it changed last.
    gang_told: int = -1
    told_revision: int = 0

    def is_told(self, instance: "InstanceRecord") -> bool:
        """Whether a host is told of the instance's placement, or only keeps the room for it."""
        return self.gang_told < 0 or instance.ordinal < self.gang_told


@dataclass(frozen=True, slots=True)
class RevisionRecord:
    """The spec that an environment had at a generation of which instances still carry restart or replace fields."""

    environment_uid: str
    generation: int
    spec: EnvironmentSpec


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """One VM: its identity for life and its addresses.

    ``meta.deleting_s`` is set where the instance goes and its environment stays (scale down). ``restart_generation`` and
    ``replace_generation`` say of which generations of the environment it carries the fields that need a restart or
    a new root disk. ``placements`` counts its placements, ``disks`` the root disks that it was rebuilt with. ``held``
    keeps it off for a reason of ours; at ``refused_generation`` what changed did not fit on its host.
    """

    meta: Meta
    environment: str
    environment_uid: str
    ordinal: int
    nics: tuple[Nic, ...]
    restart_generation: int
    replace_generation: int
    placements: int = 0
    disks: int = 0
    held: str = ""
    refused_generation: int = 0
    #: The volumes that it uses, as its spec in force says.
    volumes: tuple[Attached, ...] = ()


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """A volume, and the host that its data is on, or is to be made on, for life; empty until its first instance is placed.

    ``bound_for`` is that instance. ``made``: the host has said that the data is there.
    """

    volume: Volume
    host: str = ""
    bound_for: str = ""
    made: bool = False


@dataclass(frozen=True, slots=True)
class PlacementRecord:
    """The exact resources of one host given to one instance. ``revision`` is the store's at its last change."""

    instance_uid: str
    host: str
    claim: Claim
    epoch: int
    generation: int
    role: str = "active"
    created_s: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True)
class OperationRecord:
    """Something asked to be done once to an instance. ``released``: its turn has come, and its deadline runs;
    ``pid`` and ``guest_boot_id`` are what it was released for. ``closed``: nothing is to come of it any more."""

    meta: Meta
    verb: str
    instance_uid: str
    instance: str
    environment_uid: str
    host: str
    timeout_s: float
    grace_s: float | None = None
    released: bool = False
    deadline_s: float = 0.0
    pid: int = 0
    guest_boot_id: str = ""
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    started_s: float = 0.0
    finished_s: float = 0.0
    closed: bool = False
    #: Of a certify: how long is measured, and what was.
    duration_s: float = 0.0
    certificate: Certificate | None = None
    #: Of a migrate: where to, how far it has come (``casemate_core.spec.operation.Stage``, or ``back``: the target lets go of
    #: what has not arrived before the source goes on), where the target waits, and whether it is gone from its source.
    target: str = ""
    stage: str = ""
    address: str = ""
    left: bool = False


@dataclass(frozen=True, slots=True)
class HostRecord:
    """A host and what its last Hello said. ``held`` says why no session is taken; ``session`` its highest counter."""

    host: Host
    session: int = 0
    boot_id: str = ""
    agent_version: str = ""
    kernel: str = ""
    virtualisation: str = ""
    held: str = ""


@dataclass(frozen=True, slots=True)
class InventoryRecord:
    """What a host is made of, as it last said."""

    host: str
    digest: str
    topology: Topology


@dataclass(frozen=True, slots=True)
class GpuRecord:
    """What is kept of a GPU: its last passports, newest last, and what an operator asked of it last."""

    uuid: str
    host: str
    passports: tuple[Passport, ...] = ()
    order: GpuOrder | None = None
    revision: int = 0


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """An answered request: the same key again gets the same answer. ``digest`` tells another request with the key."""

    key: str
    digest: str
    at_s: float
    answer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AccessKeyRecord:
    """An access key. ``digest`` is of its secret; ``former_digest`` of the one before, taken until ``former_until_s``."""

    id: str
    user: str
    digest: str = field(repr=False)
    created_s: float
    expires_s: float = 0.0
    description: str = ""
    disabled: bool = False
    rotated_s: float = 0.0
    former_digest: str = field(default="", repr=False)
    former_until_s: float = 0.0


@dataclass(frozen=True, slots=True)
class AuditHead:
    """The end of the audit chain, kept beside it: what a chain that was cut off at its end is found by."""

    name: str
    sequence: int
    digest: str


@dataclass(frozen=True, slots=True)
class AuditMark:
    """A place of the audit chain and its time: what retention cuts at."""

    sequence: int
    digest: str
    time_s: float


@dataclass(frozen=True, slots=True)
class AuditCut:
    """Where the audit chain that is kept begins: the last record that was forgotten, and when it was."""

    name: str
    sequence: int
    digest: str
    time_s: float


@dataclass(frozen=True, slots=True)
class HostLimits:
    """The most that a host may have, as it was enrolled; 0: no limit."""

    threads: int = 0
    memory_mib: int = 0
    gpus: int = 0


NO_LIMITS: Final = HostLimits()


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What lets one machine become the host ``host``, once. ``digest`` is SHA-256 of its secret, which is not kept.

    ``key`` names the key that used it; ``used_s`` and ``revoked_s`` are 0 where it was not.
    """

    token: str
    host: str
    digest: str
    created_s: float
    expires_s: float
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Taint, ...] = ()
    limits: HostLimits = NO_LIMITS
    used_s: float = 0.0
    key: str = ""
    revoked_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EnrolmentRecord:
    """The key (SHA-256 of it) that is a host. ``authority`` (its pin) signed the last certificate, good until ``expires_s``."""

    host: str
    key: str
    since_s: float
    renewed_s: float
    expires_s: float
    authority: str = ""
    revoked_s: float = 0.0
    limits: HostLimits = NO_LIMITS
    #: X25519 public key of root at a split agent, in hex, for which it is told; empty: none.
    sealing: str = ""


Record = (
    EnvironmentRecord
    | RevisionRecord
    | InstanceRecord
    | PlacementRecord
    | HostRecord
    | InventoryRecord
    | GpuRecord
    | RequestRecord
    | OperationRecord
    | TokenRecord
    | EnrolmentRecord
    | Image
    | Network
    | Policy
    | Tenant
    | User
    | RoleBinding
    | Secret
    | VolumeRecord
    | AccessKeyRecord
    | AuditRecord
    | AuditHead
    | AuditMark
    | AuditCut
    | Checkpoint
    | EventView
)

#: Kind word of each record type, as stores write it.
KINDS: Final[dict[str, type[Any]]] = {
    "Environment": EnvironmentRecord,
    "Revision": RevisionRecord,
    "Instance": InstanceRecord,
    "Placement": PlacementRecord,
    "Host": HostRecord,
    "Inventory": InventoryRecord,
    "GPU": GpuRecord,
    "Request": RequestRecord,
    "Operation": OperationRecord,
    "Token": TokenRecord,
    "Enrolment": EnrolmentRecord,
    "Image": Image,
    "Network": Network,
    "Policy": Policy,
    "Tenant": Tenant,
    "User": User,
    "RoleBinding": RoleBinding,
    "Secret": Secret,
    "Volume": VolumeRecord,
    "Event": EventView,
    "AccessKey": AccessKeyRecord,
    "Audit": AuditRecord,
    "AuditHead": AuditHead,
    "AuditMark": AuditMark,
    "AuditCut": AuditCut,
    "Checkpoint": Checkpoint,
}
_WORDS: Final = {kind: word for word, kind in KINDS.items()}


def kind_of(record: Record) -> str:
    """Kind word of a record."""
    return _WORDS[type(record)]


def tenant_key(tenant: str, name: str) -> str:
    """Key of a tenant's object."""
    return f"{tenant}/{name}"


def instance_or_environment(name: str) -> str:
    """The kind that a name is taken for where there is neither: read off the name alone, so that it tells nothing of others."""
    return "Instance" if name.rpartition("-")[2].isdecimal() else "Environment"


def key_of(record: Record) -> str:
    """Key of a record, unique for its kind."""
    match record:
        case EnvironmentRecord():
            return tenant_key(record.environment.meta.tenant, record.environment.meta.name)
        case RevisionRecord():
            return f"{record.environment_uid}/{record.generation}"
        case InstanceRecord():
            return record.meta.uid
        case PlacementRecord():
            return f"{record.instance_uid}/{record.generation}"
        case HostRecord():
            return record.host.meta.name
        case InventoryRecord() | EnrolmentRecord():
            return record.host
        case GpuRecord():
            return record.uuid
        case TokenRecord():
            return record.token
        case RequestRecord():
            return record.key
        case OperationRecord():
            return tenant_key(record.meta.tenant, record.meta.name)
        case Secret():
            return tenant_key(record.meta.tenant, record.meta.name)
        case VolumeRecord():
            return tenant_key(record.volume.meta.tenant, record.volume.meta.name)
        case AccessKeyRecord():
            return record.id
        case AuditRecord() | AuditMark() | Checkpoint():
            return f"{record.sequence:016d}"
        case AuditHead() | AuditCut():
            return record.name
        case EventView() | Image() | Network() | Policy() | Tenant() | User() | RoleBinding():
            return record.meta.name


@dataclass(frozen=True, slots=True)
class Put:
    """Write this record."""

    record: Record


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget this record."""

    kind: str
    key: str


RecordChange = Put | Drop
