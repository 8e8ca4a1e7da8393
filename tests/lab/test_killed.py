"""An agent killed while it works, and a machine that changes behind it: on real drivers, with real VFs and nested VMs.

The same at every step and a thousand times is tests/journeys/test_functions_killed.py, on a simulated host.
"""

import shlex
import sys
from typing import Any

import pytest

from support.hostlab import mortal
from support.hostlab.server import HOST, Server

pytestmark = [pytest.mark.lab, pytest.mark.lab_faults, pytest.mark.timeout(3600)]
NIC = "  nics: [{network: fronthaul, type: sriov, vlan: 100}]"
SRIOV, VFIO = "casemate_agent.drivers.sriov:HostFunctions", "casemate_agent.drivers.vfio:Vfio"
LIBVIRT = "casemate_agent.drivers.libvirt:LibvirtHypervisor"
#: Where the agent dies on the way up, and where on the way down.
STEPS = (
    (f"after {SRIOV}._write_stamp", f"before {VFIO}.release"),
    (f"after {SRIOV}._set_state", f"after {VFIO}.release"),
    (f"after {VFIO}.bind", f"before {SRIOV}._remove_stamp"),
    (f"during {LIBVIRT}.start", f"after {SRIOV}._remove_stamp"),
)


@pytest.fixture(autouse=True)
def fleet(server: Server) -> None:
    server.make_fleet()


def held(server: Server) -> list[dict[str, Any]]:
    """VFs that are somebody's."""
    return [vf for vf in server.functions()["vfs"].values() if vf["stamp"]]


def is_clean(server: Server) -> bool:
    """Nothing is left of anybody, as the agent's own driver reads it from outside of the agent."""
    functions = server.functions()
    vfs = functions["vfs"].values()
    left = [vf for vf in vfs if vf["stamp"] or vf["driver"] or vf["state"]["vlan"] or vf["state"]["mac"] != NO_MAC]
    return not left and not functions["lost"] and not any(d["stamp"] for d in functions["devices"].values())


NO_MAC = "00:00:00:00:00:00"


HOLDER = "import os, time; f = os.open('/dev/vfio/%s', os.O_RDWR); print('open', flush=True); time.sleep(600)"


def test_a_leak_is_repaired_through_the_manager_and_who_holds_one_is_named(server: Server) -> None:
    vfs = server.functions()["vfs"]
    (first, second) = sorted(vfs)[:2]
    run = server.machine.run
    port = run(f"ls /sys/bus/pci/devices/{vfs[first]['address']}/physfn/net").strip()
    address = vfs[second]["address"]
    run(
        f"ip link set {port} vf {vfs[first]['index']} mac 52:54:00:bb:00:01; ip link set {port} vf {vfs[first]['index']} vlan 55"
    )
    run(
        f"modprobe vfio-pci; echo vfio-pci > /sys/bus/pci/devices/{address}/driver_override; echo {address} > /sys/bus/pci/drivers_probe"
    )
    group = run(f"basename $(readlink /sys/bus/pci/devices/{address}/iommu_group)").strip()
    run(f"systemd-run -q --unit=holder python3 -c {shlex.quote(HOLDER % group)}")
    try:
        server.until("it has it open", lambda: "open" in run("journalctl -u holder -o cat --no-pager"))
        told = server.casemate("fsck", "host", HOST)
        assert told.code == 3 and told.out.count("leak ") == 2
        assert "vlan is 55, should be 0" in told.out and "bound to vfio-pci" in told.out
        repaired = server.casemate("fsck", "host", HOST, "--repair")
        assert repaired.code == 3
        assert f"repaired   {first}" in repaired.out
        assert "unrepaired" in repaired.out and "is held open by python3" in repaired.out
    finally:
        run("systemctl stop holder", check=False)
    done = server.casemate("fsck", "host", HOST, "--repair")
    assert done.code == 0 and f"repaired   {second}" in done.out
    assert server.casemate("fsck", "host", HOST).ok().splitlines() == ["6 virtual functions, 3 devices, 9 free"]
    assert is_clean(server) and "52:54:00:bb:00:01" not in run("ip link show")


def test_a_card_that_is_pulled_and_put_back_is_told(server: Server) -> None:
    gone, found = server.told("DeviceGone"), server.told("DeviceFound")
    server.machine.monitor("device_del", id="card2")
    try:
        server.until("it is told as gone", lambda: server.told("DeviceGone") > gone)
        assert len(server.casemate("get", "devices").ok().splitlines()) == 1 + 2
    finally:
        server.machine.monitor("device_add", driver="pci-testdev", id="card2", bus="rp02")
    server.until("it is told as found", lambda: server.told("DeviceFound") > found)
    server.until("all three are there", lambda: len(server.casemate("get", "devices").ok().splitlines()) == 1 + 3)


