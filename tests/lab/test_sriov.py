"""Virtual functions under contract, on a real driver's port, with real traffic."""

import json
from pathlib import Path

import pytest

from support import functions_contract
from support.hostlab.machine import PORTS
from support.hostlab.server import HOST, Server

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600)]
CLEAN = {
    "mac": "00:00:00:00:00:00",
    "vlan": 0,
    "spoofchk": True,
    "trust": False,
    "min_rate_mbps": 0,
    "max_rate_mbps": 0,
    "link": "auto",
}
NIC = "  nics: [{network: fronthaul, type: sriov, vlan: 100}]"


@pytest.fixture(autouse=True)
def fleet(server: Server) -> None:
    server.make_fleet()


def vf_of(server: Server, uid: str) -> dict[str, object]:
    """The one VF that an instance holds."""
    (held,) = [vf for vf in server.functions()["vfs"].values() if vf["stamp"] and vf["stamp"]["owner"] == uid]
    return dict(held)


def test_pools_are_cut_and_clean_and_kept_from_the_hosts_drivers(server: Server) -> None:
    found = server.functions()
    assert len(found["vfs"]) == 6 and not found["problems"] and not found["lost"]
    assert all(vf["state"] == CLEAN and not vf["driver"] and not vf["stamp"] for vf in found["vfs"].values())


CONTRACT = """
import asyncio
from pathlib import Path
from casemate_agent.config import load
from casemate_agent.drivers.sriov import HostFunctions
async def main():
    config = load("/etc/casemate/agent.toml", {}, needs_name=False)
    functions = HostFunctions(Path(config.run_dir), config.ports, config.devices)
    try:
        await story(functions)
    finally:
        await functions.aclose()
asyncio.run(main())
"""


def test_the_real_functions_keep_the_contract(server: Server) -> None:
    """The suite of tests/contract, on a real port's driver: with the agent away, for its plan would take things back."""
    server.stop_agent()
    source = Path(functions_contract.__file__).read_text() + CONTRACT
    server.machine.run("python3 -", stdin=source.encode(), timeout_s=180)
    server.start_agent()
    server.until("it has joined again", server.joined)


def test_a_vf_has_its_contract_while_it_is_used_and_none_of_it_afterwards(server: Server) -> None:
    server.apply("du", NIC)
    uid = server.started("du")["metadata"]["uid"]
    mac = server.get("instance", "du-0")["spec"]["nics"][0]["mac"]
    vf = vf_of(server, uid)
    assert vf["state"] == {**CLEAN, "mac": mac, "vlan": 100}
    assert vf["driver"] == "vfio-pci"
    # what the kernel itself says, not what our driver reads
    shown = server.machine.run("ip -d link show | grep 'vf .*vlan 100'")
    assert mac in shown
    xml = server.machine.run(f"virsh dumpxml {uid}")
    assert "managed='no'" in xml
    server.until("the guest sees it", lambda: "PCI 8086:10ca" in console(server, uid))
    holders = server.casemate("get", "vfs", "--of", HOST).ok()
    assert sum(line.endswith("du-0") for line in holders.splitlines()) == 1
    server.deleted("du")
    assert server.functions()["vfs"][f"{vf['pf']}/{vf['index']}"] == {**vf, "state": CLEAN, "driver": "", "stamp": None}
    assert mac not in server.machine.run("ip link show")


def console(server: Server, uid: str) -> str:
    return server.machine.run(f"cat /var/lib/casemate/instances/{uid}/console.log", check=False)


def test_what_somebody_changes_behind_our_back_is_named_and_put_right(server: Server) -> None:
    server.apply("du", NIC)
    try:
        uid = server.started("du")["metadata"]["uid"]
        pid = server.get("instance", "du-0")["status"]["pid"]
        vf = vf_of(server, uid)
        name = server.machine.run(f"ls /sys/bus/pci/devices/{vf['address']}/physfn/net").strip()
        server.machine.run(f"ip link set {name} vf {vf['index']} vlan 7")
        server.until("it is put right", lambda: vf_of(server, uid)["state"]["vlan"] == 100)  # type: ignore[index]
        assert server.get("instance", "du-0")["status"]["pid"] == pid
        assert "VfChanged" in server.log(400)
    finally:
        server.deleted("du")


def test_what_a_port_cannot_do_is_said_before_anything_is_started(server: Server) -> None:
    server.apply("du", "  nics: [{network: fronthaul, type: sriov, minRate: 10Mbit, maxRate: 100Mbit}]")
    try:
        told = server.until(
            "it waits with a reason",
            lambda: server.casemate("why", "env/du").out if server.get("env", "du") else "",
        )
        assert "min-rate" in told
        assert not any(vf["stamp"] for vf in server.functions()["vfs"].values())
    finally:
        server.deleted("du")


