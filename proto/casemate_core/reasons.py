"""Why a host cannot take a request: a closed set, each with its numbers.

What may live here: reasons, the sentence of each, and the remedies that would remove it. No search: whether a remedy
is enough is found out by fitting again with it applied (``casemate_core.fit.remedies``).

Theory of operation. A reason is a frozen record of what was asked, what is available and where; ``sentence`` is derived
from the numbers, so that a program compares numbers and a person reads text. ``remedies`` are the smallest changes, of
the request or of the host, that this reason alone would be satisfied by. ``Reason`` is the union of all classes here;
a ``match`` on it is checked for completeness by the type checker.
"""

from dataclasses import dataclass

from casemate_core.quantity import format_bytes, format_mib

KIB = 1024


def _at(cell: int | None) -> str:
    return "" if cell is None else f" on cell {cell}"


# --- remedies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FewerCpus:
    """Ask for at most ``count`` vCPUs (growth room counted)."""

    count: int


@dataclass(frozen=True, slots=True)
class RelaxThreads:
    """Give up whole cores: threads ``any``."""


@dataclass(frozen=True, slots=True)
class RelaxEmulator:
    """Let the emulator share: emulator ``share``."""


@dataclass(frozen=True, slots=True)
class RelaxRealtime:
    """Give up the real-time promise."""


@dataclass(frozen=True, slots=True)
class RelaxCells:
    """Let CPUs and memory lie over several cells: cells ``prefer``."""


@dataclass(frozen=True, slots=True)
class LessMemory:
    """Ask for at most ``size_mib`` (growth room counted)."""

    size_mib: int


@dataclass(frozen=True, slots=True)
class MorePages:
    """Set aside ``count`` more huge pages of ``page_kib`` on ``cell`` of the host."""

    cell: int
    page_kib: int
    count: int


@dataclass(frozen=True, slots=True)
class PlainPages:
    """Do without huge pages."""


@dataclass(frozen=True, slots=True)
class NoGrowth:
    """Ask for no growth room."""


@dataclass(frozen=True, slots=True)
class LessDisk:
    """Ask for at most ``size_mib`` of disk."""

    size_mib: int


@dataclass(frozen=True, slots=True)
class FewerGpus:
    """Ask for at most ``count`` GPUs in GPU request number ``group`` (from 0)."""

    group: int
    count: int


@dataclass(frozen=True, slots=True)
class AnyModel:
    """Take any model in GPU request number ``group``."""

    group: int


@dataclass(frozen=True, slots=True)
class RelaxLink:
    """Take any link in GPU request number ``group``."""

    group: int


@dataclass(frozen=True, slots=True)
class SmallerShare:
    """Ask for a slice of at most ``milli`` thousandths in GPU request number ``group``."""

    group: int
    milli: int


@dataclass(frozen=True, slots=True)
class RelaxGpuLocality:
    """Take GPUs of other cells in GPU request number ``group``."""

    group: int


@dataclass(frozen=True, slots=True)
class RelaxNear:
    """Take a VF anywhere on the host for NIC number ``nic`` (from 0)."""

    nic: int


@dataclass(frozen=True, slots=True)
class DropNic:
    """Ask for one NIC less: number ``nic``."""

    nic: int


@dataclass(frozen=True, slots=True)
class FewerDevices:
    """Ask for at most ``count`` devices in device request number ``group``."""

    group: int
    count: int


@dataclass(frozen=True, slots=True)
class RelaxDeviceLocality:
    """Take devices of other cells in device request number ``group``."""

    group: int


@dataclass(frozen=True, slots=True)
class OtherHost:
    """Nothing about the request helps on this host (it lacks the kind of thing)."""


Remedy = (
    FewerCpus
    | RelaxThreads
    | RelaxEmulator
    | RelaxRealtime
    | RelaxCells
    | LessMemory
    | MorePages
    | PlainPages
    | NoGrowth
    | LessDisk
    | FewerGpus
    | AnyModel
    | RelaxLink
    | SmallerShare
    | RelaxGpuLocality
    | RelaxNear
    | DropNic
    | FewerDevices
    | RelaxDeviceLocality
    | OtherHost
)


