"""PCI functions of this machine: NIC ports that are cut into virtual functions, and functions that are given away whole.

For: ``drivers.sysfs`` (the topology), ``drivers.sriov`` and ``drivers.vfio`` (which write). What may live here: reading
sysfs, configuration space and netlink; nothing is written.

Theory of operation. What a machine has is read; what of it may be given away, and which networks a port reaches, is said by
its administrator (`PortRule`, `DeviceRule`): neither can be seen. A rule for a port names its permanent MAC address, one for
devices what they are (vendor, product, class); none names a PCI address, which moves when a card is plugged elsewhere.

Identity. A port is its permanent MAC (netlink's IFLA_PERM_ADDRESS, which no tool can change). A device is its serial number:
that of the PCI Express capability "Device Serial Number" (PCI Express base specification 7.9.3), or an NVMe controller's. One
that has none is what it is and the way to it from its root complex (slots, not bus numbers, which are dealt out anew at each
boot): put into another slot it is another device, which is the safe error. Two functions that claim one identity are both
left out, and said (`Inventory.problems`).
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from casemate_agent.hardware.rules import DeviceRule, PortRule
from casemate_core.topology_loaders import DeviceFacts, PortFacts

PCI = "sys/bus/pci/devices"
_ROOT = re.compile(r"pci([0-9a-f]{4,8}):([0-9a-f]{2})")
_SERIAL_CAPABILITY = 0x0003
_EXTENDED_START = 0x100
_CONFIG_BYTES = 4096
#: Most extended capabilities of one function that are followed: a broken chain would be followed for ever.
_MOST_CAPABILITIES = 64

#: What the drivers of physical functions let a VF be given, from their ``ndo_set_vf_*`` operations in Linux 6.12. ``rate`` is
#: the highest rate, ``min-rate`` the lowest. A driver that is not here gives what every one gives.
DRIVER_CAPABILITIES: Mapping[str, tuple[str, ...]] = {
    "bnxt_en": ("vlan", "spoofchk", "trust", "rate", "min-rate"),
    "i40e": ("vlan", "qinq", "spoofchk", "trust", "rate"),
    "ice": ("vlan", "qinq", "spoofchk", "trust", "rate", "min-rate"),
    "igb": ("vlan", "spoofchk", "trust", "rate"),
    "ixgbe": ("vlan", "spoofchk", "trust", "rate"),
    "mlx5_core": ("vlan", "qinq", "spoofchk", "trust", "rate", "min-rate"),
    "netdevsim": ("vlan", "qinq", "spoofchk", "trust", "rate", "min-rate"),
}
PLAIN_CAPABILITIES = ("vlan",)


@dataclass(frozen=True, slots=True)
class Port:
    """A NIC port as it is now. ``address`` and ``interface`` are true at the time of the reading."""

    mac: str
    address: str
    interface: str
    driver: str
    total_vfs: int
    vfs: int
    link_mbps: int = 0
    #: Its eswitch works in mode switchdev, in which its VFs can be given this alone; None: it works in mode legacy, or has none.
    switched: tuple[str, ...] | None = None

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What it lets a VF be given, in the mode in which it is."""
        if self.switched is not None:
            return self.switched
        return tuple(sorted(DRIVER_CAPABILITIES.get(self.driver, PLAIN_CAPABILITIES)))


@dataclass(frozen=True, slots=True)
class Inventory:
    """PCI functions as the topology needs them; ``problems`` are those that are held back, each with its reason."""

    ports: tuple[PortFacts, ...] = ()
    devices: tuple[DeviceFacts, ...] = ()
    problems: tuple[str, ...] = ()


def take(
    root: Path, ports: Sequence[Port], port_rules: Sequence[PortRule], device_rules: Sequence[DeviceRule]
) -> Inventory:
    """What of this machine may be given away, and what is held back."""
    problems: list[str] = []
    by_mac = {port.mac: port for port in ports}
    told = Counter(port.mac for port in ports)
    facts = []
    for rule in port_rules:
        port = by_mac.get(rule.mac)
        if port is None:
            problems.append(f"PortMissing: no port has the permanent address {rule.mac}")
        elif told[rule.mac] > 1:
            problems.append(f"IdentityUncertain: {told[rule.mac]} ports have the permanent address {rule.mac}")
        else:
            facts.append(PortFacts(port.address, port.mac, rule.networks, port.capabilities, port.link_mbps))
    devices, more = _devices(root, device_rules)
    return Inventory(tuple(facts), tuple(devices), (*problems, *more))


