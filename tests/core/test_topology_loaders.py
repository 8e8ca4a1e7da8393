"""Loaders of topologies: what is rendered as Linux and libvirt write it is read back as it was; recordings; bad files."""

import json
from dataclasses import replace

import pytest

from casemate_core.cpuset import CpuSet
from casemate_core.topology import Cell, Core, CoreKind, Topology
from casemate_core.topology_loaders import (
    BadRecording,
    DeviceFacts,
    GpuFacts,
    HostFacts,
    from_capabilities,
    from_line,
    from_sysfs,
)
from casemate_core.topology_loaders.pci import place_of
from support.hosts import FOLDER, host, names
from support.rendered import capabilities_of, facts_of, files_of, with_real_addresses


def as_loaded(topology: Topology) -> Topology:
    """What a loader can know: its own ordinals for cores and caches, and nothing kept of the memory."""
    caches: dict[int, int] = {}
    cores = []
    for number, core in enumerate(sorted(topology.cores, key=lambda c: c.threads.first)):
        cores.append(replace(core, id=number, l3=caches.setdefault(core.l3, len(caches))))
    cells = tuple(replace(cell, reserved_mib=0) for cell in topology.cells)
    return replace(with_real_addresses(topology), cells=cells, cores=tuple(cores))


@pytest.mark.parametrize("name", names())
def test_sysfs_is_read_back(name: str) -> None:
    real = with_real_addresses(host(name))
    assert from_sysfs(files_of(real), facts_of(real)) == as_loaded(host(name))


@pytest.mark.parametrize("name", names())
def test_capabilities_with_sysfs_are_read_back(name: str) -> None:
    real = with_real_addresses(host(name))
    assert from_capabilities(capabilities_of(real), files_of(real), facts_of(real)) == as_loaded(host(name))


@pytest.mark.parametrize("name", names())
def test_capabilities_alone_tell_cpus_memory_and_caches(name: str) -> None:
    expected = as_loaded(host(name))
    cores = tuple(replace(core, kind=CoreKind.UNIFORM) for core in expected.cores)
    found = from_capabilities(capabilities_of(host(name)), facts=HostFacts(name=name))
    assert found == Topology(expected.cells, cores, name=name)


def test_distances_in_the_tree_survive() -> None:
    before = host("hgx-h200")
    real = with_real_addresses(before)
    after = from_sysfs(files_of(real), facts_of(real))
    assert after.functions.shape == before.functions.shape
    assert after.functions.pf_rings == before.functions.pf_rings


def test_recorded_vm() -> None:
    recorded = json.loads((FOLDER / "recorded" / "small-vm.json").read_text())
    found = from_sysfs(recorded["files"], HostFacts(reserved_mib=1000, disk_mib=5, name="small-vm"))
    assert found.cores == tuple(Core(i, 0, 0, 0, CpuSet.of(i)) for i in range(2))
    boot_time_mib = 11866
    assert len(found.cells) == 1
    assert found.cells[0].memory_mib > boot_time_mib
    assert found.cells[0].reserved_mib == 1000
    without = {path: text for path, text in recorded["files"].items() if path != "proc/meminfo"}
    assert from_sysfs(without).cells[0].memory_mib == boot_time_mib
    assert place_of(recorded["files"], "0000:00:03.0").path == ("pci0000:00",)


def test_recorded_capabilities() -> None:
    found = from_capabilities((FOLDER / "recorded" / "libvirt-test.xml").read_text())
    assert found.cells == (Cell(0, 2048), Cell(1, 4096))
    assert [core.socket for core in found.cores] == [0] * 8 + [1] * 8
    assert found.online == CpuSet.parse("0-15")


def test_nested_switches_and_plain_ports() -> None:
    files = {
        "sys/bus/pci/devices/0000:05:00.0": "../../../devices/pci0000:00/0000:00:01.0/0000:05:00.0",
        "sys/bus/pci/devices/0000:09:00.0": "../../../devices/pci0000:00/0000:00:02.0/0000:06:00.0/0000:07:01.0/"
        "0000:08:00.0/0000:08:02.0/0000:09:00.0",
        "sys/bus/pci/devices/0000:09:00.0/numa_node": "1\n",
    }
    assert place_of(files, "0000:05:00.0").path == ("pci0000:00",)
    assert place_of(files, "0000:05:00.0").cell == -1
    nested = place_of(files, "0000:09:00.0")
    assert nested.path == ("pci0000:00", "0000:06:00.0", "0000:08:00.0")
    assert (nested.cell, nested.iommu_group) == (1, -1)


def broken_files() -> list[tuple[str, str | None]]:
    """(path, text; None: missing)."""
    cpu = "sys/devices/system/cpu"
    return [
        (f"{cpu}/online", None),
        (f"{cpu}/online", "many\n"),
        (f"{cpu}/cpu0/topology/core_cpus_list", None),
        (f"{cpu}/cpu0/topology/physical_package_id", "one\n"),
        ("sys/devices/system/node/node0/meminfo", "nothing\n"),
        ("sys/devices/system/node/node1/meminfo", None),
        ("sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages", "x\n"),
        ("sys/devices/cpu_atom/cpus", "0\n"),
    ]


@pytest.mark.parametrize(("path", "text"), broken_files())
def test_broken_files_are_named(path: str, text: str | None) -> None:
    files = files_of(from_line("2s 2k/c 2t 8G name=b"))
    if text is None:
        del files[path]
    else:
        files[path] = text
    with pytest.raises(BadRecording) as caught:
        from_sysfs(files)
    assert caught.value.path in (path, "sys/devices/cpu_core/cpus")


def test_facts_without_a_function() -> None:
    files = files_of(from_line("1s 2k/c 8G name=b"))
    with pytest.raises(BadRecording, match="no such PCI function"):
        from_sysfs(files, HostFacts(gpus=(GpuFacts("0000:01:00.0", "GPU-1", "L4", 1),)))
    files["sys/bus/pci/devices/0000:01:00.0"] = "../nowhere"
    with pytest.raises(BadRecording, match="no link"):
        from_sysfs(files, HostFacts(devices=(DeviceFacts("0000:01:00.0", "x", ()),)))
    files["sys/bus/pci/devices/0000:01:00.0"] = "../../../devices/pci0000:00/0000:01:00.0"
    files["sys/bus/pci/devices/0000:01:00.0/numa_node"] = "7"
    with pytest.raises(BadRecording, match="cell that exists"):
        from_sysfs(files, HostFacts(devices=(DeviceFacts("0000:01:00.0", "x", ()),)))


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "<capabilities/>",
        "<domain/>",
        "<!DOCTYPE a [<!ENTITY b 'c'>]><capabilities>&b;</capabilities>",
        "<capabilities><host><topology><cells><cell id='x'/></cells></topology></host></capabilities>",
        "<capabilities><host><topology><cells><cell id='0'><memory unit='KiB'>lots</memory></cell></cells></topology></host>"
        "</capabilities>",
        "<capabilities><host><topology><cells><cell id='0'><cpus><cpu id='0' socket_id='0' siblings='a'/></cpus></cell>"
        "</cells></topology></host></capabilities>",
    ],
)
def test_broken_capabilities(xml: str) -> None:
    with pytest.raises(BadRecording):
        from_capabilities(xml)
