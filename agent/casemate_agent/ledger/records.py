"""What an agent remembers: values only.

What may live here: the frozen records that the ledger keeps on disk, the observation that a round of the agent works on,
and pure questions about them. No I/O, no clock, no decisions (those are in :mod:`casemate_agent.plan.reconcile`).

Theory of operation. The agent is level-triggered: what it does next follows from what it wants (the desired records),
what is there (the observation), and the little that cannot be seen by looking: which claim it gave to whom, when it asked
a guest to power off, which attempts failed and when, and in which boot of the host it last started a domain. That little
is an :class:`InstanceRecord`. It is on disk, fsynced, before the act that it announces.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from casemate_agent.drivers.passageports import Passage as Passage
from casemate_agent.drivers.ports import (
    DomainFacts,
    MachineFacts,
    NetworkFacts,
    Partition,
    ProcessFacts,
    QemuThreads,
    StoredFiles,
)
from casemate_agent.drivers.volumeports import StoredVolume
from casemate_agent.gpu.health import GpuHealth
from casemate_agent.gpu.readings import CardFacts
from casemate_agent.gpu.records import GpuEntry
from casemate_agent.gpu.shares import ShareFacts
from casemate_agent.hardware.functions import FunctionFacts
from casemate_agent.ledger.desired import bare as bare
from casemate_agent.ledger.desired import from_metadata as from_metadata
from casemate_agent.ledger.desired import to_metadata as to_metadata
from casemate_core.claims import Claim
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.gpu import GpuOrder
from casemate_core.plain import to_plain
from casemate_core.spec.instance import DesiredInstance, HostNetwork, PodState
from casemate_core.spec.operation import OrderPhase, Verb
from casemate_core.spec.realtime import Certificate

HOST = ""
"""Stands for the host itself where instances are named by uid."""

MOST_NAMES = 2048
"""Names remembered at the same time; more than the instances that a host can have."""

RECORD_VERSION = 1
"""Version of the ledger's files. A reader takes this version and older ones; a newer one is left alone and reported."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The last attempts at an action, all failed. ``permanent`` ones fail again until the instance is changed."""

    action: str
    count: int
    at_s: float
    reason: str
    message: str
    permanent: bool = False
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """The last start of the domain: in which boot of the host, when (seconds since the epoch)."""

    boot_id: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Intent:
    """What is about to be done, written before it is done. After a crash it tells the reader of a log what was under way;
    nothing is repeated because of it, the plan is made anew from what is observed."""

    actions: tuple[str, ...]
    at_s: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """A placement that does not fit this host: must not happen, so it is told with its numbers and never papered over."""

    epoch: int
    generation: int
    message: str


@dataclass(frozen=True, slots=True)
class OrderRecord:
    """An order that this host has taken, on disk before anything is done for it.

    ``pid``, ``host_boot_id`` and ``guest_boot_id`` are what it was begun on; ``asked_s`` when the guest or the hypervisor
    was about to be asked (0: not yet), ``acted``: and has taken it.
    """

    uid: str
    verb: Verb
    phase: OrderPhase = OrderPhase.RUNNING
    started_s: float = 0.0
    finished_s: float = 0.0
    reason: str = ""
    message: str = ""
    pid: int = 0
    host_boot_id: str = ""
    guest_boot_id: str = ""
    asked_s: float = 0.0
    acted: bool = False


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """The agent's memory of one instance; one file of the ledger."""

    desired: DesiredInstance
    #: The manager no longer wants it here: it is ended, and then forgotten.
    removed: bool = False
    #: The claim that this host's resources are held under; None until it was checked.
    claim: Claim | None = None
    claim_epoch: int = 0
    claim_generation: int = 0
    refusal: Refusal | None = None
    #: When the stop that is under way began, and when the guest was asked last to power off; 0 where it was not.
    stop_since_s: float = 0.0
    stop_asked_s: float = 0.0
    #: It was its helper that was asked, and not only the power button, which a guest that is still booting does not hear.
    stop_heard: bool = False
    started: Started | None = None
    starts: int = 0
    #: How often in a row the domain ended by itself soon after its start, and when that was noticed last.
    exits: int = 0
    exited_s: float = 0.0
    failure: Failure | None = None
    intent: Intent | None = None
    #: Phase last reported, and since when: so that a restart of the agent is no change.
    phase: str = ""
    phase_since_s: float = 0.0
    order: OrderRecord | None = None
    #: The last latency that was measured in it.
    certificate: Certificate | None = None
    #: Rebuilt from a domain's metadata because the ledger had lost it.
    adopted: bool = False

    @property
    def uid(self) -> str:
        return self.desired.uid


@dataclass(frozen=True, slots=True)
class HostRecord:
    """The agent's memory of its host: the fencing epoch, the revision that is on disk, networks, the session counter."""

    epoch: int = 0
    revision: int = 0
    session: int = 0
    networks: tuple[HostNetwork, ...] = ()
    #: The desired state on disk is known to be all of it. False from the loss of a file until the manager's snapshot:
    #: until then nothing that is merely unknown is cleaned away.
    complete: bool = False
    #: Uids of the volumes whose data is to be deleted, as the manager said it last.
    volumes_removed: tuple[str, ...] = ()
    #: What operators asked of GPUs last.
    gpu_orders: tuple[GpuOrder, ...] = ()


