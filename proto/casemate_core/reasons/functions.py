"""Reasons about GPUs, virtual functions and other devices, and about parts that do not go together.

What may live here: those records. ``group`` and ``nic`` are positions in the request, from 0.
"""

from dataclasses import dataclass

from casemate_core.reasons.remedies import (
    AnyGpuLabels,
    AnyModel,
    DropNic,
    FewerDevices,
    FewerGpus,
    OtherHost,
    RelaxCells,
    RelaxDeviceLocality,
    RelaxGpuLocality,
    RelaxLink,
    RelaxNear,
    Remedy,
    SmallerShare,
)


@dataclass(frozen=True, slots=True)
class GpusShort:
    """Too few free GPUs of the model."""

    group: int
    asked: int
    available: int
    model: str
    present: int
    """GPUs of that model on the host, free or not."""
    held: tuple[str, ...] = ()
    """Of those that nobody has and nobody is given: which, and why."""

    @property
    def sentence(self) -> str:
        words = f"{self.asked} GPUs {self.model} asked, {self.available} free of {self.present}"
        more = f" and {len(self.held) - 2} more" if len(self.held) > 2 else ""
        return f"{words} ({'; '.join(self.held[:2])}{more})" if self.held else words

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
class GpuLabelsAbsent:
    """No GPU of the model carries the labels; ``present`` are those that GPUs of the model do carry."""

    group: int
    labels: tuple[tuple[str, str], ...]
    model: str
    of_model: int
    present: tuple[tuple[str, str], ...]

    @property
    def sentence(self) -> str:
        wanted, there = (",".join(f"{key}={value}" for key, value in pairs) for pairs in (self.labels, self.present))
        return f"GPUs {wanted} asked, none of {self.of_model} of model {self.model} is; they are {there or 'without labels'}"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (AnyGpuLabels(self.group), OtherHost())


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
class GpuShareBare:
    """The slices that would do are MIG instances of the host alone: none has a PCI function that a VM could be given."""

    group: int
    asked: str
    gpus: int

    @property
    def sentence(self) -> str:
        return (
            f"a slice {self.asked} asked, on {self.gpus} GPUs it is a MIG instance without a vGPU: it has no PCI function, and "
            "goes to no VM; NVIDIA's vGPU driver on the host makes MIG-backed vGPUs of them"
        )

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        return (OtherHost(),)


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
