"""PCI functions that are passed through. PURE."""

import re
from xml.etree.ElementTree import Element

from casemate_agent.domain.elements import add
from casemate_core.errors import InternalError

_ADDRESS = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])\Z", re.ASCII)


def add_functions(devices: Element, addresses: tuple[str, ...]) -> None:
    """One ``<hostdev>`` for each function, in order.

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
