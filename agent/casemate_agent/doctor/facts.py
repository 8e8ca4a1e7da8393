"""What is looked at on a host before guests are run on it. PURE: types alone.

What may live here: frozen facts, as the machine tells them. What could not be found out is None, and ``HostSurvey.problems``
says why under the name of the check; nothing is guessed. What follows from the facts is
:mod:`casemate_agent.doctor.verdicts`; who collects them is ``casemate_agent.drivers.survey``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from casemate_core.cpuset import EMPTY, CpuSet

NVIDIA = 0x10DE
#: First byte of a PCI class code.
DISPLAY_CLASS = 0x03


@dataclass(frozen=True, slots=True)
class Virtualisation:
    """What guests would run on (``kvm``, ``tcg`` or ``simulated``), found out by running one; ``reason`` why not KVM."""

    kind: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PciFunction:
    """A PCI function. ``class_code`` has three bytes; ``iommu_group`` is -1 where it is in none; numbers of VFs."""

    address: str
    vendor: int
    class_code: int
    driver: str = ""
    iommu_group: int = -1
    total_vfs: int = 0
    vfs: int = 0

    @property
    def is_nvidia_gpu(self) -> bool:
        """Whether NVML would know it, were NVIDIA's driver bound to it."""
        return self.vendor == NVIDIA and self.class_code >> 16 == DISPLAY_CLASS


@dataclass(frozen=True, slots=True)
class Pool:
    """Huge pages of one size on one cell."""

    cell: int
    page_kib: int
    count: int
    free: int


@dataclass(frozen=True, slots=True)
class Libvirt:
    """Versions as ``(major, minor, release)``."""

    uri: str
    version: tuple[int, int, int]
    qemu: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Nvml:
    """What NVIDIA's library says."""

    driver: str
    gpus: int


@dataclass(frozen=True, slots=True)
class Cgroup:
    """``version`` is 2 where one unified hierarchy holds all controllers, else 1; ``hybrid`` where both are mounted."""

    version: int
    controllers: frozenset[str]
    hybrid: bool = False


@dataclass(frozen=True, slots=True)
class Clock:
    """What the kernel says of its own clock (adjtimex)."""

    synchronised: bool
    error_us: int


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system of the state folder."""

    path: str
    total_mib: int
    free_mib: int


@dataclass(frozen=True, slots=True)
class HostSurvey:
    """All that was found out about one host at one moment."""

    hostname: str = ""
    kernel: str = ""
    #: The kernel's command line; None where it cannot be read.
    cmdline: str | None = None
    cpu_vendor: str = ""
    cpu_flags: frozenset[str] = frozenset()
    threads: CpuSet = EMPTY
    virtualisation: Virtualisation | None = None
    #: Whether the firmware describes an IOMMU (ACPI DMAR or IVRS).
    iommu_table: bool | None = None
    iommu_groups: int | None = None
    #: Whether vfio-pci is a driver of the running kernel, and whether its module could be loaded.
    vfio_loaded: bool | None = None
    vfio_available: bool | None = None
    functions: tuple[PciFunction, ...] | None = None
    pools: tuple[Pool, ...] | None = None
    libvirt: Libvirt | None = None
    nvml: Nvml | None = None
    cgroup: Cgroup | None = None
    clock: Clock | None = None
    disk: Disk | None = None
    #: Where the tool is that makes file systems of volumes; empty: nowhere.
    mkfs_ext4: str | None = None
    #: What the kernel cannot do of guests' networks; empty: nothing.
    network_problem: str | None = None
    #: Name of a check -> why it could not be looked at.
    problems: Mapping[str, str] = field(default_factory=dict)
