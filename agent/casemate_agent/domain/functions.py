"""PCI functions that are passed through, and the buses that the guest sees them on. PURE.

Theory of operation. Where an accelerator is passed through, functions that share a root complex of the host share one of the
guest's: a PCIe expander bus for each, with a root port for each function. Software that asks which NIC is near which GPU (NCCL
by sysfs) gets the host's answer, and peer-to-peer traffic is tried where it is short. The expander is of the guest's cell,
where the guest has one. Without an accelerator libvirt chooses, as before.
"""

import re
from xml.etree.ElementTree import Element

from casemate_agent.domain.elements import add
from casemate_agent.domain.names import check_uid
from casemate_agent.hardware.pciplace import FunctionPlace, hole_bytes, mirrored
from casemate_core.errors import InternalError

BUS_NUMBERS = 256
#: Below it are those of the devices that are not passed through; with fewer to give, libvirt chooses all places.
FIRST_NUMBER = 64
_ADDRESS = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])\Z", re.ASCII)


def add_buses(devices: Element, places: tuple[FunctionPlace, ...], *, bound: bool) -> dict[str, int]:
    """``<controller>`` elements for accelerators; the bus of each function that has one of its own.

    ``bound``: the guest has a cell of its own, which the expanders are near to.
    """
    roots = mirrored(places)
    hole = hole_bytes(places)
    if hole or roots:
        root = add(devices, "controller", {"type": "pci", "index": 0, "model": "pcie-root"})
        if hole:
            add(root, "pcihole64", {"unit": "KiB"}, str(hole >> 10))
    buses: dict[str, int] = {}
    index = 0
    # Firmware numbers the buses behind an expander upwards from its own number, and finds the next one's there.
    number = BUS_NUMBERS - sum(_numbers(together) for together in roots.values())
    if number < FIRST_NUMBER:
        return {}
    for together in roots.values():
        index += 1
        expander = add(devices, "controller", {"type": "pci", "index": index, "model": "pcie-expander-bus"})
        target = add(expander, "target", {"busNr": number})
        number += _numbers(together)
        if bound:
            add(target, "node", text="0")
        bus = index
        for slot, place in enumerate(together):
            index += 1
            port = add(devices, "controller", {"type": "pci", "index": index, "model": "pcie-root-port"})
            add(port, "address", _pci(bus, slot))
            buses[place.address] = index
    return buses


def _numbers(together: tuple[FunctionPlace, ...]) -> int:
    """Bus numbers of an expander: its own, one behind each port, and one to spare."""
    return len(together) + 2


def _pci(bus: int, slot: int) -> dict[str, str]:
    parts = {"domain": "0x0000", "bus": f"0x{bus:02x}", "slot": f"0x{slot:02x}", "function": "0x0"}
    return {"type": "pci", **parts}


def add_mediated(devices: Element, uuids: tuple[str, ...]) -> None:
    """One ``<hostdev>`` for each mediated device: a vGPU. libvirt chooses its place in the guest."""
    for uuid in uuids:
        hostdev = add(devices, "hostdev", {"mode": "subsystem", "type": "mdev", "managed": "no", "model": "vfio-pci"})
        add(add(hostdev, "source"), "address", {"uuid": check_uid(uuid)})


def add_functions(devices: Element, addresses: tuple[str, ...], buses: dict[str, int]) -> None:
    """One ``<hostdev>`` for each function, in order, on its bus where it has one.

    Not managed by libvirt: it would bind and unbind by itself, and give back to the host's driver what is not clean yet.
    """
    for address in addresses:
        match = _ADDRESS.match(address)
        if match is None:
            raise InternalError(f"{address!r} is no PCI address")
        hostdev = add(devices, "hostdev", {"mode": "subsystem", "type": "pci", "managed": "no"})
        add(hostdev, "driver", {"name": "vfio"})
        parts = zip(("domain", "bus", "slot", "function"), match.groups(), strict=True)
        add(add(hostdev, "source"), "address", {name: f"0x{value}" for name, value in parts})
        if address in buses:
            add(hostdev, "address", _pci(buses[address], 0))
