"""The Fabric Manager's driver through its library's C interface, on a mock that holds every structure against its own."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from casemate_agent.config import BadConfig, load
from casemate_agent.drivers.fabricports import FabricBusy, FabricFailed, FabricVersionMismatch
from casemate_agent.drivers.gpus import HostGpus
from casemate_agent.drivers.nvfm import NvFabric
from casemate_agent.drivers.sysfs import HostMachine
from casemate_agent.execute.fabrickeeper import keep
from casemate_agent.gpu.inventory import GpuSight
from casemate_agent.hardware.fabric import PartitionState
from casemate_core.errors import CasemateError, DeadlineExceeded, NotFound, Unavailable
from casemate_core.topology_loaders import GpuFacts
from support import mock_nvfm
from support.mock_nvfm import Manager, manager_program

VERSION = "570.86.15"
SOCKET = "/run/fm.sock"
BADPARAM, TIMEOUT, IN_USE, NOT_CONFIGURED, NVLINK = -1, -5, -7, -8, -10


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = mock_nvfm.build(tmp_path_factory.mktemp("nvfm"))
    mock_nvfm.load(built)
    return built


def driver_version(root: Path, version: str = VERSION) -> Path:
    file = root / "sys/module/nvidia/version"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{version}\n")
    return root


@pytest.fixture
def manager(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    manager = Manager(tmp_path / "manager")
    manager.write()
    monkeypatch.setenv("MOCK_NVFM", str(manager.path))
    yield manager
    manager.lines.clear()  # whatever hangs may end
    manager.write()


@pytest.fixture
async def fabric(manager: Manager, tmp_path: Path) -> AsyncIterator[NvFabric]:
    fabric = NvFabric(SOCKET, driver_version(tmp_path), str(manager_program(tmp_path, VERSION)))
    yield fabric
    await fabric.aclose()


async def test_partitions_and_versions_are_told(fabric: NvFabric, manager: Manager) -> None:
    facts = await fabric.observe(10)
    assert (facts.version, facts.driver) == (VERSION, VERSION)
    assert facts.partitions[0] == PartitionState(0, (1, 2, 3, 4, 5, 6, 7, 8), active=False)
    assert [p.id for p in facts.partitions] == [0, 1, 2, 3, 7] and facts.partitions[3].modules == (1, 3)
    await fabric.activate(3, 10)
    assert [p.id for p in (await fabric.observe(10)).partitions if p.active] == [3] and manager.active == {3}


async def test_both_acts_have_one_effect_and_refuse_what_cannot_be(fabric: NvFabric, manager: Manager) -> None:
    for _ in range(2):
        await fabric.activate(1, 10)
        assert manager.active == {1}
    with pytest.raises(FabricBusy, match="partition 0: 1 is active and has GPUs of it"):
        await fabric.activate(0, 10)
    for work in (fabric.activate(9, 10), fabric.deactivate(9, 10)):
        with pytest.raises(NotFound):
            await work
    for _ in range(2):
        await fabric.deactivate(1, 10)
        assert manager.active == set()


async def test_exactly_what_is_wanted_is_active(fabric: NvFabric, manager: Manager) -> None:
    await fabric.activate(0, 10)
    kept = await keep(fabric, {1, 7}, (), 10)
    assert kept.active == manager.active == {1, 7} and kept.problems == {}


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (NOT_CONFIGURED, Unavailable, "FABRIC_MODE=1"),
        (TIMEOUT, Unavailable, "did not answer in time"),
        (IN_USE, FabricBusy, "in use"),
        (NVLINK, FabricFailed, "an NVLink failed"),
        (BADPARAM, FabricFailed, "invalid"),
        (-99, FabricFailed, r"not known \(-99\)"),
    ],
)
async def test_what_the_library_answers_is_said(
    fabric: NvFabric, manager: Manager, code: int, error: type[CasemateError], said: str
) -> None:
    await fabric.observe(10)
    manager.lines = [f"fail fmActivateFabricPartition {code}"]
    manager.write()
    with pytest.raises(error, match=said):
        await fabric.activate(1, 10)
    assert manager.active == set()


async def test_what_was_answered_with_success_is_read_back(fabric: NvFabric, manager: Manager) -> None:
    manager.lines = ["deaf"]
    manager.write()
    with pytest.raises(FabricFailed, match="partition 1 is read back as"):
        await fabric.activate(1, 10)


async def test_a_manager_that_was_restarted_is_connected_to_anew(fabric: NvFabric, manager: Manager) -> None:
    await fabric.activate(1, 10)
    manager.lines = ["gone"]
    manager.write()
    with pytest.raises(Unavailable, match="not valid"):
        await fabric.observe(10)
    manager.lines = ["forgets"]
    manager.write()
    assert (await fabric.observe(10)).partitions[1].active


async def test_a_manager_that_lies_about_its_numbers_is_not_followed(fabric: NvFabric, manager: Manager) -> None:
    manager.lines = ["many 4000000"]
    manager.write()
    with pytest.raises(FabricFailed, match="4000000 partitions, at most 64"):
        await fabric.observe(10)


async def test_a_hung_call_costs_its_deadline_and_never_the_loop(fabric: NvFabric, manager: Manager) -> None:
    await fabric.observe(10)
    manager.lines = ["hang fmGetSupportedFabricPartitions"]
    manager.write()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    with pytest.raises(DeadlineExceeded):
        await fabric.observe(0.5)
    with pytest.raises(Unavailable):
        await fabric.observe(0.5)
    ticking.cancel()
    assert ticks > 3, "the loop went on"
    manager.lines = []
    manager.write()
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            await fabric.observe(10)
            return
        except Unavailable:
            await asyncio.sleep(0.05)
    pytest.fail("it does not come back")


async def test_a_manager_of_another_version_switches_nothing(
    fabric: NvFabric, manager: Manager, tmp_path: Path
) -> None:
    driver_version(tmp_path, "580.1.2")
    facts = await fabric.observe(10)
    assert (facts.version, facts.driver) == (VERSION, "580.1.2")
    with pytest.raises(FabricVersionMismatch, match=r"fabric manager 570\.86\.15, driver 580\.1\.2"):
        await fabric.activate(1, 10)


@pytest.mark.parametrize(("output", "said"), [("", "no version"), ("exec sleep 60", "has not ended")])
async def test_a_program_that_tells_no_version(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, said: str
) -> None:
    monkeypatch.setattr("casemate_agent.drivers.nvfm.VERSION_S", 1.0)
    program = manager_program(tmp_path, "")
    program.write_text(f"#!/bin/sh\n{output}\n")
    fabric = NvFabric(SOCKET, driver_version(tmp_path), str(program))
    with pytest.raises(Unavailable, match=said):
        await fabric.observe(10)
    await fabric.aclose()


async def test_a_socket_behind_which_there_is_nobody(manager: Manager, tmp_path: Path) -> None:
    fabric = NvFabric("/run/other.sock", driver_version(tmp_path), str(manager_program(tmp_path, VERSION)))
    with pytest.raises(Unavailable, match=r"fmConnect to /run/other\.sock"):
        await fabric.observe(10)
    await fabric.aclose()


@pytest.mark.parametrize("given", ["127.0.0.1:6666", "run/fm.sock", "unix:/run/fm.sock", "/" + "x" * 200])
def test_an_address_on_the_network_is_none(tmp_path: Path, given: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(f'fabric_manager = "{given}"\n')
    with pytest.raises(
        BadConfig, match=r"fabric_manager: .* is no path of a socket; write that of FM_CMD_UNIX_SOCKET_PATH"
    ):
        load(str(file), {"name": "box"})
    file.write_text(f'fabric_manager = "{SOCKET}"\n')
    assert load(str(file), {"name": "box"}).fabric_manager == SOCKET


CHILD = """
import asyncio, sys
from pathlib import Path
from casemate_agent.drivers.nvfm import NvFabric
from casemate_core.errors import CasemateError

