"""Cards between tenants: the story of the port, on a simulated host."""

import time

import pytest

from casemate_agent.drivers.simulated import SimulatedHost, SimulatedPace
from casemate_core.errors import MachineError
from casemate_core.gpu import Rung
from casemate_core.topology_loaders import from_line
from support import gpus_contract

HOST = from_line("1s 8k/c 2t 64G disk=1T gpu=2xH200 name=box")
GPU = HOST.gpus[0].uuid


async def test_a_card_that_nobody_has() -> None:
    host = SimulatedHost("box", HOST, time.time, SimulatedPace(call_s=0.0))
    await gpus_contract.story(host.drivers().cards, GPU)
    assert host.board(GPU).driver == "nvidia"


async def test_a_card_that_somebody_has_open_is_left_alone() -> None:
    host = SimulatedHost("box", HOST, time.time, SimulatedPace(call_s=0.0))
    cards = host.drivers().cards
    host.board(GPU).holders = ("python3 (77)",)
    assert (await cards.card(GPU, 9)).holders == ("python3 (77)",)
    for work in (cards.bind(GPU, 9), cards.unbind(GPU, 9), cards.reset(GPU, Rung.BUS_RESET, 9), cards.scrub(GPU, 9)):
        with pytest.raises(MachineError, match="held open by python3"):
            await work
    assert host.board(GPU).driver == "nvidia"
