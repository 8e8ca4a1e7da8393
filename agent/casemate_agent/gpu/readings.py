"""What a GPU's library says of it at one moment. PURE.

What may live here: the values that a driver fills. Everything that a GPU may not tell is optional, and None means unknown:
a GPU that does not count its ECC errors has not had none.
"""

from dataclasses import dataclass, fields

from casemate_core.topology.model import ShareProfile


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU while the host's own driver holds it. ``uuid`` is its identity; ``address`` (``0000:17:00.0``) is true at the
    time of the reading only."""

    uuid: str
    address: str
    model: str
    serial: str | None = None
    memory_mib: int | None = None
    memory_used_mib: int | None = None
    temperature_c: int | None = None
    power_mw: int | None = None
    gpu_busy_percent: int | None = None
    memory_busy_percent: int | None = None
    #: ECC errors since the driver was loaded. Uncorrected ones cost somebody data.
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    #: Rows of memory that were replaced by spare ones, by what made it needed.
    rows_remapped_corrected: int | None = None
    rows_remapped_uncorrected: int | None = None
    #: A row waits to be replaced at the next reset; a row could not be replaced.
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    link_generation: int | None = None
    link_generation_max: int | None = None
    link_width: int | None = None
    link_width_max: int | None = None
    #: Packets of the PCIe link that were sent again.
    pcie_replays: int | None = None
    #: Number within an NVSwitch baseboard; does not follow PCI order.
    module_id: int | None = None
    mig: bool | None = None
    share_slots: int = 0
    share_profiles: tuple[ShareProfile, ...] = ()
    #: Processes of the host that hold it, by pid.
    processes: tuple[int, ...] | None = None
    #: It fell off the bus: the library knows it and cannot reach it.
    lost: bool = False

    @property
    def untold(self) -> tuple[str, ...]:
        """Names of what it did not tell."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is None)


def growth(now: int, before: int | None) -> int:
    """How much a counter grew since an earlier reading; one that fell was reset with its driver, and counts from 0."""
    return now if before is None or now < before else now - before


@dataclass(frozen=True, slots=True)
class GpuFault:
    """An XID: the driver's number for something that went wrong on a GPU (NVIDIA, "XID Errors")."""

    uuid: str
    xid: int
