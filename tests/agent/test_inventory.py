"""What of a machine may be given away: identities, rules, and what is held back."""

import os
from pathlib import Path

import pytest

from casemate_agent.config import BadConfig, load
from casemate_agent.drivers.inventory import Port, identity_of, take
from casemate_agent.drivers.portreader import read_ports
from casemate_agent.hardware.rules import DeviceRule, PortRule, device_rules, port_rules
from casemate_agent.plan.changes import changes
from casemate_core.topology_loaders import from_line

MAC = "52:54:00:10:01:00"
FEC = DeviceRule((("type", "fec"),), "8086", "0d5c")


def function(root: Path, way: str, **files: str | bytes) -> Path:
    """A PCI function at the end of ``way`` below sys/devices, linked from the bus as the kernel does it."""
    real = root / "sys/devices" / way
    real.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = real / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode() + b"\n")
    link = root / "sys/bus/pci/devices" / real.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(real, link.parent))
    return link


def config_with_serial(number: int, at: int = 0x140) -> bytes:
    """Configuration space whose second extended capability is a serial number (the first: AER)."""
    space = bytearray(4096)
    space[0x100:0x104] = (0x0001 | 1 << 16 | at << 20).to_bytes(4, "little")
    space[at : at + 4] = (0x0003 | 1 << 16).to_bytes(4, "little")
    space[at + 4 : at + 12] = number.to_bytes(8, "little")
    return bytes(space)


def fec(root: Path, way: str, serial: int = 0) -> Path:
    return function(
        root, way, vendor="0x8086", device="0x0d5c", **{"class": "0x120000"}, config=config_with_serial(serial)
    )


def test_a_serial_number_is_the_same_in_any_slot_and_boot(tmp_path: Path) -> None:
    here = fec(tmp_path / "a", "pci0000:20/0000:20:00.0/0000:21:00.0", 0x1122334455667788)
    there = fec(tmp_path / "b", "pci0000:60/0000:60:01.0/0000:63:00.0", 0x1122334455667788)
    assert identity_of(here) == identity_of(there) == "8086:0d5c#1122334455667788.0"


def test_without_a_serial_number_a_device_is_its_slot_whatever_the_bus_is_numbered(tmp_path: Path) -> None:
    before = fec(tmp_path / "a", "pci0000:20/0000:20:00.0/0000:21:00.0")
    after = fec(tmp_path / "b", "pci0000:20/0000:20:00.0/0000:24:00.0")
    elsewhere = fec(tmp_path / "c", "pci0000:20/0000:20:01.0/0000:22:00.0")
    assert identity_of(before) == identity_of(after) == "8086:0d5c@0000:20/00.0/00.0"
    assert identity_of(elsewhere) != identity_of(before)


def test_a_broken_chain_of_capabilities_ends(tmp_path: Path) -> None:
    space = bytearray(4096)
    space[0x100:0x104] = (0x0001 | 0x100 << 20).to_bytes(4, "little")  # points at itself
    here = function(tmp_path, "pci0000:00/0000:00:03.0", vendor="0x8086", device="0x0d5c", config=bytes(space))
    assert identity_of(here) == "8086:0d5c@0000:00/03.0"


def test_an_nvme_drive_is_its_controllers_serial_number(tmp_path: Path) -> None:
    here = function(tmp_path, "pci0000:00/0000:00:04.0", vendor="0x144d", device="0xa80a", nvme__nvme0__serial="S5X1  ")
    assert identity_of(here) == "144d:a80a#S5X1"


def test_two_functions_that_say_the_same_are_both_held_back(tmp_path: Path) -> None:
    for way in ("pci0000:20/0000:20:00.0/0000:21:00.0", "pci0000:60/0000:60:00.0/0000:61:00.0"):
        fec(tmp_path, way, 7)
    found = take(tmp_path, (), (), (FEC,))
    assert found.devices == ()
    assert [p.partition(":")[0] for p in found.problems] == ["IdentityUncertain"]
    assert "0000:21:00.0 and 0000:61:00.0" in found.problems[0]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "sys/bus/pci/devices").mkdir(parents=True)
    found = take(tmp_path, (), (PortRule(MAC, ("fronthaul",)),), (FEC,))
    assert [p.partition(":")[0] for p in found.problems] == ["PortMissing", "DeviceMissing"]


