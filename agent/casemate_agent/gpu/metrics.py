"""Figures of GPUs under the names that dashboards know. PURE.

What may live here: names, and how figures follow from a record. Where dcgm-exporter has a family of the same meaning its name
and labels are used (its ``etc/default-counters.csv``), so that dashboards made for it work; what it cannot know, because the
GPU is a guest's, has names of ours. A figure that is unknown is left out, never 0.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from casemate_agent.gpu.health import GpuHealth, Health
from casemate_agent.gpu.readings import GpuReading
from casemate_core.metrics import Family, counter, gauge
from casemate_core.quantity import MIB

_BOARD: Final = ("gpu", "UUID", "pci_bus_id", "device", "modelName", "Hostname")
TEMPERATURE: Final = gauge("DCGM_FI_DEV_GPU_TEMP", "GPU temperature in degrees Celsius.", *_BOARD)
POWER: Final = gauge("DCGM_FI_DEV_POWER_USAGE", "Power draw in watts.", *_BOARD)
BUSY: Final = gauge("DCGM_FI_DEV_GPU_UTIL", "GPU utilisation in percent.", *_BOARD)
MEMORY_BUSY: Final = gauge("DCGM_FI_DEV_MEM_COPY_UTIL", "Memory utilisation in percent.", *_BOARD)
MEMORY_USED: Final = gauge("DCGM_FI_DEV_FB_USED", "Memory in use in MiB.", *_BOARD)
MEMORY_FREE: Final = gauge("DCGM_FI_DEV_FB_FREE", "Memory free in MiB.", *_BOARD)
REPLAYS: Final = gauge("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", "PCIe packets that were sent again.", *_BOARD)
ECC_CORRECTED: Final = gauge(
    "DCGM_FI_DEV_ECC_SBE_VOL_TOTAL", "Corrected ECC errors since the driver that holds it was loaded.", *_BOARD
)
ECC_UNCORRECTED: Final = gauge(
    "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", "Uncorrected ECC errors since the driver that holds it was loaded.", *_BOARD
)
ROWS_UNCORRECTABLE: Final = gauge(
    "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", "Rows of memory remapped for uncorrected errors.", *_BOARD
)
ROWS_CORRECTABLE: Final = gauge(
    "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS", "Rows of memory remapped for corrected errors.", *_BOARD
)
ROWS_FAILED: Final = gauge("DCGM_FI_DEV_ROW_REMAP_FAILURE", "1 where a row of memory could not be remapped.", *_BOARD)
XID: Final = gauge(
    "DCGM_FI_DEV_XID_ERRORS", "The last XID that the host was told; absent where none was.", "UUID", "Hostname"
)
HEALTH: Final = gauge("casemate_gpu_health", "1 for the judgement that each GPU has.", "uuid", "owner", "health")
LINK: Final = gauge("casemate_gpu_link_lanes", "Lanes of the PCIe link that are in use.", "uuid")
LINK_ERRORS: Final = counter(
    "casemate_gpu_pcie_errors_total", "PCIe errors that the host counted, whoever owns the GPU.", "uuid", "severity"
)
MEMORY: Final = gauge("casemate_gpu_memory_bytes", "Memory of each GPU, where it is told.", "uuid")

FAMILIES: Final[tuple[Family, ...]] = tuple(value for value in list(globals().values()) if isinstance(value, Family))


def gpu_values(
    host: str, gpus: Iterable[GpuHealth], last_xid: Mapping[str, int]
) -> dict[Family, dict[tuple[str, ...], float]]:
    """All figures. ``last_xid``: by UUID, of those that had one."""
    found: dict[Family, dict[tuple[str, ...], float]] = {}

    def add(family: Family, value: float | None, *labels: str) -> None:
        if value is not None:
            found.setdefault(family, {})[labels] = float(value)

    for number, gpu in enumerate(gpus):
        if gpu.reading is not None and not gpu.reading.lost:
            r = gpu.reading
            board = (str(number), r.uuid, r.address, f"nvidia{number}", r.model, host)
            for family, value in _of_reading(r).items():
                add(family, value, *board)
            add(MEMORY, None if r.memory_mib is None else r.memory_mib * MIB, gpu.uuid)
        add(XID, last_xid.get(gpu.uuid), gpu.uuid, host)
        for word in Health:
            add(HEALTH, gpu.health is word, gpu.uuid, gpu.owner, word)
        if gpu.link is not None:
            add(LINK, gpu.link.width, gpu.uuid)
            add(LINK_ERRORS, gpu.link.corrected, gpu.uuid, "corrected")
            add(LINK_ERRORS, gpu.link.nonfatal, gpu.uuid, "nonfatal")
            add(LINK_ERRORS, gpu.link.fatal, gpu.uuid, "fatal")
    return found


def _of_reading(r: GpuReading) -> dict[Family, float | None]:
    free = None if r.memory_mib is None or r.memory_used_mib is None else r.memory_mib - r.memory_used_mib
    return {
        TEMPERATURE: r.temperature_c,
        POWER: None if r.power_mw is None else r.power_mw / 1000,
        BUSY: r.gpu_busy_percent,
        MEMORY_BUSY: r.memory_busy_percent,
        MEMORY_USED: r.memory_used_mib,
        MEMORY_FREE: free,
        REPLAYS: r.pcie_replays,
        ECC_CORRECTED: r.ecc_corrected,
        ECC_UNCORRECTED: r.ecc_uncorrected,
        ROWS_UNCORRECTABLE: r.rows_remapped_uncorrected,
        ROWS_CORRECTABLE: r.rows_remapped_corrected,
        ROWS_FAILED: r.rows_failed,
    }
