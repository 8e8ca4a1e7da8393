"""The emulated server as it was recorded: the kernel's files and libvirt's capabilities tell the same host, exactly."""

import json
from itertools import pairwise

from casemate_core.cpuset import CpuSet
from casemate_core.topology import Cell, PagePool, check
from casemate_core.topology_loaders import DeviceFacts, HostFacts, PortFacts, from_capabilities, from_sysfs
from support.hosts import FOLDER

RECORDED = json.loads((FOLDER / "recorded" / "lab.json").read_text())
CAPABILITIES = (FOLDER / "recorded" / "lab.xml").read_text()
FACTS = HostFacts(
    ports=tuple(PortFacts(**{**port, "networks": tuple(port["networks"])}) for port in RECORDED["ports"]),
    devices=(
        DeviceFacts("0000:22:00.0", "card-0", (("type", "card"),)),
        DeviceFacts("0000:62:00.0", "card-1", (("type", "card"),)),
    ),
    name="lab",
)


def test_cells_cores_and_pools_are_exact() -> None:
    found = from_sysfs(RECORDED["files"], FACTS)
    assert check(found) == []
    assert [cell.distances for cell in found.cells] == [(10, 21), (21, 10)]
    assert [cell.pools for cell in found.cells] == [(PagePool(2048, 64),), (PagePool(2048, 128),)]
    assert [(str(core.threads), core.cell, core.socket) for core in found.cores] == [
        ("0-1", 0, 0),
        ("2-3", 0, 0),
        ("4-5", 1, 1),
        ("6-7", 1, 1),
    ]
    assert not found.offline and not found.isolated and found.online == CpuSet.parse("0-7")


def test_functions_hang_where_they_are_plugged_in() -> None:
    found = from_sysfs(RECORDED["files"], FACTS)
    assert [(pf.place.cell, pf.place.path) for pf in found.pfs] == [(0, ("pci0000:20",)), (1, ("pci0000:60",))]
    assert [[vf.index for vf in pf.vfs] for pf in found.pfs] == [[0, 1, 2, 3], [0, 1]]
    groups = sorted(vf.iommu_group for pf in found.pfs for vf in pf.vfs)
    assert groups[0] >= 0 and all(a < b for a, b in pairwise(groups)), "each VF has a group of its own"
    assert [device.place.cell for device in found.devices] == [0, 1]


def test_libvirt_tells_the_same_host() -> None:
    by_kernel, by_libvirt = (
        from_sysfs(RECORDED["files"], FACTS),
        from_capabilities(CAPABILITIES, RECORDED["files"], FACTS),
    )
    assert by_libvirt.cores == by_kernel.cores
    assert by_libvirt.pfs == by_kernel.pfs and by_libvirt.devices == by_kernel.devices

    def shape(cell: Cell) -> tuple[object, ...]:
        return cell.id, cell.memory_mib, cell.pools, cell.distances

    assert list(map(shape, by_libvirt.cells)) == list(map(shape, by_kernel.cells))
    alone = from_capabilities(CAPABILITIES)
    assert [(core.threads, core.cell, core.socket) for core in alone.cores] == [
        (core.threads, core.cell, core.socket) for core in by_kernel.cores
    ]
