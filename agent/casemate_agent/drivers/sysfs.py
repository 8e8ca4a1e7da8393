"""The host's own facts, from /proc and /sys.

For: ``ports.Machine``. What may live here: reading files of the kernel, and the amounts that are kept for the host itself.

Theory of operation. Processors, cells, caches, page pools and isolation are read from sysfs, which is what libvirt itself
reads; the memory of a machine with one cell is read from /proc/meminfo, because both sysfs and libvirt tell only the part
that was there at boot on machines whose memory was plugged in later. A thread that is offline is in no core. The root of
the files is a parameter, so that a recorded machine is read like a live one.

What the host keeps for itself is decided once, at the first reading: it must not move under the claims that were made on
it. Without a word of the configuration: on machines of eight threads and more the first core, some memory for the kernel,
libvirt and the agent, and a twentieth of the disk.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.ports import MachineFacts
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.errors import MachineError, Unavailable
from casemate_core.quantity import MIB
from casemate_core.topology import Cell, Core, PagePool, Topology

#: From so many threads on one core is worth giving to the host alone; on a smaller machine everybody floats over all.
MIN_THREADS_FOR_HOUSEKEEPING = 8
#: Kernel, libvirtd, agent and page tables: 1 GiB and a thirty-second of the memory, at most a quarter of a small machine.
RESERVED_MIB = 1024
RESERVED_SHARE = 32
DISK_RESERVE_SHARE = 20


class BadSysfs(MachineError):
    """/proc or /sys do not say what every Linux says."""

    reason = "BadSysfs"


@dataclass(frozen=True, slots=True)
class Housekeeping:
    """What the host keeps. None: by the rules of this module. ``threads`` in the kernel's list syntax."""

    threads: CpuSet | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None


