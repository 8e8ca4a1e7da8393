"""What an environment says of its own life, on real QEMU: crashes and what follows, protection, an end with notice.

Nothing boots: a crash is the end of the process. One pair of VMs serves all of it, and the longest wait, for the end of the
shortest lifetime, is used for the crashes of the other.
"""

import json
import os
import signal
from datetime import datetime
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import fromstring

import pytest

from support.realfleet import RealFleet, empty_environment

pytestmark = pytest.mark.libvirt


def running(fleet: RealFleet, name: str) -> dict[str, Any]:
    """What is said of an environment's first instance: the condition that it runs, with starts and pid."""
    found = fleet.instance(name)["status"]
    said: dict[str, Any] = next((c for c in found["conditions"] if c["type"] == "Running"), {})
    return said | {"phase": found["phase"], "starts": found.get("starts", 0), "pid": int(found.get("pid", 0))}


def crash(fleet: RealFleet, name: str) -> int:
    """End the QEMU of an environment's instance as a crash would; its pid."""
    pid = fleet.qemus()[fleet.uids[name]]
    os.kill(pid, signal.SIGKILL)
    return pid


def told(fleet: RealFleet, name: str) -> list[dict[str, Any]]:
    """Events of an environment and of what belongs to it, oldest first."""
    lines = fleet.run("events", f"env/{name}", "-o", "json").ok().splitlines()
    return [json.loads(line) for line in lines]


def messages(fleet: RealFleet, name: str, reason: str) -> list[str]:
    return [event["message"] for event in told(fleet, name) if event["reason"] == reason]


@pytest.mark.timeout(900)
def test_crashes_protection_and_the_end_of_a_lifetime(real_fleet: RealFleet) -> None:
    fleet = real_fleet
    fleet.apply(empty_environment("brief", onCrash="leave"))
    fleet.apply(empty_environment("again", onCrash="restart", crashLimit=2, protected=True, isolated=True))
    for name in ("brief", "again"):
        fleet.until_running(name)

    for name, nics in (("brief", 1), ("again", 0)):
        _has_fewest_devices(fleet, fleet.uids[name], nics)

    refused = fleet.run("delete", "env", "again")
    assert refused.code == 7 and refused.out == "", refused
    assert "environment again is protected" in refused.err and "spec.protected" in refused.err
    assert "deleting" not in fleet.get("environment", "again")["metadata"]

    # Left: nothing follows, whatever else happens on this host meanwhile.
    crash(fleet, "brief")
    left = fleet.until("it is left off", lambda: _is(fleet, "brief", "Left"))
    assert (left["phase"], left["starts"], left["pid"]) == ("Failed", 1, 0)
    # The shortest lifetime, set when some of it may be over: however much that is, its end comes with notice.
    fleet.apply(empty_environment("brief", onCrash="leave", lifetime="60s"))

    # Started again, until it ended too often in a row.
    for starts in (1, 2):
        pid = crash(fleet, "again")
        if starts == 1:
            after = fleet.until("it is started again", lambda: _started(fleet, "again", 2))
            assert after["pid"] not in (0, pid)
    given_up = fleet.until("it is given up", lambda: _is(fleet, "again", "GivenUp"))
    assert (given_up["phase"], given_up["starts"], given_up["pid"]) == ("Failed", 2, 0)
    ends = messages(fleet, "again", "Exited")
    assert ["it is started again" in e for e in ends] == [True, False] and "it is given up" in ends[1], ends
    assert fleet.qemus() == {}, "neither of them is started any more"

    # A person's restart begins anew, and the count with it.
    fleet.run("restart", "inst/again-0", "--no-wait").ok()
    fleet.until("a restart starts it", lambda: _started(fleet, "again", 3))
    assert fleet.instance("again")["status"]["boot"] == "firmware", "no kernel is on its disk"
    crash(fleet, "again")
    fleet.until("it is started again", lambda: _started(fleet, "again", 4))

    # Its end is told ahead, and is not sooner than that.
    fleet.until("brief has ended", lambda: not fleet.get("environment", "brief"), 300)
    events = told(fleet, "brief")
    notice = next(e for e in events if e["reason"] == "LifetimeEnding")
    ending = next(e for e in events if e["reason"] == "Deleting")
    assert "a longer spec.lifetime keeps it" in notice["message"]
    assert ending["message"] == "its lifetime of 1m is over"
    assert _seconds(ending) - _seconds(notice) >= 30
    assert fleet.traces_of(fleet.uids["brief"]) == []

    # What is protected is deleted when it is not any more.
    fleet.apply(empty_environment("again", onCrash="restart", crashLimit=2, isolated=True))
    fleet.run("delete", "env", "again", timeout_s=330).ok()
    assert fleet.traces_of(fleet.uids["again"]) == []
    assert fleet.domains() == set()


def _has_fewest_devices(fleet: RealFleet, uid: str, nics: int) -> None:
    """What libvirt made of the domain, and QEMU of that: nothing beside what the spec needs."""
    devices = fromstring(fleet.virsh("dumpxml", uid)).find("devices")
    assert devices is not None
    # libvirt names what is in the machine type anyway: the keyboard controller of a PC, the watchdog of its chipset.
    kinds = {device.tag for device in devices} - {"emulator", "audio", "watchdog", "input"}
    assert {each.get("bus") for each in devices.iterfind("input")} <= {"ps2"}
    assert kinds <= {"disk", "controller", "rng", "interface", "channel", "serial", "console", "memballoon"}
    assert {audio.get("type") for audio in devices.iterfind("audio")} <= {"none"}
    assert {disk.get("device") for disk in devices.iterfind("disk")} == {"disk"}
    assert {target.get("bus") for target in devices.iterfind("disk/target")} == {"virtio"}
    assert {c.get("model") for c in devices.iterfind("controller[@type='usb']")} == {"none"}
    assert len(devices.findall("interface")) == nics
    argv = Path(f"/proc/{fleet.qemus()[uid]}/cmdline").read_bytes().decode().split("\0")
    assert "-nodefaults" in argv and argv[argv.index("-display") + 1] == "none"
    given = [argv[n + 1] for n, word in enumerate(argv) if word == "-device"]
    for word in ("usb", "floppy", "isa-fdc", "cdrom", "ide-cd", "scsi-cd", "VGA", "virtio-gpu", "hda", "sound"):
        assert not [each for each in given if word in each], word
    assert not {"-vnc", "-spice", "-vga", "-usb", "-cdrom", "-fda"} & set(argv)
    assert len([each for each in given if "virtio-net" in each]) == nics


def _is(fleet: RealFleet, name: str, reason: str) -> dict[str, Any]:
    found = running(fleet, name)
    return found if found.get("reason") == reason else {}


def _started(fleet: RealFleet, name: str, starts: int) -> dict[str, Any]:
    found = running(fleet, name)
    alive = fleet.qemus().get(fleet.uids[name])
    return found if found["starts"] == starts and alive and found["pid"] == alive else {}


def _seconds(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"].replace("Z", "+00:00")).timestamp()
