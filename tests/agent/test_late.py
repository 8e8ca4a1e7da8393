"""Ports, their functions and their drivers that come late, or go and come back: through the agent on the simulated host, and by the
real driver on files that stand for sysfs."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from casemate_agent.drivers.portreader import is_representor, read_ports
from casemate_agent.drivers.sriov import HostFunctions, PoolFailed
from casemate_agent.hardware.rules import PortRule
from casemate_core.errors import MachineError
from casemate_core.spec.instance import Phase
from casemate_wire.stream import HostEvent
from support.agents import Rig, uid
from support.functions import HOST, PORTS, with_functions
from support.virtual import VirtualLoop, run_virtual

from .test_inventory import MAC, function


def told(rig: Rig, reason: str) -> list[str]:
    assert rig.agent is not None
    return [n.message for _, n in rig.agent.feed.outbox.after(-1) if isinstance(n, HostEvent) and n.reason == reason]


def test_an_instance_whose_port_comes_late_waits_for_it_and_then_runs() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop, HOST)
        await rig.start()
        await rig.want(with_functions(1, (0, 0)), with_functions(2, (1, 0)))
        await rig.settle()
        await rig.kill()
        rig.host.reboot()
        rig.host.topology = replace(HOST, pfs=HOST.pfs[1:])  # its driver is not loaded yet
        await rig.start()
        await asyncio.sleep(30)
        assert rig.states()[uid(1)].reason == "FunctionMissing" and set(rig.active()) == {uid(2)}
        others = rig.active()[uid(2)]
        rig.host.topology = HOST
        await asyncio.sleep(5)
        address = HOST.pfs[0].place.address
        assert told(rig, "PortFound") == [f"{PORTS[0]} is at {address}"], "named within five seconds"
        assert [line for line in told(rig, "VfFound") if line.startswith(f"{PORTS[0]}/0 ")]
        await rig.settle()
        assert rig.active()[uid(2)] == others and rig.broken == []
        await rig.kill()

    run_virtual(story)


def test_a_placement_that_names_a_port_which_is_not_there_yet_is_taken_up_when_it_comes() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop, replace(HOST, pfs=HOST.pfs[1:]))
        await rig.start()
        await rig.want(with_functions(1, (0, 0)))
        await asyncio.sleep(10)
        state = rig.states()[uid(1)]
        assert (state.phase, state.reason) == (Phase.FAILED, "PlacementRefused") and not rig.active()
        rig.host.topology = HOST
        await rig.settle()
        assert rig.broken == []
        await rig.kill()

    run_virtual(story)


def test_a_port_that_goes_and_comes_back_is_two_events_and_its_vm_runs_on() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop, HOST)
        await rig.start()
        await rig.want(with_functions(2, (1, 0)))
        await rig.settle()
        before = rig.active()
        rig.host.topology = replace(HOST, pfs=HOST.pfs[1:])
        await asyncio.sleep(5)
        rig.host.topology = HOST
        await asyncio.sleep(5)
        assert [len(told(rig, reason)) for reason in ("PortGone", "PortFound")] == [1, 1]
        assert rig.active() == before
        await rig.kill()

    run_virtual(story)


# --- the real driver, on files ----------------------------------------------------------------------------------------

WAY = "pci0000:20/0000:20:00.0/0000:21:00.0"


@pytest.fixture
async def functions(tmp_path: Path) -> AsyncIterator[HostFunctions]:
    """The driver on a machine whose port has no driver yet: a PCI function that can have VFs, and no interface."""
    function(tmp_path, WAY, sriov_totalvfs="7", sriov_numvfs="0", sriov_drivers_autoprobe="1")
    made = HostFunctions(
        tmp_path / "run",
        (PortRule(MAC, ("fronthaul",), 2),),
        root=tmp_path,
        port_reader=lambda: read_ports(tmp_path, lambda names: dict.fromkeys(names, MAC)),
    )
    yield made
    await made.aclose()


def folder(root: Path) -> Path:
    return root / "sys/bus/pci/devices/0000:21:00.0"


async def kernel(root: Path) -> None:
    """What the kernel does where the number of VFs is written."""
    here = folder(root)
    while (count := int((here / "sriov_numvfs").read_text() or 0)) == 0:
        await asyncio.sleep(0.01)
    for index in range(count):
        function(root, f"pci0000:20/0000:20:00.0/0000:21:10.{index}")
        (here / f"virtfn{index}").symlink_to(f"../0000:21:10.{index}")


async def test_a_port_is_cut_once_its_driver_has_come(functions: HostFunctions, tmp_path: Path) -> None:
    await functions.make_pools(10)
    facts = await functions.observe(10)
    assert facts.uncut == () and not facts.vfs, "without an interface it is no port yet"
    (folder(tmp_path) / "net/cmlate0").mkdir(parents=True)
    assert (await functions.observe(10)).uncut == (MAC,), "so the agent asks again, every few seconds"
    with pytest.raises(PoolFailed, match="has no driver yet"):
        await functions.make_pools(10)
    assert (folder(tmp_path) / "sriov_numvfs").read_text() == "0\n", "nothing was written before"
    (tmp_path / "sys/bus/pci/drivers/igb").mkdir(parents=True)
    (folder(tmp_path).resolve() / "driver").symlink_to(tmp_path / "sys/bus/pci/drivers/igb")
    async with asyncio.TaskGroup() as group:
        group.create_task(kernel(tmp_path))
        await functions.make_pools(20)
    facts = await functions.observe(10)
    assert sorted(facts.vfs) == [f"{MAC}/0", f"{MAC}/1"] and facts.uncut == ()
    assert (folder(tmp_path) / "sriov_drivers_autoprobe").read_text() == "0"


def test_ports_of_functions_are_not_taken_for_the_port_itself(tmp_path: Path) -> None:
    here = function(tmp_path, WAY, sriov_totalvfs="7", sriov_numvfs="2")
    for name, port in (("eth0", "pf0vf0"), ("eth1", "pf0vf1"), ("eth2", "p0"), ("eth3", "c1pf0sf88")):
        (here / "net" / name).mkdir(parents=True)
        (here / "net" / name / "phys_port_name").write_text(port + "\n")
    (found,) = read_ports(tmp_path, lambda names: dict.fromkeys(names, MAC))
    assert found.interface == "eth2" and is_representor(here / "net/eth0")
    assert not is_representor(here / "net/nothing")


async def test_a_port_that_loses_its_driver_is_no_port_and_no_defect(functions: HostFunctions, tmp_path: Path) -> None:
    (folder(tmp_path) / "net/cmlate0").mkdir(parents=True)
    assert (await functions.observe(10)).uncut == (MAC,)
    os.rmdir(folder(tmp_path) / "net/cmlate0")
    assert (await functions.observe(10)).uncut == ()
    try:
        await functions.make_pools(10)
    except MachineError as error:
        raise AssertionError("a port that is gone is not cut") from error
