"""What dies and what goes on, on real libvirt and QEMU: the agent's ledger, libvirtd, the whole host.

Nothing boots here: whether a VM is the same one is told by its QEMU.
"""

import json
import os
import shutil
import signal
import time
import uuid
from dataclasses import replace
from typing import Any

import pytest

from casemate_agent import sandbox as sandboxes
from support.realfleet import RealFleet, empty_environment

pytestmark = pytest.mark.libvirt

#: An agent that lives on another boot of this machine: $1 is the file with that boot's id, the rest its command line.
ANOTHER_BOOT = 'mount --bind "$1" /proc/sys/kernel/random/boot_id && shift && exec "$@"'


def of(fleet: RealFleet, name: str) -> tuple[str, int, int]:
    """Uid, pid and starts of an environment's instance, as the manager tells them."""
    found = fleet.instance(name)
    return found["metadata"]["uid"], int(found["status"].get("pid", 0)), int(found["status"]["starts"])


def host(fleet: RealFleet) -> dict[str, Any]:
    found: dict[str, Any] = fleet.get("host", "box")["status"]
    return found


def conditions(fleet: RealFleet) -> dict[str, str]:
    return {c["type"]: c["status"] for c in host(fleet).get("conditions", ())}


@pytest.mark.timeout(900)
def test_a_lost_ledger_is_rebuilt_and_a_foreign_vm_left_alone(real_fleet: RealFleet) -> None:
    fleet = real_fleet
    for name in ("one", "two"):
        fleet.apply(empty_environment(name))
    uids = {of(fleet, name)[0] if fleet.until_running(name) else "" for name in ("one", "two")}
    fleet.run("stop", "two", "--wait", timeout_s=300).ok()
    uid, pid, _ = of(fleet, "one")
    fleet.agent.end(signal.SIGKILL)
    fleet.manager.end()
    foreign = str(uuid.uuid4())
    xml = fleet.folder / "foreign.xml"
    xml.write_text(
        f"<domain type='qemu'><name>neighbour</name><uuid>{foreign}</uuid><memory unit='MiB'>96</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"
    )
    fleet.virsh("define", str(xml))
    fleet.virsh("start", "neighbour")
    qemus = fleet.qemus()
    assert set(qemus) == {uid, foreign}
    shutil.rmtree(fleet.state / "ledger")

    # Without a manager nobody knows what else is wanted here: what runs goes on, and nothing is cleaned away.
    fleet.agent.start()
    ledger = fleet.state / "ledger/instances"
    fleet.until("both are in the ledger again", lambda: {p.stem for p in ledger.glob("*.json")} == uids)
    time.sleep(3)
    assert fleet.qemus() == qemus
    assert fleet.domains() == {*uids, foreign}

    fleet.manager.start()
    fleet.until_host_ready()
    fleet.until("the manager knows it again", lambda: of(fleet, "one")[:2] == (uid, pid))
    fleet.until("the ledger is complete", lambda: conditions(fleet).get("LedgerComplete") == "True")
    fleet.until("the foreign VM is counted", lambda: host(fleet).get("foreign", 0) == 1)
    assert fleet.instance("two")["status"]["phase"] == "Stopped"
    # what it uses is nobody else's: who would need all that our own leave waits, until the foreign one ends
    fleet.run("delete", "env", "two", timeout_s=330).ok()
    rest = int(host(fleet)["threads"]) - 1
    fleet.apply(empty_environment("rest", cpu={"count": rest}))
    fleet.until("what needs the foreign VM's CPUs waits", lambda: "CPUs asked" in _why_not(fleet, "rest"), 30)
    assert fleet.qemus() == qemus
    fleet.virsh("destroy", "neighbour")
    fleet.until_running("rest")
    fleet.virsh("start", "neighbour")
    qemus |= {foreign: fleet.qemus()[foreign]}

    # what was adopted can be ended and started like any other
    for name in ("one", "rest"):
        fleet.run("delete", "env", name, timeout_s=330).ok()
    for gone in (*uids, fleet.uids["rest"]):
        assert fleet.traces_of(gone) == []
    assert fleet.qemus() == {foreign: qemus[foreign]}
    assert fleet.domains() == {foreign}


def _why_not(fleet: RealFleet, name: str) -> str:
    """What the environment's condition says of its place; empty where it has one."""
    found = fleet.get("environment", name)["status"]["conditions"]
    return next((str(c.get("message")) for c in found if c["type"] == "Scheduled" and c["status"] == "False"), "")