def _devices(root: Path, rules: Sequence[DeviceRule]) -> tuple[list[DeviceFacts], list[str]]:
    if not rules:
        return [], []
    found: dict[str, list[DeviceFacts]] = {}
    matched = dict.fromkeys(rules, 0)
    for folder in sorted((root / PCI).glob("*")):
        rule = next((r for r in rules if matches(folder, r.vendor, r.device, r.pci_class)), None)
        if rule is None or (folder / "physfn").exists():
            continue
        matched[rule] += 1
        identity = identity_of(folder)
        found.setdefault(identity, []).append(DeviceFacts(folder.name, identity, rule.labels))
    problems = [
        f"DeviceMissing: no function of this host is {_named(rule)}" for rule, count in matched.items() if not count
    ]
    for identity, all_of_it in found.items():
        if len(all_of_it) > 1:
            where = " and ".join(facts.address for facts in all_of_it)
            problems.append(f"IdentityUncertain: {where} both say that they are {identity}; none is given away")
    return [facts[0] for facts in found.values() if len(facts) == 1], problems


def _named(rule: DeviceRule) -> str:
    kind = f" of class {rule.pci_class}" if rule.pci_class else ""
    return f"{rule.vendor or '*'}:{rule.device or '*'}{kind}"


def matches(folder: Path, vendor: str, device: str, pci_class: str) -> bool:
    """Whether a function is what a rule says; an empty word of it matches all."""
    return (
        (not vendor or _hex(folder / "vendor") == vendor)
        and (not device or _hex(folder / "device") == device)
        and (not pci_class or _hex(folder / "class").startswith(pci_class))
    )


def _hex(path: Path) -> str:
    """A number that sysfs writes as ``0x8086``; empty where it is not there."""
    try:
        return path.read_text().strip().removeprefix("0x")
    except OSError:
        return ""


def identity_of(folder: Path) -> str:
    """What the function at ``folder`` (of /sys/bus/pci/devices) is, whatever slot and boot it is seen in."""
    kind = f"{_hex(folder / 'vendor')}:{_hex(folder / 'device')}"
    if serial := _serial(folder):
        # All functions of a card carry the card's number.
        return f"{kind}#{serial}.{folder.name.rpartition('.')[2]}"
    for path in sorted(folder.glob("nvme/nvme*/serial")):
        if text := path.read_text(errors="replace").strip():
            return f"{kind}#{text}"
    return f"{kind}@{_way(folder)}"


def _serial(folder: Path) -> str:
    """The Device Serial Number, sixteen hex digits; empty where there is none (a zero or all ones is none)."""
    try:
        config = (folder / "config").read_bytes()[:_CONFIG_BYTES]
    except OSError:
        return ""
    at = _EXTENDED_START
    for _ in range(_MOST_CAPABILITIES):
        if at < _EXTENDED_START or at + 12 > len(config):
            return ""
        header = int.from_bytes(config[at : at + 4], "little")
        if header & 0xFFFF == _SERIAL_CAPABILITY:
            number = int.from_bytes(config[at + 4 : at + 12], "little")
            return f"{number:016x}" if number not in (0, (1 << 64) - 1) else ""
        at = header >> 20
    return ""


def _way(folder: Path) -> str:
    """From the root complex down, slot and function of each step: ``0000:20/00.0/00.0``."""
    target = os.readlink(folder) if folder.is_symlink() else str(folder)
    steps = target.split("/")
    root = next((i for i, step in enumerate(steps) if _ROOT.fullmatch(step)), None)
    if root is None:
        return folder.name
    return "/".join([steps[root].removeprefix("pci"), *(step.rpartition(":")[2] for step in steps[root + 1 :])])
