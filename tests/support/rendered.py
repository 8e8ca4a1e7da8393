"""The opposite of the loaders: the files of the kernel, and libvirt's capabilities, as a host of that topology has them."""

from dataclasses import replace
from xml.etree import ElementTree

from casemate_core.cpuset import CpuSet
from casemate_core.topology import CoreKind, PciPlace, Topology
from casemate_core.topology_loaders import DeviceFacts, GpuFacts, HostFacts, PortFacts

CPU = "sys/devices/system/cpu"
NODE = "sys/devices/system/node"
PCI = "sys/bus/pci/devices"


def with_real_addresses(topology: Topology) -> Topology:
    """The same host with PCI paths and addresses as Linux writes them; identities and distances stay."""
    roots: dict[str, str] = {}
    switches: dict[tuple[str, ...], str] = {}
    count = 0

    def moved(place: PciPlace) -> PciPlace:
        nonlocal count
        root = roots.setdefault(place.path[0], f"pci0000:{len(roots):02x}")
        ways = [place.path[:depth] for depth in range(2, len(place.path) + 1)]
        below = [switches.setdefault(way, f"{1 + len(switches):04x}:00:00.0") for way in ways]
        count += 1
        return replace(place, path=(root, *below), address=f"{0x1000 + count:04x}:00:00.0")

    gpus = tuple(replace(g, place=moved(g.place)) for g in topology.gpus)
    pfs = []
    for pf in topology.pfs:
        place = moved(pf.place)
        vfs = tuple(replace(v, address=f"{place.address[:4]}:01:{v.index // 8:02x}.{v.index % 8}") for v in pf.vfs)
        pfs.append(replace(pf, place=place, vfs=vfs))
    devices = tuple(replace(d, place=moved(d.place)) for d in topology.devices)
    return replace(topology, gpus=gpus, pfs=tuple(pfs), devices=devices)


def facts_of(topology: Topology) -> HostFacts:
    """What the drivers would add. The host's reserve is left out: it is a number of the whole host."""
    return HostFacts(
        gpus=tuple(
            GpuFacts(
                g.place.address,
                g.uuid,
                g.model,
                g.memory_mib,
                g.module_id,
                g.peers,
                g.share_slots,
                g.share_profiles,
                g.share_step_milli,
            )
            for g in reversed(topology.gpus)
        ),
        partitions=topology.partitions,
        ports=tuple(
            PortFacts(p.place.address, p.mac.upper(), p.networks, p.capabilities, p.link_mbps)
            for p in reversed(topology.pfs)
        ),
        devices=tuple(DeviceFacts(d.place.address, d.id, d.labels) for d in topology.devices),
        reserved=topology.reserved,
        disk_mib=topology.disk_mib,
        name=topology.name,
    )


def files_of(topology: Topology) -> dict[str, str]:
    """Paths and texts under /sys."""
    files = {
        f"{CPU}/online": f"{topology.online}\n",
        f"{CPU}/present": f"{topology.online | topology.offline}\n",
        f"{CPU}/isolated": f"{topology.isolated}\n",
        f"{NODE}/online": ",".join(str(c.id) for c in topology.cells) + "\n",
    }
    for cell in topology.cells:
        node = f"{NODE}/node{cell.id}"
        cpus = CpuSet.from_ids(t for core in topology.cores if core.cell == cell.id for t in core.threads)
        files[f"{node}/cpulist"] = f"{cpus}\n"
        files[f"{node}/meminfo"] = (
            f"Node {cell.id} MemTotal:  {cell.memory_mib * 1024} kB\nNode {cell.id} MemFree: 1 kB\n"
        )
        files[f"{node}/distance"] = " ".join(map(str, cell.distances)) + "\n"
        for size in (2048, 1 << 20):
            pages = next((p.count for p in cell.pools if p.page_kib == size), 0)
            files[f"{node}/hugepages/hugepages-{size}kB/nr_hugepages"] = f"{pages}\n"
    for core in topology.cores:
        cache = CpuSet.from_ids(t for other in topology.cores if other.l3 == core.l3 for t in other.threads)
        for thread in core.threads:
            cpu = f"{CPU}/cpu{thread}"
            files[f"{cpu}/topology/core_cpus_list"] = f"{core.threads}\n"
            files[f"{cpu}/topology/physical_package_id"] = f"{core.socket}\n"
            for index, (level, shared) in enumerate(((1, core.threads), (2, core.threads), (3, cache))):
                files[f"{cpu}/cache/index{index}/level"] = f"{level}\n"
                files[f"{cpu}/cache/index{index}/shared_cpu_list"] = f"{shared}\n"
    for kind, name in ((CoreKind.PERFORMANCE, "cpu_core"), (CoreKind.EFFICIENCY, "cpu_atom")):
        cpus = CpuSet.from_ids(t for core in topology.cores if core.kind is kind for t in core.threads)
        if cpus:
            files[f"sys/devices/{name}/cpus"] = f"{cpus}\n"
    for place in (f.place for some in (topology.gpus, topology.pfs, topology.devices) for f in some):
        files |= _function(place)
    for pf in topology.pfs:
        for vf in pf.vfs:
            files[f"{PCI}/{pf.place.address}/virtfn{vf.index}"] = f"../{vf.address}"
            files |= _function(replace(pf.place, address=vf.address, iommu_group=vf.iommu_group))
    return files


