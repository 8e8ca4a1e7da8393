"""NIC ports with SR-IOV, from netlink and sysfs.

For: ``drivers.sysfs`` and ``drivers.sriov``. What may live here: pyroute2's link dump, joined with the PCI functions by the
name that both give an interface at this moment. Nothing is written.
"""

from collections.abc import Callable
from pathlib import Path

from pyroute2 import IPRoute

from casemate_agent.drivers.inventory import PCI, Port

PortReader = Callable[[], tuple[Port, ...]]
#: What ethtool and sysfs show for an unknown speed: -1, or it in an unsigned number.
_UNKNOWN_SPEEDS = (-1, 0xFFFF, 0xFFFFFFFF)


def permanent_addresses() -> dict[str, str]:
    """Interface name -> permanent MAC, of this network namespace. Raises OSError and NetlinkError."""
    found = {}
    with IPRoute() as ip:
        for link in ip.get_links():
            # A driver that does not know it says nothing, or zeroes: such a port has no identity.
            address = link.get_attr("IFLA_PERM_ADDRESS") or ""
            if address.strip("0:"):
                found[link.get_attr("IFLA_IFNAME")] = address.lower()
    return found


def read_ports(
    root: Path = Path("/"), addresses: Callable[[], dict[str, str]] = permanent_addresses
) -> tuple[Port, ...]:
    """Every physical function of this machine that is a NIC port, with its VFs counted."""
    permanent: dict[str, str] | None = None
    ports = []
    for total in sorted((root / PCI).glob("*/sriov_totalvfs")):
        folder = total.parent
        names = sorted(path.name for path in folder.glob("net/*"))
        if not names:
            continue  # its driver is not there (yet), or it is no NIC
        permanent = addresses() if permanent is None else permanent
        # A function with several ports has several interfaces; its VFs hang off the first.
        name = names[0]
        if name not in permanent:
            continue
        ports.append(
            Port(
                mac=permanent[name],
                address=folder.name,
                interface=name,
                driver=(folder / "driver").resolve().name if (folder / "driver").exists() else "",
                total_vfs=int(total.read_text()),
                vfs=int((folder / "sriov_numvfs").read_text()),
                link_mbps=_speed(folder / "net" / name / "speed"),
            )
        )
    return tuple(ports)


def _speed(path: Path) -> int:
    try:
        speed = int(path.read_text())
    except (OSError, ValueError):
        return 0  # a link that is down refuses to be read
    return 0 if speed in _UNKNOWN_SPEEDS else speed
