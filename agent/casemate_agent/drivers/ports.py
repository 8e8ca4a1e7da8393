"""The narrow doors between the agent and its machine.

Each port is a Protocol owned by the agent; a driver wraps one library, speaks the types below, translates the library's
errors into :mod:`casemate_core.errors`, and decides nothing. `drivers.simulated` implements all of them in memory and
passes the same contract suite (``tests/contract``) as the real ones.

Rules that hold for every method here: it returns or raises within ``deadline_s`` (a hung library call raises
``DeadlineExceeded`` and its effect is unknown: observe before you act again); ending what is already ended is no error;
making what is already made as asked is no error.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from casemate_agent.doctor.facts import HostSurvey
from casemate_agent.drivers.fabricports import Fabric
from casemate_agent.drivers.gpuports import GpuCards, Gpus, GpuShares
from casemate_agent.drivers.passageports import Passages
from casemate_agent.drivers.sideports import Consoles, GuestSides, SerialLogs
from casemate_agent.drivers.volumeports import Volumes
from casemate_agent.hardware.functions import FunctionFacts, Grant, Stamp
from casemate_agent.hardware.pciplace import FunctionPlace
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.errors import CallerError, MachineError
from casemate_core.spec.instance import DesiredInstance, HostNetwork, ImageRef, Nic, PodState
from casemate_core.topology import Topology

# --- the hypervisor ---------------------------------------------------------------------------------------------------


class DomainPhase(StrEnum):
    """State of a libvirt domain, as far as the agent tells them apart (virDomainState)."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUTTING_DOWN = "shutting-down"
    SHUT_OFF = "shut-off"
    CRASHED = "crashed"


@dataclass(frozen=True, slots=True)
class DomainFacts:
    """One domain as the hypervisor reports it. ``owned`` domains carry our metadata; others are foreign and never touched."""

    uuid: str
    name: str
    phase: DomainPhase
    owned: bool
    #: It is paused because somebody asked for it, not because its disk is full or failed.
    frozen: bool = False
    #: It is paused for a migration that is under way, or broke off; it is off because it was migrated away.
    halted: bool = False
    left: bool = False
    #: Of our metadata element, for owned domains: what this domain was made from.
    instance_uid: str = ""
    generation: int = 0
    placement_epoch: int = 0
    placement_generation: int = 0
    pid: int = 0
    vcpus: int = 0
    memory_mib: int = 0
    #: Target devices of its interfaces on the host.
    taps: tuple[str, ...] = ()
    #: Paths of the files that it uses as disks, kernel and initrd.
    files: tuple[str, ...] = ()
    #: Unix socket of our helper's channel, where there is one.
    channel_path: str = ""
    #: Host threads that its vCPUs are pinned to, one set a vCPU; empty where they are not pinned.
    vcpu_pins: tuple[frozenset[int], ...] = ()
    #: Threads that its emulator is pinned to by its definition; empty: none.
    emulator_pin: CpuSet = EMPTY
    #: Claim recorded in our metadata (Claim.to_dict()), from which a lost ledger is rebuilt; the whole desired record too.
    record: str = ""


@dataclass(frozen=True, slots=True)
class QemuThreads:
    """Where the threads of one QEMU may run, as the kernel says it: each vCPU's, empty for one that has no thread of its own
    (any more); and all places of all its other threads together."""

    vcpus: tuple[CpuSet, ...] = ()
    rest: CpuSet = EMPTY
    #: vCPUs whose thread runs under SCHED_FIFO.
    fifo: frozenset[int] = frozenset()

    @property
    def all(self) -> CpuSet:
        """Wherever any of them may run."""
        found = self.rest
        for each in self.vcpus:
            found |= each
        return found