def test_only_what_a_rule_matches_is_given_away_and_no_virtual_function(tmp_path: Path) -> None:
    fec(tmp_path, "pci0000:20/0000:20:00.0/0000:21:00.0", 7)
    function(tmp_path, "pci0000:00/0000:00:02.0", vendor="0x8086", device="0x1234")
    vf = fec(tmp_path, "pci0000:20/0000:20:00.0/0000:21:00.1", 8)
    (vf.resolve() / "physfn").symlink_to("../0000:21:00.0")
    found = take(tmp_path, (), (), (FEC,))
    assert [(d.address, d.labels) for d in found.devices] == [("0000:21:00.0", (("type", "fec"),))]


def test_a_port_tells_what_its_driver_can(tmp_path: Path) -> None:
    port = Port(MAC, "0000:21:00.0", "enp33s0", "igb", 7, 4)
    found = take(tmp_path, (port,), (PortRule(MAC, ("fronthaul",)),), ())
    assert found.ports[0].capabilities == ("rate", "spoofchk", "trust", "vlan")
    assert take(tmp_path, (port, port), (PortRule(MAC, ("fronthaul",)),), ()).ports == ()


def test_ports_are_read_from_sysfs_and_netlink(tmp_path: Path) -> None:
    here = function(
        tmp_path,
        "pci0000:20/0000:20:00.0/0000:21:00.0",
        sriov_totalvfs="7",
        sriov_numvfs="4",
        net__enp33s0__speed="4294967295",
    )
    (tmp_path / "sys/bus/pci/drivers/igb").mkdir(parents=True)
    (here.resolve() / "driver").symlink_to(tmp_path / "sys/bus/pci/drivers/igb")
    assert read_ports(tmp_path, lambda names: dict.fromkeys(names, MAC)) == (
        Port(MAC, "0000:21:00.0", "enp33s0", "igb", 7, 4, 0),
    )
    assert read_ports(tmp_path, lambda _: {}) == (), "a port without a permanent address has no identity"


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ([{"mac": "nonsense", "networks": ["a"]}], "ports[0].mac: 'nonsense' is not a MAC address"),
        ([{"mac": MAC, "networks": []}], "ports[0].networks: []"),
        ([{"mac": MAC, "networks": ["a"], "vfs": -1}], "ports[0].vfs: -1"),
        ([{"mac": MAC, "networks": ["a"], "vf": 4}], "ports[0].vf: there is no such setting"),
        ([{"mac": MAC, "networks": ["a"]}, {"mac": MAC, "networks": ["b"]}], "two rules name the same port"),
        ("x", "begin each with [[ports]]"),
    ],
)
def test_wrong_rules_of_ports_are_refused_by_field(tables: object, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        port_rules(tables)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ([{"labels": {"a": "b"}}], "matches every function"),
        ([{"vendor": "xyz", "labels": {"a": "b"}}], "devices[0].vendor: 'xyz'"),
        ([{"vendor": "8086", "labels": {}}], "devices[0].labels"),
        ([{"vendor": "8086", "labels": {"a": 1}}], "devices[0].labels"),
    ],
)
def test_wrong_rules_of_devices_are_refused_by_field(tables: object, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        device_rules(tables)
    assert words in str(caught.value)


def test_rules_come_from_the_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(
        f'name = "h"\n[[ports]]\nmac = "{MAC.upper()}"\nnetworks = ["b", "a"]\nvfs = 4\n'
        '[[devices]]\nvendor = "0x8086"\ndevice = "0D5C"\nlabels = { type = "fec" }\n'
    )
    config = load(str(path), {})
    assert config.ports == (PortRule(MAC, ("a", "b"), 4),)
    assert config.devices == (FEC,)
    path.write_text('name = "h"\n[[ports]]\nmac = "x"\nnetworks = ["a"]\n')
    with pytest.raises(BadConfig, match="ethtool -P"):
        load(str(path), {})


def test_changes_of_a_host_are_named() -> None:
    before = from_line("2s 2k/c 2t 8G 2M=256 vf=1x4 dev=2xfec")
    after = from_line("2s 2k/c 2t 8G 2M=200 vf=1x2 dev=1xfec off=3")
    told = {(note.reason, note.severity) for note in changes(before, after)}
    assert told == {
        ("ThreadsOffline", "Warning"),
        ("PagePoolShrank", "Warning"),
        ("VfGone", "Warning"),
        ("DeviceGone", "Warning"),
    }
    back = {note.reason for note in changes(after, before)}
    assert back == {"ThreadsOnline", "PagePoolGrew", "VfFound", "DeviceFound"}
    assert changes(before, before) == ()
