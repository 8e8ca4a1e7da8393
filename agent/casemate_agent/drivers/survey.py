"""Looks at everything that ``casemate-agent doctor`` judges.

For: ``ports.Survey``. What may live here: reading /proc and /sys, and asking libvirt, NVML, QEMU and the kernel once each;
what follows from the answers is :mod:`casemate_agent.doctor.verdicts`.

Theory of operation. Every question stands alone: one that fails, or has no answer in time, leaves its facts None and its
reason in ``problems``; the others go on. The root of the files is a parameter, so that a machine written down as text is
read like a live one. Nothing is changed on the machine but for the probe guest, which runs for a second from a temporary
file.
"""

import ctypes
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import libvirt

from casemate_agent.doctor.facts import (
    Cgroup,
    Clock,
    Disk,
    HostSurvey,
    Libvirt,
    Nvml,
    PciFunction,
    Pool,
    Virtualisation,
)
from casemate_agent.drivers import kvm
from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.network import HostNetworks
from casemate_agent.drivers.nvml import NvmlGpus
from casemate_agent.drivers.volumes import TOOLS
from casemate_core.cpuset import CpuSet
from casemate_core.errors import CasemateError, MachineError
from casemate_core.quantity import MIB

T = TypeVar("T")

#: struct timex of Linux on 64 bits (man 2 adjtimex): its size with padding, and where two of its fields lie.
TIMEX_BYTES: Final = 208
MAXERROR_AT: Final = 24
STATUS_AT: Final = 40
STA_UNSYNC: Final = 0x40
TIME_ERROR: Final = 5


class HostSurveyor:
    """``ports.Survey`` on this machine. ``probe_cache``: where the answer about KVM is kept; None: a guest is run each time."""

    def __init__(
        self, state_dir: Path, libvirt_uri: str, scope: str, probe_cache: Path | None = None, root: Path = Path("/")
    ) -> None:
        self._state_dir = state_dir
        self._uri = libvirt_uri
        self._scope = scope
        self._probe_cache = probe_cache
        self._root = root
        self._calls = DeadlineExecutor("survey", threads=2)

    async def aclose(self) -> None:
        """Let the threads go."""
        self._calls.close()

    async def look(self, deadline_s: float) -> HostSurvey:
        """Everything; each question gets ``deadline_s``."""
        problems: dict[str, str] = {}
        files: dict[str, Any] = {}
        read = await self._ask("files", lambda: read_files(self._root), deadline_s, problems)
        if read is not None:
            files, said = read
            problems |= said
        network: str | None = None
        networks = HostNetworks(self._scope)
        try:
            network = await networks.condition(deadline_s)
        except CasemateError as error:
            problems["network"] = str(error)
        finally:
            await networks.aclose()
        return HostSurvey(
            hostname=socket.gethostname(),
            kernel=os.uname().release,
            virtualisation=await self._ask("virtualisation", self._virtualisation, deadline_s, problems),
            libvirt=await self._ask("libvirt", lambda: ask_libvirt(self._uri), deadline_s, problems),
            nvml=await ask_nvml(deadline_s, problems),
            clock=await self._ask("clock", ask_clock, deadline_s, problems),
            disk=await self._ask("disk", lambda: ask_disk(self._state_dir), deadline_s, problems),
            mkfs_ext4=await self._ask("volumes", ask_mkfs, deadline_s, problems),
            network_problem=network,
            problems=problems,
            **files,
        )

    def _virtualisation(self) -> Virtualisation:
        found = kvm.probe(self._probe_cache) if self._probe_cache else kvm.probe_now()
        return Virtualisation(found.kind, found.reason)

    async def _ask(self, name: str, question: Callable[[], T], deadline_s: float, problems: dict[str, str]) -> T | None:
        try:
            return await self._calls.run(name, question, deadline_s)
        except (CasemateError, OSError, ValueError, LookupError, AttributeError) as error:
            problems[name] = str(error) or type(error).__name__
            return None


# --- files ------------------------------------------------------------------------------------------------------------


