"""What the agent relies on of ``ports.Functions``: one story, told to the simulated driver and, in the emulated server, to the
real one. It imports nothing of the tests, because it runs there too.
"""

from casemate_agent.drivers.ports import Functions
from casemate_agent.hardware.functions import CLEAN, Grant, GrantedVf, Stamp, VfState
from casemate_core.errors import CasemateError

ME, YOU = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"


async def refused(work: "object", reason: str) -> None:
    """The call is refused with this word."""
    try:
        await work  # type: ignore[misc]
    except CasemateError as error:
        assert error.reason == reason, f"{error.reason}: {error}"
    else:
        raise AssertionError(f"not refused as {reason}")


async def story(functions: Functions, deadline_s: float = 60) -> None:
    """On functions that nobody has; they are left so."""
    await functions.make_pools(deadline_s)
    before = await functions.observe(deadline_s)
    assert len(before.vfs) >= 2 and before.devices
    assert not before.leaks() and not before.stamped() and not before.uncut
    first, second = sorted(before.vfs)[:2]
    pf, index = before.vfs[first].pf, before.vfs[first].index
    device = sorted(before.devices)[0]
    wanted = VfState("52:54:00:aa:bb:01", 100, False, True, 0, 0)
    grant = Grant(Stamp(ME, 3, 7), (GrantedVf(pf, index, wanted),), (device,))

    for _ in range(2):  # giving what is given is no error, and changes nothing
        addresses = await functions.give(grant, deadline_s)
        assert addresses == (before.vfs[first].address, before.devices[device].address)
        held = await functions.observe(deadline_s)
        assert held.vfs[first].state == wanted and held.vfs[first].stamp == grant.stamp
        assert held.vfs[first].driver == held.devices[device].driver == "vfio-pci"
        assert held.vfs[second] == before.vfs[second], "another's function was touched"

    other = Grant(Stamp(YOU, 9, 9), (GrantedVf(pf, index, VfState("52:54:00:aa:bb:02")),))
    await refused(functions.give(other, deadline_s), "HeldByOther")
    await refused(functions.clean(first, deadline_s), "HeldByOther")
    await functions.take_back(Stamp(YOU, 9, 9), (first,), deadline_s)
    await functions.take_back(Stamp(ME, 3, 6), (first,), deadline_s)  # an older generation's release comes late
    assert await functions.observe(deadline_s) == held

    moved = Grant(Stamp(ME, 3, 8), (GrantedVf(pf, index, VfState("52:54:00:aa:bb:03", 5)),), (device,))
    await functions.give(moved, deadline_s)
    assert (await functions.observe(deadline_s)).vfs[first].state == moved.vfs[0].state

    missing = Grant(Stamp(YOU, 9, 9), (GrantedVf(pf, 60000, wanted),))
    await refused(functions.give(missing, deadline_s), "NotFound")

    for _ in range(2):
        await functions.take_back(moved.stamp, moved.keys, deadline_s)
        after = await functions.observe(deadline_s)
        assert after.vfs == before.vfs and not after.stamped()
        assert after.vfs[first].state == CLEAN and after.devices[device].driver != "vfio-pci"
    await functions.clean(first, deadline_s)
    assert (await functions.observe(deadline_s)).vfs == before.vfs