@dataclass(frozen=True, slots=True)
class Partition:
    """The cpuset of one vCPU. ``state``: the kernel's word in cpuset.cpus.partition, such as ``member``, ``isolated`` or
    ``isolated invalid (why)``. ``cpus``: what its threads may run on."""

    state: str
    cpus: CpuSet = EMPTY

    @property
    def isolated(self) -> CpuSet:
        """What it has for itself."""
        return self.cpus if self.state == "isolated" else EMPTY

    @property
    def words(self) -> str:
        return f"{self.state} on {self.cpus}" if self.cpus else self.state


@dataclass(frozen=True, slots=True)
class PartitionFacts:
    """By process of a domain: the cpuset of each of its vCPUs; one that is gone, or has no cgroup of libvirt's, is left out.
    ``set_aside``: threads that a cgroup may take for itself (cpuset.cpus.exclusive) of which no cgroup below it has them."""

    domains: Mapping[int, tuple[Partition, ...]] = field(default_factory=dict)
    set_aside: CpuSet = EMPTY


class PartitionRefused(MachineError):
    """The kernel does not make a partition; the message has its reason."""

    reason = "PartitionRefused"


class Partitions(Protocol):
    """cpuset partitions of cgroup v2."""

    async def look(self, pids: tuple[int, ...], deadline_s: float) -> PartitionFacts:
        """As the kernel says it. Changes nothing."""
        ...

    async def isolate(self, pid: int, sets: tuple[CpuSet, ...], deadline_s: float) -> None:
        """Make the cpuset of each vCPU a partition ``isolated`` with its set (none where that is empty); read back. Raises
        PartitionRefused with the kernel's reason."""
        ...

    async def reclaim(self, cpus: CpuSet, deadline_s: float) -> None:
        """Take these out of what cgroups may take for themselves, where none below has them."""
        ...


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """A domain changed: look again. ``reason`` is libvirt's event and detail in words, for the log."""

    uuid: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class DomainFiles:
    """Local files that a domain is made from."""

    root: str
    root_format: str
    #: The backing file of the overlay and its format, named in the XML so that nothing is probed.
    backing: str
    backing_format: str
    seed: str
    archives: tuple[str, ...] = ()
    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""
    #: PCI addresses of the functions that are passed through, VFs in the order of their interfaces, then devices.
    functions: tuple[str, ...] = ()
    #: UUIDs of the mediated devices that are passed through.
    mdevs: tuple[str, ...] = ()
    #: Where they hang; of none where nothing is known of it.
    places: tuple[FunctionPlace, ...] = ()
    #: Where those of its threads run that have none of their own; empty: anywhere.
    rest: CpuSet = EMPTY
    #: Disks of the instance's volumes, in their order.
    volumes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VcpuStats:
    """One vCPU: time that it ran, waited, and was kept from a thread by others."""

    number: int
    time_ns: int | None = None
    wait_ns: int | None = None
    delay_ns: int | None = None


@dataclass(frozen=True, slots=True)
class BlockStats:
    """One disk: its device in the guest, its file on the host, and what went over it."""

    name: str
    path: str
    read_bytes: int | None = None
    read_requests: int | None = None
    write_bytes: int | None = None
    write_requests: int | None = None


@dataclass(frozen=True, slots=True)
class InterfaceStats:
    """One interface by its device on the host; ``counts`` are ``receive_`` and ``transmit_`` ``bytes``, ``packets``, ``errors``,
    ``drops``, as the guest sees them."""

    name: str
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DomainStats:
    """What the hypervisor counts of one domain; None is not known. ``memory`` in bytes, by what the hypervisor tells."""

    uuid: str
    name: str
    phase: DomainPhase
    cpu_time_ns: int | None = None
    vcpus: int | None = None
    memory_bytes: int | None = None
    max_memory_bytes: int | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    vcpu_stats: tuple[VcpuStats, ...] = ()
    blocks: tuple[BlockStats, ...] = ()
    interfaces: tuple[InterfaceStats, ...] = ()


