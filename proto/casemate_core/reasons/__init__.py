"""Why a host cannot take a request: a closed set, each with its numbers.

What may live here: reasons, the sentence of each, and the remedies that would remove it. No search: whether a remedy
is enough is found out by fitting again with it applied (``casemate_core.fit.remedies``).

Theory of operation. A reason is a frozen record of what was asked, what is available and where; ``sentence`` is derived
from the numbers, so that a program compares numbers and a person reads text. ``remedies`` are the smallest changes, of
the request or of the host, that this reason alone would be satisfied by. ``Reason`` is the union of all classes here;
a ``match`` on it is checked for completeness by the type checker.
"""

from casemate_core.reasons.cells import (
    CellsShort,
    CoresShort,
    DiskShort,
    EmulatorShort,
    HousekeepingMissing,
    IsolatedShort,
    MemoryShort,
    NoPagePool,
    NoSmt,
    PagesShort,
    SharedCpuShort,
    ThreadsShort,
    VolumeElsewhere,
)
from casemate_core.reasons.functions import (
    CapabilityMissing,
    DeviceNotLocal,
    DevicesShort,
    GpuLabelsAbsent,
    GpuLinkShort,
    GpuModelAbsent,
    GpuNotLocal,
    GpuShareBare,
    GpuShareShort,
    GpusShort,
    NetworkUnreached,
    NicTooFar,
    NothingTogether,
    PartitionsTaken,
    VfsShort,
)
from casemate_core.reasons.remedies import (
    AnyGpuLabels,
    AnyModel,
    DropNic,
    FewerCpus,
    FewerDevices,
    FewerGpus,
    LessDisk,
    LessMemory,
    MorePages,
    NoGrowth,
    OtherHost,
    PlainPages,
    RelaxCells,
    RelaxDeviceLocality,
    RelaxEmulator,
    RelaxGpuLocality,
    RelaxLink,
    RelaxNear,
    RelaxRealtime,
    RelaxThreads,
    Remedy,
    SmallerShare,
)

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
    | VolumeElsewhere
    | GpusShort
    | GpuModelAbsent
    | GpuLabelsAbsent
    | GpuLinkShort
    | PartitionsTaken
    | GpuShareShort
    | GpuShareBare
    | GpuNotLocal
    | NetworkUnreached
    | CapabilityMissing
    | VfsShort
    | NicTooFar
    | DevicesShort
    | DeviceNotLocal
    | NothingTogether
)

__all__ = [
    "AnyGpuLabels",
    "AnyModel",
    "CapabilityMissing",
    "CellsShort",
    "CoresShort",
    "DeviceNotLocal",
    "DevicesShort",
    "DiskShort",
    "DropNic",
    "EmulatorShort",
    "FewerCpus",
    "FewerDevices",
    "FewerGpus",
    "GpuLabelsAbsent",
    "GpuLinkShort",
    "GpuModelAbsent",
    "GpuNotLocal",
    "GpuShareBare",
    "GpuShareShort",
    "GpusShort",
    "HousekeepingMissing",
    "IsolatedShort",
    "LessDisk",
    "LessMemory",
    "MemoryShort",
    "MorePages",
    "NetworkUnreached",
    "NicTooFar",
    "NoGrowth",
    "NoPagePool",
    "NoSmt",
    "NothingTogether",
    "OtherHost",
    "PagesShort",
    "PartitionsTaken",
    "PlainPages",
    "Reason",
    "RelaxCells",
    "RelaxDeviceLocality",
    "RelaxEmulator",
    "RelaxGpuLocality",
    "RelaxLink",
    "RelaxNear",
    "RelaxRealtime",
    "RelaxThreads",
    "Remedy",
    "SharedCpuShort",
    "SmallerShare",
    "ThreadsShort",
    "VfsShort",
    "VolumeElsewhere",
]
