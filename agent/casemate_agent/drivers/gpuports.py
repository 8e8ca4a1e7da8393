"""The door to a host's GPUs. See :mod:`casemate_agent.drivers.ports` for the rules that hold for every port."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.readings import Card, CardFacts, GpuFault, GpuReading, Proof
from casemate_agent.gpu.shares import Share, ShareFacts
from casemate_core.gpu import Rung


@dataclass(frozen=True, slots=True)
class GpuParts:
    """One GPU from both sides. ``reading``: None where a guest holds it, or its library does not answer."""

    uuid: str
    reading: GpuReading | None
    link: LinkReading | None


class Gpus(Protocol):
    """The GPUs of a host, whoever holds them."""

    async def read(self, deadline_s: float) -> tuple[GpuParts, ...]:
        """One for each GPU of the host's topology, by UUID. A library that does not answer is no error."""
        ...

    def faults(self) -> AsyncIterator[GpuFault]:
        """XIDs as they happen. Raises MachineError where they cannot be heard; ask again later."""
        ...


class GpuCards(Protocol):
    """What is done to GPUs between tenants. Each act is idempotent, and names a GPU by its UUID; one that is not there now
    raises Unavailable. None of them decides whether it may: that is the caller's record."""

    async def look(self, deadline_s: float) -> Mapping[str, CardFacts]:
        """Every GPU of the host's topology that is there now."""
        ...

    async def card(self, uuid: str, deadline_s: float) -> Card:
        """Who holds it, and what the kernel can do with it."""
        ...

    async def link(self, uuid: str, deadline_s: float) -> LinkReading:
        """Its PCIe link, whoever holds it."""
        ...

    async def bind(self, uuid: str, deadline_s: float) -> str:
        """Have it on vfio-pci, its whole IOMMU group or nothing; returns its address. Raises BindFailed, GroupNotViable."""
        ...

    async def reset(self, uuid: str, rung: Rung, deadline_s: float) -> str:
        """Set a mark, reset it by a function or a bus reset, and say what was done. Raises MachineError."""
        ...

    async def prove(self, uuid: str, deadline_s: float) -> Proof:
        """What it shows after the reset that this object made last."""
        ...

    async def scrub(self, uuid: str, deadline_s: float) -> str:
        """Overwrite its memory with the configured scrubber, and say what that said. Raises MachineError."""
        ...

    async def unbind(self, uuid: str, deadline_s: float) -> None:
        """Take it from vfio-pci; the host's own driver, where it has one, may have it again."""
        ...


class GpuShares(Protocol):
    """Slices of GPUs that are functions of their own. Both acts are idempotent, and read back what they did."""

    async def look(self, deadline_s: float) -> Mapping[str, ShareFacts]:
        """Every one there is on GPUs of the host's topology, by its name; those that nobody here has made, too."""
        ...

    async def create(self, share: Share, deadline_s: float) -> ShareFacts:
        """Have it there, for its owner. Raises ShareFailed where the GPU has no room, or it is there as another one;
        Unavailable where the GPU is gone."""
        ...

    async def remove(self, id: str, deadline_s: float) -> None:
        """Have it gone, whoever made it; no domain may run with it. Raises ShareFailed."""
        ...
