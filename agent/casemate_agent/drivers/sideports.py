"""Doors to what goes on beside an instance's life: its console, its ports, its files. Rules are those of `ports`.

What may live here: Protocols and their types. A session is closed by whoever opened it, and ends by itself when the guest,
its helper or its QEMU does.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from casemate_core.errors import CallerError

if TYPE_CHECKING:
    from casemate_agent.drivers.ports import ExecSession

#: In the output of a connection to a port: nothing more comes from there, but it may still take.
EOF: Final = "eof"


class ConsoleRefused(CallerError):
    """There is no console to open: the instance is off."""

    reason = "ConsoleRefused"


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """A file or folder ``path`` of a container, or of the guest itself where ``pod`` is empty, out or ``into`` it.

    The archive is a tar whose root is ``x``. On the way in an existing folder gets the copy inside, as ``name``.
    """

    path: str
    into: bool
    name: str = ""
    pod: str = ""
    container: str = ""


class GuestSides(Protocol):
    """Part of `ports.Guests`. All raise Unavailable while the helper is not connected, and GuestRefused."""

    async def dial(self, uid: str, pod: str, container: str, port: int, deadline_s: float) -> "ExecSession":
        """A connection to a TCP port on the loopback of a pod, or of the guest where ``pod`` is empty. Output comes as
        ``stdout``; ``EOF`` says that no more comes; exit code 0 that both directions have ended. `close_stdin` ends ours.
        """
        ...

    async def copy(self, uid: str, request: CopyRequest, deadline_s: float) -> "ExecSession":
        """Files out (the archive is ``stdout``) or in (the archive is the input); ``stderr`` tells what was not copied.
        Exit code 0: all was copied; 1: not all; 4: there is no such file."""
        ...

    async def authorize(self, uid: str, key: str, deadline_s: float) -> tuple[str, ...]:
        """Let a public key log in as root; the guest's host keys."""
        ...


class ConsoleSession(Protocol):
    """One reader of a serial console. All readers see the same output; what any of them types is typed."""

    def output(self) -> AsyncIterator[bytes | int]:
        """What the console prints, until it is gone; a number where so many bytes were lost to a slow reader."""
        ...

    async def input(self, data: bytes) -> None:
        """Type. Waits while the guest does not take it."""
        ...

    async def close(self) -> None: ...


class Consoles(Protocol):
    """Serial consoles of running instances."""

    async def open(self, uid: str, deadline_s: float) -> ConsoleSession:
        """Raises ConsoleRefused where the instance does not run."""
        ...


class SerialLogs(Protocol):
    """What guests wrote to their serial consoles, kept within bounds of size and time."""

    async def keep(self, deadline_s: float) -> None:
        """Mark how far the logs have got, and hold them within their bounds; every few seconds."""
        ...

    def read(self, uid: str, since_s: float, deadline_s: float) -> AsyncGenerator[bytes, None]:
        """What is kept of an instance, oldest first: all of it (``since_s`` 0), or from a time on. It may begin a little
        earlier, never later. Nothing where nothing is kept."""
        ...
