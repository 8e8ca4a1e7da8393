"""Ports of migration: from one host to another, by bytes that only these two can read.

What may live here: the protocol that the agent asks, and its errors. What is sent and when is decided in
:mod:`casemate_agent.moving`; what runs through it is the hypervisor's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from casemate_core.errors import MachineError
from casemate_core.spec.instance import DesiredInstance


@dataclass(frozen=True, slots=True)
class Passage:
    """This host waits for an instance, by an order: the source finds it at ``address`` (``host:port``)."""

    order: str
    address: str


class NoPassage(MachineError):
    """This host takes part in no migrations."""

    reason = "NoPassage"


class PassageFailed(MachineError):
    """The other host was not reached, is not the one it should be, or broke off."""

    reason = "PassageFailed"


class Passages(Protocol):
    """Ways between this host and others, one for each migration that it takes part in."""

    @property
    def where(self) -> str:
        """The address of this host that others reach; told to the manager."""
        ...

    @property
    def cpu(self) -> str:
        """Names the CPU that guests with cores of their own see."""
        ...

    def opened(self) -> Mapping[str, Passage]:
        """Passages that wait here, by the uid of the instance."""
        ...

    async def open(self, desired: DesiredInstance, xml: str, deadline_s: float) -> None:
        """Wait for the source of this instance's order, and let it bring the domain that ``xml`` describes. One that was open
        for the instance is closed."""
        ...

    async def close(self, uid: str) -> None:
        """Wait no longer; who is within is thrown out."""
        ...

    async def send(self, desired: DesiredInstance, deadline_s: float) -> None:
        """Send the running domain to the target of this instance's order, with its root disk. Returns when it is off here and
        there frozen. Raises PassageFailed, and what the hypervisor raises; then it runs here, unless it cannot be told.
        Given up (cancelled), it has stopped sending before it ends."""
        ...
