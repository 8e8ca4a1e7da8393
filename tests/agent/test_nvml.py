"""The NVML driver through the real nvidia-ml-py, on the mock library: what it reads, what it leaves unknown, what hangs."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from casemate_agent.drivers.nvml import NvmlFailed, NvmlGpus
from casemate_agent.gpu.readings import GpuFault
from casemate_core.errors import DeadlineExceeded, Unavailable
from support import mock_nvml
from support.mock_nvml import HEALTHY, Boards

UUID = HEALTHY["uuid"]
GPU_IS_LOST, UNKNOWN_ERROR, UNINITIALIZED = 15, 999, 1


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = mock_nvml.build(tmp_path_factory.mktemp("nvml"))
    mock_nvml.load(built)
    return built


@pytest.fixture
def boards(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Boards]:
    boards = Boards(tmp_path / "boards")
    boards.write()
    monkeypatch.setenv("MOCK_NVML", str(boards.path))
    yield boards
    boards.lines.clear()  # whatever hangs may end
    boards.write()


@pytest.fixture
async def gpus(boards: Boards) -> AsyncIterator[NvmlGpus]:
    gpus = NvmlGpus()
    yield gpus
    await gpus.aclose()


async def test_a_whole_board_is_read(gpus: NvmlGpus) -> None:
    (gpu,) = await gpus.read(10)
    assert (gpu.uuid, gpu.address, gpu.model, gpu.module_id) == (UUID, "0000:17:00.0", "NVIDIA H200", 3)
    assert (gpu.memory_mib, gpu.memory_used_mib, gpu.temperature_c, gpu.power_mw) == (143771, 4, 31, 76500)
    assert (gpu.link_width, gpu.link_width_max, gpu.rows_pending, gpu.processes) == (16, 16, False, ())
    assert gpu.untold == ()
    assert await gpus.driver(10) == "570.86.15"


async def test_mig_profiles_carry_their_places(gpus: NvmlGpus) -> None:
    (gpu,) = await gpus.read(10)
    assert gpu.mig is False and gpu.share_slots == 8
    assert [(p.name, p.milli, p.slots, p.starts) for p in gpu.share_profiles] == [
        ("1g.18gb", 125, 1, (0, 1, 2, 3, 4, 5, 6)),
        ("2g.36gb", 250, 2, (0, 2, 4)),
        ("3g.71gb", 500, 4, (0, 4)),
    ]


@pytest.mark.parametrize("key", [k for k in HEALTHY if k not in ("uuid", "name", "bus")])
async def test_what_a_board_does_not_tell_is_unknown_and_nothing_else_is(
    gpus: NvmlGpus, boards: Boards, key: str
) -> None:
    (whole,) = await gpus.read(10)
    del boards.gpus[0][key]
    boards.write()
    (gpu,) = await gpus.read(10)
    told = {"used", "memory"} if key == "used" else {key}
    assert gpu.untold or told == {"used", "memory"}
    changed = {name for name in gpu.__slots__ if getattr(gpu, name) != getattr(whole, name)}
    assert changed >= set(gpu.untold)
    assert len(changed) <= {"rows": 4, "busy": 2, "mig": 3, "memory": 4}.get(key, 1), changed


async def test_the_older_call_for_the_temperature_serves_where_the_newer_is_not_there(
    gpus: NvmlGpus, boards: Boards
) -> None:
    boards.gpus[0]["temperature"] = boards.gpus[0].pop("temperature-v")
    boards.write()
    (gpu,) = await gpus.read(10)
    assert gpu.temperature_c == 31


async def test_a_board_that_fell_off_the_bus_is_lost_and_the_others_are_read(gpus: NvmlGpus, boards: Boards) -> None:
    other = "GPU-00000000-0000-0000-0000-000000000001"
    boards.gpus.append(HEALTHY | {"uuid": other, "bus": "0000:65:00", "lost": "1"})
    boards.write()
    lost, well = await gpus.read(10)
    assert (lost.uuid, lost.lost, well.lost) == (other, True, False)
    assert lost.temperature_c is None


async def test_processes_are_told_by_pid(gpus: NvmlGpus, boards: Boards) -> None:
    boards.gpus[0]["processes"] = "4711 12"
    boards.write()
    (gpu,) = await gpus.read(10)
    assert gpu.processes == (12, 4711)


async def test_no_gpu_is_no_error(gpus: NvmlGpus, boards: Boards) -> None:
    boards.gpus.clear()
    boards.write()
    assert await gpus.read(10) == ()


async def test_a_driver_that_is_not_loaded_is_told_and_found_when_it_comes(gpus: NvmlGpus, boards: Boards) -> None:
    boards.lines = ["not-loaded"]
    boards.write()
    with pytest.raises(Unavailable, match="installed and not loaded"):
        await gpus.read(10)
    boards.lines = []
    boards.write()
    assert len(await gpus.read(10)) == 1


async def test_a_driver_that_was_reloaded_is_asked_anew(gpus: NvmlGpus, boards: Boards) -> None:
    assert len(await gpus.read(10)) == 1
    boards.lines = [f"fail nvmlDeviceGetCount_v2 {UNINITIALIZED}"]
    boards.write()
    with pytest.raises(Unavailable, match="Uninitialized"):
        await gpus.read(10)
    boards.lines = []
    boards.write()
    assert len(await gpus.read(10)) == 1


async def test_an_error_that_is_about_more_than_one_value_is_told(gpus: NvmlGpus, boards: Boards) -> None:
    boards.lines = [f"fail nvmlDeviceGetCount_v2 {UNKNOWN_ERROR}"]
    boards.write()
    with pytest.raises(NvmlFailed, match="read GPUs"):
        await gpus.read(10)


async def test_a_hung_call_costs_its_deadline_and_never_the_loop(gpus: NvmlGpus, boards: Boards) -> None:
    assert len(await gpus.read(10)) == 1
    boards.lines = ["hang nvmlDeviceGetPowerUsage"]
    boards.write()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    try:
        with pytest.raises(DeadlineExceeded):
            await gpus.read(0.3)
        with pytest.raises(Unavailable, match="hang"):
            await gpus.read(10)
        assert ticks >= 5, "the loop went on"
    finally:
        ticking.cancel()
    boards.lines = []
    boards.write()
    for _ in range(200):  # the late call ends, and with it its thread
        try:
            assert len(await gpus.read(10)) == 1
            break
        except Unavailable:
            await asyncio.sleep(0.05)
    else:
        pytest.fail("never read again")


async def test_xids_are_told_as_they_happen(gpus: NvmlGpus, boards: Boards) -> None:
    boards.gpus.append(HEALTHY | {"uuid": "GPU-00000000-0000-0000-0000-000000000002", "no-events": "1"})
    boards.write()
    faults = gpus.faults()
    try:
        first = asyncio.ensure_future(anext(faults))
        await asyncio.sleep(0.05)
        assert not first.done()
        boards.lines = ["xid 0 79", "xid 0 13"]
        boards.write()
        async with asyncio.timeout(60):
            assert await first == GpuFault(UUID, 79)
            assert await anext(faults) == GpuFault(UUID, 13)
    finally:
        await faults.aclose()


async def test_it_lets_go_of_every_device_and_comes_back(gpus: NvmlGpus, boards: Boards) -> None:
    assert await gpus.read(10)
    faults = gpus.faults()
    waiting = asyncio.ensure_future(anext(faults))
    while not gpus._sets:
        await asyncio.sleep(0.01)
    await gpus.let_go(30)
    assert gpus._sets == [] and not gpus._ready, "nothing of this process holds a device"
    with pytest.raises(Unavailable, match="closed; ask again"):
        async with asyncio.timeout(60):
            await waiting
    await gpus.let_go(30)  # again is no error
    assert await gpus.read(10)


ONCE = """
import asyncio
from casemate_agent.drivers.nvml import NvmlGpus
from casemate_core.errors import CasemateError
async def main():
    gpus = NvmlGpus()
    try:
        for gpu in await gpus.read(10):
            print(gpu.model, gpu.untold)
    except CasemateError as error:
        print(error)
    finally:
        await gpus.aclose()