# --- reasons --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ThreadsShort:
    """Too few free threads for dedicated vCPUs; ``cell`` None: on the whole host. ``available`` counts vCPUs."""

    asked: int
    available: int
    cell: int | None = None

    @property
    def sentence(self) -> str:
        return f"{self.asked} dedicated threads asked, {self.available} free{_at(self.cell)}"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (FewerCpus(self.available), NoGrowth())


@dataclass(frozen=True, slots=True)
class CoresShort:
    """Too few cores of which every thread is free. Counted in vCPUs that whole cores could carry."""

    asked: int
    available: int
    threads: str
    """The thread policy that asks for whole cores."""
    free_threads: int
    """Free threads, whole cores or not: what ``any`` could have."""
    cell: int | None = None

    @property
    def sentence(self) -> str:
        return (
            f"{self.asked} vCPUs on whole cores asked (threads: {self.threads}), whole free cores carry "
            f"{self.available}{_at(self.cell)}; {self.free_threads} threads are free"
        )

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (RelaxThreads(), FewerCpus(self.available), NoGrowth())


@dataclass(frozen=True, slots=True)
class NoSmt:
    """Siblings required on a host whose cores have one thread."""

    @property
    def sentence(self) -> str:
        return "threads: require asks for SMT siblings, this host's cores have one thread each"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (RelaxThreads(),)


@dataclass(frozen=True, slots=True)
class IsolatedShort:
    """Too few isolated whole cores for real-time vCPUs."""

    asked: int
    available: int
    cell: int | None = None

    @property
    def sentence(self) -> str:
        return f"{self.asked} real-time vCPUs asked, isolated free cores carry {self.available}{_at(self.cell)}"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (FewerCpus(self.available), NoGrowth(), RelaxRealtime())


@dataclass(frozen=True, slots=True)
class HousekeepingMissing:
    """No thread for the emulator: none of the cell's is for housekeeping, beside real-time vCPUs; or (``cell`` None) the
    host has neither housekeeping threads nor a thread left in its pools."""

    cell: int | None = None

    @property
    def sentence(self) -> str:
        if self.cell is None:
            return "no housekeeping thread, and none in the pools, for the emulator to run on"
        return f"no housekeeping thread on cell {self.cell} for the emulator beside real-time vCPUs"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (OtherHost(),) if self.cell is None else (RelaxRealtime(), RelaxEmulator())


@dataclass(frozen=True, slots=True)
class EmulatorShort:
    """The vCPUs have room; the emulator's own thread has not."""

    cell: int | None = None

    @property
    def sentence(self) -> str:
        return f"emulator: isolate asks for one more thread, none is free{_at(self.cell)}"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (RelaxEmulator(),)


