"""A host from libvirt's capabilities XML, and files of the kernel for what it does not tell.

What may live here: the reading of ``<host><topology>`` and ``<cache>`` (https://libvirt.org/formatcaps.html). libvirt tells
cells, memory, page pools, distances, threads with their sockets and siblings, and caches; it tells no offline threads, no
kinds of cores, no isolation and no PCI tree.
"""

from collections.abc import Mapping
from xml.etree import ElementTree

from casemate_core.cpuset import CpuSet
from casemate_core.topology.model import Cell, Core, PagePool, Topology
from casemate_core.topology_loaders.facts import BadRecording, HostFacts
from casemate_core.topology_loaders.sysfs import CPU, finished, shared_reserve
from casemate_core.topology_loaders.sysfs import cores_of as cores_by_files

_UNITS_KIB = {"KiB": 1, "MiB": 1024, "GiB": 1024 * 1024}


def from_capabilities(xml: str, files: Mapping[str, str] | None = None, facts: HostFacts | None = None) -> Topology:
    """The host that the capabilities describe. ``files`` as for ``sysfs.from_sysfs``; may be empty.

    Raises BadRecording for XML that is not libvirt's, and for a document type, which libvirt never writes.
    """
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise BadRecording("capabilities", "has a document type")
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise BadRecording("capabilities", str(error)) from error
    found = root.findall("./host/topology/cells/cell")
    if root.tag != "capabilities" or not found:
        raise BadRecording("capabilities", "has no host/topology/cells/cell")
    known, texts = facts or HostFacts(), files or {}
    cells = _cells(found, known)
    return finished(texts, known, cells, _cores(root, found, texts))


def _cells(found: list[ElementTree.Element], facts: HostFacts) -> tuple[Cell, ...]:
    ordered = sorted(found, key=lambda cell: _number(cell, "id"))
    pools = [_pools(cell) for cell in ordered]
    memory = [_memory_mib(cell) for cell in ordered]
    kept = shared_reserve(
        facts.reserved_mib,
        [(size, sum(p.size_mib for p in own)) for size, own in zip(memory, pools, strict=True)],
    )
    ids = [_number(cell, "id") for cell in ordered]
    return tuple(Cell(ids[i], memory[i], pools[i], kept[i], _distances(cell, ids)) for i, cell in enumerate(ordered))


def _memory_mib(cell: ElementTree.Element) -> int:
    memory = cell.find("memory")
    if memory is None:
        return 0  # a cell without memory
    unit = memory.get("unit", "KiB")
    if unit not in _UNITS_KIB or not (memory.text or "").strip().isdecimal():
        raise BadRecording(f"cell {cell.get('id')}", "memory is no number of KiB")
    return int(memory.text or "0") * _UNITS_KIB[unit] // 1024


def _pools(cell: ElementTree.Element) -> tuple[PagePool, ...]:
    """Huge pages only: the pool of the smallest size is all other memory, which libvirt counts in pages too."""
    sizes = sorted((_number(pages, "size"), _pages(cell, pages.text or "0")) for pages in cell.findall("pages"))
    return tuple(PagePool(size, count) for size, count in sizes[1:] if count)


def _pages(cell: ElementTree.Element, text: str) -> int:
    if not text.strip().isdecimal():
        raise BadRecording(f"cell {cell.get('id')}", f"pages is no number: {text!r}")
    return int(text)


def _distances(cell: ElementTree.Element, ids: list[int]) -> tuple[int, ...]:
    told = {_number(s, "id"): _number(s, "value") for s in cell.findall("./distances/sibling")}
    return tuple(told[i] for i in ids) if all(i in told for i in ids) else ()


def _cores(root: ElementTree.Element, found: list[ElementTree.Element], files: Mapping[str, str]) -> tuple[Core, ...]:
    threads: dict[int, tuple[int, int, CpuSet]] = {}  # (cell, socket, siblings)
    for cell in found:
        for cpu in cell.findall("./cpus/cpu"):
            if cpu.get("siblings") is None:
                continue  # libvirt knows no more of a thread that went offline since it looked
            threads[_number(cpu, "id")] = (
                _number(cell, "id"),
                _number(cpu, "socket_id"),
                _cpus(cpu.get("siblings", ""), f"cpu {cpu.get('id')}"),
            )
    try:
        online = CpuSet.from_ids(threads)
    except ValueError as error:
        raise BadRecording("cpu.id", str(error)) from error
    if f"{CPU}/online" in files:  # sysfs knows kinds of cores and caches too
        return cores_by_files(files, online, {thread: cell for thread, (cell, _, _) in threads.items()})
    levels: dict[int, list[CpuSet]] = {}
    for bank in root.findall("./host/cache/bank"):
        levels.setdefault(_number(bank, "level"), []).append(_cpus(bank.get("cpus", ""), "cache bank"))
    banks = levels[max(levels)] if levels else []
    groups: dict[tuple[int, int, int], int] = {}
    cores: list[Core] = []
    seen = CpuSet()
    for thread in online:
        if thread in seen:
            continue
        cell_id, socket, siblings = threads[thread]
        members = siblings & online | CpuSet.of(thread)
        seen |= members
        bank_number = next((i for i, bank in enumerate(banks) if thread in bank), -1)
        group = groups.setdefault((socket, cell_id, bank_number), len(groups))
        cores.append(Core(len(cores), socket, cell_id, group, members))
    return tuple(cores)


def _number(element: ElementTree.Element, name: str) -> int:
    text = element.get(name, "")
    if not text.isdecimal():
        raise BadRecording(f"{element.tag}.{name}", f"is no number: {text!r}")
    return int(text)


def _cpus(text: str, where: str) -> CpuSet:
    try:
        return CpuSet.parse(text)
    except ValueError as error:
        raise BadRecording(where, str(error)) from error
