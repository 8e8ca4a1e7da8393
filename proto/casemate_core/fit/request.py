"""What one instance asks of a host.

What may live here: the request and its vocabulary. It is resolved: classes and defaults are merged, quantities are whole
numbers in the unit of their name, labels are settled. Where the words come from: ``cpu``, ``memory``, ``gpus``, ``nics``
and ``devices`` of an environment's spec.
"""

from dataclasses import dataclass
from enum import StrEnum

from casemate_core.errors import CallerError


class BadRequest(CallerError):
    """A request that no host could make sense of. ``field`` is the name within this module's records."""

    reason = "BadRequest"

    def __init__(self, field: str, problem: str) -> None:
        self.field = field
        super().__init__(f"{field} {problem}")


def _must(holds: bool, field: str, problem: str) -> None:
    if not holds:
        raise BadRequest(field, problem)


class CpuPolicy(StrEnum):
    """Whether a vCPU has a thread of its own or floats over the pool of its cell."""

    DEDICATED = "dedicated"
    SHARED = "shared"


class ThreadPolicy(StrEnum):
    """How dedicated vCPUs use the siblings of a core."""

    REQUIRE = "require"
    """Whole cores of the host's full width, siblings as vCPUs of this instance. Needs a host with SMT."""
    ISOLATE = "isolate"
    """A whole core per vCPU, siblings idle."""
    PREFER = "prefer"
    """As few cores as possible, siblings together; a core may be shared with another instance."""
    ANY = "any"
    """Whatever is free, breaking as few whole cores as possible."""


class EmulatorPolicy(StrEnum):
    """Where the emulator's own threads run."""

    SHARE = "share"
    """On housekeeping threads, or over the pool on a host that has none."""
    ISOLATE = "isolate"
    """On a thread that this instance owns, in a cell of its vCPUs."""


class CellPolicy(StrEnum):
    """Over how many cells CPUs and memory may lie."""

    ONE = "one"
    """All threads and all memory in the same cell, or not at all."""
    PREFER = "prefer"
    """One cell where one has room, else split over the fewest."""
    SPREAD = "spread"
    """Evenly over ``cell_count`` cells, CPUs beside their memory."""


class GpuLink(StrEnum):
    """How the GPUs of one request reach each other."""

    ANY = "any"
    PCIE = "pcie"
    """Under one PCI root complex, so that peer-to-peer traffic stays there."""
    NVLINK = "nvlink"
    """By NVLink, all to all: one fabric partition, or direct peers."""


class Near(StrEnum):
    """The farthest that a NIC may be from one of the instance's GPUs. The nearest is always preferred."""

    ANY = "any"
    CELL = "cell"
    ROOT = "root"
    SWITCH = "switch"


class CoreChoice(StrEnum):
    """Which cores of a hybrid processor."""

    ANY = "any"
    PERFORMANCE = "performance"
    EFFICIENCY = "efficiency"


