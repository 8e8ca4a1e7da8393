"""The door to a host's NVSwitch fabric. See :mod:`casemate_agent.drivers.ports` for the rules that hold for every port."""

from typing import Protocol

from casemate_agent.hardware.fabric import FabricFacts
from casemate_core.errors import MachineError


class FabricBusy(MachineError):
    """Another active partition has GPUs of this one."""

    reason = "FabricBusy"


class FabricVersionMismatch(MachineError):
    """Manager, driver and this agent do not speak the same version, and nothing is done."""

    reason = "FabricVersionMismatch"


class FabricFailed(MachineError):
    """The manager did not do as asked."""

    reason = "FabricFailed"


class Fabric(Protocol):
    """A fabric manager. Types and decisions: :mod:`casemate_agent.hardware.fabric`."""

    async def observe(self, deadline_s: float) -> FabricFacts:
        """All partitions as they are. Raises Unavailable where the manager does not answer."""
        ...

    async def activate(self, partition: int, deadline_s: float) -> None:
        """Have it active; no change where it is. Raises NotFound; FabricBusy where one that overlaps it is active."""
        ...

    async def deactivate(self, partition: int, deadline_s: float) -> None:
        """Have it not active; no change where it is not. Raises NotFound."""
        ...
