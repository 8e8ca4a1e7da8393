"""The door to a host's GPUs. See :mod:`casemate_agent.drivers.ports` for the rules that hold for every port."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.readings import GpuFault, GpuReading


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