@dataclass(frozen=True, slots=True)
class SharedCpuShort:
    """The pool of shared threads is promised away. In thousandths, after overcommit."""

    asked_milli: int
    available_milli: int
    vcpus: int
    """That share ``asked_milli`` equally."""
    cell: int | None = None

    @property
    def sentence(self) -> str:
        return (
            f"{self.asked_milli / 1000:g} shared CPUs asked (after overcommit), "
            f"{self.available_milli / 1000:g} free{_at(self.cell)}"
        )

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (FewerCpus(self.available_milli * self.vcpus // self.asked_milli), NoGrowth())


@dataclass(frozen=True, slots=True)
class MemoryShort:
    """Too little plain memory. In MiB as charged, after overcommit, overhead counted."""

    asked_mib: int
    available_mib: int
    cell: int | None = None

    @property
    def sentence(self) -> str:
        return f"{format_mib(self.asked_mib)} of memory asked, {format_mib(self.available_mib)} free{_at(self.cell)}"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (LessMemory(self.available_mib), NoGrowth())


@dataclass(frozen=True, slots=True)
class PagesShort:
    """Too few free huge pages of the size asked."""

    asked: int
    available: int
    page_kib: int
    cell: int | None = None

    @property
    def sentence(self) -> str:
        size = format_bytes(self.page_kib * KIB)
        return f"{self.asked} pages of {size} asked, {self.available} free{_at(self.cell)}"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        fewer = LessMemory(self.available * self.page_kib // KIB)
        if self.cell is None:
            return (fewer, NoGrowth())
        return (MorePages(self.cell, self.page_kib, self.asked - self.available), fewer, NoGrowth())


@dataclass(frozen=True, slots=True)
class NoPagePool:
    """The host has no huge pages of this size at all."""

    page_kib: int
    sizes_kib: tuple[int, ...]

    @property
    def sentence(self) -> str:
        sizes = ", ".join(format_bytes(size * KIB) for size in self.sizes_kib) or "none"
        return f"huge pages of {format_bytes(self.page_kib * KIB)} asked, this host has pools of: {sizes}"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (PlainPages(), OtherHost())


@dataclass(frozen=True, slots=True)
class CellsShort:
    """Spread over more cells than have the room of one part each."""

    asked: int
    available: int
    cpu_cells: int
    """Cells with CPUs to give, full or not."""

    @property
    def sentence(self) -> str:
        return f"spread over {self.asked} cells asked, {self.available} of {self.cpu_cells} have room for their part"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (RelaxCells(),)


@dataclass(frozen=True, slots=True)
class DiskShort:
    """Too little disk. In MiB."""

    asked_mib: int
    available_mib: int

    @property
    def sentence(self) -> str:
        return f"{format_mib(self.asked_mib)} of disk asked, {format_mib(self.available_mib)} free"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (LessDisk(self.available_mib),)


@dataclass(frozen=True, slots=True)
class GpusShort:
    """Too few free GPUs of the model."""

    group: int
    asked: int
    available: int
    model: str
    present: int
    """GPUs of that model on the host, free or not."""

    @property
    def sentence(self) -> str:
        return f"{self.asked} GPUs {self.model} asked, {self.available} free of {self.present}"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (FewerGpus(self.group, self.available),)


@dataclass(frozen=True, slots=True)
class GpuModelAbsent:
    """No GPU of the model on this host."""

    group: int
    model: str
    present: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return f"GPU model {self.model} asked, this host has {', '.join(self.present) or 'no GPU'}"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (AnyModel(self.group), OtherHost()) if self.present else (OtherHost(),)


@dataclass(frozen=True, slots=True)
class GpuLinkShort:
    """Enough free GPUs, but not joined as asked."""

    group: int
    asked: int
    available: int
    """The largest number of free GPUs that are."""
    link: str

    @property
    def sentence(self) -> str:
        return f"{self.asked} GPUs joined by {self.link} asked, at most {self.available} free ones are"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (FewerGpus(self.group, self.available), RelaxLink(self.group))


@dataclass(frozen=True, slots=True)
class PartitionsTaken:
    """Fabric partitions of that size exist, each with a GPU that is not free."""

    group: int
    asked: int
    partitions: int
    """How many of that size there are; 0: none has that size."""
    nearest_missing: int
    """GPUs that the best of them lacks."""

    @property
    def sentence(self) -> str:
        if not self.partitions:
            return f"a fabric partition of {self.asked} GPUs asked, this host has none of that size"
        return (
            f"a fabric partition of {self.asked} GPUs asked, none of {self.partitions} is free; "
            f"the nearest lacks {self.nearest_missing}"
        )

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (FewerGpus(self.group, self.asked - 1), RelaxLink(self.group))


@dataclass(frozen=True, slots=True)
class GpuShareShort:
    """No GPU has so large a slice left; ``available_milli`` is the largest there is."""

    group: int
    asked: str
    """Profile, or thousandths."""
    count: int
    available: int
    """GPUs that could still give one."""
    available_milli: int

    @property
    def sentence(self) -> str:
        return (
            f"{self.count} slices {self.asked} of different GPUs asked, {self.available} GPUs have one; "
            f"the largest slice left is {self.available_milli} thousandths"
        )

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (SmallerShare(self.group, self.available_milli), FewerGpus(self.group, self.available))


@dataclass(frozen=True, slots=True)
class GpuNotLocal:
    """Enough GPUs are free, not in a cell where the CPUs and the memory have room."""

    group: int
    asked: int
    available: int
    """In the best such cell."""

    @property
    def sentence(self) -> str:
        return f"{self.asked} GPUs beside the CPUs asked, at most {self.available} are free in a cell with room"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (RelaxGpuLocality(self.group), FewerGpus(self.group, self.available))


@dataclass(frozen=True, slots=True)
class NetworkUnreached:
    """No port of the host is on the network."""

    nic: int
    network: str
    reached: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return f"network {self.network} asked, this host's ports reach {', '.join(self.reached) or 'none'}"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (OtherHost(), DropNic(self.nic))


@dataclass(frozen=True, slots=True)
class CapabilityMissing:
    """Ports on the network exist, none can do what is needed."""

    nic: int
    network: str
    needs: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return f"a VF on {self.network} with {', '.join(self.needs)} asked, no port there can do that"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (OtherHost(), DropNic(self.nic))


@dataclass(frozen=True, slots=True)
class VfsShort:
    """Too few free VFs on ports of the network. ``asked`` counts all NICs of the request that compete for them."""

    nic: int
    network: str
    asked: int
    available: int

    @property
    def sentence(self) -> str:
        return f"{self.asked} VFs on {self.network} asked, {self.available} free"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (DropNic(self.nic),)


@dataclass(frozen=True, slots=True)
class NicTooFar:
    """VFs are free, none as near to a GPU of the instance as asked."""

    nic: int
    network: str
    near: str

    @property
    def sentence(self) -> str:
        return f"a VF on {self.network} within the same {self.near} as a GPU asked, no free GPU and VF are that near"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (RelaxNear(self.nic), DropNic(self.nic))


@dataclass(frozen=True, slots=True)
class DevicesShort:
    """Too few free devices with the labels."""

    group: int
    labels: tuple[tuple[str, str], ...]
    asked: int
    available: int
    present: int

    @property
    def sentence(self) -> str:
        wanted = ",".join(f"{key}={value}" for key, value in self.labels)
        return f"{self.asked} devices {wanted} asked, {self.available} free of {self.present}"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (FewerDevices(self.group, self.available),) if self.present else (OtherHost(),)


@dataclass(frozen=True, slots=True)
class DeviceNotLocal:
    """Enough devices are free, not in a cell where the CPUs and the memory have room."""

    group: int
    asked: int
    available: int

    @property
    def sentence(self) -> str:
        return f"{self.asked} devices beside the CPUs asked, at most {self.available} are free in a cell with room"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (RelaxDeviceLocality(self.group), FewerDevices(self.group, self.available))


@dataclass(frozen=True, slots=True)
class NothingTogether:
    """Each part alone would fit; no choice of all parts at once does (a cell, GPUs, VFs and devices that go together)."""

    parts: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return f"{', '.join(self.parts)} each fit alone, but not together"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (RelaxCells(), OtherHost())


Reason = (
    ThreadsShort
    | CoresShort
    | NoSmt
    | IsolatedShort
    | HousekeepingMissing
    | EmulatorShort
    | SharedCpuShort
    | MemoryShort
    | PagesShort
    | NoPagePool
    | CellsShort
    | DiskShort
    | GpusShort
    | GpuModelAbsent
    | GpuLinkShort
    | PartitionsTaken
    | GpuShareShort
    | GpuNotLocal
    | NetworkUnreached
    | CapabilityMissing
    | VfsShort
    | NicTooFar
    | DevicesShort
    | DeviceNotLocal
    | NothingTogether
)