@dataclass(frozen=True, slots=True)
class Book:
    """The whole ledger as one value."""

    host: HostRecord = field(default_factory=HostRecord)
    instances: Mapping[str, InstanceRecord] = field(default_factory=dict)
    #: By UUID.
    gpus: Mapping[str, GpuEntry] = field(default_factory=dict)
    #: What was wrong with the files, in words.
    damage: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GuestView:
    """What a guest has said since its helper connected; empty where it has not."""

    connected: bool = False
    boot_id: str = ""
    cloud_init: str = ""
    pods: tuple[PodState, ...] = ()
    revision: str = ""
    #: Why cloud-init failed, in its own words.
    cloud_init_message: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """What the machine looks like, asked of every driver once. A part that did not answer is None: unknown, not empty."""

    time_s: float
    machine: MachineFacts
    #: Owned domains by uuid.
    domains: Mapping[str, DomainFacts] | None
    foreign: tuple[DomainFacts, ...] = ()
    files: StoredFiles | None = None
    networks: NetworkFacts | None = None
    functions: FunctionFacts | None = None
    #: Volumes whose data is here, by uid.
    volumes: Mapping[str, StoredVolume] | None = None
    #: GPUs that are there, by UUID, and the last judgement of each.
    cards: Mapping[str, CardFacts] | None = None
    gpu_health: Mapping[str, GpuHealth] = field(default_factory=dict)
    #: Slices of GPUs that there are, by name.
    shares: Mapping[str, ShareFacts] | None = field(default_factory=dict)
    #: By process of a domain: where its threads may run, as the kernel says it. Only of those that were looked at.
    affinities: Mapping[int, QemuThreads] = field(default_factory=dict)
    #: By process: the vCPUs' sets and the others' that this agent has bound its threads to last.
    pinned: Mapping[int, tuple[tuple[CpuSet, ...], CpuSet]] = field(default_factory=dict)
    #: Processes in which a kernel was seen at work. Asked of those alone whose guest was not heard yet.
    kernels: frozenset[int] = frozenset()
    #: By process of a domain: the cpusets of its vCPUs, and threads that a slice may take though nobody has them.
    partitions: Mapping[int, tuple[Partition, ...]] = field(default_factory=dict)
    set_aside: CpuSet = EMPTY
    #: Files of the kernel by which the host is tuned, and processes of dedicated VMs; None: not read yet.
    tuning: Mapping[str, str] | None = None
    processes: Mapping[int, ProcessFacts] = field(default_factory=dict)
    #: Where this agent's own threads may run; files that the kernel refused to have written.
    agent_threads: CpuSet = EMPTY
    refused: frozenset[str] = frozenset()
    #: This host has a fabric manager, by which partitions of its GPUs are made active.
    switches: bool = False
    #: Instances that may have been started since the observation began.
    unsure: frozenset[str] = frozenset()
    #: Guarded taps of ours by the uid of the instance, in the order of its interfaces.
    guarded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    guests: Mapping[str, GuestView] = field(default_factory=dict)
    attached: frozenset[str] = frozenset()
    virtualisation: str = ""
    #: Why guests are emulated, where they are.
    virtualisation_reason: str = ""
    #: What this host lacks to make guests' networks; None: not known.
    network_problem: str | None = None
    #: Passages that are open, by the uid of the instance that is waited for; instances that are being sent.
    passages: Mapping[str, Passage] = field(default_factory=dict)
    moving: frozenset[str] = frozenset()
    #: Instances that had an action under way when the observation began (and ``HOST``, for the host's own). They are not
    #: planned for: what was seen of them may be older than the action's effect.
    busy: frozenset[str] = frozenset()
    #: Ports that did not answer, with the reason.
    silent: Mapping[str, str] = field(default_factory=dict)
    #: Since when each of them has not (seconds since the epoch).
    silent_since_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Note:
    """Something that happened and is worth an event."""

    uid: str
    reason: str
    message: str
    severity: str = "Normal"
    pod: str = ""


def _remembered(make: Callable[[DesiredInstance], str]) -> Callable[[DesiredInstance], str]:
    """Make the name of a record once for each object: a round asks for the names of all instances. Records are values that
    nobody changes; they are told apart by identity because a dictionary within them has no hash."""
    names: OrderedDict[int, tuple[DesiredInstance, str]] = OrderedDict()

    @wraps(make)
    def name_of(desired: DesiredInstance) -> str:
        known = names.get(id(desired))
        if known is not None and known[0] is desired:
            return known[1]
        name = make(desired)
        names[id(desired)] = (desired, name)
        while len(names) > MOST_NAMES:
            names.popitem(last=False)
        return name

    return name_of


@_remembered
def pods_revision(desired: DesiredInstance) -> str:
    """Names the pod set of an instance: equal sets have equal names, across restarts and releases."""
    body: dict[str, Any] = {
        "pods": [to_plain(dict(pod)) for pod in desired.pods],
        "peers": to_plain(desired.peers),
        "archives": [a.file.digest for a in desired.archives],
    }
    if desired.secrets:
        body["secrets"] = {place: secret.fingerprint for place, secret in desired.secrets.items()}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@_remembered
def domain_digest(desired: DesiredInstance) -> str:
    """Names everything of an instance that its domain and its files are made from: two records with equal digests need
    no restart between them. Pods and peers are live, run is a level of its own, and stamps alone change nothing."""
    body = {
        "cpus": desired.cpus,
        "memory_mib": desired.memory_mib,
        "image": to_plain(desired.image),
        "archives": [to_plain(a) for a in desired.archives],
        "nics": to_plain(desired.nics),
        "ssh_keys": list(desired.ssh_keys),
        "user_data": desired.user_data,
        "virtualisation": desired.virtualisation.value,
        "cpu_policy": desired.cpu_policy,
        "page_kib": desired.page_kib,
        "claim": to_plain(desired.placement.claim),
        "disk": desired.disk,
        # Not their size: they grow while they are in use.
        "volumes": [[v.uid, v.name, v.read_only] for v in desired.volumes],
    }
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