asyncio.run(main())
"""


def in_a_process_of_its_own(**environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ONCE], capture_output=True, text=True, timeout=60, check=True, env=os.environ | environ
    )
    return done.stdout.strip()


def test_a_library_without_a_function_leaves_its_values_unknown(tmp_path: Path) -> None:
    mock_nvml.build(tmp_path, "WITHOUT_ROWS")
    boards = Boards(tmp_path / "boards")
    boards.write()
    said = in_a_process_of_its_own(LD_LIBRARY_PATH=str(tmp_path), MOCK_NVML=str(boards.path))
    rows = "('rows_remapped_corrected', 'rows_remapped_uncorrected', 'rows_pending', 'rows_failed')"
    assert said == f"NVIDIA H200 {rows}"


def test_no_library_at_all_is_told_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")
    said = in_a_process_of_its_own(LD_LIBRARY_PATH=str(tmp_path))
    assert "no libnvidia-ml.so.1" in said


VGPUS = "471 4096 20 -1 GRID A100D-4C,480 81920 1 -1 GRID A100D-80C,700 10240 7 19 NVIDIA A100D-1-10C"


async def test_types_of_vgpu_are_how_a_board_is_cut_for_vms(gpus: NvmlGpus, boards: Boards) -> None:
    boards.gpus[0] |= {"vgpus": VGPUS, "memory": "81920"}
    boards.write()
    (gpu,) = await gpus.read(10)
    assert (gpu.share_alike, gpu.share_slots) == (True, 0)
    assert [(p.name, p.milli, p.memory_mib, p.bare) for p in gpu.share_profiles] == [
        ("A100D-4C", 50, 4096, False),
        ("A100D-80C", 999, 81920, False),
    ]


async def test_with_mig_a_type_is_there_where_an_instance_was_made_for_it(gpus: NvmlGpus, boards: Boards) -> None:
    boards.gpus[0] |= {"vgpus": VGPUS, "memory": "81920", "mig": "1"}
    boards.write()
    (gpu,) = await gpus.read(10)
    assert gpu.share_profiles == (), "MIG is on, and nobody has made an instance"
    boards.gpus[0]["instances"] = "19 6 1,19 4 1,14 0 2"
    boards.write()
    (gpu,) = await gpus.read(10)
    assert (gpu.share_alike, gpu.share_slots) == (False, 7)
    assert [(p.name, p.milli, p.slots, p.starts, p.bare) for p in gpu.share_profiles] == [
        ("A100D-1-10C", 125, 1, (4, 6), False)
    ]


@pytest.mark.parametrize(
    "function",
    [
        "nvmlDeviceGetSupportedVgpus",
        "nvmlVgpuTypeGetName",
        "nvmlVgpuTypeGetFramebufferSize",
        "nvmlVgpuTypeGetMaxInstances",
    ],
)
@pytest.mark.parametrize("code", [UNKNOWN_ERROR, 2])
async def test_a_library_that_fails_about_vgpus_tells_the_rest(
    gpus: NvmlGpus, boards: Boards, function: str, code: int
) -> None:
    boards.gpus[0] |= {"vgpus": VGPUS}
    boards.lines = [f"fail {function} {code}"]
    boards.write()
    (gpu,) = await gpus.read(10)
    assert gpu.temperature_c == 31 and not gpu.share_alike and all(p.bare for p in gpu.share_profiles)
