"""What the kernel must let a QEMU lock and map, computed from what the instance has. PURE.

What may live here: the amounts, each with the rule that it follows from. They are too small by default where devices are
passed through, and then show as ``VFIO_MAP_DMA: Cannot allocate memory`` when a guest starts, or only when it grows.

Theory of operation. All of a guest's memory is locked while a device is passed through to it, because the device may write to
any of it; huge pages count too (drivers/vfio/vfio_iommu_type1.c, vfio_lock_acct: each pinned page, whatever its size). What
QEMU locks beside it is small; libvirt allows one GiB for it (qemu_domain.c, qemuDomainGetMemLockLimitBytes), and so do we. Each
contiguous piece of guest memory and each region of a device that others may reach takes an entry of the container's table
(dma_entry_limit of the module vfio_iommu_type1, 65535 by default).
"""

from dataclasses import dataclass

#: What QEMU may lock beside the guest's memory.
BESIDE_MIB = 1024
#: Pieces that a q35 guest's memory is mapped in: below and above the hole at 4 GiB, split by firmware, option ROMs and VGA.
PIECES = 32
#: Regions of one function: six BARs and a ROM, of which each may be split in two by its MSI-X table.
REGIONS = 14


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """``lock_mib``: memory that QEMU may lock, 0: the default is enough. ``dma_entries``: mappings of its VFIO container."""

    lock_mib: int = 0
    dma_entries: int = 0
    rule: str = ""


def memory_limits(memory_max_mib: int, functions: int, *, locked: bool) -> MemoryLimits:
    """Limits of a guest with so much memory at most and so many functions passed through; ``locked``: its memory is locked
    whether or not it has any."""
    if not functions and not locked:
        return MemoryLimits()
    why = f"{functions} functions passed through" if functions else "real-time memory is locked"
    rule = f"{why}: {memory_max_mib} MiB of the guest, {BESIDE_MIB} MiB beside it"
    return MemoryLimits(memory_max_mib + BESIDE_MIB, PIECES + REGIONS * functions if functions else 0, rule)