def test_a_killed_agent_leaves_nothing_and_doubles_nothing(server: Server) -> None:
    """SIGKILL at moments spread over preparing, starting and ending."""
    for moment_s in (0.2, 0.6, 1.2, 2.0):
        server.apply("du", NIC)
        server.machine.run(f"sleep {moment_s}; systemctl kill -s SIGKILL casemate-agent")
        uid = server.started("du")["metadata"]["uid"]
        vf = vf_of(server, uid)
        assert vf["state"]["vlan"] == 100  # type: ignore[index]
        server.casemate("delete", "env", "du", "--no-wait").ok()
        server.machine.run(f"sleep {moment_s}; systemctl kill -s SIGKILL casemate-agent")
        server.until("it is gone", lambda: not server.get("env", "du"))
        found = server.functions()["vfs"].values()
        assert all(vf["state"] == CLEAN and not vf["stamp"] and not vf["driver"] for vf in found)


def test_a_device_is_given_by_label_with_its_whole_group_or_not_at_all(server: Server) -> None:
    server.apply("card", "  nics: [{network: fronthaul, type: sriov}]\n  devices: [{labels: {type: card}}]")
    try:
        uid = server.started("card")["metadata"]["uid"]
        (held,) = [d for d in server.functions()["devices"].values() if d["stamp"]]
        assert held["stamp"]["owner"] == uid and held["driver"] == "vfio-pci"
    finally:
        server.deleted("card")
    assert not any(d["stamp"] for d in server.functions()["devices"].values())


TRAFFIC = """
set -e
pf=/sys/bus/pci/devices/$1; i=0
for vf in 0 1; do
  a=$(basename $(readlink $pf/virtfn$vf))
  ip link set $2 vf $vf mac 52:54:00:aa:00:0$vf
  echo igbvf > /sys/bus/pci/devices/$a/driver_override; echo $a > /sys/bus/pci/drivers_probe
  udevadm settle
  n=$(ls $pf/virtfn$vf/net); ip netns add t$vf; ip link set $n netns t$vf
  ip -n t$vf addr add 10.9.0.1$vf/24 dev $n; ip -n t$vf link set $n up
done
"""
UNTRAFFIC = """
for vf in 0 1; do
  a=$(basename $(readlink /sys/bus/pci/devices/$1/virtfn$vf))
  ip netns del t$vf; sleep 0.5; echo $a > /sys/bus/pci/drivers/igbvf/unbind; echo > /sys/bus/pci/devices/$a/driver_override
done
"""


def test_traffic_and_the_finder_of_leaks(server: Server) -> None:
    """Two VFs in namespaces: the same VLAN passes, another does not. They are nobody's: fsck shows and repairs them."""
    machine = server.machine
    server.stop_agent()
    found = server.functions()["vfs"]
    address = machine.run(f"readlink /sys/bus/pci/devices/{found[f'{PORTS[0]}/0']['address']}/physfn").strip()[-12:]
    name = machine.run(f"ls /sys/bus/pci/devices/{address}/net").strip()
    machine.run(f"modprobe igbvf; set -- {address} {name};{TRAFFIC}", timeout_s=60)
    ping = "ip netns exec t0 busybox ping -c 1 -W 3 10.9.0.11 >/dev/null 2>&1 && echo passed || echo blocked"
    server.until("the links are up and frames pass", lambda: "passed" in machine.run(ping))
    machine.run(f"ip link set {name} vf 1 vlan 55; ip -n t0 neigh flush all")
    assert machine.run(ping).strip() == "blocked"
    machine.run(f"ip link set {name} vf 0 vlan 55; ip -n t0 neigh flush all")
    server.until("the same VLAN passes", lambda: "passed" in machine.run(ping))
    machine.run(f"set -- {address};{UNTRAFFIC}", timeout_s=60)
    told = machine.run("casemate-agent fsck --config /etc/casemate/agent.toml", check=False)
    assert told.count("leak") == 2 and "vlan is 55, should be 0" in told
    machine.run("casemate-agent fsck --repair --config /etc/casemate/agent.toml")
    assert all(vf["state"] == CLEAN for vf in server.functions()["vfs"].values())
    assert "52:54:00:aa:00" not in machine.run("ip link show")
    server.start_agent()
    server.until("it has joined again", server.joined)
    assert json.loads(server.casemate("get", "vfs", "-o", "json").ok())["items"]