def _function(place: PciPlace) -> dict[str, str]:
    steps = [place.path[0]]
    for i, switch in enumerate(place.path[1:]):
        steps += [f"0000:f{i}:01.0" if i == 0 else f"0000:f{i}:02.0", switch]
    if len(place.path) > 1:
        steps.append("0000:fe:04.0")  # the downstream port
    path = f"{PCI}/{place.address}"
    found = {path: "../../../devices/" + "/".join([*steps, place.address]), f"{path}/numa_node": f"{place.cell}\n"}
    if place.iommu_group >= 0:
        found[f"{path}/iommu_group"] = f"../../../../kernel/iommu_groups/{place.iommu_group}"
    return found


def capabilities_of(topology: Topology) -> str:
    """libvirt's XML, in the form of formatcaps."""
    root = ElementTree.Element("capabilities")
    host = ElementTree.SubElement(root, "host")
    cells = ElementTree.SubElement(ElementTree.SubElement(host, "topology"), "cells", num=str(len(topology.cells)))
    for cell in reversed(topology.cells):
        entry = ElementTree.SubElement(cells, "cell", id=str(cell.id))
        ElementTree.SubElement(entry, "memory", unit="KiB").text = str(cell.memory_mib * 1024)
        plain = cell.memory_mib - sum(p.size_mib for p in cell.pools)
        ElementTree.SubElement(entry, "pages", unit="KiB", size="4").text = str(plain * 256)
        for size in (2048, 1 << 20):
            count = next((p.count for p in cell.pools if p.page_kib == size), 0)
            ElementTree.SubElement(entry, "pages", unit="KiB", size=str(size)).text = str(count)
        distances = ElementTree.SubElement(entry, "distances")
        for other, value in zip(topology.cells, cell.distances, strict=bool(cell.distances)):
            ElementTree.SubElement(distances, "sibling", id=str(other.id), value=str(value))
        cores = [core for core in topology.cores if core.cell == cell.id]
        cpus = ElementTree.SubElement(entry, "cpus", num=str(sum(len(core.threads) for core in cores)))
        for core in cores:
            for thread in core.threads:
                ElementTree.SubElement(
                    cpus,
                    "cpu",
                    id=str(thread),
                    socket_id=str(core.socket),
                    die_id="0",
                    core_id=str(core.id % 7),
                    siblings=str(core.threads),
                )
        for thread in topology.offline if cell is topology.cells[0] else ():
            ElementTree.SubElement(cpus, "cpu", id=str(thread))
    cache = ElementTree.SubElement(host, "cache")
    for group in sorted({core.l3 for core in topology.cores}):
        threads = CpuSet.from_ids(t for core in topology.cores if core.l3 == group for t in core.threads)
        ElementTree.SubElement(cache, "bank", id=str(group), level="3", type="both", cpus=str(threads))
    return ElementTree.tostring(root, encoding="unicode")
