"""Where a PCI function hangs on its host, and how much room its memory needs in a guest. PURE.

What may live here: the record, the reading of the kernel's text, and the sums that follow from it.

A function's BARs are mapped into the guest's physical addresses. Those of 64 bits lie above the guest's memory, in a window
that firmware lays out: each at a multiple of its size, behind a bridge whose own window is one piece. A GPU's may be hundreds
of GiB, and the window that QEMU provides by default is 32 GiB (hw/pci-host/q35.c, Q35_PCI_HOST_HOLE64_SIZE_DEFAULT).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

GIB = 1 << 30
#: A function with this much is an accelerator, for which the guest's buses are laid out as the host's are.
LARGE_BYTES = 256 << 20
DEFAULT_HOLE = 32 * GIB
#: Left for what is not passed through: virtio devices behind root ports take 64-bit windows too.
OTHERS = 8 * GIB
#: Physical addresses that a guest has whose processor is not told to have others (target/i386/cpu.c, TCG_PHYS_ADDR_BITS).
DEFAULT_ADDRESS_BITS = 40
#: From here to 1 TiB a guest whose processor is AMD's has nothing: QEMU puts all that would reach into it above 1 TiB
#: (hw/i386/pc.c, AMD_HT_START and AMD_ABOVE_1TB_START).
HYPERTRANSPORT = 1012 * GIB
#: Lines of the file ``resource`` that are the function's own BARs; those after them are its ROM, then its VFs' BARs.
BARS = 6
#: include/linux/ioport.h
IORESOURCE_MEM, IORESOURCE_MEM_64 = 0x200, 0x100000
_LINE = re.compile(r"0x([0-9a-f]{16}) 0x([0-9a-f]{16}) 0x([0-9a-f]{16})\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class FunctionPlace:
    """A function that is passed through. ``root``: its root complex on the host, empty where that is not known;
    ``window_bytes``: what its 64-bit BARs take."""

    address: str
    root: str = ""
    cell: int = -1
    window_bytes: int = 0

    @property
    def is_large(self) -> bool:
        """Whether it has more memory than an ordinary function."""
        return self.window_bytes >= LARGE_BYTES


def bar_bytes(text: str) -> int:
    """What the 64-bit BARs of a function take, by the text of its file ``resource``; each at a multiple of its size."""
    total = 0
    for line in text.splitlines()[:BARS]:
        match = _LINE.match(line.strip())
        if match is None:
            continue
        start, end, flags = (int(part, 16) for part in match.groups())
        if end > start and flags & IORESOURCE_MEM and flags & IORESOURCE_MEM_64:
            total += power_of_two(end - start + 1)
    return total


def power_of_two(size: int) -> int:
    """The next power of two: what a BAR of this size is, and where its window may begin."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def hole_bytes(places: Iterable[FunctionPlace]) -> int:
    """The window above the guest's memory that all of them need; 0: the default is enough.

    Each stands behind a root port of its own, whose window begins at a multiple of its largest BAR: rounding each function's sum
    up covers that.
    """
    needed = sum(power_of_two(place.window_bytes) for place in places)
    return power_of_two(needed + OTHERS) if needed + OTHERS > DEFAULT_HOLE else 0


def address_bits(memory_mib: int, hole: int = 0) -> int:
    """Physical address bits of a guest with so much memory and such a window (0: the default one), whoever made its processor.

    QEMU does not start one whose memory and window reach further than its processor: ``phys-bits too low``.
    """
    above = (memory_mib << 20) + max(hole, DEFAULT_HOLE)
    reach = 4 * GIB + above
    if reach > HYPERTRANSPORT:
        reach = 1024 * GIB + above
    return max(DEFAULT_ADDRESS_BITS, (reach - 1).bit_length())


def mirrored(places: Iterable[FunctionPlace]) -> dict[str, tuple[FunctionPlace, ...]]:
    """Functions by the root complex of the host that they share, in order, where a guest is to see that: an accelerator among
    them, and all roots known. Else empty."""
    found: dict[str, tuple[FunctionPlace, ...]] = {}
    every = tuple(places)
    if not any(place.is_large for place in every) or not all(place.root for place in every):
        return {}
    for place in every:
        found[place.root] = (*found.get(place.root, ()), place)
    return found
