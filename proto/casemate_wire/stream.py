"""PURE. What a host and the manager say to one another, as values.

One frozen type for each message of ``casemate_wire/v1/hosts.proto``, so that the protocol
(:mod:`casemate_wire.session`), the agent and the manager speak core types and never protobuf; :mod:`casemate_wire.codec`
converts at the border. Nothing here decides anything. Times are seconds since the epoch, 0 where unknown.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from casemate_core.checkpoint import Checkpoint
from casemate_core.claims import Claim
from casemate_core.gpu import GpuOrder, GpuState
from casemate_core.spec.instance import DesiredInstance, HostNetwork, InstanceState
from casemate_core.spec.realtime import ProfileLine
from casemate_core.spec.views import Condition
from casemate_core.topology import Topology


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a session. ``epoch``, ``revision``: of the desired state on the agent's disk (0: none). ``nonce``:
    drawn for this session by who takes signed messages alone; empty where they need not be."""

    host: str
    boot_id: str
    epoch: int
    revision: int
    inventory_digest: str
    session: int
    agent_version: str = ""
    kernel: str = ""
    virtualisation: str = ""
    nonce: bytes = b""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The session is open. ``since`` 0: the desired state follows whole; else what changed after that revision.
    ``authorities``: SHA-256 of those that are trusted now, told to who takes signed messages alone."""

    epoch: int
    since: int
    send_inventory: bool
    reconnect_window_s: float
    credit: int
    authorities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """The session is refused or ended. ``retry_after_s`` < 0: do not come back before someone has acted."""

    reason: str
    message: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the host is made of."""

    digest: str
    topology: Topology


@dataclass(frozen=True, slots=True)
class Desired:
    """Desired state of one host, level-triggered: records are whole, the last one of an instance wins.

    ``snapshot``: everything that the host should have; what is not in it is to be ended. ``more``: parts of the same
    transfer follow; none of it counts before the last part is there. The session joins parts before it delivers them.
    ``removed`` names instances to end; the host answers each of them with ``Facts.gone`` once no trace of it is left,
    also where it never had it.
    """

    epoch: int
    revision: int
    snapshot: bool = False
    instances: tuple[DesiredInstance, ...] = ()
    removed: tuple[str, ...] = ()
    networks: tuple[HostNetwork, ...] = ()
    #: Names of networks to end.
    networks_removed: tuple[str, ...] = ()
    more: bool = False
    #: Uids of all volumes of the host whose data is to be deleted: whole in each message, never merged.
    volumes_removed: tuple[str, ...] = ()
    #: The last that operators asked of each GPU of the host, whole; None: as it was.
    gpu_orders: tuple[GpuOrder, ...] | None = None


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """A volume whose data is on the host: its size, and what it takes of the host's disk."""

    uid: str
    size_mib: int
    allocated_mib: int


@dataclass(frozen=True, slots=True)
class HostReport:
    """What a host observes of itself, whole. ``foreign`` VMs are not ours; what they hold counts as used."""

    foreign: int = 0
    foreign_claims: tuple[Claim, ...] = ()
    drift: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = ()
    disk_free_mib: int = 0
    #: What real time needs of the host, read back.
    profile: tuple[ProfileLine, ...] = ()
    #: All volumes whose data is here, by uid; None: not known at the moment.
    volumes: tuple[VolumeFacts, ...] | None = None
    #: Every GPU that the host has a record of.
    gpus: tuple[GpuState, ...] = ()
    #: Where other hosts reach this one for a migration, and the name of its CPU (casemate_wire.v1.HostFacts).
    passage: str = ""
    cpu: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the host observes: whole after a hello, then as deltas. ``sequence`` counts from 1 in each session."""

    sequence: int
    snapshot: bool = False
    instances: tuple[InstanceState, ...] = ()
    gone: tuple[str, ...] = ()
    host: HostReport | None = None
    more: bool = False


@dataclass(frozen=True, slots=True)
class FactsAck:
    """Facts up to this sequence, and every message sent before them, were taken; what must be durable is."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an operation ended, or (``placement_refused``) that a placement did not fit, which must not happen."""

    operation: str
    instance: str
    phase: str
    reason: str = ""
    message: str = ""
    placement_refused: bool = False


@dataclass(frozen=True, slots=True)
class HostEvent:
    """Something that happened on the host. ``id`` is unique for the host, so that a repeat is known as one."""

    id: str
    instance: str
    pod: str
    reason: str
    message: str
    severity: str = "Normal"
    time_s: float = 0.0
    cause: str = ""


@dataclass(frozen=True, slots=True)
class InstanceMeasurement:
    """Figures of one VM."""

    uid: str
    cpu_time_ns: int
    memory_rss_mib: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """Sampled figures; losing one is no harm. ``cpu_used`` in CPUs."""

    time_s: float
    cpu_used: float
    memory_used_mib: int
    instances: tuple[InstanceMeasurement, ...] = ()


@dataclass(frozen=True, slots=True)
class Ack:
    """Desired state up to this revision is on the agent's disk."""

    epoch: int
    revision: int


@dataclass(frozen=True, slots=True)
class Credit:
    """Lets the other side send so many more counted messages."""

    messages: int


@dataclass(frozen=True, slots=True)
class Bye:
    """The agent leaves on purpose."""

    reason: str


@dataclass(frozen=True, slots=True)
class Operate:
    """Something to be done once, before ``deadline_s``."""

    operation: str
    verb: str
    instance: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    deadline_s: float = 0.0


@dataclass(frozen=True, slots=True)
class OpenChannel:
    """Asks the agent to dial a channel of a kind (``logs``, ``exec``, ``console``); the ticket is good once, for 30 s."""

    ticket: str = field(repr=False)
    kind: str
    instance: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


FromHost = Hello | Inventory | Facts | Outcome | HostEvent | Measurement | Ack | Credit | Bye
ToHost = Welcome | Desired | Operate | OpenChannel | Credit | Rejected | FactsAck | Checkpoint
