"""The PCIe link of a function, as the host sees it, whoever owns the function. PURE.

What may live here: the reading of files below ``/sys/bus/pci/devices/<address>``, given as text. The kernel tells them for a
function on vfio-pci as well: it is the port above that counts and trains.

Errors are those of Advanced Error Reporting (kernel, Documentation/ABI/testing/sysfs-bus-pci-devices-aer_stats): each file has
a line for every kind and a total, ``TOTAL_ERR_COR``, ``TOTAL_ERR_NONFATAL``, ``TOTAL_ERR_FATAL``, counted since the function was
found. They fall to 0 when it is removed and found again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

FILES = (
    "aer_dev_correctable",
    "aer_dev_nonfatal",
    "aer_dev_fatal",
    "current_link_speed",
    "current_link_width",
    "max_link_speed",
    "max_link_width",
    "driver",
)
"""What to read of a function; ``driver`` is a link, of which the target's last part is wanted."""

_TOTAL = re.compile(r"^TOTAL_ERR_(?:COR|NONFATAL|FATAL) (\d{1,20})$", re.MULTILINE)
_SPEED = re.compile(r"^(\d{1,3}(?:\.\d)?) GT/s")


@dataclass(frozen=True, slots=True)
class LinkReading:
    """One function's link at one moment. None: not told. Speeds in GT/s a lane."""

    address: str
    #: Name of the driver that holds it; empty for none.
    driver: str = ""
    speed: float | None = None
    speed_max: float | None = None
    width: int | None = None
    width_max: int | None = None
    corrected: int | None = None
    nonfatal: int | None = None
    fatal: int | None = None


def link_of(address: str, files: Mapping[str, str]) -> LinkReading:
    """What the files tell; one that is missing or reads otherwise than the kernel writes it is unknown."""
    return LinkReading(
        address=address,
        driver=files.get("driver", "").strip().rpartition("/")[2],
        speed=_speed(files.get("current_link_speed", "")),
        speed_max=_speed(files.get("max_link_speed", "")),
        width=_width(files.get("current_link_width", "")),
        width_max=_width(files.get("max_link_width", "")),
        corrected=_total(files.get("aer_dev_correctable", "")),
        nonfatal=_total(files.get("aer_dev_nonfatal", "")),
        fatal=_total(files.get("aer_dev_fatal", "")),
    )


def _total(text: str) -> int | None:
    found = _TOTAL.search(text)
    return int(found[1]) if found else None


def _speed(text: str) -> float | None:
    """ "16.0 GT/s PCIe"; "Unknown" where there is no link."""
    found = _SPEED.match(text.strip())
    return float(found[1]) if found else None


def _width(text: str) -> int | None:
    """Lanes; a function without a link says 0 or 255."""
    word = text.strip()
    return int(word) if word.isascii() and word.isdecimal() and 0 < int(word[:4]) < 255 else None
