"""The records of which the picture of one host is made.

What may live here: frozen records and their plain form; no derived structures (``index``), no rules (``rules``), no
reading of files (``casemate_core.topology_loaders``).

Theory of operation. A host is a tree of sockets, cells, last-level-cache groups, cores and threads, and beside it a
tree of PCI roots and switches with functions at its leaves. The two are joined by the cell that each function hangs
off. Both trees are stored flat: a core names its cell, a function names its path from the root; flat records compare,
travel and diff more easily than nested ones.

Identity. Threads, cells and IOMMU groups carry the kernel's numbers, which hold for one boot. A GPU is its UUID, a
physical function is its permanent MAC address, a virtual function is that MAC and its index, any other device is its
serial or another identity that does not move. A PCI address is a hint for the driver that must write to sysfs, and
nothing here is looked up by it.

Threads are of four kinds, which partition the online threads (OFFLINE ones are in no core)::

    RESERVED    housekeeping: the host's own work, agents, and emulators that share
    ISOLATED    taken from the kernel's load balancer (isolcpus, or a cpuset partition "isolated"): dedicated vCPUs only
    POOL        all others: dedicated vCPUs take threads out of it, shared vCPUs float over what is left
    UNUSABLE    isolated, but on a core of which another thread is not: neither quiet nor balanced, so given to nobody
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.plain import BadPlain, from_plain, to_plain

if TYPE_CHECKING:
    from casemate_core.topology.functions import FunctionIndex
    from casemate_core.topology.index import TopologyIndex

FORMAT_VERSION = 1
"""Of the plain form of a Topology. A reader refuses any other."""

MAX_VF_INDEX = 65_535
"""The VF count of the SR-IOV capability is a 16-bit number (PCI Express base specification, SR-IOV, TotalVFs)."""

MAX_SHARE_SLOTS = 64
"""Memory slices of one GPU; the largest known count is 8."""

BASE_PAGE_KIB = 4
"""Size of the pages that ``memory_mib`` is made of where no huge-page pool holds them (x86-64, and arm64 with 4K pages;
on a 64K kernel the loader still counts plain memory in MiB, so nothing depends on it but the number's meaning)."""


class CoreKind(StrEnum):
    """What a core of a hybrid processor is good for; UNIFORM where all cores are alike."""

    UNIFORM = "uniform"
    PERFORMANCE = "performance"
    EFFICIENCY = "efficiency"


@dataclass(frozen=True, slots=True)
class PagePool:
    """Huge pages of one size that the kernel has set aside on one cell."""

    page_kib: int
    count: int

    @property
    def size_mib(self) -> int:
        """What the pool takes from the cell's memory, rounded up to a MiB."""
        return -(-self.page_kib * self.count // 1024)


@dataclass(frozen=True, slots=True)
class Cell:
    """A NUMA node. ``memory_mib`` is all of its memory: huge-page pools and the host's reserve lie inside it.

    A cell without cores is a memory cell (a CXL expander, or the memory of a coherent GPU). One without memory exists too.
    """

    id: int
    memory_mib: int
    pools: tuple[PagePool, ...] = ()
    reserved_mib: int = 0
    """Kept for the host itself; counted against plain memory, not against the pools."""
    distances: tuple[int, ...] = ()
    """To every cell in the order of Topology.cells, as in ACPI SLIT (10 is local). Empty: not known."""


@dataclass(frozen=True, slots=True)
class Core:
    """A physical core with at least one online thread."""

    id: int
    """Unique on the host; an ordinal of ours, not the kernel's core_id, which repeats from socket to socket."""
    socket: int
    cell: int
    l3: int
    """Group of cores that share a last-level cache; unique on the host."""
    threads: CpuSet
    """The online ones."""
    kind: CoreKind = CoreKind.UNIFORM


@dataclass(frozen=True, slots=True)
class PciPlace:
    """Where a PCI function hangs.

    ``path`` names the root complex and then each switch on the way down; two functions are as near as their paths are
    alike (see ``Nearness``). ``cell`` is the cell of the root, -1 where firmware does not say.
    """

    path: tuple[str, ...] = ()
    cell: int = -1
    iommu_group: int = -1
    """-1: no IOMMU, or each function may be given away alone."""
    address: str = ""
    """A hint, true at the time of the reading only: ``0000:17:00.0``."""


@dataclass(frozen=True, slots=True)
class ShareProfile:
    """One way to cut a slice off a GPU (a MIG profile, a vGPU type)."""

    name: str
    milli: int
    """Thousandths of the GPU, 1 to 999: what the slice counts against others, and against a request in thousandths."""
    memory_mib: int
    slots: int = 0
    """Memory slices taken, for a GPU with ``share_slots``; 0 where slices have no place of their own."""
    starts: tuple[int, ...] = ()
    """First slots at which the slice may lie (MIG: "placements")."""
    bare: bool = False
    """A slice of the host's own, with no function that a VM could be given: a MIG instance that no vGPU carries."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A whole GPU. Shared only where it has profiles, or ``share_step_milli`` (time slices of free size)."""

    uuid: str
    model: str
    memory_mib: int
    place: PciPlace = PciPlace()
    module_id: int = -1
    """Number within the NVSwitch baseboard; does not follow PCI order."""
    peers: tuple[str, ...] = ()
    """UUIDs of the GPUs that it reaches by NVLink without a partition manager."""
    share_slots: int = 0
    share_profiles: tuple[ShareProfile, ...] = ()
    share_step_milli: int = 0
    """Slices of any multiple of so many thousandths may be cut; 0: only by profile."""
    share_alike: bool = False
    """All slices that are cut at one time are of one profile (time-sliced vGPUs of equal size)."""
    labels: tuple[tuple[str, str], ...] = ()
    """What the administrator of the host calls it; ascending by key."""


@dataclass(frozen=True, slots=True)
class FabricPartition:
    """GPUs that a fabric manager can join by NVLink into one unit, and only as this set."""

    id: int
    gpus: tuple[str, ...]
    """UUIDs, ascending."""


@dataclass(frozen=True, slots=True)
class VirtualFunction:
    """One VF of a PF, by index; the rest is a hint or for the IOMMU."""

    index: int
    iommu_group: int = -1
    address: str = ""


@dataclass(frozen=True, slots=True)
class PhysicalFunction:
    """A NIC port that can be cut into VFs."""

    mac: str
    """Permanent address, lower case with colons."""
    networks: tuple[str, ...]
    """Physical networks that it reaches."""
    vfs: tuple[VirtualFunction, ...]
    capabilities: tuple[str, ...] = ()
    """What its driver lets a VF be given: ``vlan``, ``trust``, ``rate``, ``spoofchk``, ``qinq``."""
    place: PciPlace = PciPlace()
    link_mbps: int = 0
    """0: not known."""


@dataclass(frozen=True, slots=True)
class Device:
    """Any other PCI function that can be given away whole (a FEC card, an NVMe drive)."""

    id: str
    """Serial or another identity that does not move."""
    labels: tuple[tuple[str, str], ...]
    """Ascending by key."""
    place: PciPlace = PciPlace()


@dataclass(frozen=True)
class Topology:
    """What one host has, with nothing said of who holds it.

    ``cells``, ``cores`` and devices are in ascending order of their identity. Equality is by value. The derived
    structures that ``fit`` works on are made once per object, at first use: keep the object, do not rebuild it.
    """

    cells: tuple[Cell, ...]
    cores: tuple[Core, ...]
    offline: CpuSet = EMPTY
    reserved: CpuSet = EMPTY
    """Housekeeping threads."""
    isolated: CpuSet = EMPTY
    """Threads outside the kernel's load balancer."""
    disk_mib: int = 0
    gpus: tuple[Gpu, ...] = ()
    partitions: tuple[FabricPartition, ...] = ()
    pfs: tuple[PhysicalFunction, ...] = ()
    devices: tuple[Device, ...] = ()
    name: str = field(default="", compare=False)
    """For people and tests; no identity."""

    @cached_property
    def index(self) -> "TopologyIndex":
        """Masks and tables derived from the records; see ``casemate_core.topology.index``."""
        from casemate_core.topology.index import TopologyIndex  # index needs the records above

        return TopologyIndex.of(self)

    @cached_property
    def functions(self) -> "FunctionIndex":
        """Tables over GPUs, PFs and devices; see ``casemate_core.topology.functions``."""
        from casemate_core.topology.functions import FunctionIndex  # it needs the records above

        return FunctionIndex.of(self)

    @cached_property
    def online(self) -> CpuSet:
        """All online threads."""
        mask = 0
        for core in self.cores:
            mask |= core.threads.mask
        return CpuSet(mask)

    @cached_property
    def memory_mib(self) -> int:
        """Of all cells together."""
        return sum(cell.memory_mib for cell in self.cells)

    def to_dict(self) -> dict[str, Any]:
        """The plain form: JSON-able, complete, with ``version``."""
        plain: dict[str, Any] = {"version": FORMAT_VERSION}
        for entry in fields(self):
            plain[entry.name] = to_plain(getattr(self, entry.name))
        return plain

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Read the plain form. Raises BadPlain; does not judge the picture: that is ``check``, to be called before use.

        Only numbers that become positions of bits are bounded here: a mask of 10**12 bits is an attack.
        """
        if not isinstance(data, Mapping):
            raise BadPlain("", f"expected a topology, got {type(data).__name__}")
        if data.get("version") != FORMAT_VERSION:
            raise BadPlain("version", f"expected {FORMAT_VERSION}, got {data.get('version')!r}")
        values: dict[str, Any] = {}
        hints = _FIELD_KINDS
        for key in data:
            if key != "version" and key not in hints:
                raise BadPlain(str(key), "Topology has no such field")
        for name, kind in hints.items():
            if name in data:
                values[name] = from_plain(kind, data[name], path=name)
            elif name in ("cells", "cores"):
                raise BadPlain(name, "is missing")
        topology = cls(**values)
        for i, pf in enumerate(topology.pfs):
            for vf in pf.vfs:
                if not 0 <= vf.index <= MAX_VF_INDEX:
                    raise BadPlain(f"pfs[{i}].vfs", f"index {vf.index} is outside 0..{MAX_VF_INDEX}")
        for i, gpu in enumerate(topology.gpus):
            slots = [gpu.share_slots, *(s.slots for s in gpu.share_profiles)]
            starts = [start for s in gpu.share_profiles for start in s.starts]
            if not all(0 <= number <= MAX_SHARE_SLOTS for number in slots + starts):
                raise BadPlain(f"gpus[{i}]", f"has a slot outside 0..{MAX_SHARE_SLOTS}")
        return topology


_FIELD_KINDS: dict[str, Any] = {
    "cells": tuple[Cell, ...],
    "cores": tuple[Core, ...],
    "offline": CpuSet,
    "reserved": CpuSet,
    "isolated": CpuSet,
    "disk_mib": int,
    "gpus": tuple[Gpu, ...],
    "partitions": tuple[FabricPartition, ...],
    "pfs": tuple[PhysicalFunction, ...],
    "devices": tuple[Device, ...],
    "name": str,
}
