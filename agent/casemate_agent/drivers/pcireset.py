"""Resets of PCI functions, and the proof that one happened.

For: ``drivers.gpucards``. What may live here: the files of sysfs by which the kernel resets a function, and configuration space.
It blocks: callers run it in a thread with a deadline.

Theory of operation. The kernel resets a function when 1 is written to its ``reset`` (Documentation/ABI/testing/sysfs-bus-pci),
by the first of ``reset_method`` that works; we name the one that we want, and put the list back. Around a reset the kernel saves
and restores most of configuration space, so that a value set there says nothing. What it does not restore are the registers of
message-signalled interrupts while these are off: a mark written there is gone if, and only if, the function was reset.
"""

from dataclasses import dataclass
from pathlib import Path

from casemate_agent.drivers.attributes import write_attribute
from casemate_agent.gpu.readings import Proof
from casemate_core.errors import MachineError, Unavailable
from casemate_core.gpu import Rung

METHODS = {Rung.FUNCTION_RESET: "flr", Rung.BUS_RESET: "bus"}

_STATUS, _CAPABILITIES = 0x06, 0x34
_HAS_CAPABILITIES = 0x10
_MSI, _MSIX = 0x05, 0x11
_MOST_CAPABILITIES = 48
#: Where a message would be sent; the two lowest bits are not kept (PCI local bus specification 3.0, 6.8.1.4).
_ADDRESS = 0x5A5A5A58
#: Function mask and enable of MSI-X (ibid., 6.8.2.3).
_MASKED, _ENABLED = 0x4000, 0x8000


class ResetFailed(MachineError):
    """The kernel did not reset the function."""

    reason = "ResetFailed"


@dataclass(frozen=True, slots=True)
class Mark:
    """A register that was set: its place, its bytes as they were set, and its name."""

    at: int
    value: bytes
    name: str


def methods(folder: Path) -> tuple[str, ...]:
    """How the kernel can reset the function; empty where it cannot, or is older than Linux 5.15."""
    try:
        return tuple((folder / "reset_method").read_text().split())
    except OSError:
        return ()


def reset(folder: Path, rung: Rung) -> str:
    """Reset it in that way and no other; what was done. Raises ResetFailed."""
    known, method = methods(folder), METHODS[rung]
    if method not in known:
        raise ResetFailed(f"{folder.name}: the kernel knows no reset by {method} ({', '.join(known) or 'none'})")
    write_attribute(folder / "reset_method", method, ResetFailed)
    try:
        write_attribute(folder / "reset", "1", ResetFailed)
    finally:
        write_attribute(folder / "reset_method", " ".join(known), ResetFailed)
    return f"{method} of {folder.name}"


def identity(folder: Path) -> str:
    """Vendor and product as the function itself says them now; empty where it does not answer."""
    try:
        with (folder / "config").open("rb", buffering=0) as file:
            head = file.read(4)
    except OSError:
        return ""
    vendor, product = int.from_bytes(head[:2], "little"), int.from_bytes(head[2:4], "little")
    return "" if len(head) < 4 or vendor in (0, 0xFFFF) else f"{vendor:04x}:{product:04x}"


def mark(folder: Path) -> Mark | None:
    """Set a register that a reset clears; None where there is none. Raises MachineError."""
    try:
        config = (folder / "config").read_bytes()[:256]
    except OSError as error:
        raise Unavailable(f"{folder.name}: {error.strerror}") from error
    found = _capabilities(config)
    if (at := found.get(_MSI)) is not None and not config[at + 2] & 1:
        wanted = Mark(at + 4, _ADDRESS.to_bytes(4, "little"), "address of its MSI")
    elif (at := found.get(_MSIX)) is not None and not int.from_bytes(config[at + 2 : at + 4], "little") & _ENABLED:
        control = int.from_bytes(config[at + 2 : at + 4], "little") | _MASKED
        wanted = Mark(at + 2, control.to_bytes(2, "little"), "mask of its MSI-X")
    else:
        return None
    _put(folder, wanted)
    # A register that does not keep what is written proves nothing.
    return wanted if _get(folder, wanted) == wanted.value else None


def prove(folder: Path, before: str, was: Mark | None) -> Proof:
    """What it shows now. ``before``: its identity before the reset."""
    now = identity(folder)
    if not now:
        return Proof(False, "", before)
    if was is None:
        return Proof(True, now, before)
    return Proof(True, now, before, f"{was.name} ({was.value[::-1].hex()})", _get(folder, was) == was.value)


def _capabilities(config: bytes) -> dict[int, int]:
    """Places of the capabilities, by id."""
    found: dict[int, int] = {}
    if len(config) < 64 or not config[_STATUS] & _HAS_CAPABILITIES:
        return found
    at = config[_CAPABILITIES] & 0xFC
    for _ in range(_MOST_CAPABILITIES):
        if at < 0x40 or at + 12 > len(config):
            break
        found.setdefault(config[at], at)
        at = config[at + 1] & 0xFC
    return found


def _get(folder: Path, place: Mark) -> bytes:
    with (folder / "config").open("rb", buffering=0) as file:
        file.seek(place.at)
        return file.read(len(place.value))


def _put(folder: Path, wanted: Mark) -> None:
    try:
        with (folder / "config").open("r+b", buffering=0) as file:
            file.seek(wanted.at)
            file.write(wanted.value)
    except OSError as error:
        raise ResetFailed(f"{folder.name}: configuration space cannot be written: {error.strerror}") from error