async def main():
    fabric = NvFabric("/run/fm.sock", Path(sys.argv[1]), sys.argv[2])
    try:
        print((await fabric.observe(10)).version)
    except CasemateError as error:
        print(f"{error.reason}: {error}")
    await fabric.aclose()

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("define", "said"),
    [
        ("VERSION=2", "FabricVersionMismatch: fmConnect to /run/fm.sock"),
        ("WITHOUT_LIST", "Unavailable: libnvfm.so.1 has no fmGetSupportedFabricPartitions"),
        ("", "Unavailable: no libnvfm.so.1: install the Fabric Manager's library"),
    ],
)
def test_a_library_of_another_version(tmp_path: Path, define: str, said: str) -> None:
    manager = Manager(tmp_path / "manager")
    manager.write()
    if define:
        mock_nvfm.build(tmp_path, define)
    program = manager_program(tmp_path, VERSION)
    environ = os.environ | {"MOCK_NVFM": str(manager.path), "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(driver_version(tmp_path)), str(program)],
        env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.startswith(said), (done.stdout, done.stderr)


class Told(HostGpus):
    """GPUs whose modules follow no order of their addresses."""

    modules = (3, 1, 4, 2, 8, 6, 7, 5)

    async def look(self, deadline_s: float) -> GpuSight:
        gpus = tuple(GpuFacts(f"0000:0{i}:00.0", f"GPU-{i}", "H200", 143771, m) for i, m in enumerate(self.modules))
        return GpuSight(gpus)


async def test_partitions_of_a_host_are_in_its_inventory_by_uuid(
    fabric: NvFabric, manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Told(tmp_path / "state", tmp_path)
    machine = HostMachine(tmp_path / "state", gpus=gpus, fabric=fabric)
    # the places of the cards are this machine's business, and it has none of them
    monkeypatch.setattr("casemate_agent.drivers.sysfs.from_sysfs", _without_places)
    try:
        facts = await machine.observe(30)
        (pair,) = (p for p in facts.topology.partitions if p.id == 3)
        assert pair.gpus == ("GPU-0", "GPU-1"), "modules 1 and 3"
        assert len(facts.topology.partitions) == 5 and facts.problems == ()
        manager.lines = ["gone"]
        manager.write()
        silent = await machine.observe(30)
        assert silent.topology.partitions == facts.topology.partitions, "what was told holds"
        assert silent.problems[0].startswith("FabricSilent: ")
        manager.lines = []
        manager.partitions[5] = (9,)
        manager.write()
        more = await machine.observe(30)
        assert len(more.topology.partitions) == 5
        assert more.problems == ("FabricModule: partition 5: no GPU is told for modules [9]",)
    finally:
        await machine.aclose()
        await gpus.aclose()


def _without_places(files: object, facts: object) -> object:
    from dataclasses import replace

    from casemate_core.topology import Gpu
    from casemate_core.topology_loaders import from_sysfs

    plain = from_sysfs(files, replace(facts, gpus=()))  # type: ignore[arg-type, type-var]
    gpus = tuple(Gpu(g.uuid, g.model, g.memory_mib, module_id=g.module_id) for g in facts.gpus)  # type: ignore[attr-defined]
    return replace(plain, gpus=gpus)