INNER = """apiVersion: casemate/v1
kind: Network
metadata: {name: inner}
spec: {type: nat, subnet: 10.72.0.0/24}
"""


def test_three_things_changed_behind_a_stopped_agent_are_three_named_drifts(server: Server) -> None:
    server.casemate("apply", "-f", "-", stdin=INNER).ok()
    nics = "  nics: [{network: inner}, {network: fronthaul, type: sriov, vlan: 100}]"
    server.apply("du", nics, cpu="{count: 2, policy: dedicated}")
    try:
        started = server.started("du")
        uid, pid = started["metadata"]["uid"], started["status"]["pid"]
        (vf,) = held(server)
        port = server.machine.run(f"ls /sys/bus/pci/devices/{vf['address']}/physfn/net").strip()
        tap = server.machine.run(f"virsh domiflist {uid} | awk '/bridge/ {{print $1}}'").strip()
        master = server.machine.run(f"readlink /sys/class/net/{tap}/master").strip()
        pinned = server.machine.run(f"virsh vcpupin {uid}").split()[-3:]
        server.stop_agent()
        other = "0" if pinned[-1] != "0" else "1"
        server.machine.run(
            f"virsh vcpupin {uid} 1 {other} --live; ip link set {port} vf {vf['index']} mac 02:00:00:00:00:01; "
            f"ip link set {tap} nomaster"
        )
        server.start_agent()
        for reason in ("AffinityChanged", "VfChanged", "TapMoved"):
            server.until(f"{reason} is told", lambda reason=reason: reason in server.log(400))  # type: ignore[misc]
        server.until("the VF is as it was", lambda: held(server)[0]["state"] == vf["state"])
        server.until(
            "the tap is on its bridge again",
            lambda: server.machine.run(f"readlink /sys/class/net/{tap}/master", check=False).strip() == master,
        )
        server.until(
            "the vCPU is bound again",
            lambda: server.machine.run(f"virsh vcpupin {uid}").split()[-3:] == pinned,
        )
        server.until("it has joined again", server.joined)
        assert server.get("instance", "du-0")["status"]["pid"] == pid, "under the same QEMU"
    finally:
        server.deleted("du")


def test_a_hung_libvirtd_holds_everything_as_it_is(server: Server) -> None:
    server.apply("du", NIC)
    try:
        pid = server.started("du")["status"]["pid"]
        (vf,) = held(server)
        server.machine.run("systemctl kill -s STOP libvirtd")
        try:
            server.casemate("delete", "env", "du", "--no-wait").ok()
            said = "hypervisor does not answer"
            server.until("the agent says that it has no answer", lambda: said in server.log(200))
            assert held(server) == [vf], "what a VM may still use is not taken back"
            assert server.machine.run(f"cat /proc/{pid}/comm").startswith("qemu")
            assert server.get("host", HOST)["status"]["phase"] != "Unknown", "the stream is up meanwhile"
        finally:
            server.machine.run("systemctl kill -s CONT libvirtd")
        server.until("it is gone", lambda: not server.get("env", "du"))
        assert is_clean(server)
    finally:
        server.machine.run("systemctl kill -s CONT libvirtd", check=False)
        server.deleted("du")


def test_killed_at_each_step_of_set_up_attach_detach_and_release(
    server: Server, mortal_agent: None, capsys: pytest.CaptureFixture[str]
) -> None:
    leaked = doubled = wrong = 0
    for way_up, way_down in STEPS:
        before = mortal.arm(server, way_up)
        server.apply("du", NIC)
        mortal.until_dead(server, before)
        uid = server.started("du")["metadata"]["uid"]
        mac = server.get("instance", "du-0")["spec"]["nics"][0]["mac"]
        found = held(server)
        doubled += len(found) != 1
        vf = found[0]
        right = (vf["stamp"]["owner"], vf["state"]["mac"], vf["state"]["vlan"], vf["driver"])
        attached = server.machine.run(f"virsh dumpxml {uid} | grep -c '<hostdev'").strip()
        place = vf["address"].replace(":", " ").replace(".", " ").split()
        words = [
            f"{name}='0x{value}'" for name, value in zip(("domain", "bus", "slot", "function"), place, strict=True)
        ]
        there = all(word in server.machine.run(f"virsh dumpxml {uid} | grep -A6 '<hostdev'") for word in words)
        wrong += right != (uid, mac, 100, "vfio-pci") or attached != "1" or not there
        before = mortal.arm(server, way_down)
        server.casemate("delete", "env", "du", "--no-wait").ok()
        mortal.until_dead(server, before)
        server.until("it is gone", lambda: not server.get("env", "du"))
        leaked += not is_clean(server)
    with capsys.disabled():
        sys.stdout.write(
            f"\nlab: {2 * len(STEPS)} kills: leaked {leaked}, doubled {doubled}, wrongly attached {wrong}\n"
        )
    assert (leaked, doubled, wrong) == (0, 0, 0)