class Hypervisor(Protocol):
    """libvirt, or its simulation."""

    async def domains(self, deadline_s: float) -> tuple[DomainFacts, ...]:
        """All domains of the host, owned and foreign."""
        ...

    async def define(self, desired: DesiredInstance, files: DomainFiles, deadline_s: float) -> None:
        """Define (or redefine) the domain whose uuid is the instance's uid. Does not start it."""
        ...

    async def expect(self, desired: DesiredInstance, files: DomainFiles, deadline_s: float) -> str:
        """The domain as ``define`` would make it, told and not made: what a host that sends it hands to this one. The record
        that it will be known by is written."""
        ...

    async def start(self, uid: str, deadline_s: float, *, frozen: bool = False) -> None:
        """Start a defined domain. ``frozen``: its guest runs from `resume` on, not before."""
        ...

    async def shutdown(self, uid: str, deadline_s: float) -> None:
        """Ask the guest to power off; returns when it was asked."""
        ...

    async def destroy(self, uid: str, deadline_s: float) -> None:
        """End the domain's QEMU at once."""
        ...

    async def affinities(self, pids: tuple[int, ...], deadline_s: float) -> Mapping[int, QemuThreads]:
        """By process of a domain: where its threads may run, as the kernel says it. One that is gone is left out."""
        ...

    async def pin(self, uid: str, vcpus: tuple[CpuSet, ...], rest: CpuSet, deadline_s: float) -> None:
        """Bind the vCPUs of a running domain (each to its own set, or all to the only one) and its other threads; read back.
        Raises NotFound, and MachineError where the kernel says otherwise afterwards."""
        ...

    async def suspend(self, uid: str, deadline_s: float) -> None:
        """Freeze the guest of a running domain; nothing where it is frozen or off."""
        ...

    async def resume(self, uid: str, deadline_s: float) -> None:
        """Let a frozen guest go on; nothing where it runs or is off."""
        ...

    async def reset(self, uid: str, deadline_s: float) -> None:
        """Press the reset button: the guest boots anew at once, in the same process. Raises NotFound where none runs."""
        ...

    async def resize_disk(self, uid: str, path: str, size_mib: int, deadline_s: float) -> None:
        """Make a disk of a running domain, and its file, as large as that; its guest is told. Never smaller than it is.
        Raises NotFound where the domain does not run or has no such disk."""
        ...

    async def undefine(self, uid: str, deadline_s: float) -> None:
        """Forget a domain that is shut off."""
        ...

    async def descriptions(self, deadline_s: float) -> Mapping[str, str]:
        """The XML of each of our domains, by name, as it is now."""
        ...

    async def stats(self, deadline_s: float, uids: frozenset[str] | None = None) -> tuple[DomainStats, ...]:
        """What is counted of all domains, or of some, in one call that waits for none that is busy."""
        ...

    def events(self) -> AsyncIterator[DomainEvent]:
        """Changes of domains; also one event with an empty uuid when the connection was lost and is back."""
        ...

    async def virtualisation(self, deadline_s: float) -> str:
        """``kvm`` where KVM runs guests here, else ``tcg``. Probed once by really using it, then remembered."""
        ...

    @property
    def virtualisation_reason(self) -> str:
        """Why not KVM, in one sentence; empty where it is, and before ``virtualisation`` answered."""
        ...


# --- images, overlays, seeds ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """What the store holds: paths by digest for images; by instance uid for overlays and seeds."""

    images: Mapping[str, str]
    overlays: Mapping[str, str]
    seeds: Mapping[str, str]
    #: Unfinished downloads and stray files, to be removed.
    strays: tuple[str, ...] = ()
    free_mib: int = 0
    total_mib: int = 0
    #: Numbers of the root disks that each instance has; one is named in ``overlays``.
    disks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def disks_of(self, uid: str) -> tuple[int, ...]:
        """Numbers of an instance's root disks; an overlay of which no number is known is the first."""
        return self.disks.get(uid, (0,) if uid in self.overlays else ())


