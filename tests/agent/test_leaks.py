"""What is left of somebody on a host: each kind of finding, and what a repair touches."""

import time

from casemate_agent.drivers.simulated import SimulatedHost
from casemate_agent.fsck.leaks import Finding, look
from casemate_agent.hardware.functions import Stamp, VfState
from support.agents import uid
from support.functions import DEVICES, HOST, PORTS

LEFT = VfState("52:54:00:00:00:01", 7)


async def test_a_repair_cleans_what_nobody_has_and_leaves_the_rest() -> None:
    host = SimulatedHost("box", HOST, time.time)
    cards, functions = host.cards, host.drivers().functions
    free, held, lost = f"{PORTS[0]}/0", f"{PORTS[0]}/1", f"{PORTS[1]}/0"
    cards.states |= {free: LEFT, held: LEFT}
    cards.stamps |= {held: Stamp(uid(1), 2, 3), DEVICES[0]: Stamp(uid(1), 2, 3), "gone/0": Stamp(uid(2), 1, 1)}
    found = await look(functions, repair=False)
    leak = "mac is 52:54:00:00:00:01, should be 00:00:00:00:00:00; vlan is 7, should be 0"
    assert found.findings == (
        Finding("held", held, "placement 2.3", uid(1)),
        Finding("held", DEVICES[0], "placement 2.3", uid(1)),
        Finding("lost", "gone/0", "is not on this host any more", uid(2)),
        Finding("leak", free, leak),
    )
    assert not found.clean and found.free == 3 + 1
    repaired = await look(functions, repair=True)
    assert repaired.findings[3:] == (Finding("repaired", free, leak),) and not repaired.clean, "the lost one is left"
    assert cards.states == {held: LEFT} and lost not in cards.states
    del cards.stamps["gone/0"]
    assert (await look(functions, repair=True)).clean


async def test_what_cannot_be_cleaned_is_named_and_the_others_are_cleaned() -> None:
    host = SimulatedHost("box", HOST, time.time)
    functions = host.drivers().functions
    first, second = f"{PORTS[0]}/0", f"{PORTS[0]}/1"
    host.cards.states |= {first: LEFT, second: LEFT}
    host.faults.failing["clean_state"] = 1
    found = await look(functions, repair=True)
    assert [(f.kind, f.function) for f in found.findings] == [
        ("leak", first),
        ("unrepaired", first),
        ("repaired", second),
    ]
    assert not found.clean
