"""What the agent relies on of functions that are given away. The real driver's half runs in the emulated server (tests/lab)."""

import asyncio

from casemate_agent.drivers.simulated import SimulatedHost, SimulatedPace
from support.functions import HOST
from support.functions_contract import story


async def test_the_simulated_functions_keep_the_contract() -> None:
    now = asyncio.get_running_loop().time
    host = SimulatedHost("box", HOST, now, SimulatedPace(call_s=0.0))
    await story(host.drivers().functions)
    assert not (host.cards.stamps or host.cards.states or host.cards.bound)
