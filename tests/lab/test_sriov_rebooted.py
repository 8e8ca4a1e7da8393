"""The server is switched off and on, with its cards in other slots and one missing. The last of the tests with VFs: it leaves
the cards where they are then."""

import pytest

from support.hostlab.machine import PORTS, Shape
from support.hostlab.server import HOST, Server

pytestmark = [pytest.mark.lab, pytest.mark.lab_faults, pytest.mark.timeout(3600)]
NIC = "  nics: [{network: fronthaul, type: sriov, vlan: 100}]"
#: Root ports of the two NICs, at first and later.
SLOTS = (("rp00", "rp03"), ("rp10", "rp13"))


def switched_on(server: Server, shape: Shape) -> None:
    """Off and on, with the cards plugged in so."""
    boot = server.machine.read("/proc/sys/kernel/random/boot_id")
    server.machine.reboot(shape)
    server.machine.run("systemctl start libvirtd", timeout_s=180)
    server.start_agent()
    server.until("it has joined again", server.joined)
    server.until("as another boot", lambda: server.get("host", HOST)["status"]["bootId"] != boot)


def test_cards_moved_and_one_missing_nothing_is_attached_wrongly(server: Server) -> None:
    server.make_fleet()
    server.apply("du", NIC)
    try:
        uid = server.started("du")["metadata"]["uid"]
        (before,) = [vf for vf in server.functions()["vfs"].values() if vf["stamp"]]
        own = PORTS.index(before["pf"])
        moved = [slots[1] for slots in SLOTS]
        missing = tuple("" if number == own else slot for number, slot in enumerate(moved))
        switched_on(server, Shape(ports=missing))
        server.until(
            "it is held back, with its reason",
            lambda: "FunctionMissing" in str(server.get("instance", "du-0").get("status", {})),
        )
        there = server.functions()
        assert {vf["pf"] for vf in there["vfs"].values()} == {PORTS[1 - own]}
        assert not any(vf["stamp"] or vf["state"]["vlan"] for vf in there["vfs"].values()), "no other took its place"

        switched_on(server, Shape(ports=tuple(moved)))
        server.until("it runs again", lambda: server.get("instance", "du-0")["status"].get("pid"))
        (after,) = [vf for vf in server.functions()["vfs"].values() if vf["stamp"]]
        assert (after["pf"], after["index"], after["stamp"]["owner"]) == (before["pf"], before["index"], uid)
        assert (after["state"], after["driver"]) == (before["state"], "vfio-pci")
        assert after["address"] != before["address"], "its port was plugged in elsewhere"
    finally:
        server.deleted("du")
    vfs = server.functions()["vfs"].values()
    assert len(vfs) == 6 and not any(vf["stamp"] or vf["driver"] or vf["state"]["vlan"] for vf in vfs)