@dataclass(frozen=True, slots=True)
class CpuRequest:
    """``count`` vCPUs now, room for ``max`` (0: no growth room)."""

    count: int = 1
    max: int = 0
    policy: CpuPolicy = CpuPolicy.SHARED
    threads: ThreadPolicy = ThreadPolicy.ANY
    emulator: EmulatorPolicy = EmulatorPolicy.SHARE
    realtime: bool = False
    """Isolated threads, whole cores, one cell, emulator beside them in the cell. Implies DEDICATED."""
    cores: CoreChoice = CoreChoice.ANY
    shared_milli: int = 0
    """SHARED: thousandths of a thread for each vCPU, before overcommit; 0 means 1000."""

    def __post_init__(self) -> None:
        _must(self.count >= 1 and self.max >= 0, "cpu.count", "is at least 1")
        _must(self.shared_milli >= 0, "cpu.shared_milli", "is not negative")
        dedicated = self.policy is CpuPolicy.DEDICATED or self.realtime
        _must(dedicated or self.cores is CoreChoice.ANY, "cpu.cores", "can be chosen for dedicated CPUs only")

    @property
    def reserved_count(self) -> int:
        """vCPUs to find room for: the larger of ``count`` and ``max``."""
        return max(self.count, self.max)

    @property
    def milli_each(self) -> int:
        """Thousandths of a thread per shared vCPU."""
        return self.shared_milli or 1000


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """``size_mib`` now, room for ``max_mib`` (0: no growth room)."""

    size_mib: int = 512
    max_mib: int = 0
    page_kib: int = 0
    """Huge pages of this size; 0: plain memory."""
    cells: CellPolicy = CellPolicy.PREFER
    cell_count: int = 0
    """SPREAD: over how many cells; 0: every one with CPUs to give."""
    overhead_mib: int = 0
    """Plain memory that the hypervisor needs beside the guest's; counted, not overcommitted away."""

    def __post_init__(self) -> None:
        _must(self.size_mib >= 1 and self.max_mib >= 0, "memory.size_mib", "is at least 1")
        _must(min(self.page_kib, self.cell_count, self.overhead_mib) >= 0, "memory", "has no negative amounts")

    @property
    def reserved_mib(self) -> int:
        """Memory to find room for: the larger of ``size_mib`` and ``max_mib``."""
        return max(self.size_mib, self.max_mib)


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """``count`` whole GPUs, or ``count`` slices on as many different GPUs."""

    count: int = 1
    model: str = "*"
    """A glob over the model's name, case as written."""
    link: GpuLink = GpuLink.ANY
    local: bool = False
    """Only GPUs in a cell of the instance's CPUs; else that is preferred."""
    share_profile: str = ""
    """Name of a profile (``1g.10gb``): a slice instead of a whole GPU."""
    share_milli: int = 0
    """Thousandths of a GPU: a slice of at least this size, by profile or of free size."""
    labels: tuple[tuple[str, str], ...] = ()
    """Only GPUs that carry all of them; ascending by key."""

    def __post_init__(self) -> None:
        _must(self.count >= 1, "gpus.count", "is at least 1")
        _must(0 <= self.share_milli < 1000, "gpus.share_milli", "is a true part of a GPU, in thousandths")
        _must(not (self.is_share and self.link is not GpuLink.ANY), "gpus.link", "is for whole GPUs: slices have none")

    @property
    def is_share(self) -> bool:
        """True for slices."""
        return bool(self.share_profile or self.share_milli)


@dataclass(frozen=True, slots=True)
class NicRequest:
    """A virtual function of a PF on ``network``. Bridged NICs take nothing exact and are not asked for here."""

    network: str
    near: Near = Near.ANY
    needs: tuple[str, ...] = ()
    """Capabilities that the PF must have: ``vlan``, ``trust``, ``rate``."""


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """``count`` devices that carry all of ``labels``."""

    labels: tuple[tuple[str, str], ...]
    count: int = 1
    local: bool = False
    """Only devices in a cell of the instance's CPUs; else that is preferred."""

    def __post_init__(self) -> None:
        _must(self.count >= 1, "devices.count", "is at least 1")


@dataclass(frozen=True, slots=True)
class VolumeRequest:
    """A volume that the instance uses. ``host``: where its data is; empty while it is nowhere, and then it needs room."""

    uid: str
    name: str
    size_mib: int
    host: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that one instance asks of one host."""

    cpu: CpuRequest = CpuRequest()
    memory: MemoryRequest = MemoryRequest()
    disk_mib: int = 0
    gpus: tuple[GpuRequest, ...] = ()
    nics: tuple[NicRequest, ...] = ()
    devices: tuple[DeviceRequest, ...] = ()
    volumes: tuple[VolumeRequest, ...] = ()

    def __post_init__(self) -> None:
        _must(self.disk_mib >= 0, "disk_mib", "is not negative")
        near = any(nic.near is not Near.ANY for nic in self.nics)
        _must(not near or bool(self.gpus), "nics.near", "asks for a NIC near a GPU, and no GPU is asked for")

    @property
    def room_mib(self) -> int:
        """Disk to find room for: its own, and that of volumes that are nowhere yet."""
        if not self.volumes:
            return self.disk_mib
        return self.disk_mib + sum(v.size_mib for v in self.volumes if not v.host)


@dataclass(frozen=True, slots=True)
class Overcommit:
    """How many times the divisible amounts of a host may be promised, in percent (400: each thread four times).

    Huge pages, dedicated threads, disk and devices are never promised twice.
    """

    cpu_percent: int = 100
    memory_percent: int = 100

    def __post_init__(self) -> None:
        _must(self.cpu_percent >= 1 and self.memory_percent >= 1, "overcommit", "is at least 1 percent")

    def cpu_charge(self, milli: int) -> int:
        """What an amount of shared CPU takes from the pool, rounded up."""
        return -(-milli * 100 // self.cpu_percent)

    def memory_charge(self, size_mib: int) -> int:
        """What an amount of plain memory takes from the cell, rounded up."""
        return -(-size_mib * 100 // self.memory_percent)
