"""Which GPUs a host has: what the library tells, what a guest holds, and what a reboot makes uncertain."""

import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from casemate_agent.drivers.gpus import HostGpus
from casemate_agent.drivers.nvml import NvmlGpus
from casemate_agent.drivers.sysfs import HostMachine
from casemate_agent.gpu.inventory import KnownGpu, facts_of, sight
from casemate_agent.gpu.readings import GpuReading
from casemate_core.errors import DeadlineExceeded, Unavailable

HERE, THERE = "0000:17:00.0", "0000:65:00.0"
ONE = GpuReading("GPU-1", HERE, "NVIDIA H200", memory_mib=143771, module_id=3)
TWO = GpuReading("GPU-2", THERE, "NVIDIA H200", memory_mib=143771)
KNOWN = {"GPU-1": KnownGpu(facts_of(ONE), "boot-1")}


def test_what_the_library_tells_is_there_and_remembered() -> None:
    seen = sight([ONE, TWO], {}, "boot-1", {HERE: "nvidia", THERE: "nvidia"})
    assert [gpu.uuid for gpu in seen.gpus] == ["GPU-1", "GPU-2"]
    assert seen.known["GPU-1"] == KNOWN["GPU-1"] and seen.problems == ()


@pytest.mark.parametrize("readings", [None, [], [TWO]])
def test_a_gpu_of_a_guest_is_there_though_nobody_tells_it(readings: list[GpuReading] | None) -> None:
    seen = sight(readings, KNOWN, "boot-1", {HERE: "vfio-pci", THERE: "nvidia"})
    assert "GPU-1" in [gpu.uuid for gpu in seen.gpus] and seen.problems == ()


def test_after_a_reboot_an_address_is_no_identity() -> None:
    seen = sight([], KNOWN, "boot-2", {HERE: "vfio-pci"})
    assert seen.gpus == () and seen.problems[0].startswith("IdentityUncertain: GPU-1 was at 0000:17:00.0")
    assert seen.known == KNOWN, "it is not forgotten"
    back = sight([replace(ONE, address=THERE)], seen.known, "boot-2", {THERE: "nvidia"})
    assert back.gpus[0].address == THERE and back.problems == ()
    assert back.known["GPU-1"].boot_id == "boot-2"


@pytest.mark.parametrize(
    ("readings", "drivers", "reason"),
    [
        ([], {}, "GpuMissing: GPU-1 was at 0000:17:00.0, where nothing is now"),
        ([TWO], {HERE: "nvidia", THERE: "nvidia"}, "GpuMissing: its driver holds 0000:17:00.0"),
        ([replace(ONE, lost=True)], {HERE: "nvidia"}, "GpuLost: GPU-1 at 0000:17:00.0 has fallen off the bus"),
    ],
)
def test_what_is_gone_is_named_and_not_given_away(
    readings: list[GpuReading], drivers: dict[str, str], reason: str
) -> None:
    seen = sight(readings, KNOWN, "boot-1", drivers)
    assert "GPU-1" not in [gpu.uuid for gpu in seen.gpus]
    assert any(problem.startswith(reason) for problem in seen.problems)


class Library(NvmlGpus):
    """Tells what a test says."""

    def __init__(self, *readings: GpuReading) -> None:
        super().__init__()
        self.readings: tuple[GpuReading, ...] | Exception = readings

    async def read(self, deadline_s: float) -> tuple[GpuReading, ...]:
        if isinstance(self.readings, Exception):
            raise self.readings
        return self.readings


def machine(root: Path, driver: str = "nvidia", boot: str = "boot-1") -> None:
    """Files of a small host with one card."""
    files = {
        "proc/meminfo": "MemTotal:       16777216 kB",
        "proc/sys/kernel/random/boot_id": boot,
        "sys/devices/system/cpu/online": "0-1",
        "sys/devices/system/cpu/present": "0-1",
        "sys/devices/system/node/online": "0",
        "sys/devices/system/node/node0/cpulist": "0-1",
        **{f"sys/devices/system/cpu/cpu{n}/topology/core_cpus_list": str(n) for n in (0, 1)},
        **{f"sys/devices/system/cpu/cpu{n}/topology/physical_package_id": "0" for n in (0, 1)},
    }
    card = f"sys/devices/pci0000:16/0000:16:01.0/{HERE}"
    files |= {f"{card}/vendor": "0x10de", f"{card}/class": "0x030200", f"{card}/numa_node": "0"}
    files |= {f"{card}/current_link_width": "16", f"{card}/max_link_width": "16"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    link = root / "sys/bus/pci/devices" / HERE
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(root / card, link.parent))
    bound = root / card / "driver"
    bound.unlink(missing_ok=True)
    bound.symlink_to(f"../../../../bus/pci/drivers/{driver}")


@pytest.fixture
async def library() -> AsyncIterator[Library]:
    yield Library(ONE)


async def test_a_gpu_stays_in_the_topology_from_agent_to_agent_while_a_guest_has_it(
    tmp_path: Path, library: Library
) -> None:
    root, state = tmp_path / "root", tmp_path / "state"
    machine(root)
    for driver, told in (("nvidia", (ONE,)), ("vfio-pci", ())):
        machine(root, driver)
        gpus = HostGpus(state, root, Library(*told))
        host = HostMachine(state, root=root, gpus=gpus)
        facts = await host.observe(10)
        (gpu,) = facts.topology.gpus
        assert (gpu.uuid, gpu.module_id, gpu.place.path, gpu.place.cell) == ("GPU-1", 3, ("pci0000:16",), 0)
        assert facts.problems == ()
        (link,) = await gpus.links((HERE,), 10)
        assert (link.driver, link.width) == (driver, 16)
        await host.aclose()
        await gpus.aclose()


async def test_what_the_library_cannot_say_is_said(tmp_path: Path) -> None:
    root, state = tmp_path / "root", tmp_path / "state"
    machine(root)
    library = Library(ONE)
    gpus = HostGpus(state, root, library)
    assert len((await gpus.look(10)).gpus) == 1
    for error in (Unavailable("NVML: installed and not loaded"), DeadlineExceeded("no answer")):
        library.readings = error
        seen = await gpus.look(10)
        assert len(seen.gpus) == 1, "what was seen in this boot is still there"
        assert seen.problems == (f"GpusNotTold: {error}",)
    await gpus.aclose()


async def test_a_torn_file_is_said_and_begun_anew(tmp_path: Path) -> None:
    root, state = tmp_path / "root", tmp_path / "state"
    machine(root, "vfio-pci")
    state.mkdir()
    for text in ("{", '{"version": 9, "gpus": {}}', '{"version": 1, "gpus": {"GPU-1": {"facts": 7}}}', "[]"):
        (state / "gpus.json").write_text(text)
        gpus = HostGpus(state, root, Library())
        seen = await gpus.look(10)
        assert seen.gpus == () and seen.problems[0].startswith("GpusForgotten")
        await gpus.aclose()
    machine(root)
    gpus = HostGpus(state, root, Library(ONE))
    await gpus.look(10)
    assert (await gpus.look(10)).problems == ()
    assert json.loads((state / "gpus.json").read_text())["gpus"].keys() == {"GPU-1"}
    await gpus.aclose()


async def test_a_host_without_a_card_never_loads_the_library(tmp_path: Path) -> None:
    library = Library()
    library.readings = AssertionError("asked")
    gpus = HostGpus(tmp_path / "state", tmp_path, library)
    seen = await gpus.look(10)
    assert (seen.gpus, seen.problems) == ((), ())
    await gpus.aclose()
