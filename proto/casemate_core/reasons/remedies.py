"""The smallest changes, of a request or of a host, that one reason would be satisfied by.

What may live here: the closed set ``Remedy``. How a remedy is applied, and whether it is enough, is
``casemate_core.fit.remedies``.
"""

from dataclasses import dataclass

from casemate_core.quantity import format_bytes, format_mib

KIB = 1024


@dataclass(frozen=True, slots=True)
class FewerCpus:
    """Ask for at most ``count`` vCPUs (growth room counted)."""

    count: int

    @property
    def sentence(self) -> str:
        return f"ask for at most {self.count} vCPUs, growth room counted"


@dataclass(frozen=True, slots=True)
class RelaxThreads:
    """Give up whole cores: threads ``any``."""

    @property
    def sentence(self) -> str:
        return "let vCPUs share cores with others (threads: any)"


@dataclass(frozen=True, slots=True)
class RelaxEmulator:
    """Place the emulator by the other rule: ``share``, and for a real-time instance ``isolate``."""

    @property
    def sentence(self) -> str:
        return "place the emulator otherwise: on shared threads, or for a real-time instance on one of its own"


@dataclass(frozen=True, slots=True)
class RelaxRealtime:
    """Give up the real-time promise."""

    @property
    def sentence(self) -> str:
        return "give up real time (dedicated CPUs without isolated cores)"


@dataclass(frozen=True, slots=True)
class RelaxCells:
    """Let CPUs and memory lie over several cells: cells ``prefer``."""

    @property
    def sentence(self) -> str:
        return "let CPUs and memory lie over several cells (cells: prefer)"


@dataclass(frozen=True, slots=True)
class LessMemory:
    """Ask for at most ``size_mib`` (growth room counted)."""

    size_mib: int

    @property
    def sentence(self) -> str:
        return f"ask for at most {format_mib(self.size_mib)} of memory, growth room counted"


@dataclass(frozen=True, slots=True)
class MorePages:
    """Set aside ``count`` more huge pages of ``page_kib`` on ``cell`` of the host."""

    cell: int
    page_kib: int
    count: int

    @property
    def sentence(self) -> str:
        return (
            f"set aside {self.count} more pages of {format_bytes(self.page_kib * KIB)} on cell {self.cell} of the host"
        )


@dataclass(frozen=True, slots=True)
class PlainPages:
    """Do without huge pages."""

    @property
    def sentence(self) -> str:
        return "do without huge pages"


@dataclass(frozen=True, slots=True)
class NoGrowth:
    """Ask for no growth room."""

    @property
    def sentence(self) -> str:
        return "ask for no growth room"


@dataclass(frozen=True, slots=True)
class LessDisk:
    """Ask for at most ``size_mib`` of disk."""

    size_mib: int

    @property
    def sentence(self) -> str:
        return f"ask for at most {format_mib(self.size_mib)} of disk"


@dataclass(frozen=True, slots=True)
class FewerGpus:
    """Ask for at most ``count`` GPUs in GPU request number ``group`` (from 0)."""

    group: int
    count: int

    @property
    def sentence(self) -> str:
        return f"ask for at most {self.count} GPUs in gpus[{self.group}]"


@dataclass(frozen=True, slots=True)
class AnyModel:
    """Take any model in GPU request number ``group``."""

    group: int

    @property
    def sentence(self) -> str:
        return f"take any model in gpus[{self.group}]"


@dataclass(frozen=True, slots=True)
class AnyGpuLabels:
    """Ask for no labels in GPU request number ``group``."""

    group: int

    @property
    def sentence(self) -> str:
        return f"leave out labels in gpus[{self.group}]"


@dataclass(frozen=True, slots=True)
class RelaxLink:
    """Take any link in GPU request number ``group``."""

    group: int

    @property
    def sentence(self) -> str:
        return f"take GPUs however they are linked in gpus[{self.group}]"


@dataclass(frozen=True, slots=True)
class SmallerShare:
    """Ask for a slice of at most ``milli`` thousandths in GPU request number ``group``."""

    group: int
    milli: int

    @property
    def sentence(self) -> str:
        return f"ask for a slice of at most {self.milli} thousandths in gpus[{self.group}]"


@dataclass(frozen=True, slots=True)
class RelaxGpuLocality:
    """Take GPUs of other cells in GPU request number ``group``."""

    group: int

    @property
    def sentence(self) -> str:
        return f"take GPUs of other cells in gpus[{self.group}]"


@dataclass(frozen=True, slots=True)
class RelaxNear:
    """Take a VF anywhere on the host for NIC number ``nic`` (from 0)."""

    nic: int

    @property
    def sentence(self) -> str:
        return f"take a VF anywhere on the host for NIC {self.nic}"


@dataclass(frozen=True, slots=True)
class DropNic:
    """Ask for one NIC less: number ``nic``."""

    nic: int

    @property
    def sentence(self) -> str:
        return f"ask for one NIC less, number {self.nic}"


@dataclass(frozen=True, slots=True)
class FewerDevices:
    """Ask for at most ``count`` devices in device request number ``group``."""

    group: int
    count: int

    @property
    def sentence(self) -> str:
        return f"ask for at most {self.count} devices in devices[{self.group}]"


@dataclass(frozen=True, slots=True)
class RelaxDeviceLocality:
    """Take devices of other cells in device request number ``group``."""

    group: int

    @property
    def sentence(self) -> str:
        return f"take devices of other cells in devices[{self.group}]"


@dataclass(frozen=True, slots=True)
class OtherHost:
    """Nothing about the request helps on this host (it lacks the kind of thing)."""

    @property
    def sentence(self) -> str:
        return "use another host: this one lacks the kind of thing"


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
    | AnyGpuLabels
    | RelaxLink
    | SmallerShare
    | RelaxGpuLocality
    | RelaxNear
    | DropNic
    | FewerDevices
    | RelaxDeviceLocality
    | OtherHost
)
