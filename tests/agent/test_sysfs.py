"""The host's facts, from files of made-up machines and from this one."""

from pathlib import Path

import pytest

from casemate_agent.drivers.hostfiles import WHOLE_S, HostFiles
from casemate_agent.drivers.sysfs import BadSysfs, HostMachine, Housekeeping, read_topology
from casemate_core.cpuset import CpuSet
from casemate_core.errors import MachineError
from casemate_core.topology import check


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def two_socket_machine(root: Path) -> None:
    """2 sockets of 2 cores of 2 threads; thread 7 offline, core 3's rest isolated; pages of 1 GiB on cell 1."""
    put(root, "sys/devices/system/cpu/online", "0-6")
    put(root, "sys/devices/system/cpu/present", "0-7")
    put(root, "sys/devices/system/cpu/isolated", "3")
    put(root, "sys/devices/system/node/online", "0-1")
    put(root, "proc/meminfo", "MemTotal:       16777216 kB")
    put(root, "proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555555")
    for node, cpus, memory_kib, pages in ((0, "0-1,4-5", 8388608, 0), (1, "2-3,6", 8388608, 2)):
        here = f"sys/devices/system/node/node{node}"
        put(root, f"{here}/cpulist", cpus)
        put(root, f"{here}/meminfo", f"Node {node} MemTotal:  {memory_kib} kB\nNode {node} MemFree: 1 kB")
        put(root, f"{here}/distance", "10 21" if node == 0 else "21 10")
        put(root, f"{here}/hugepages/hugepages-1048576kB/nr_hugepages", str(pages))
        put(root, f"{here}/hugepages/hugepages-2048kB/nr_hugepages", "0")
    for thread in range(7):
        core, socket = thread % 4, thread % 4 // 2
        here = f"sys/devices/system/cpu/cpu{thread}"
        siblings = "3" if core == 3 else f"{core},{core + 4}"
        put(root, f"{here}/topology/core_cpus_list", siblings)
        put(root, f"{here}/topology/physical_package_id", str(socket))
        put(root, f"{here}/cache/index0/level", "1")
        put(root, f"{here}/cache/index0/shared_cpu_list", siblings)
        put(root, f"{here}/cache/index3/level", "3")
        put(root, f"{here}/cache/index3/shared_cpu_list", "0-1,4-5" if socket == 0 else "2-3,6")


def test_a_machine_of_two_sockets(tmp_path: Path) -> None:
    two_socket_machine(tmp_path)
    topology = read_topology(tmp_path, 16384, 1000, Housekeeping(memory_mib=1000))
    assert check(topology) == []
    assert [str(core.threads) for core in topology.cores] == ["0,4", "1,5", "2,6", "3"]
    assert [(core.socket, core.cell, core.l3) for core in topology.cores] == [
        (0, 0, 0),
        (0, 0, 0),
        (1, 1, 1),
        (1, 1, 1),
    ]
    assert (str(topology.offline), str(topology.isolated), str(topology.reserved)) == ("7", "3", "")
    assert [(cell.memory_mib, cell.reserved_mib) for cell in topology.cells] == [(8192, 500), (8192, 500)]
    assert [(pool.page_kib, pool.count) for pool in topology.cells[1].pools] == [(1048576, 2)]
    assert topology.cells[0].distances == (10, 21)


def test_housekeeping_is_as_configured(tmp_path: Path) -> None:
    two_socket_machine(tmp_path)
    kept = Housekeeping(threads=CpuSet.parse("0,4"), memory_mib=0)
    topology = read_topology(tmp_path, 16384, 1000, kept)
    assert str(topology.reserved) == "0,4" and topology.cells[0].reserved_mib == 0
    by_rule = read_topology(tmp_path, 16384, 1000, Housekeeping())
    assert sum(cell.reserved_mib for cell in by_rule.cells) == 1024 + 16384 // 32


def test_a_kernel_without_numa_is_one_cell(tmp_path: Path) -> None:
    two_socket_machine(tmp_path)
    (tmp_path / "sys/devices/system/node/online").unlink()
    topology = read_topology(tmp_path, 16384, 1000, Housekeeping())
    assert [(cell.id, cell.memory_mib) for cell in topology.cells] == [(0, 16384)]
    assert {core.cell for core in topology.cores} == {0}


async def test_files_that_are_missing_are_an_error_of_the_machine(tmp_path: Path) -> None:
    machine = HostMachine(tmp_path / "state", root=tmp_path)
    with pytest.raises(BadSysfs, match="No such file"):
        await machine.observe(5)
    await machine.aclose()


async def test_this_machine(tmp_path: Path) -> None:
    machine = HostMachine(tmp_path)
    facts = await machine.observe(5)
    again = await machine.observe(5)
    await machine.aclose()
    assert check(facts.topology) == []
    assert facts == again, "a host does not change under the claims on it"
    assert facts.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert facts.topology.online == CpuSet.parse(Path("/sys/devices/system/cpu/online").read_text())
    assert facts.topology.disk_mib > 0 and facts.topology.memory_mib > 0


@pytest.mark.parametrize(
    "text", ["", "MemTotal:", "MemTotal: kB", "MemTotal: x kB", "MemTotal: 5 MB", "XMemTotal: 5 kB"]
)
async def test_memory_that_reads_otherwise_is_told_and_no_defect(tmp_path: Path, text: str) -> None:
    two_socket_machine(tmp_path)
    put(tmp_path, "proc/meminfo", text)
    machine = HostMachine(tmp_path / "state", root=tmp_path)
    with pytest.raises(MachineError, match="MemTotal"):
        await machine.observe(20)
    await machine.aclose()


def test_files_are_read_again_when_one_of_their_signs_has_changed(tmp_path: Path) -> None:
    two_socket_machine(tmp_path)
    clock = [0.0]
    files = HostFiles(tmp_path, lambda: clock[0])
    first = files.read()
    assert files.read() is first
    pool = "sys/devices/system/node/node1/hugepages/hugepages-1048576kB/nr_hugepages"
    put(tmp_path, pool, "1")
    assert files.read()[pool] == "1"
    function = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    put(function, "numa_node", "1")
    put(function, "sriov_numvfs", "0")
    found = files.read()
    assert found["sys/bus/pci/devices/0000:01:00.0/numa_node"] == "1"
    put(function, "sriov_numvfs", "2")
    (function / "virtfn0").symlink_to("../0000:01:10.0")
    assert "sys/bus/pci/devices/0000:01:00.0/virtfn0" in files.read()
    put(tmp_path, "sys/devices/system/cpu/online", "0-5")
    assert files.read()["sys/devices/system/cpu/online"] == "0-5"


def test_what_has_no_sign_is_found_within_a_minute(tmp_path: Path) -> None:
    two_socket_machine(tmp_path)
    clock = [0.0]
    files = HostFiles(tmp_path, lambda: clock[0])
    first = files.read()
    put(tmp_path, "sys/devices/system/node/node0/meminfo", "Node 0 MemTotal: 9437184 kB")
    assert files.read() is first
    clock[0] = WHOLE_S
    changed = files.read()
    assert changed["sys/devices/system/node/node0/meminfo"] == "Node 0 MemTotal: 9437184 kB"
    clock[0] = 2 * WHOLE_S
    assert files.read() is changed, "the same again is the same object: nothing is made anew from it"
