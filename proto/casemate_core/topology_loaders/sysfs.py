"""A host from the files of the kernel, given as text.

What may live here: the reading of files under /sys, named as in the kernel's Documentation/ABI. No opening of them:
``files`` maps a path without its leading slash to the text, and the path of a symbolic link to its target. ``GLOBS`` and
``LINKS`` say which ones to collect.

A thread that is offline has no siblings file and no cell, and is in no core. Where a machine tells no caches (some VMs)
each cell of a socket counts as one cache group. The memory of a machine with one cell is read from /proc/meminfo where
that was collected: sysfs tells only the part that was there at boot on machines whose memory was plugged in later.
"""

import re
from collections.abc import Iterator, Mapping

from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.topology.model import Cell, Core, CoreKind, PagePool, Topology
from casemate_core.topology.rules import check
from casemate_core.topology_loaders.facts import BadRecording, HostFacts
from casemate_core.topology_loaders.pci import devices_of, gpus_of, ports_of

CPU = "sys/devices/system/cpu"
NODE = "sys/devices/system/node"
MEMINFO = "proc/meminfo"
GLOBS = (
    MEMINFO,
    f"{CPU}/online",
    f"{CPU}/present",
    f"{CPU}/isolated",
    f"{CPU}/cpu[0-9]*/topology/core_cpus_list",
    f"{CPU}/cpu[0-9]*/topology/thread_siblings_list",
    f"{CPU}/cpu[0-9]*/topology/physical_package_id",
    f"{CPU}/cpu[0-9]*/cache/index[0-9]*/level",
    f"{CPU}/cpu[0-9]*/cache/index[0-9]*/shared_cpu_list",
    f"{NODE}/online",
    f"{NODE}/node[0-9]*/cpulist",
    f"{NODE}/node[0-9]*/meminfo",
    f"{NODE}/node[0-9]*/distance",
    f"{NODE}/node[0-9]*/hugepages/hugepages-*/nr_hugepages",
    "sys/devices/cpu_core/cpus",
    "sys/devices/cpu_atom/cpus",
    "sys/bus/pci/devices/*/numa_node",
)
"""Files to collect, as glob patterns under the root."""
LINKS = ("sys/bus/pci/devices/*", "sys/bus/pci/devices/*/iommu_group", "sys/bus/pci/devices/*/virtfn[0-9]*")
"""Symbolic links to collect, whose text is their target."""

_POOL = re.compile(rf"{NODE}/node(\d+)/hugepages/hugepages-(\d+)kB/nr_hugepages")
_MEMORY = re.compile(r"MemTotal:\s+(\d+) kB")


def from_sysfs(files: Mapping[str, str], facts: HostFacts | None = None) -> Topology:
    """The host that the files describe. Raises BadRecording naming the file."""
    known = facts or HostFacts()
    online = _cpus(files, f"{CPU}/online")
    cells = _cells(files, known)
    return finished(files, known, cells, cores_of(files, online, _cell_of_threads(files, [c.id for c in cells])))


def finished(files: Mapping[str, str], facts: HostFacts, cells: tuple[Cell, ...], cores: tuple[Core, ...]) -> Topology:
    """Cells and cores joined with the PCI tree and the facts. Raises BadRecording where the whole breaks a rule."""
    online = EMPTY
    for core in cores:
        online |= core.threads
    if not online:
        raise BadRecording(f"{CPU}/online", "names no thread")
    present = _cpus(files, f"{CPU}/present") if f"{CPU}/present" in files else online
    reserved = facts.reserved & online
    topology = Topology(
        cells=cells,
        cores=cores,
        offline=present - online,
        reserved=reserved,
        isolated=(_cpus(files, f"{CPU}/isolated") if f"{CPU}/isolated" in files else EMPTY) & online - reserved,
        disk_mib=facts.disk_mib,
        gpus=gpus_of(files, facts),
        partitions=facts.partitions,
        pfs=ports_of(files, facts),
        devices=devices_of(files, facts),
        name=facts.name,
    )
    if broken := check(topology):
        raise BadRecording(facts.name or "host", "; ".join(map(str, broken)))
    return topology