class Images(Protocol):
    """Images by digest, and the files made for each instance."""

    async def observe(self, deadline_s: float) -> StoredFiles: ...

    async def fetch(self, image: ImageRef, deadline_s: float) -> None:
        """Have the image's files (with kernel and initrd) in the store: fetched, digest checked, header checked."""
        ...

    async def create_overlay(self, uid: str, image: ImageRef, size_mib: int, deadline_s: float, disk: int = 0) -> None:
        """Make the instance's root disk of this number over its image, with recorded formats."""
        ...

    async def remove_disks(self, uid: str, keep: int, deadline_s: float) -> None:
        """Remove the instance's root disks but the one of this number."""
        ...

    async def write_seed(self, desired: DesiredInstance, deadline_s: float) -> None:
        """Make the instance's NoCloud seed."""
        ...

    def files(self, desired: DesiredInstance) -> DomainFiles:
        """Where the files of an instance lie (or will lie)."""
        ...

    async def remove_instance(self, uid: str, deadline_s: float) -> None:
        """Remove overlay and seed of an instance."""
        ...

    async def remove_strays(self, deadline_s: float) -> None: ...

    async def remove_image(self, digest: str, deadline_s: float) -> None: ...


# --- network ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """What of ours is on the host's network: bridges by network name, and guarded taps (those with rules) by name."""

    bridges: Mapping[str, str]
    #: tap -> (mac, address) that its rules let through.
    guards: Mapping[str, tuple[str, str]]
    taps: tuple[str, ...] = ()
    #: tap -> bridge that it is on; empty: none.
    plugged: Mapping[str, str] = field(default_factory=dict)


class Networks(Protocol):
    """Bridges, NAT and anti-spoofing."""

    async def observe(self, deadline_s: float) -> NetworkFacts: ...

    async def ensure_network(self, network: HostNetwork, deadline_s: float) -> None:
        """Bridge up with the gateway's address, forwarding and masquerading rules in place."""
        ...

    async def remove_network(self, name: str, deadline_s: float) -> None: ...

    def tap(self, uid: str, index: int) -> str:
        """Name of the tap of an instance's interface: ``cm`` + 11 hex digits, the same for life."""
        ...

    def bridge(self, network: str) -> str:
        """Name of the bridge of a network."""
        ...

    async def guard(self, uid: str, nics: tuple[Nic, ...], deadline_s: float) -> None:
        """Let through on each tap of the instance only its own MAC and address. Made before the domain starts."""
        ...

    async def plug(self, tap: str, network: str, deadline_s: float) -> None:
        """Put a tap that is there on the bridge of a network."""
        ...

    async def unguard(self, uid: str, deadline_s: float) -> None:
        """Remove the rules of an instance's taps."""
        ...

    async def condition(self, deadline_s: float) -> str:
        """Empty where this host can make guests' networks; else what it lacks. Changes nothing."""
        ...


# --- the guest --------------------------------------------------------------------------------------------------------


class GuestRefused(CallerError):
    """The helper refused what was asked; its own words, escaped, are the message."""

    reason = "GuestRefused"


@dataclass(frozen=True, slots=True)
class GuestHello:
    """The helper is there. ``boot_id`` tells a reboot of the guest; ``cloud_init`` is its status word."""

    uid: str
    boot_id: str
    version: str
    cloud_init: str = ""
    #: What cloud-init complained about, where it failed.
    cloud_init_message: str = ""


@dataclass(frozen=True, slots=True)
class GuestPods:
    """All pods of the guest as they are now, and the revision of the pod set that the helper works on."""

    uid: str
    pods: tuple[PodState, ...]
    revision: str = ""


@dataclass(frozen=True, slots=True)
class GuestGone:
    """The channel closed (guest off, helper dead, or QEMU ended)."""

    uid: str


