"""NIC ports with SR-IOV, from netlink and sysfs.

For: ``drivers.sysfs`` and ``drivers.sriov``. What may live here: what netlink says of an interface, joined
with the PCI functions by the name that both give an interface at this moment. Nothing is written.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from pyroute2 import IPRoute

from casemate_agent.drivers.eswitch import DRIVERS, Device, switched
from casemate_agent.drivers.inventory import PCI, Port
from casemate_agent.drivers.links import named_link

PortReader = Callable[[], tuple[Port, ...]]
_FUNCTION_PORT = re.compile(r"(c\d+)?pf\d+(vf|sf)\d+")
"""Names of ports of virtual functions (kernel documentation, networking/switchdev)."""
#: What ethtool and sysfs show for an unknown speed: -1, or it in an unsigned number.
_UNKNOWN_SPEEDS = (-1, 0xFFFF, 0xFFFFFFFF)


def permanent_addresses(interfaces: Collection[str]) -> dict[str, str]:
    """Interface name -> permanent MAC, of this network namespace. Raises OSError and NetlinkError.

    Each is asked for by its name: a list of all would hold the taps of every VM, a millisecond each, every few seconds.
    """
    found = {}
    with IPRoute() as ip:
        for name in interfaces:
            for link in named_link(ip, name):
                # A driver that does not know it says nothing, or zeroes: such a port has no identity.
                address = link.get_attr("IFLA_PERM_ADDRESS") or ""
                if address.strip("0:"):
                    found[name] = address.lower()
    return found


def read_ports(
    root: Path = Path("/"), addresses: Callable[[Collection[str]], Mapping[str, str]] = permanent_addresses
) -> tuple[Port, ...]:
    """Every physical function of this machine that is a NIC port, with its VFs counted."""
    # A function with several ports has several interfaces; its VFs hang off the first. One without any has no driver (yet), or
    first: dict[Path, str] = {}
    # is no NIC. In mode switchdev the ports of its VFs are interfaces of it too.
    for total in sorted((root / PCI).glob("*/sriov_totalvfs")):
        if names := sorted(path.name for path in total.parent.glob("net/*") if not is_representor(path)):
            first[total.parent] = names[0]
    permanent = addresses(tuple(first.values())) if first else {}
    ports = []
    for folder, name in first.items():
        if name not in permanent:
            continue
        driver = (folder / "driver").resolve().name if (folder / "driver").exists() else ""
        ports.append(
            Port(
                mac=permanent[name],
                address=folder.name,
                interface=name,
                driver=driver,
                total_vfs=int((folder / "sriov_totalvfs").read_text()),
                vfs=int((folder / "sriov_numvfs").read_text()),
                link_mbps=_speed(folder / "net" / name / "speed"),
                switched=switched(Device("pci", folder.name)) if driver in DRIVERS else None,
            )
        )
    return tuple(ports)


def is_representor(folder: Path) -> bool:
    """Whether an interface (of sysfs) is the switch's port of a function, by the name that its driver gives the port."""
    try:
        return _FUNCTION_PORT.fullmatch((folder / "phys_port_name").read_text().strip()) is not None
    except OSError:
        return False  # most drivers give none


def _speed(path: Path) -> int:
    try:
        speed = int(path.read_text())
    except (OSError, ValueError):
        return 0  # a link that is down refuses to be read
    return 0 if speed in _UNKNOWN_SPEEDS else speed
