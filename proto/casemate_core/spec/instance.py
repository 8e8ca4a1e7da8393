"""An instance as an agent receives it: resolved, complete, and free of environments and policies.

The manager makes one ``DesiredInstance`` for each VM that a host should have; the agent stores it in its ledger, compares
it with what it observes, and acts. Everything an agent needs to make the VM again after a crash is in it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from casemate_core.claims import Claim
from casemate_core.spec.operation import Order, OrderState
from casemate_core.spec.realtime import Certificate, ProfileLine
from casemate_core.spec.secret import SecretText
from casemate_core.spec.volume import serial_of

DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z", re.ASCII)


class Run(StrEnum):
    """Whether an instance should run."""

    STARTED = "started"
    STOPPED = "stopped"
    #: Frozen where it stands, if it runs; one that does not is not started.
    PAUSED = "paused"


class Virtualisation(StrEnum):
    """What an instance asks of its host's virtualisation."""

    REQUIRE = "require"
    PREFER = "prefer"
    ANY = "any"


class Phase(StrEnum):
    """Phase of an instance. The agent reports those from PREPARING on; the manager alone sets the first two."""

    PENDING = "Pending"
    PLACED = "Placed"
    PREPARING = "Preparing"
    STARTING = "Starting"
    RUNNING = "Running"
    READY = "Ready"
    PAUSED = "Paused"
    STOPPING = "Stopping"
    STOPPED = "Stopped"
    FAILED = "Failed"
    DELETING = "Deleting"
    UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True)
class File:
    """A file known by its digest (``sha256:`` + 64 hex digits) and where to fetch it (file, http or https URL)."""

    source: str
    digest: str


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A root disk (type ``disk``) or a tar file of container images (type ``oci-archive``), with its recorded format."""

    name: str
    type: str
    file: File
    format: str
    kernel: File | None = None
    initrd: File | None = None
    cmdline: str = ""


@dataclass(frozen=True, slots=True)
class Nic:
    """A network interface as the manager gave it out. MAC lower-case with colons; address IPv4 dotted."""

    network: str
    mac: str
    address: str
    prefix_length: int
    gateway: str
    dns: tuple[str, ...] = ()
    mtu: int = 1500
    type: str = "bridge"
    #: Of a virtual function (type ``sriov``). Rates in Mbit/s, 0: no limit.
    vlan: int = 0
    trust: bool = False
    min_rate_mbps: int = 0
    max_rate_mbps: int = 0
    #: Name of the pod whose network it goes into; empty: it stays in the guest's.
    pod: str = ""


def bridged(nics: tuple[Nic, ...]) -> tuple[Nic, ...]:
    """The interfaces that have a tap on a bridge of the host, in their order; the others are passed through."""
    return tuple(nic for nic in nics if nic.type != "sriov")


@dataclass(frozen=True, slots=True)
class HostNetwork:
    """A network that instances of a host attach to: for type ``nat`` a bridge of the host with the gateway's address."""

    name: str
    type: str
    subnet: str
    gateway: str
    mtu: int = 1500


@dataclass(frozen=True, slots=True)
class Placement:
    """The exact resources given to one instance on one host, stamped.

    ``epoch`` is the manager's term, ``generation`` counts this instance's placements; an agent keeps the highest epoch it
    has seen and refuses older ones (fencing).
    """

    claim: Claim
    epoch: int
    generation: int
    role: str = "active"


@dataclass(frozen=True, slots=True)
class VolumeRef:
    """A volume of this host that an instance uses, with its recorded format; ``name`` is what the guest mounts it under.

    ``made``: the host has said that its data is there. From then on it is never made anew: where it is missing, it is lost.
    """

    uid: str
    name: str
    size_mib: int
    format: str = "raw"
    read_only: bool = False
    made: bool = False

    @property
    def serial(self) -> str:
        """What the guest finds its disk by."""
        return serial_of(self.uid)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another instance of the same environment."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class DesiredInstance:
    """One VM that a host should have. Sizes in MiB; ``page_kib`` 0 means ordinary pages."""

    uid: str
    tenant: str
    environment: str
    name: str
    ordinal: int
    generation: int
    run: Run
    cpus: int
    memory_mib: int
    disk_mib: int
    image: ImageRef
    placement: Placement
    archives: tuple[ImageRef, ...] = ()
    nics: tuple[Nic, ...] = ()
    #: v1 Pod manifests, validated by the manager against the table of supported fields.
    pods: tuple[MappingProxyType[str, Any] | dict[str, Any], ...] = ()
    ssh_keys: tuple[str, ...] = ()
    user_data: str = field(default="", repr=False)
    virtualisation: Virtualisation = Virtualisation.PREFER
    cpu_policy: str = "shared"
    page_kib: int = 0
    peers: tuple[Peer, ...] = ()
    #: What is to be done once, until its end was told; no part of what a domain is made from.
    order: Order | None = None
    #: Counts the instance's root disks: another number asks for a new one, made from the image.
    disk: int = 0
    #: ``restart`` or ``leave``; and after how many ends by itself in a row it is given up (0: never).
    on_crash: str = "restart"
    crash_limit: int = 0
    #: How long the guest has to power off; None: the agent's own.
    stop_grace_s: float | None = None
    #: Texts of secrets that its pods name, by `casemate_core.spec.secret.place_of`; no part of what a domain is made from.
    secrets: Mapping[str, SecretText] = field(default_factory=dict)
    volumes: tuple[VolumeRef, ...] = ()
    #: What this state of it follows from (casemate_core.cause); its events carry it until it is as asked.
    cause: str = ""


@dataclass(frozen=True, slots=True)
class ContainerState:
    """A container as the guest reports it. Times in seconds since the epoch, 0 where unknown."""

    name: str
    image: str
    state: str
    ready: bool = False
    restarts: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    started_s: float = 0.0
    finished_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PodState:
    """A pod as the guest reports it."""

    name: str
    phase: str
    ready: bool = False
    reason: str = ""
    message: str = ""
    started_s: float = 0.0
    containers: tuple[ContainerState, ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceState:
    """What a host reports of one VM. ``since_s`` is the time of the last change of phase, seconds since the epoch."""

    uid: str
    generation: int
    phase: Phase
    reason: str = ""
    message: str = ""
    virtualisation: str = ""
    guest_boot_id: str = ""
    pid: int = 0
    starts: int = 0
    since_s: float = 0.0
    guest_ready: bool = False
    cloud_init: str = ""
    pods: tuple[PodState, ...] = ()
    placement_epoch: int = 0
    placement_generation: int = 0
    #: The claim of the agent's ledger; told in snapshots only.
    claim: Claim | None = None
    order: OrderState | None = None
    #: Why cloud-init failed, in its own words.
    cloud_init_message: str = ""
    #: Whether a kernel was seen at work since its process began.
    kernel: bool = False
    #: What its threads and memory need, read back; and the last latency that was measured in it.
    profile: tuple[ProfileLine, ...] = ()
    certificate: Certificate | None = None
