"""Two servers beside each other: who is who, what is spread over both, what passes between them, and one that is cut off.

Both are one image, joined to one manager, their ports and a plain NIC of each on one Ethernet segment (`hostlab.machine.Wire`).
What moves an instance from one to the other belongs here too: hosts reach each other at ``Name.address``.
"""

import json
from collections.abc import Iterator

import pytest

from support.hostlab.server import Server

pytestmark = [pytest.mark.lab, pytest.mark.two_labs, pytest.mark.timeout(3600)]

PAIR = """apiVersion: casemate/v1
kind: Environment
metadata: {name: pair, labels: {app: pair}}
spec:
  replicas: 2
  cpu: {count: 1}
  memory: {size: 64Mi}
  image: tiny
  disk: {size: 16Mi}
  virtualisation: any
  nics: [{network: fronthaul, type: sriov, vlan: 100}]
  placement: {spreadBy: host}
"""
APART = """apiVersion: casemate/v1
kind: Environment
metadata: {name: loner}
spec:
  cpu: {count: 1}
  memory: {size: 64Mi}
  image: tiny
  disk: {size: 16Mi}
  virtualisation: any
  isolated: true
  placement: {affinity: [{kind: apart, match: {app: pair}, topology: host, required: true}]}
"""


@pytest.fixture(autouse=True)
def fleet(servers: list[Server]) -> None:
    servers[0].make_fleet()


@pytest.fixture
def pair(servers: list[Server]) -> Iterator[dict[str, dict[str, object]]]:
    """An instance on each server, by the host's name."""
    first = servers[0]
    first.casemate("apply", "-f", "-", stdin=PAIR).ok()
    try:
        started = [first.running(f"pair-{ordinal}") for ordinal in range(2)]
        yield {instance["spec"]["host"]: instance for instance in started}
    finally:
        first.deleted("pair")


def test_two_servers_are_two_hosts_to_everybody(servers: list[Server]) -> None:
    boots: set[str] = set()
    ports: list[str] = []
    for server in servers:
        name, run = server.machine.name, server.machine.run
        assert run("hostname").strip() == server.host
        assert run("cat /etc/machine-id").strip() == name.machine_id
        assert f"<uuid>{name.uuid}</uuid>" in run("virsh capabilities", timeout_s=300)
        status = server.get("host", server.host)["status"]
        assert status["phase"] == "Ready" and status["cells"] == 2
        assert status["bootId"] == server.machine.read("/proc/sys/kernel/random/boot_id")
        assert [port["mac"] for port in sorted(status["topology"]["pfs"], key=lambda port: str(port["mac"]))] == [
            *name.ports
        ]
        boots.add(status["bootId"])
        ports += name.ports
    assert len(boots) == 2 and len(set(ports)) == 4
    listed = servers[0].casemate("get", "hosts", "-o", "name").ok().split()
    assert listed == [f"host/{server.host}" for server in servers]
    vfs = json.loads(servers[0].casemate("get", "vfs", "-o", "json").ok())["items"]
    assert len({(vf["port"], vf["index"]) for vf in vfs}) == len(vfs) == 12
    assert {vf["port"]: vf["host"] for vf in vfs} == {
        mac: server.host for server in servers for mac in server.machine.name.ports
    }


def test_instances_are_spread_and_whoever_must_be_apart_from_both_waits(
    servers: list[Server], pair: dict[str, dict[str, object]]
) -> None:
    first = servers[0]
    assert set(pair) == {server.host for server in servers}
    for server in servers:
        instance = pair[server.host]
        uid = str(instance["metadata"]["uid"])  # type: ignore[index]
        assert server.machine.run("virsh list --uuid").split() == [uid], "it runs there, and nowhere else"
        (vf,) = [vf for vf in server.functions()["vfs"].values() if vf["stamp"]]
        mac = instance["spec"]["nics"][0]["mac"]  # type: ignore[index]
        assert (vf["stamp"]["owner"], vf["state"]["mac"], vf["state"]["vlan"]) == (uid, mac, 100)
    first.casemate("apply", "-f", "-", stdin=APART).ok()
    try:
        why = first.until("it waits with a reason", lambda: said_apart(first))
        assert all(server.host in why for server in servers)
    finally:
        first.deleted("loner")


def said_apart(server: Server) -> str:
    """What ``why`` says of the environment that must be apart, once it says that."""
    said = server.casemate("why", "env/loner").out
    return said if "apart" in said.lower() or "affinity" in said.lower() else ""