class HostMachine:
    """``ports.Machine`` on the files below ``root``."""

    def __init__(self, state_dir: Path, housekeeping: Housekeeping | None = None, root: Path = Path("/")) -> None:
        self._state_dir = state_dir
        self._housekeeping = housekeeping or Housekeeping()
        self._root = root
        self._calls = DeadlineExecutor("sysfs", threads=1)
        self._disk_mib: int | None = None
        self._memory_mib: int | None = None

    async def aclose(self) -> None:
        """Let the thread go."""
        self._calls.close()

    async def observe(self, deadline_s: float) -> MachineFacts:
        try:
            return await self._calls.run("read host facts", self._observe, deadline_s)
        except (OSError, ValueError) as error:
            raise BadSysfs(f"host facts: {error}") from error

    def _observe(self) -> MachineFacts:
        if self._disk_mib is None:
            self._disk_mib = self._disk()
        if self._memory_mib is None:
            self._memory_mib = _meminfo_mib(self._root / "proc/meminfo", "MemTotal")
        return MachineFacts(
            hostname=socket.gethostname(),
            boot_id=(self._root / "proc/sys/kernel/random/boot_id").read_text().strip(),
            kernel=os.uname().release,
            topology=read_topology(self._root, self._memory_mib, self._disk_mib, self._housekeeping),
        )

    def _disk(self) -> int:
        """What instances may hold of the state folder's file system: what is free, and what they hold already."""
        self._state_dir.mkdir(parents=True, exist_ok=True)
        room = os.statvfs(self._state_dir)
        held = 0
        for folder, _, names in os.walk(self._state_dir / "instances"):
            for name in names:
                try:
                    held += os.lstat(os.path.join(folder, name)).st_blocks * 512
                except OSError:
                    continue  # removed meanwhile
        usable = (room.f_bavail * room.f_frsize + held) // MIB
        reserved = self._housekeeping.disk_mib
        return max(0, usable - (usable // DISK_RESERVE_SHARE if reserved is None else reserved))


def read_topology(root: Path, memory_mib: int, disk_mib: int, housekeeping: Housekeeping) -> Topology:
    """The topology that the files below ``root`` tell. ``memory_mib`` is that of the whole machine.

    Raises OSError for a file that is missing, ValueError for one that reads otherwise than the kernel writes it.
    """
    cpus = root / "sys/devices/system/cpu"
    online = CpuSet.parse((cpus / "online").read_text())
    present = CpuSet.parse((cpus / "present").read_text())
    isolated = _cpus(cpus / "isolated") & online
    cells_of = _cells_of_threads(root, online)
    cores = _read_cores(cpus, online, cells_of)
    reserved = housekeeping.threads
    if reserved is None:
        reserved = _first_core(cores, isolated) if len(online) >= MIN_THREADS_FOR_HOUSEKEEPING else EMPTY
    return Topology(
        cells=_read_cells(root, memory_mib, housekeeping),
        cores=cores,
        offline=present - online,
        reserved=reserved & online,
        isolated=isolated - reserved,
        disk_mib=disk_mib,
        name=socket.gethostname(),
    )


def _cpus(path: Path) -> CpuSet:
    try:
        return CpuSet.parse(path.read_text())
    except FileNotFoundError:
        return EMPTY


def _node_ids(root: Path) -> tuple[int, ...]:
    """Cells; a kernel without NUMA shows none, and is one cell 0."""
    online = root / "sys/devices/system/node/online"
    return tuple(CpuSet.parse(online.read_text())) if online.exists() else (0,)


def _cells_of_threads(root: Path, online: CpuSet) -> dict[int, int]:
    found = dict.fromkeys(online, 0)
    for node in _node_ids(root):
        for thread in _cpus(root / f"sys/devices/system/node/node{node}/cpulist"):
            found[thread] = node
    return found


def _read_cores(cpus: Path, online: CpuSet, cells_of: dict[int, int]) -> tuple[Core, ...]:
    """Cores by their first thread. Numbers of ours: the kernel's core_id repeats from socket to socket."""
    cores: list[Core] = []
    seen, caches = EMPTY, dict[CpuSet, int]()
    for thread in online:
        if thread in seen:
            continue
        place = cpus / f"cpu{thread}"
        siblings = CpuSet.parse(_first_of(place / "topology", "core_cpus_list", "thread_siblings_list"))
        threads = siblings & online
        seen = seen | threads
        shared = _last_level_cache(place) or threads
        cores.append(
            Core(
                id=len(cores),
                socket=max(0, int((place / "topology/physical_package_id").read_text())),
                cell=cells_of[thread],
                l3=caches.setdefault(shared, len(caches)),
                threads=threads,
            )
        )
    return tuple(cores)


def _first_of(folder: Path, *names: str) -> str:
    for name in names:
        if (folder / name).exists():
            return (folder / name).read_text()
    raise BadSysfs(f"{folder} has none of {', '.join(names)}")


def _last_level_cache(place: Path) -> CpuSet | None:
    """Threads that share the highest cache of ``place``; None where the machine does not tell (some VMs)."""
    levels = {}
    for index in sorted((place / "cache").glob("index*")):
        level, shared = index / "level", index / "shared_cpu_list"
        if level.exists() and shared.exists():
            levels[int(level.read_text())] = CpuSet.parse(shared.read_text())
    return levels[max(levels)] if levels else None


def _first_core(cores: tuple[Core, ...], isolated: CpuSet) -> CpuSet:
    for core in cores:
        if core.threads.isdisjoint(isolated):
            return core.threads
    return EMPTY


def _read_cells(root: Path, memory_mib: int, housekeeping: Housekeeping) -> tuple[Cell, ...]:
    nodes = _node_ids(root)
    sizes = {}
    for node in nodes:
        path = root / f"sys/devices/system/node/node{node}/meminfo"
        sizes[node] = _meminfo_mib(path, "MemTotal") if len(nodes) > 1 else memory_mib
    total = sum(sizes.values())
    reserved = housekeeping.memory_mib
    if reserved is None:
        reserved = min(RESERVED_MIB + total // RESERVED_SHARE, total // 4)
    cells = []
    for node in nodes:
        folder = root / f"sys/devices/system/node/node{node}"
        pools = _read_pools(folder / "hugepages")
        plain = sizes[node] - sum(pool.size_mib for pool in pools)
        # In proportion, and never more than the cell has outside its pools.
        share = min(max(0, plain), -(-reserved * sizes[node] // total) if total else 0)
        distances = folder / "distance"
        cells.append(
            Cell(
                id=node,
                memory_mib=sizes[node],
                pools=pools,
                reserved_mib=share,
                distances=tuple(map(int, distances.read_text().split())) if distances.exists() else (),
            )
        )
    return tuple(cells)


def _read_pools(folder: Path) -> tuple[PagePool, ...]:
    pools = []
    for entry in folder.glob("hugepages-*kB"):
        count = int((entry / "nr_hugepages").read_text())
        if count:
            pools.append(PagePool(int(entry.name.removeprefix("hugepages-").removesuffix("kB")), count))
    return tuple(sorted(pools, key=lambda pool: pool.page_kib))


def _meminfo_mib(path: Path, field: str) -> int:
    for line in path.read_text().splitlines():
        if f"{field}:" in line:
            return int(line.split()[-2]) // 1024
    raise Unavailable(f"{path} has no {field}")
