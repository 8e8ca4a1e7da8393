"""Binding of PCI functions to vfio-pci, and who holds one open.

For: ``drivers.sriov`` and whoever else passes functions through. What may live here: writing the driver files of sysfs, and
reading /proc for holders. It blocks: callers run it in a thread with a deadline, because a write to sysfs can hang in a driver.

Theory of operation. ``driver_override`` names the one driver that may have a function, ``drivers_probe`` lets the kernel bind
it; neither needs an id table, and neither touches another function of the same kind
(Documentation/ABI/testing/sysfs-bus-pci). A group is viable for VFIO when every other function in it, bridges left aside, is
bound to nothing or to vfio-pci too (Documentation/driver-api/vfio.rst).
"""

import os
import subprocess
import time
from pathlib import Path

from casemate_agent.drivers.attributes import write_attribute
from casemate_core.errors import MachineError, Unavailable

PCI = "sys/bus/pci"
DRIVER = "vfio-pci"
_BRIDGE_CLASS = "0x06"


class BindFailed(MachineError):
    """The kernel did not bind or unbind a function."""

    reason = "BindFailed"


class HeldByOther(MachineError):
    """Somebody has the function: another instance, or a process that has it open."""

    reason = "HeldByOther"


class GroupNotViable(MachineError):
    """Other functions of the IOMMU group are bound to drivers of the host, so none of it can be given away."""

    reason = "GroupNotViable"


class Vfio:
    """The PCI functions below ``root``; ``proc`` is where processes are looked for."""

    def __init__(self, root: Path = Path("/"), proc: Path = Path("/proc")) -> None:
        self._root = root
        self._proc = proc

    def function(self, address: str) -> Path:
        """Its folder. Raises Unavailable where the function is gone."""
        folder = self._root / PCI / "devices" / address
        if not folder.exists():
            raise Unavailable(f"PCI function {address} is gone")
        return folder

    def driver(self, address: str) -> str:
        """What it is bound to; empty: nothing, or the function is gone."""
        link = self._root / PCI / "devices" / address / "driver"
        return os.path.basename(os.readlink(link)) if link.is_symlink() else ""

    def group(self, address: str) -> str:
        """Number of its IOMMU group. Raises BindFailed where the host has no IOMMU for it."""
        link = self.function(address) / "iommu_group"
        if not link.is_symlink():
            raise BindFailed(f"{address} is in no IOMMU group: switch the IOMMU on (intel_iommu=on or the firmware's)")
        return os.path.basename(os.readlink(link))

    def others_of_group(self, address: str) -> tuple[tuple[str, str], ...]:
        """(address, driver) of the other functions of its group that are bound to something and are no bridges."""
        self.group(address)
        found = []
        for path in sorted((self.function(address) / "iommu_group/devices").iterdir()):
            other = path.name
            if other == address or (self.function(other) / "class").read_text().startswith(_BRIDGE_CLASS):
                continue
            if driver := self.driver(other):
                found.append((other, driver))
        return tuple(found)

    def bind(self, address: str) -> None:
        """Bind to vfio-pci, away from whatever has it. Raises BindFailed, GroupNotViable naming the others."""
        # Asked of one that is bound already, too: a host's driver may have come to another function since.
        if others := [(other, driver) for other, driver in self.others_of_group(address) if driver != DRIVER]:
            named = ", ".join(f"{other} ({driver})" for other, driver in others)
            raise GroupNotViable(
                f"IOMMU group {self.group(address)} of {address} holds {named} too; give those away with it, or unbind them"
            )
        if self.driver(address) == DRIVER:
            return
        if not (self._root / PCI / "drivers" / DRIVER).exists():
            # The module's name has one form on every kernel; what it needs of this machine it says itself.
            done = subprocess.run(["modprobe", DRIVER], capture_output=True, text=True, timeout=30, check=False)
            if done.returncode != 0:
                raise BindFailed(f"vfio-pci cannot be loaded: {done.stderr.strip()[:300]}")
        folder = self.function(address)
        write_attribute(folder / "driver_override", DRIVER, BindFailed)
        self._unbind(address)
        write_attribute(self._root / PCI / "drivers_probe", address, BindFailed)
        if (driver := self.driver(address)) != DRIVER:
            raise BindFailed(f"{address} is bound to {driver or 'nothing'} after it was given to {DRIVER}")

    def release(self, address: str, *, back: bool) -> None:
        """Take it from vfio-pci. ``back``: let the host's own driver have it again. Nothing happens where it is gone."""
        folder = self._root / PCI / "devices" / address
        if not folder.exists():
            return
        if self.driver(address) == DRIVER:
            self._unbind(address)
        write_attribute(folder / "driver_override", "\n", BindFailed)
        if back and not self.driver(address):
            write_attribute(self._root / PCI / "drivers_probe", address, BindFailed)

    def holders(self, address: str) -> tuple[str, ...]:
        """Processes that have the function open, as ``name (pid)``: those with its group's file among their descriptors.

        One that is being pulled out is bound to nothing already, while the kernel still waits for whoever has it open.
        """
        folder = self._root / PCI / "devices" / address
        if not (folder / "iommu_group").is_symlink() or self.driver(address) not in ("", DRIVER):
            return ()
        files = {f"/dev/vfio/{self.group(address)}"}
        files |= {f"/dev/vfio/devices/{path.name}" for path in folder.glob("vfio-dev/*")}
        return self.open_by(files)

    def open_by(self, files: set[str]) -> tuple[str, ...]:
        """Processes that have one of these files open, as ``name (pid)``. Raises Unavailable where that cannot be seen."""
        if not files:
            return ()
        found = []
        for process in self._proc.iterdir():
            if process.name.isdecimal() and self._has_open(process, files):
                try:
                    name = (process / "comm").read_text().strip()
                except OSError:
                    continue  # it ended while we looked
                found.append(f"{name} ({process.name})")
        return tuple(found)

    @staticmethod
    def _has_open(process: Path, files: set[str]) -> bool:
        try:
            with os.scandir(process / "fd") as descriptors:
                for entry in descriptors:
                    try:
                        if os.readlink(entry.path) in files:
                            return True
                    except FileNotFoundError:
                        continue  # closed while we looked
        except PermissionError as error:
            # Not "nobody": to a device that a guest has in use that would be the end of it.
            raise Unavailable(
                f"who has {', '.join(sorted(files))} open is unknown, since {process}/fd cannot be read: {error.strerror}; "
                "let the agent have CAP_SYS_PTRACE"
            ) from error
        except OSError:
            return False  # it ended while we looked
        return False

    def _unbind(self, address: str) -> None:
        driver = self.driver(address)
        if not driver:
            return
        write_attribute(self._root / PCI / "drivers" / driver / "unbind", address, BindFailed)
        give_up_s = time.monotonic() + 5
        while self.driver(address):  # some drivers are done a moment after the write returned
            if time.monotonic() > give_up_s:
                raise BindFailed(f"{address} is still bound to {driver}")
            time.sleep(0.02)
