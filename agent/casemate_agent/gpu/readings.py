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
    #: All vGPUs on it at one time are of one type.
    share_alike: bool = False
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


@dataclass(frozen=True, slots=True)
class Card:
    """What decides the way up, as the host sees the device now."""

    #: Processes of the host that hold it, with their names: ``4711 (nvidia-smi)``.
    holders: tuple[str, ...] = ()
    #: Ways in which the kernel can reset it, as ``reset_method`` in sysfs lists them (Linux 5.15 and newer).
    methods: tuple[str, ...] = ()
    #: Functions on its bus that do not belong to this hand-over, by address.
    strangers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Proof:
    """What a device showed after a reset. ``found`` and ``expected``: what it says that it is, now and before. ``mark`` is what
    was written before the reset, in words; ``kept``: it is still there; None: the device has no place for one."""

    answers: bool
    found: str = ""
    expected: str = ""
    mark: str = ""
    kept: bool | None = None


@dataclass(frozen=True, slots=True)
class CardFacts:
    """A GPU as the host sees it. ``address`` and ``driver`` (empty: none is bound) are true at the time of the reading."""

    uuid: str
    address: str
    driver: str = ""
    #: A library of the host tells its readings while the host's own driver holds it.
    told: bool = False
