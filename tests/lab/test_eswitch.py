"""Virtual functions of a NIC whose eswitch is in mode switchdev, on netdevsim: modes, representors, what can be given and what not.

netdevsim's functions are no PCI functions, so this is the half of the contract that a port keeps: what is written is read back, and
comes back clean.
"""

import json
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from support.hostlab import netdevsim
from support.hostlab.server import Server

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1200)]

NAME = "netdevsim7"
#: Run in the server: the drivers themselves, on the netdevsim's port and first VF.
STORY = """
import json, sys
from dataclasses import asdict, replace
from pathlib import Path
from casemate_agent.drivers import eswitch, vflink
from casemate_agent.drivers.eswitch import Device
from casemate_agent.drivers.portreader import is_representor
from casemate_agent.hardware.functions import CLEAN, VfState
from casemate_core.errors import CasemateError

device = Device("netdevsim", "netdevsim7")
links = sorted(Path("/sys/bus/netdevsim/devices/netdevsim7/net").iterdir())
uplink = [path.name for path in links if not is_representor(path)][0]
found = {"mode": eswitch.mode(device), "links": [path.name for path in links], "uplink": uplink}
legacy = found["mode"] == "legacy"

def read():
    return (vflink.read_states([uplink])[uplink] if legacy else eswitch.read_states(uplink, device))[0]

def write(wanted):
    if legacy:
        vflink.write_state(uplink, 0, wanted, read())
    else:
        eswitch.write_state(uplink, device, 0, wanted, read())

def given(wanted):
    try:
        write(wanted)
    except CasemateError as error:
        return f"{error.reason}: {error}"
    return list(wanted.differences(read()))

found["can"] = eswitch.switched(device)
found["ports"] = [asdict(port) for port in eswitch.vf_ports(device).values()]
found["first"] = given(CLEAN)
me = VfState("52:54:00:aa:bb:01")
found["mac"] = given(me)
found["down"] = given(replace(me, link="disable"))
found["up"] = given(me)
found["rate"] = given(replace(me, max_rate_mbps=100, min_rate_mbps=10))
found["no rate"] = given(me)
found["vlan"] = given(replace(me, vlan=100))
found["other vlan"] = given(replace(me, vlan=200))
found["trust"] = given(replace(me, trust=True))
found["clean"] = given(CLEAN)
found["others"] = [asdict(state) for state in (vflink.read_states([uplink])[uplink] if legacy else eswitch.read_states(uplink, device)).values()][1:]
print(json.dumps(found))
"""


@pytest.fixture
def simulated(server: Server) -> Iterator[Server]:
    """The server, with a netdevsim of two VFs."""
    netdevsim.load(server.machine, print)
    server.machine.run(f"echo 7 1 > {netdevsim.DEVICES}/new_device && udevadm settle -t 60")
    server.machine.run(f"echo 2 > {netdevsim.DEVICES}/devices/{NAME}/sriov_numvfs")
    try:
        yield server
    finally:
        server.machine.run(f"ip link del swi 2>/dev/null; echo 7 > {netdevsim.DEVICES}/del_device")


def story(server: Server) -> dict[str, Any]:
    told = server.machine.run(f"python3 -c {shlex.quote(STORY)}", timeout_s=180)
    found: dict[str, Any] = json.loads(told)
    return found


def test_legacy_keeps_the_whole_contract_in_the_list_of_the_port(simulated: Server) -> None:
    found = story(simulated)
    assert (found["mode"], found["can"]) == ("legacy", None)
    for step in ("first", "mac", "rate", "no rate", "vlan", "other vlan", "clean"):
        assert found[step] == [], (step, found)


def test_switchdev_gives_what_switch_and_bridge_keep_and_refuses_the_rest(simulated: Server) -> None:
    server = simulated
    server.machine.run(f"devlink dev eswitch set netdevsim/{NAME} mode switchdev && udevadm settle -t 60")
    found = story(server)
    assert found["mode"] == "switchdev" and len(found["links"]) == 3, found
    assert len(found["ports"]) == 2 and all(port["representor"] for port in found["ports"])
    assert found["uplink"] not in {port["representor"] for port in found["ports"]}
    assert found["can"] == ["min-rate", "rate"], "no VLAN without a bridge that filters"
    for step in ("first", "mac", "down", "up", "rate", "no rate", "clean"):
        assert found[step] == [], (step, found)
    assert "is on no bridge that filters VLANs" in found["vlan"]
    assert found["trust"] == ["trust cannot be given by this port's driver"]
    assert found["others"][0]["mac"] == "00:00:00:00:00:00", "another's was not touched"

    representors = [port["representor"] for port in found["ports"]]
    server.machine.run(
        "ip link add swi type bridge vlan_filtering 1 && ip link set swi up; "
        + "; ".join(f"ip link set {name} master swi" for name in representors)
    )
    found = story(server)
    assert found["can"] == ["min-rate", "rate", "vlan"]
    for step in ("vlan", "other vlan", "clean"):
        assert found[step] == [], (step, found)
    shown = server.machine.run(f"bridge vlan show dev {representors[0]}")
    assert "1 PVID" in shown and "200" not in shown, shown
