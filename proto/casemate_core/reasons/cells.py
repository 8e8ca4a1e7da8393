"""Reasons about CPUs, memory, pages, cells and disk.

What may live here: those records. ``cell`` is None where the host as a whole is short.
"""

from dataclasses import dataclass

from casemate_core.quantity import format_bytes, format_mib
from casemate_core.reasons.remedies import (
    KIB,
    FewerCpus,
    LessDisk,
    LessMemory,
    MorePages,
    NoGrowth,
    OtherHost,
    PlainPages,
    RelaxCells,
    RelaxEmulator,
    RelaxRealtime,
    RelaxThreads,
    Remedy,
)


def _at(cell: int | None) -> str:
    return "" if cell is None else f" on cell {cell}"


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
        return (OtherHost(),) if self.cell is None else (RelaxEmulator(), RelaxRealtime())


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
class VolumeElsewhere:
    """The data of a volume is on another host."""

    volume: str
    host: str

    @property
    def sentence(self) -> str:
        return f"volume {self.volume} is on host {self.host}, and its instance runs there alone"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (OtherHost(),)


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
