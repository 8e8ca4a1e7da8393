"""The door to a host's GPUs. See :mod:`casemate_agent.drivers.ports` for the rules that hold for every port."""

from collections.abc import AsyncIterator
from typing import Protocol

from casemate_agent.gpu.health import GpuHealth
from casemate_agent.gpu.readings import GpuFault


class Gpus(Protocol):
    """The GPUs of a host, whoever holds them."""

    async def health(self, deadline_s: float) -> tuple[GpuHealth, ...]:
        """One record for each GPU of the host's topology, by UUID. A GPU that a guest holds, or whose library does not
        answer, has no reading; that is no error."""
        ...

    def faults(self) -> AsyncIterator[GpuFault]:
        """XIDs as they happen. Raises MachineError where they cannot be heard; ask again later."""
        ...