def read_files(root: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Facts that are files below ``root``, by their name in `HostSurvey`; and by check, why some could not be read."""
    facts: dict[str, Any] = {}
    problems: dict[str, str] = {}
    readers: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "cmdline": ("kernel-line", lambda root: (root / "proc/cmdline").read_text().strip()),
        "threads": ("kernel-line", lambda root: CpuSet.parse((root / "sys/devices/system/cpu/online").read_text())),
        "iommu_table": ("iommu", _iommu_table),
        "iommu_groups": ("iommu", lambda root: _count(root / "sys/kernel/iommu_groups")),
        "vfio_loaded": ("vfio", lambda root: (root / "sys/bus/pci/drivers/vfio-pci").exists()),
        "vfio_available": ("vfio", _vfio_available),
        "functions": ("sriov", _functions),
        "pools": ("hugepages", _pools),
        "cgroup": ("cgroup", _cgroup),
    }
    for name, (check, reader) in readers.items():
        try:
            facts[name] = reader(root)
        except (OSError, ValueError) as error:
            problems[check] = str(error)
    try:
        facts["cpu_vendor"], facts["cpu_flags"] = _processor((root / "proc/cpuinfo").read_text())
    except OSError as error:
        problems["virtualisation"] = str(error)
    return facts, problems


def _processor(cpuinfo: str) -> tuple[str, frozenset[str]]:
    """Vendor and flags of the first processor."""
    vendor, flags = "", frozenset[str]()
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "vendor_id" and not vendor:
            vendor = value.strip()
        elif name.strip() in ("flags", "Features") and not flags:
            flags = frozenset(value.split())
    return vendor, flags


def _count(folder: Path) -> int:
    """Entries of a folder; a kernel without the feature has no folder."""
    try:
        return sum(1 for _ in folder.iterdir())
    except FileNotFoundError:
        return 0


def _iommu_table(root: Path) -> bool | None:
    """None where the machine has no ACPI tables to look into: then the firmware does not tell."""
    tables = root / "sys/firmware/acpi/tables"
    return any((tables / name).exists() for name in ("DMAR", "IVRS", "VIOT")) if tables.exists() else None


def _vfio_available(root: Path) -> bool:
    modules = root / "lib/modules" / os.uname().release
    if root != Path("/"):
        modules = next((root / "lib/modules").glob("*"), modules)
    for name in ("modules.dep", "modules.builtin"):
        try:
            if "/vfio-pci.ko" in (modules / name).read_text():
                return True
        except FileNotFoundError:
            continue
    return False


def _functions(root: Path) -> tuple[PciFunction, ...]:
    found = []
    try:
        places = sorted((root / "sys/bus/pci/devices").iterdir())
    except FileNotFoundError:
        return ()
    for place in places:
        driver, group = place / "driver", place / "iommu_group"
        found.append(
            PciFunction(
                address=place.name,
                vendor=int((place / "vendor").read_text(), 16),
                class_code=int((place / "class").read_text(), 16),
                driver=os.path.basename(os.readlink(driver)) if driver.is_symlink() else "",
                iommu_group=int(os.path.basename(os.readlink(group))) if group.is_symlink() else -1,
                total_vfs=_number(place / "sriov_totalvfs"),
                vfs=_number(place / "sriov_numvfs"),
            )
        )
    return tuple(found)


def _number(path: Path) -> int:
    """A number that not every device has."""
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0


def _pools(root: Path) -> tuple[Pool, ...]:
    found = []
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"))
    places = [(int(node.name.removeprefix("node")), node / "hugepages") for node in nodes]
    for cell, place in places or [(0, root / "sys/kernel/mm/hugepages")]:
        for entry in sorted(place.glob("hugepages-*kB")):
            size = int(entry.name.removeprefix("hugepages-").removesuffix("kB"))
            count, free = int((entry / "nr_hugepages").read_text()), int((entry / "free_hugepages").read_text())
            found.append(Pool(cell, size, count, free))
    return tuple(found)


def _cgroup(root: Path) -> Cgroup:
    place = root / "sys/fs/cgroup"
    unified = place / "cgroup.controllers"
    if unified.exists():
        return Cgroup(2, frozenset(unified.read_text().split()))
    names = frozenset(entry.name for entry in place.iterdir())
    return Cgroup(1, names - {"unified", "systemd"}, hybrid="unified" in names)


# --- questions --------------------------------------------------------------------------------------------------------


def ask_libvirt(uri: str) -> Libvirt:
    """Versions of the libvirtd and the QEMU behind ``uri``. Raises MachineError."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it would write to stderr
    try:
        connection = libvirt.open(uri)
        try:
            return Libvirt(uri, _version(connection.getLibVersion()), _version(connection.getVersion()))
        finally:
            connection.close()
    except libvirt.libvirtError as error:
        raise MachineError(f"{uri}: {error.get_error_message()}") from error


def _version(number: int) -> tuple[int, int, int]:
    """libvirt writes major * 1,000,000 + minor * 1,000 + release."""
    return number // 1_000_000, number // 1000 % 1000, number % 1000


async def ask_nvml(deadline_s: float, problems: dict[str, str]) -> Nvml | None:
    """What NVIDIA's library says, by the driver that the agent uses; None, and why in ``problems``, where it does not."""
    library = NvmlGpus()
    try:
        return Nvml(await library.driver(deadline_s), len(await library.read(deadline_s)))
    except CasemateError as error:
        problems["nvml"] = str(error)
        return None
    finally:
        await library.aclose()


def ask_clock() -> Clock:
    """What the kernel says of its clock; nothing is adjusted (modes is 0). Raises MachineError."""
    library = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(TIMEX_BYTES)
    state = library.adjtimex(buffer)
    if state < 0:
        raise MachineError(f"adjtimex: {os.strerror(ctypes.get_errno())}")
    (error_us,) = struct.unpack_from("@l", buffer, MAXERROR_AT)
    (status,) = struct.unpack_from("@i", buffer, STATUS_AT)
    return Clock(state != TIME_ERROR and not status & STA_UNSYNC, error_us)


def ask_mkfs() -> str:
    """Where mkfs.ext4 is that makes the file systems of volumes; empty: nowhere."""
    return shutil.which("mkfs.ext4", path=TOOLS) or ""


def ask_disk(state_dir: Path) -> Disk:
    """The file system that the state folder is on, or will be once it is made. Raises OSError."""
    place = state_dir.absolute()
    while not place.exists():
        place = place.parent
    room = os.statvfs(place)
    return Disk(str(state_dir), room.f_blocks * room.f_frsize // MIB, room.f_bavail * room.f_frsize // MIB)