@pytest.mark.timeout(900)
def test_libvirtd_hangs_for_a_minute_and_dies_and_no_vm_notices(real_fleet: RealFleet) -> None:
    fleet = real_fleet
    fleet.apply(empty_environment("calm"))
    fleet.until_running("calm")
    before = of(fleet, "calm")
    qemus = fleet.qemus()
    log = fleet.agent.log.stat().st_size
    longest_s, asked = 0.0, 0

    os.kill(fleet.sandbox.pid, signal.SIGSTOP)
    try:
        ends_s = time.monotonic() + 60
        fleet.apply(empty_environment("late"))
        while time.monotonic() < ends_s:
            began_s = time.monotonic()
            assert host(fleet)["phase"] == "Ready", fleet.tails()
            longest_s, asked = max(longest_s, time.monotonic() - began_s), asked + 1
            time.sleep(2)
        assert conditions(fleet).get("Hypervisor") == "False"
        assert fleet.instance("late")["status"]["phase"] in ("Placed", "Unknown", "Preparing")
    finally:
        os.kill(fleet.sandbox.pid, signal.SIGCONT)
    assert asked >= 5 and longest_s < 30, f"{asked} answers, the longest in {longest_s:.1f} s"
    fleet.until_running("late")
    fleet.until("libvirtd is reached again", lambda: conditions(fleet).get("Hypervisor") == "True")
    assert of(fleet, "calm") == before
    assert qemus.items() <= fleet.qemus().items()
    qemus = fleet.qemus()

    os.kill(fleet.sandbox.pid, signal.SIGKILL)
    fleet.until("its end is noticed", lambda: conditions(fleet).get("Hypervisor") == "False")
    fleet.run("delete", "env", "late", "--no-wait").ok()
    assert host(fleet)["phase"] == "Ready"
    assert fleet.qemus() == qemus
    fleet.sandbox = sandboxes.up(fleet.folder / "v")
    fleet.until_gone("late")
    assert fleet.traces_of(fleet.uids["late"]) == []
    fleet.until("the VM is known again", lambda: of(fleet, "calm") == before)
    assert fleet.qemus() == {before[0]: before[1]}
    said = fleet.agent.log.read_bytes()[log:]
    assert b"session ended" not in said, f"the stream broke off: {said.decode(errors='replace')[:20000]}"
    fleet.run("delete", "env", "calm", timeout_s=330).ok()
    assert fleet.traces_of(before[0]) == []


@pytest.mark.timeout(900)
def test_after_a_reboot_what_should_run_is_started_with_the_manager_away(real_fleet: RealFleet) -> None:
    fleet = real_fleet
    for name in ("on", "off"):
        fleet.apply(empty_environment(name))
        fleet.until_running(name)
    fleet.run("stop", "off", "--wait", timeout_s=300).ok()
    uid, pid, starts = of(fleet, "on")
    off = fleet.uids["off"]
    address = fleet.instance("on")["spec"]["nics"]
    fleet.manager.end()
    fleet.agent.end(signal.SIGKILL)
    # A reboot: every process, bridge, tap and firewall rule is gone; what lies on the disk is there.
    sandboxes.down(fleet.folder / "v", keep=True)
    shutil.rmtree(fleet.folder / "r")
    fleet.sandbox = sandboxes.up(fleet.folder / "v")
    assert fleet.qemus() == {} and fleet.domains() == {uid, off}

    boot = fleet.folder / "boot_id"
    boot.write_text(f"{uuid.uuid4()}\n")
    usual = fleet.agent
    enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ANOTHER_BOOT, "sh", str(boot)]
    fleet.agent = replace(usual, argv=[*enter, *usual.argv], process=None)
    fleet.agent.start()
    fleet.until("what should run is started", lambda: set(fleet.qemus()) == {uid}, 120)
    time.sleep(3)
    assert set(fleet.qemus()) == {uid}, "what was stopped stays off"
    assert fleet.qemus()[uid] != pid

    fleet.manager.start()
    fleet.until_host_ready()
    fleet.until("the manager knows", lambda: of(fleet, "on") == (uid, fleet.qemus()[uid], starts + 1))
    assert fleet.instance("on")["spec"]["nics"] == address
    assert host(fleet)["bootId"] == boot.read_text().strip()
    reasons = [json.loads(line)["reason"] for line in fleet.run("events", "-o", "json").ok().splitlines()]
    assert "HostRebooted" in reasons
    assert fleet.instance("off")["status"]["phase"] == "Stopped"
    fleet.run("start", "off", "--wait", "--timeout", "1s")
    fleet.until_running("off")
    for name in ("on", "off"):
        fleet.run("delete", "env", name, timeout_s=330).ok()
    assert fleet.traces_of(uid) == [] and fleet.traces_of(off) == []
