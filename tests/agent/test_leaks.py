"""What is left of somebody on a host: each kind of finding, and what a repair touches."""

import time

from casemate_agent.drivers.simulated import SimulatedHost
from casemate_agent.fsck.leaks import Finding, look
from casemate_agent.hardware.functions import Stamp, VfState
from casemate_core.cpuset import CpuSet
from support.agents import uid
from support.functions import DEVICES, HOST, PORTS

LEFT = VfState("52:54:00:00:00:01", 7)


async def test_a_repair_cleans_what_nobody_has_and_leaves_the_rest() -> None:
    host = SimulatedHost("box", HOST, time.time)
    cards, drivers = host.cards, host.drivers()
    functions, partitions = drivers.functions, drivers.partitions
    free, held, lost = f"{PORTS[0]}/0", f"{PORTS[0]}/1", f"{PORTS[1]}/0"
    cards.states |= {free: LEFT, held: LEFT}
    cards.stamps |= {held: Stamp(uid(1), 2, 3), DEVICES[0]: Stamp(uid(1), 2, 3), "gone/0": Stamp(uid(2), 1, 1)}
    found = await look(functions, partitions, host.partitionable, repair=False)
    leak = "mac is 52:54:00:00:00:01, should be 00:00:00:00:00:00; vlan is 7, should be 0"
    assert found.findings == (
        Finding("held", held, "placement 2.3", uid(1)),
        Finding("held", DEVICES[0], "placement 2.3", uid(1)),
        Finding("lost", "gone/0", "is not on this host any more", uid(2)),
        Finding("leak", free, leak),
    )
    assert not found.clean and found.free == 3 + 1
    repaired = await look(functions, partitions, host.partitionable, repair=True)
    assert repaired.findings[3:] == (Finding("repaired", free, leak),) and not repaired.clean, "the lost one is left"
    assert cards.states == {held: LEFT} and lost not in cards.states
    del cards.stamps["gone/0"]
    assert (await look(functions, partitions, host.partitionable, repair=True)).clean


async def test_what_cannot_be_cleaned_is_named_and_the_others_are_cleaned() -> None:
    host = SimulatedHost("box", HOST, time.time)
    drivers = host.drivers()
    functions, partitions = drivers.functions, drivers.partitions
    first, second = f"{PORTS[0]}/0", f"{PORTS[0]}/1"
    host.cards.states |= {first: LEFT, second: LEFT}
    host.faults.failing["clean_state"] = 1
    found = await look(functions, partitions, host.partitionable, repair=True)
    assert [(f.kind, f.function) for f in found.findings] == [
        ("leak", first),
        ("unrepaired", first),
        ("repaired", second),
    ]
    assert not found.clean


async def test_threads_that_a_slice_may_take_though_no_vm_has_them_are_a_leak_and_taken_back() -> None:
    host = SimulatedHost("box", HOST, time.time)
    drivers = host.drivers()
    host.permitted = host.partitionable = CpuSet.parse("4-7")
    found = await look(drivers.functions, drivers.partitions, host.partitionable, repair=False)
    assert (
        found.findings == (Finding("leak", "threads 4-7", "may be taken by a slice of VMs, of which none has them"),)
        and not found.clean
    )
    assert host.permitted, "looking changes nothing"
    repaired = await look(drivers.functions, drivers.partitions, host.partitionable, repair=True)
    assert [finding.kind for finding in repaired.findings] == ["repaired"] and repaired.clean and not host.permitted
    host.permitted = CpuSet.parse("4-7")
    host.faults.failing["reclaim"] = 1
    (finding,) = (await look(drivers.functions, drivers.partitions, host.partitionable, repair=True)).findings
    assert finding.kind == "unrepaired" and finding.function == "threads 4-7"
