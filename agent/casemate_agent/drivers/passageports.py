"""Ports of migration: from one host to another, by bytes that only these two can read.

What may live here: the protocol that the agent asks, and its errors. What is sent and when is decided in
:mod:`casemate_agent.moving`; what runs through it is the hypervisor's own.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from casemate_core.errors import MachineError
from casemate_core.spec.instance import DesiredInstance
from casemate_core.spec.operation import Order


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


def ports_of(where: str) -> tuple[str, range]:
    """The address, and the ports, that ``ADDRESS`` or ``ADDRESS:FIRST-LAST`` names. Raises PassageFailed."""
    address, colon, ports = where.rpartition(":")
    if not colon or where.endswith("]") or (where.count(":") > 1 and not where.startswith("[")):
        return where.strip("[]"), range(1)
    first, _, last = ports.partition("-")
    try:
        found = range(int(first), int(last or first) + 1)
    except ValueError:
        found = range(0)
    if not found or found[-1] > 65535 or found[0] < 0:
        raise PassageFailed(f"passage {where!r}: write an address, or ADDRESS:FIRST-LAST with two ports")
    return address.strip("[]"), found


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


class Bytes(Protocol):
    """One stream of bytes between two hosts."""

    async def read(self, most: int) -> bytes:
        """The next ones; none at the end. Raises PassageFailed."""
        ...

    async def write(self, data: bytes) -> None:
        """Returns when they are on their way. Raises PassageFailed."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Ends:
    """What the manager signs: PEM of the certificate and of its issuer; ``end``: ``source`` or ``target``."""

    certificate: bytes
    issuer: bytes
    end: str


#: A certificate for this host's end of a migration, by its uid and a certificate request.
Certify = Callable[[str, bytes], Awaitable[Ends]]


#: What is done with a stream that the other host has opened, to its end; the stream is named.
Serve = Callable[[str, Bytes], Awaitable[None]]


class Listening(Protocol):
    """The other host is waited for."""

    @property
    def address(self) -> str:
        """``host:port``."""
        ...

    async def close(self) -> None:
        """Wait no longer; streams that are open break off."""
        ...


class Crossings(Protocol):
    """Streams between the two hosts of a migration, which nobody else can open, read or change."""

    @property
    def where(self) -> str:
        """The address of this host, as others reach it; empty where they cannot."""
        ...

    async def listen(self, order: Order, serve: Serve) -> Listening:
        """Wait for the source of a migration. Raises PassageFailed."""
        ...

    async def dial(self, order: Order, name: str) -> Bytes:
        """A stream to the target of a migration. Raises PassageFailed."""
        ...
