"""What the driver of NVML means, on any board: the suite runs on the mock library, and with --real-gpu on the one of this machine.

``make test-gpu`` is the latter. What is said here holds of every GPU that the library tells; what one board tells exactly is in
``tests/agent/test_nvml.py``.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from casemate_agent.drivers.nvml import NvmlGpus
from casemate_core.errors import MachineError
from support import mock_nvml
from support.mock_nvml import HEALTHY, Boards

MISSING = "run this where nvidia-smi answers: it needs a GPU, its driver loaded, and libnvidia-ml.so.1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One of the two: a process has room for one library of that name."""
    if "gpus" in metafunc.fixturenames:
        metafunc.parametrize("gpus", ["real" if metafunc.config.getoption("--real-gpu") else "mock"], indirect=True)


@pytest.fixture
async def gpus(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[NvmlGpus]:
    if request.param == "mock":
        mock_nvml.load(mock_nvml.build(tmp_path_factory.mktemp("nvml")))
        boards = Boards(tmp_path / "boards")
        boards.gpus = [
            dict(HEALTHY),
            HEALTHY | {"uuid": HEALTHY["uuid"].replace("1111", "2222"), "bus": "0000:65:00", "mig": "1"},
        ]
        boards.write()
        monkeypatch.setenv("MOCK_NVML", str(boards.path))
    made = NvmlGpus()
    try:
        if request.param == "real":
            try:
                assert await made.read(60), f"the library tells no GPU; {MISSING}"
            except MachineError as error:
                pytest.fail(f"{error}; {MISSING}", pytrace=False)
        yield made
    finally:
        await made.aclose()


async def test_each_gpu_is_told_by_an_identity_of_its_own_and_where_it_is(gpus: NvmlGpus) -> None:
    readings = await gpus.read(60)
    assert readings and [r.uuid for r in readings] == sorted({r.uuid for r in readings})
    for gpu in readings:
        assert re.match(r"GPU-[0-9a-f-]{36}\Z", gpu.uuid)
        assert re.match(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.0\Z", gpu.address)
        assert gpu.model and gpu.memory_mib and gpu.memory_mib > 0
    assert re.match(r"[0-9]+\.[0-9.]+\Z", await gpus.driver(60))


async def test_what_is_told_is_of_this_world_and_what_is_not_is_none(gpus: NvmlGpus) -> None:
    for gpu in await gpus.read(60):
        for name, low, high in (
            ("temperature_c", -20, 130),
            ("power_mw", 0, 3_000_000),
            ("memory_used_mib", 0, gpu.memory_mib),
            ("link_width", 0, 32),
            ("link_width_max", 1, 32),
            ("ecc_uncorrected", 0, 2**63),
        ):
            value = getattr(gpu, name)
            assert value is None or low <= value <= high, (name, value)
        assert {name for name in gpu.untold if getattr(gpu, name, None) not in (None, ())} == set()


async def test_who_a_gpu_is_does_not_change_from_look_to_look_nor_from_agent_to_agent(gpus: NvmlGpus) -> None:
    first = [(r.uuid, r.address, r.model, r.memory_mib) for r in await gpus.read(60)]
    assert [(r.uuid, r.address, r.model, r.memory_mib) for r in await gpus.read(60)] == first
    other = NvmlGpus()
    try:
        assert [(r.uuid, r.address, r.model, r.memory_mib) for r in await other.read(60)] == first
    finally:
        await other.aclose()


async def test_profiles_of_mig_are_parts_that_lie_within_the_board(gpus: NvmlGpus) -> None:
    for gpu in await gpus.read(60):
        for profile in gpu.share_profiles:
            assert 0 < profile.milli < 1000 and profile.memory_mib <= (gpu.memory_mib or 0)
            assert profile.starts and all(0 <= s <= gpu.share_slots - profile.slots for s in profile.starts)
        names = [p.name for p in gpu.share_profiles]
        assert len(set(names)) == len(names)


async def test_gpus_are_read_while_their_faults_are_waited_for_and_the_wait_can_be_ended(gpus: NvmlGpus) -> None:
    faults = gpus.faults()
    waiting = asyncio.ensure_future(anext(faults))
    for _ in range(3):
        assert await gpus.read(60)
    assert not waiting.done() or waiting.exception() is None
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
        await waiting
    await faults.aclose()  # type: ignore[attr-defined]
    assert await gpus.read(60)
