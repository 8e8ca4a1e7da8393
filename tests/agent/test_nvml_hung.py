"""An agent whose NVML hangs, through the real nvidia-ml-py on the mock library: it goes on, says so, and reads again after."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from casemate_agent.agent import Agent, Pace
from casemate_agent.drivers.gpus import HostGpus
from casemate_agent.drivers.ports import Machine, MachineFacts
from casemate_agent.drivers.simulated import SimulatedHost, SimulatedPace
from casemate_agent.drivers.simulated_disk import SimulatedDisk
from casemate_agent.ledger.store import Ledger, inline
from casemate_core.spec.instance import Phase
from casemate_core.topology_loaders import from_line
from casemate_wire.stream import Desired
from support import mock_nvml
from support.agents import HOST_LINE, NETWORK, SETTINGS, instance, uid
from support.mock_nvml import Boards

CARD = "sys/bus/pci/devices/0000:17:00.0"


class WithGpus:
    """A host's own facts, with the GPUs that its library tells: as HostMachine asks for them."""

    def __init__(self, machine: Machine, gpus: HostGpus) -> None:
        self._machine, self._gpus = machine, gpus

    async def observe(self, deadline_s: float) -> MachineFacts:
        seen = await self._gpus.look(0.5)
        return replace(await self._machine.observe(deadline_s), problems=seen.problems)


async def until(what: str, met: Callable[[], object]) -> None:
    try:
        async with asyncio.timeout(90):
            while not met():
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"in vain: {what}")


@pytest.mark.parametrize(
    "trouble",
    ["hang nvmlInitWithFlags", "hang nvmlDeviceGetCount_v2", "hang nvmlDeviceGetTemperatureV", "not-loaded"],
)
async def test_an_agent_whose_library_hangs_starts_vms_says_so_and_reads_again(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("vendor", "0x10de"), ("class", "0x030200")):
        (tmp_path / CARD).mkdir(parents=True, exist_ok=True)
        (tmp_path / CARD / name).write_text(text)
    boot = tmp_path / "proc/sys/kernel/random/boot_id"
    boot.parent.mkdir(parents=True)
    boot.write_text("one")
    mock_nvml.load(mock_nvml.build(tmp_path))
    boards = Boards(tmp_path / "boards", lines=[trouble])
    boards.write()
    monkeypatch.setenv("MOCK_NVML", str(boards.path))
    host = SimulatedHost("box", from_line(HOST_LINE), time.time, SimulatedPace(0.0, 0.0, 0.02, 0.02, 0.02))
    state = tmp_path / "state"
    state.mkdir()
    gpus = HostGpus(state, tmp_path)
    drivers = host.drivers()
    drivers = replace(drivers, gpus=gpus, machine=WithGpus(drivers.machine, gpus))
    ledger = await Ledger.load(SimulatedDisk(), inline)
    pace = Pace(machine_s=0.2, gpus_s=0.2)
    agent = Agent("box", drivers, ledger, time.time, SETTINGS, pace, lambda step: None)
    running = asyncio.ensure_future(agent.run())
    try:
        await agent.accept(Desired(1, 1, True, (instance(1),), networks=(NETWORK,)))
        await until("its VM runs", lambda: (s := agent.feed.states.get(uid(1))) and s.phase is Phase.READY)
        told = lambda: bool(agent.machine) and any(p.startswith("GpusNotTold") for p in agent.machine.problems)  # noqa: E731
        await until("it says that GPUs are not told", told)
        rounds = agent.rounds
        agent.wake()
        await until("it goes on", lambda: agent.rounds > rounds)
        boards.lines = []
        boards.write()
        await until("its GPUs are told again", lambda: agent.machine is not None and not told() and gpus._sight.gpus)
        assert not running.done()
    finally:
        boards.lines = []
        boards.write()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await gpus.aclose()