#: A virtual function of the first port, driven by the host itself, in a namespace of its own: $1 MAC, $2 VLAN, $3 address.
INTO_NAMESPACE = """
set -e
modprobe igbvf
pf=$(dirname $(ls -d /sys/bus/pci/devices/*/virtfn0 | head -1)); port=$(ls $pf/net); a=$(basename $(readlink $pf/virtfn0))
ip link set $port vf 0 mac $1 vlan $2
echo igbvf > /sys/bus/pci/devices/$a/driver_override; echo $a > /sys/bus/pci/drivers_probe
udevadm settle
n=$(ls $pf/virtfn0/net); ip netns add far; ip link set $n netns far
ip -n far addr add $3/24 dev $n; ip -n far link set $n up
echo $port
"""
OUT_OF_NAMESPACE = """
pf=$(dirname $(ls -d /sys/bus/pci/devices/*/virtfn0 | head -1)); a=$(basename $(readlink $pf/virtfn0))
ip netns del far; sleep 0.5; echo $a > /sys/bus/pci/drivers/igbvf/unbind; echo > /sys/bus/pci/devices/$a/driver_override
"""


def test_frames_pass_from_a_vf_to_a_vf_of_the_other_server_within_one_vlan(servers: list[Server]) -> None:
    here, there = servers
    ports = [
        server.machine.run(f"set -- 52:54:00:aa:0{number}:00 100 10.9.1.{number};{INTO_NAMESPACE}").strip()
        for number, server in enumerate(servers, 1)
    ]
    ping = "ip netns exec far ip neigh flush all; ip netns exec far busybox ping -c 1 -W 5 10.9.1.2 >/dev/null 2>&1 && echo passed || echo blocked"
    try:
        here.until("frames pass", lambda: "passed" in here.machine.run(ping))
        for vlan, expected in ((55, "blocked"), (100, "passed")):
            there.machine.run(f"ip link set {ports[1]} vf 0 vlan {vlan}")
            here.until(f"in VLAN {vlan} they are {expected}", lambda: expected in here.machine.run(ping))  # noqa: B023
        there.machine.run(f"ip link set {ports[1]} vf 0 vlan 55")
        assert [here.machine.run(ping).strip() for _ in range(3)] == ["blocked"] * 3
    finally:
        for server in servers:
            server.machine.run(OUT_OF_NAMESPACE, check=False)
    for server in servers:
        told = server.casemate("fsck", "host", server.host, "--repair", timeout_s=300)
        assert told.code == 0 and "repaired" in told.out, told
        assert not any(vf["state"]["vlan"] or vf["stamp"] for vf in server.functions()["vfs"].values())


def test_a_server_that_is_cut_off_is_unknown_and_its_instance_is_nowhere_else(
    servers: list[Server], pair: dict[str, dict[str, object]]
) -> None:
    here, there = servers
    uid = str(pair[there.host]["metadata"]["uid"])  # type: ignore[index]
    pid = here.get("instance", str(pair[here.host]["metadata"]["name"]))["status"]["pid"]  # type: ignore[index]
    boot = there.get("host", there.host)["status"]["bootId"]
    there.machine.stop()
    here.until("the fleet does not know of it", lambda: phase(here, there.host) == "Unknown")
    assert here.get("instance", str(pair[there.host]["metadata"]["name"]))["spec"]["host"] == there.host  # type: ignore[index]
    assert uid not in here.machine.run("virsh list --all --uuid")
    there.machine.start()
    there.machine.run("systemctl start libvirtd", timeout_s=300)
    there.start_agent()
    there.until("it has joined again", there.joined)
    again = there.until("its instance runs again, there", lambda: runs_since(there, uid, boot))
    assert again["spec"]["host"] == there.host
    mine = here.get("instance", str(pair[here.host]["metadata"]["name"]))  # type: ignore[index]
    assert mine["status"]["pid"] == pid, "the other one never noticed"


def phase(server: Server, host: str) -> str:
    return str(server.get("host", host).get("status", {}).get("phase"))


def runs_since(server: Server, uid: str, boot: str) -> dict[str, object]:
    """The instance with this uid, once the host is another boot and the domain runs there."""
    if server.get("host", server.host)["status"]["bootId"] == boot:
        return {}
    if uid not in server.machine.run("virsh list --uuid"):
        return {}
    items = json.loads(server.casemate("get", "instances", "-o", "json").ok())["items"]
    (found,) = [item for item in items if item["metadata"]["uid"] == uid]
    return dict(found) if found["status"].get("pid") else {}