def cores_of(files: Mapping[str, str], online: CpuSet, cell_of: Mapping[int, int]) -> tuple[Core, ...]:
    """Cores by their first thread, numbered by us: the kernel's core_id repeats from socket to socket."""
    performance, efficiency = (
        _cpus_or_none(files, "sys/devices/cpu_core/cpus"),
        _cpus_or_none(files, "sys/devices/cpu_atom/cpus"),
    )
    caches: dict[tuple[str, int, int], int] = {}
    cores: list[Core] = []
    seen = EMPTY
    for thread in online:
        if thread in seen:
            continue
        threads = _siblings(files, thread) & online | CpuSet.of(thread)
        seen |= threads
        socket = max(0, _int(files, f"{CPU}/cpu{thread}/topology/physical_package_id"))
        cell = cell_of.get(thread, 0)
        shared = _last_level_cache(files, thread) or f"cell {cell}"
        kind = CoreKind.UNIFORM
        if efficiency:
            kind = CoreKind.EFFICIENCY if thread in efficiency else CoreKind.PERFORMANCE
            if thread not in efficiency | performance:
                raise BadRecording("sys/devices/cpu_core/cpus", f"thread {thread} is of neither kind")
        cache = caches.setdefault((shared, socket, cell), len(caches))
        cores.append(Core(len(cores), socket, cell, cache, threads, kind))
    return tuple(cores)


def pools_of(files: Mapping[str, str], cell: int) -> tuple[PagePool, ...]:
    """Huge-page pools of one cell, smallest pages first; empty ones are left out."""
    pools = []
    for path in files:
        match = _POOL.fullmatch(path)
        if match and int(match[1]) == cell and (count := _int(files, path)):
            pools.append(PagePool(int(match[2]), count))
    return tuple(sorted(pools, key=lambda p: p.page_kib))


def shared_reserve(reserved_mib: int, sizes: list[tuple[int, int]]) -> list[int]:
    """The host's reserve over cells of (memory, pools) in MiB: in proportion to the memory, never more than is plain."""
    total = sum(memory for memory, _ in sizes)
    return [min(max(0, memory - pools), -(-reserved_mib * memory // total) if total else 0) for memory, pools in sizes]


def _cells(files: Mapping[str, str], facts: HostFacts) -> tuple[Cell, ...]:
    ids = list(_cpus(files, f"{NODE}/online"))
    pools = [pools_of(files, cell) for cell in ids]
    memory = []
    for cell in ids:
        source = MEMINFO if len(ids) == 1 and MEMINFO in files else f"{NODE}/node{cell}/meminfo"
        match = _MEMORY.search(_text(files, source))
        if match is None:
            raise BadRecording(source, "has no MemTotal")
        memory.append(int(match[1]) // 1024)
    kept = shared_reserve(
        facts.reserved_mib,
        [(size, sum(p.size_mib for p in own)) for size, own in zip(memory, pools, strict=True)],
    )
    return tuple(
        Cell(cell, size, own, reserve, _distances(files, f"{NODE}/node{cell}/distance"))
        for cell, size, own, reserve in zip(ids, memory, pools, kept, strict=True)
    )


def _distances(files: Mapping[str, str], path: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, files.get(path, "").split()))
    except ValueError as error:
        raise BadRecording(path, str(error)) from error


def _cell_of_threads(files: Mapping[str, str], cells: list[int]) -> dict[int, int]:
    return {thread: cell for cell in cells for thread in _cpus(files, f"{NODE}/node{cell}/cpulist")}


def _siblings(files: Mapping[str, str], thread: int) -> CpuSet:
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the name before Linux 5.2
        if f"{CPU}/cpu{thread}/topology/{name}" in files:
            return _cpus(files, f"{CPU}/cpu{thread}/topology/{name}")
    raise BadRecording(f"{CPU}/cpu{thread}/topology/core_cpus_list", "is missing")


def _last_level_cache(files: Mapping[str, str], thread: int) -> str:
    """Its threads, as text; empty where the machine does not tell."""
    levels = {_int(files, f"{index}/level"): index for index in _cache_indices(files, thread)}
    return str(_cpus(files, f"{levels[max(levels)]}/shared_cpu_list")) if levels else ""


def _cache_indices(files: Mapping[str, str], thread: int) -> Iterator[str]:
    for number in range(10):
        index = f"{CPU}/cpu{thread}/cache/index{number}"
        if f"{index}/level" in files and f"{index}/shared_cpu_list" in files:
            yield index


def _text(files: Mapping[str, str], path: str) -> str:
    try:
        return files[path]
    except KeyError:
        raise BadRecording(path, "is missing") from None


def _int(files: Mapping[str, str], path: str) -> int:
    try:
        return int(_text(files, path))
    except ValueError as error:
        raise BadRecording(path, str(error)) from error


def _cpus(files: Mapping[str, str], path: str) -> CpuSet:
    try:
        return CpuSet.parse(_text(files, path))
    except ValueError as error:
        raise BadRecording(path, str(error)) from error


def _cpus_or_none(files: Mapping[str, str], path: str) -> CpuSet:
    return _cpus(files, path) if path in files else EMPTY
