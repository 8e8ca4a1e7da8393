"""Where PCI functions hang, by sysfs: read when a domain is made, for an address is true for a moment only."""

from pathlib import Path

from casemate_agent.hardware.pciplace import FunctionPlace, bar_bytes


def read_places(addresses: tuple[str, ...], sys_root: Path = Path("/sys")) -> tuple[FunctionPlace, ...]:
    """The place of each. One that cannot be read has no known root: its guest is then laid out as if all were alike."""
    return tuple(_read(address, sys_root / "bus/pci/devices" / address) for address in addresses)


def _read(address: str, folder: Path) -> FunctionPlace:
    try:
        # …/devices/pci0000:17/0000:17:01.0/0000:18:00.0: the first part below devices is the root complex
        root = next((part for part in folder.resolve(strict=True).parts if part.startswith("pci")), "")
        cell = int((folder / "numa_node").read_text())
        return FunctionPlace(address, root, cell, bar_bytes((folder / "resource").read_text()))
    except (OSError, ValueError):
        return FunctionPlace(address)