@dataclass(frozen=True, slots=True)
class GuestNote:
    """Something worth an event: a container exited, an image failed to load, cloud-init finished or failed."""

    uid: str
    pod: str
    reason: str
    message: str
    severity: str = "Normal"
    time_s: float = 0.0


GuestEvent = GuestHello | GuestPods | GuestGone | GuestNote


#: Of a record: lines are missing before it, and nobody knows how many.
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class LogRecord:
    """A line of a container's log. ``sequence`` is a position that grows along the log (not by one), from which
    ``after_sequence`` goes on; ``lost`` lines are missing before it, `UNKNOWN` where nobody can tell how many. ``log`` names
    the log that the sequence counts in: a container that is made anew begins another."""

    time_s: float
    pod: str
    container: str
    sequence: int
    text: str
    stream: str = "stdout"
    lost: int = 0
    log: str = ""


@dataclass(frozen=True, slots=True)
class ExecRequest:
    """A command to run in a container, or in the guest itself where ``pod`` is empty."""

    argv: tuple[str, ...]
    pod: str = ""
    container: str = ""
    tty: bool = False
    rows: int = 24
    columns: int = 80
    environment: Mapping[str, str] = field(default_factory=dict)


class ExecSession(Protocol):
    """A running command. Output comes as ('stdout' | 'stderr', bytes) until the end, then ``exit_code`` is set."""

    def output(self) -> AsyncIterator[tuple[str, bytes]]: ...

    async def stdin(self, data: bytes) -> None: ...

    async def close_stdin(self) -> None: ...

    async def resize(self, rows: int, columns: int) -> None: ...

    async def signal(self, number: int) -> None: ...

    async def close(self) -> None: ...

    @property
    def exit_code(self) -> int | None: ...


class Guests(GuestSides, Protocol):
    """The helpers inside the guests. A connection is kept to each attached guest; what they say is hostile until parsed.

    What needs a guest raises Unavailable while its helper is not connected, and GuestRefused for what the helper will
    not do: a pod, container or program that is not there. What was under way when the connection broke off raises
    Unavailable; a log that is followed is taken up again.
    """

    async def attach(self, uid: str, channel_path: str) -> None:
        """Keep a connection to this guest's channel until it is detached."""
        ...

    async def detach(self, uid: str) -> None:
        """Let go of the guest; what it said last is followed by GuestGone."""
        ...

    def attached(self) -> frozenset[str]: ...

    def events(self) -> AsyncIterator[GuestEvent]:
        """What the guests push. After an attach: hello, then the pods as they are."""
        ...

    async def apply(
        self,
        uid: str,
        pods: tuple[Mapping[str, Any], ...],
        archives: int,
        revision: str,
        peers: Mapping[str, str],
        deadline_s: float,
    ) -> None:
        """Make these the guest's pods: ``archives`` archive disks are loaded first. Idempotent by ``revision``."""
        ...

    def logs(
        self,
        uid: str,
        pod: str,
        container: str,
        *,
        follow: bool,
        tail: int,
        since_s: float,
        after_sequence: int = 0,
        log: str = "",
        previous: bool = False,
    ) -> AsyncIterator[LogRecord]:
        """Lines of a container. ``tail`` below 0: all that are kept. ``after_sequence`` goes on behind a record of ``log``;
        where that log is no more, all of the present one comes, its first record with ``lost`` UNKNOWN. ``previous``: the
        lines of the run before the last start; GuestRefused where there was none."""
        ...

    async def exec(self, uid: str, request: ExecRequest, deadline_s: float) -> ExecSession: ...

    async def shutdown(self, uid: str, deadline_s: float) -> None:
        """Ask the guest's system to power off (the helper's way; the hypervisor's is ACPI)."""
        ...

    async def reboot(self, uid: str, deadline_s: float) -> None:
        """Ask the guest's system to boot anew; a new boot id in its next hello proves it."""
        ...


# --- functions that are given away -------------------------------------------------------------------------------------


