"""What may stand in the way of a private fleet, found before anything is started: each with its remedy."""

import ipaddress
import os
import shutil
import socket
from pathlib import Path

from casemate_cli.failure import Detail, Failure

#: Bridges of casemate begin so (casemate_agent.domain.names); their routes do not stand in the way.
OUR_BRIDGES = "cmbr-"
_PROGRAMS = {
    "libvirtd": "libvirt-daemon",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "nft": "nftables",
}


def check_port(port: int) -> None:
    """Raise Failure where somebody listens on the manager's port already."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise Failure(
                "the manager's port is taken",
                details=[Detail("--port", str(port), error.strerror or "cannot be bound")],
                remedy="end what listens there, or take another: casemate dev up --port 7444",
            ) from None


def free_port(after: int) -> int:
    """The port after this one, if it is free; else any that is."""
    for wanted in (after + 1 if after < 65535 else 0, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError:
                continue
            found: int = probe.getsockname()[1]
            return found
    raise Failure("no port of loopback is free")


def check_subnet(subnet: str) -> None:
    """Raise Failure where the machine has a route into the subnet, or the subnet is none."""
    try:
        wanted = ipaddress.IPv4Network(subnet)
    except ValueError as error:
        raise Failure(
            "the subnet is not understood",
            details=[Detail("--subnet", subnet, str(error), "write an IPv4 network such as 10.99.0.0/16")],
        ) from None
    for interface, route in routes():
        if route.prefixlen and route.overlaps(wanted) and not interface.startswith(OUR_BRIDGES):
            raise Failure(
                "the subnet for instances is taken",
                details=[Detail("--subnet", subnet, f"overlaps {route}, which this machine reaches by {interface}")],
                remedy="take another: casemate dev up --subnet 10.77.0.0/16",
            )


def routes() -> list[tuple[str, ipaddress.IPv4Network]]:
    """IPv4 routes of this machine, as (interface, network)."""
    found = []
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        interface, destination, _, _, _, _, _, mask = line.split()[:8]
        address = ipaddress.IPv4Address(int.from_bytes(bytes.fromhex(destination), "little"))
        netmask = ipaddress.IPv4Address(int.from_bytes(bytes.fromhex(mask), "little"))
        found.append((interface, ipaddress.IPv4Network(f"{address}/{netmask}", strict=False)))
    return found


def check_machine() -> None:
    """Raise Failure where a fleet with real VMs cannot run here."""
    if os.geteuid() != 0:
        raise Failure(
            "real VMs with their own network need root",
            remedy="run this as root, or try simulated hosts: casemate dev up --simulated 3",
        )
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = {program: package for program, package in _PROGRAMS.items() if shutil.which(program, path=path) is None}
    if missing:
        raise Failure(
            "programs are missing: " + ", ".join(missing),
            remedy="apt-get install --no-install-recommends " + " ".join(sorted(set(missing.values()))),
        )
