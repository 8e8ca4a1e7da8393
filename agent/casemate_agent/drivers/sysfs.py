"""The host's own facts, from /proc and /sys.

For: ``ports.Machine``. What may live here: reading files of the kernel, and the amounts that are kept for the host itself.

Theory of operation. The kernel's files are collected and given to the core's loader (``casemate_core.topology_loaders``),
which is what recorded machines are read by, too; so the root of the files is a parameter. Ports and devices come from
``inventory``, by the rules of the host's administrator, GPUs from ``gpus``.

What the host keeps for itself is decided once, at the first reading: it must not move under the claims that were made on
it. Without a word of the configuration: on machines of eight threads and more the first core, some memory for the kernel,
libvirt and the agent, and a twentieth of the disk.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.fabricports import Fabric
from casemate_agent.drivers.gpus import HostGpus
from casemate_agent.drivers.hostfiles import HostFiles, collect
from casemate_agent.drivers.inventory import Inventory, take
from casemate_agent.drivers.partitions import why_not
from casemate_agent.drivers.portreader import PortReader, read_ports
from casemate_agent.drivers.ports import MachineFacts
from casemate_agent.gpu.inventory import GpuSight
from casemate_agent.hardware.fabric import FabricSight, sight
from casemate_agent.hardware.rules import DeviceRule, PortRule
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.errors import CasemateError, MachineError, Unavailable
from casemate_core.quantity import MIB
from casemate_core.topology import Core, FabricPartition, Topology
from casemate_core.topology_loaders import BadRecording, GpuFacts, HostFacts, from_sysfs
from casemate_core.topology_loaders.sysfs import CPU, MEMINFO

#: From so many threads on one core is worth giving to the host alone; on a smaller machine everybody floats over all.
MIN_THREADS_FOR_HOUSEKEEPING = 8
#: Kernel, libvirtd, agent and page tables: 1 GiB and a thirty-second of the memory, at most a quarter of a small machine.
RESERVED_MIB = 1024
RESERVED_SHARE = 32
DISK_RESERVE_SHARE = 20
#: So long a look at the machine waits for a fabric manager; what it told before holds meanwhile.
FABRIC_S = 2.0


ISOLATED = f"{CPU}/isolated"


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

    def __init__(
        self,
        state_dir: Path,
        housekeeping: Housekeeping | None = None,
        root: Path = Path("/"),
        ports: tuple[PortRule, ...] = (),
        devices: tuple[DeviceRule, ...] = (),
        port_reader: PortReader = read_ports,
        gpus: HostGpus | None = None,
        isolate: CpuSet = EMPTY,
        fabric: Fabric | None = None,
    ) -> None:
        self._gpus = gpus
        self._fabric = fabric
        #: As the fabric manager told them last: while it is silent they are what they were.
        self._told = FabricSight()
        #: Threads that partitions are to isolate; why they cannot, once it was looked.
        self._isolate = isolate
        self._no_partitions = why_not(root) if isolate else ""
        self._rules = ports, devices
        self._read_ports = port_reader
        self._state_dir = state_dir
        self._housekeeping = housekeeping or Housekeeping()
        self._root = root
        self._calls = DeadlineExecutor("sysfs", threads=1)
        self._disk_mib: int | None = None
        self._memory_mib: int | None = None
        self._files = HostFiles(root)
        #: The last topology, and what it was made from: the same is not made again.
        self._made: (
            tuple[tuple[Mapping[str, str], Inventory, tuple[GpuFacts, ...], tuple[FabricPartition, ...]], Topology]
            | None
        ) = None

    async def aclose(self) -> None:
        """Let the thread go."""
        self._calls.close()

    async def observe(self, deadline_s: float) -> MachineFacts:
        try:
            gpus = await self._gpus.look(deadline_s) if self._gpus is not None else GpuSight()
            fabric = await self._look_at_fabric(gpus, deadline_s)
            return await self._calls.run("read host facts", lambda: self._observe(gpus, fabric), deadline_s)
        except (OSError, ValueError, BadRecording) as error:
            raise BadSysfs(f"host facts: {error}") from error

    async def _look_at_fabric(self, gpus: GpuSight, deadline_s: float) -> FabricSight:
        """Partitions of the board, by the UUIDs of its GPUs."""
        if self._fabric is None:
            return self._told
        try:
            facts = await self._fabric.observe(min(deadline_s, FABRIC_S))
        except CasemateError as error:
            there = {gpu.uuid for gpu in gpus.gpus}
            known = tuple(p for p in self._told.partitions if there.issuperset(p.gpus))
            return FabricSight(known, (f"FabricSilent: {error}",))
        self._told = sight(facts, gpus.gpus)
        return self._told

    def _observe(self, gpus: GpuSight, fabric: FabricSight) -> MachineFacts:
        if self._disk_mib is None:
            self._disk_mib = self._disk()
        if self._memory_mib is None:
            self._memory_mib = _meminfo_mib(self._root / "proc/meminfo", "MemTotal")
        ports, devices = self._rules
        # A host with neither is spared the questions.
        found = take(self._root, self._read_ports() if ports else (), ports, devices)
        # What is a GPU is no other device, whatever else a rule says.
        its = {gpu.address for gpu in gpus.gpus}
        found = replace(found, devices=tuple(device for device in found.devices if device.address not in its))
        topology = self._topology(found, gpus.gpus, fabric.partitions)
        refused = (
            (f"IsolationUnavailable: threads {self._isolate}: {self._no_partitions}",) if self._no_partitions else ()
        )
        return MachineFacts(
            hostname=socket.gethostname(),
            boot_id=(self._root / "proc/sys/kernel/random/boot_id").read_text().strip(),
            kernel=os.uname().release,
            topology=topology,
            problems=(*gpus.problems, *fabric.problems, *found.problems, *refused),
            partitionable=self._partitions & topology.isolated - _isolated_at_boot(self._files.read()),
        )

    @property
    def _partitions(self) -> CpuSet:
        return EMPTY if self._no_partitions else self._isolate

    def _topology(
        self, found: Inventory, gpus: tuple[GpuFacts, ...], fabric: tuple[FabricPartition, ...] = ()
    ) -> Topology:
        assert self._disk_mib is not None and self._memory_mib is not None
        files = self._files.read()
        made = self._made
        if made is not None and made[0][0] is files and made[0][1:] == (found, gpus, fabric):
            return made[1]
        isolated = {**files, ISOLATED: str(_isolated_at_boot(files) | self._partitions)} if self._partitions else files
        topology = _topology(isolated, self._memory_mib, self._disk_mib, self._housekeeping, found, gpus)
        topology = replace(topology, partitions=fabric) if fabric else topology
        self._made = (files, found, gpus, fabric), topology
        return topology

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


def read_topology(
    root: Path,
    memory_mib: int,
    disk_mib: int,
    housekeeping: Housekeeping,
    found: Inventory | None = None,
    gpus: tuple[GpuFacts, ...] = (),
) -> Topology:
    """The topology that the files below ``root`` tell. ``memory_mib`` is that of the whole machine.

    Raises BadRecording for a file that is missing or reads otherwise than the kernel writes it.
    """
    return _topology(collect(root), memory_mib, disk_mib, housekeeping, found or Inventory(), gpus)


def _topology(
    read: Mapping[str, str],
    memory_mib: int,
    disk_mib: int,
    housekeeping: Housekeeping,
    found: Inventory,
    gpus: tuple[GpuFacts, ...],
) -> Topology:
    # What was read first: memory that is plugged in later must not move under the claims.
    files = {**read, MEMINFO: f"MemTotal: {memory_mib * 1024} kB"}
    facts = HostFacts(
        gpus=gpus,
        ports=found.ports,
        devices=found.devices,
        reserved_mib=0,
        disk_mib=disk_mib,
        name=socket.gethostname(),
    )
    plain = from_sysfs(files, facts)
    reserved = housekeeping.threads
    if reserved is None:
        many = len(plain.online) >= MIN_THREADS_FOR_HOUSEKEEPING
        reserved = _first_core(plain.cores, plain.isolated) if many else EMPTY
    reserved_mib = housekeeping.memory_mib
    if reserved_mib is None:
        reserved_mib = min(RESERVED_MIB + plain.memory_mib // RESERVED_SHARE, plain.memory_mib // 4)
    return from_sysfs(files, replace(facts, reserved=reserved, reserved_mib=reserved_mib))


def _isolated_at_boot(files: Mapping[str, str]) -> CpuSet:
    return CpuSet.parse(files.get(ISOLATED, ""))


def _first_core(cores: tuple[Core, ...], isolated: CpuSet) -> CpuSet:
    for core in cores:
        if core.threads.isdisjoint(isolated):
            return core.threads
    return EMPTY


def _meminfo_mib(path: Path, field: str) -> int:
    match = re.search(rf"\b{field}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    if match is None:
        raise Unavailable(f"{path} has no {field}")
    return int(match[1]) // 1024