class Functions(Protocol):
    """Virtual functions and other PCI functions. Types and contract: :mod:`casemate_agent.hardware.functions`."""

    async def observe(self, deadline_s: float) -> FunctionFacts:
        """All of them as they are. Changes nothing."""
        ...

    async def make_pools(self, deadline_s: float) -> None:
        """Cut the ports that are to be cut. One that has VFs already keeps them, whatever their number."""
        ...

    async def give(self, grant: Grant, deadline_s: float) -> tuple[str, ...]:
        """Have these functions in the state asked for, read back, and bound for the domain; their PCI addresses in order.

        What somebody else has, or holds open, is refused and left as it is: HeldByOther, GroupNotViable, VfMismatch."""
        ...

    async def take_back(self, stamp: Stamp, keys: tuple[str, ...], deadline_s: float) -> None:
        """Clean and unbind those of ``keys`` that carry this stamp or an older one of its owner; read back. Raises
        HeldByOther where a process still has one open."""
        ...

    async def clean(self, key: str, deadline_s: float) -> None:
        """Clean a VF that nobody has. Raises HeldByOther where somebody has it after all."""
        ...


# --- the machine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What the host is. ``boot_id`` of /proc/sys/kernel/random/boot_id tells a reboot from a restart of the agent."""

    hostname: str
    boot_id: str
    kernel: str
    topology: Topology
    #: Functions that are held back: each as ``Reason: what, and why``.
    problems: tuple[str, ...] = ()
    #: Of the isolated threads, those that a cpuset partition isolates while a VM has them, and nothing else.
    partitionable: CpuSet = EMPTY


class Machine(Protocol):
    """The host's own facts."""

    async def observe(self, deadline_s: float) -> MachineFacts: ...


#: The device whose value bounds the latency of power states; held open by whoever sets it.
DMA_LATENCY = "dev/cpu_dma_latency"


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """Of a QEMU's process, as the kernel says it. ``lock_limit_kib`` None: unlimited. ``huge_kib``: huge pages that it has
    mapped, by cell; None where that was not read."""

    locked_kib: int = 0
    lock_limit_kib: int | None = None
    huge_kib: Mapping[int, int] | None = None


class Tuning(Protocol):
    """Files of the kernel by which a host is tuned, and processes as they came to be."""

    async def read(self, patterns: tuple[str, ...], deadline_s: float) -> Mapping[str, str]:
        """Text of the files that match, by path without a leading slash; those that cannot be read are left out."""
        ...

    async def write(self, path: str, text: str, deadline_s: float) -> None:
        """Write a file. Raises MachineError where the kernel refuses. What was written is seen at the next reading."""
        ...

    async def processes(self, pids: tuple[int, ...], deadline_s: float) -> Mapping[int, ProcessFacts]:
        """By process; one that is gone is left out."""
        ...

    async def confine(self, quiet: CpuSet, deadline_s: float) -> CpuSet:
        """Keep this agent's own threads off these; where they may run afterwards, as the kernel says it."""
        ...


class Survey(Protocol):
    """Everything that the doctor judges, looked at once."""

    async def look(self, deadline_s: float) -> HostSurvey:
        """Each question gets ``deadline_s``; one without an answer is named in ``problems``. Never raises for one."""
        ...


@dataclass(frozen=True, slots=True)
class Drivers:
    """All the drivers of one host, picked once in the composition root."""

    machine: Machine
    survey: Survey
    hypervisor: Hypervisor
    images: Images
    networks: Networks
    guests: Guests
    consoles: Consoles
    serials: SerialLogs
    gpus: Gpus
    cards: GpuCards
    shares: GpuShares
    functions: Functions
    tuning: Tuning
    partitions: Partitions
    volumes: Volumes
    #: Of boards with NVSwitches; None where there is none.
    fabric: Fabric | None = None
    #: Ways to other hosts; None where this one takes part in no migrations.
    passages: Passages | None = None
