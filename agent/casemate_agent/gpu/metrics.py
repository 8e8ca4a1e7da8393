"""Figures of GPUs under the names that dashboards know. PURE.

What may live here: names, kinds and units, and how they follow from a record. Where dcgm-exporter has a family of the same
meaning its name and labels are used (its ``etc/default-counters.csv``), so that dashboards made for it work; what it cannot
know, because the GPU is a guest's, has names of ours. A figure that is unknown is left out, never 0.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from casemate_agent.gpu.health import GpuHealth, Health
from casemate_agent.gpu.readings import GpuReading


@dataclass(frozen=True, slots=True)
class Family:
    """One family: ``kind`` is ``gauge`` or ``counter``, as dcgm-exporter has it."""

    name: str
    kind: str
    help: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One figure."""

    family: Family
    labels: Mapping[str, str]
    value: float


TEMPERATURE = Family("DCGM_FI_DEV_GPU_TEMP", "gauge", "GPU temperature in degrees Celsius")
POWER = Family("DCGM_FI_DEV_POWER_USAGE", "gauge", "Power draw in W")
BUSY = Family("DCGM_FI_DEV_GPU_UTIL", "gauge", "GPU utilisation in percent")
MEMORY_BUSY = Family("DCGM_FI_DEV_MEM_COPY_UTIL", "gauge", "Memory utilisation in percent")
MEMORY_USED = Family("DCGM_FI_DEV_FB_USED", "gauge", "Memory in use in MiB")
MEMORY_FREE = Family("DCGM_FI_DEV_FB_FREE", "gauge", "Memory free in MiB")
REPLAYS = Family("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", "counter", "PCIe packets sent again")
XID = Family("DCGM_FI_DEV_XID_ERRORS", "gauge", "The last XID that was told; absent where none was")
ROWS_UNCORRECTABLE = Family(
    "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", "counter", "Rows of memory remapped for uncorrected errors"
)
ROWS_CORRECTABLE = Family(
    "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS", "counter", "Rows of memory remapped for corrected errors"
)
ROWS_FAILED = Family("DCGM_FI_DEV_ROW_REMAP_FAILURE", "gauge", "1 where a row of memory could not be remapped")
HEALTH = Family("casemate_gpu_health", "gauge", "1 for the judgement that a GPU has: well, suspect, broken or unknown")
LINK_WIDTH = Family("casemate_gpu_link_width_lanes", "gauge", "Lanes of the PCIe link that are in use")
LINK_ERRORS = Family(
    "casemate_gpu_pcie_errors_total", "counter", "PCIe errors that the host counted, whoever owns the GPU"
)

FAMILIES = (
    TEMPERATURE,
    POWER,
    BUSY,
    MEMORY_BUSY,
    MEMORY_USED,
    MEMORY_FREE,
    REPLAYS,
    XID,
    ROWS_UNCORRECTABLE,
    ROWS_CORRECTABLE,
    ROWS_FAILED,
    HEALTH,
    LINK_WIDTH,
    LINK_ERRORS,
)


def samples(host: str, gpus: Iterable[GpuHealth], last_xid: Mapping[str, int]) -> tuple[Sample, ...]:
    """All figures. ``last_xid``: by UUID, of those that had one."""
    found: list[Sample] = []
    for number, gpu in enumerate(gpus):
        if gpu.reading is not None and not gpu.reading.lost:
            found += _of_reading(_labels(host, number, gpu.reading), gpu.reading)
        labels = {"UUID": gpu.uuid, "Hostname": host}
        if gpu.uuid in last_xid:
            found.append(Sample(XID, labels, last_xid[gpu.uuid]))
        found += [Sample(HEALTH, labels | {"health": word, "owner": gpu.owner}, gpu.health is word) for word in Health]
        if gpu.link is not None:
            if gpu.link.width is not None:
                found.append(Sample(LINK_WIDTH, labels, gpu.link.width))
            counted = {"corrected": gpu.link.corrected, "nonfatal": gpu.link.nonfatal, "fatal": gpu.link.fatal}
            found += [
                Sample(LINK_ERRORS, labels | {"severity": word}, n) for word, n in counted.items() if n is not None
            ]
    return tuple(found)


def _labels(host: str, number: int, reading: GpuReading) -> dict[str, str]:
    """Those of dcgm-exporter."""
    return {
        "gpu": str(number),
        "UUID": reading.uuid,
        "pci_bus_id": reading.address,
        "device": f"nvidia{number}",
        "modelName": reading.model,
        "Hostname": host,
    }


def _of_reading(labels: dict[str, str], reading: GpuReading) -> list[Sample]:
    free = None
    if reading.memory_mib is not None and reading.memory_used_mib is not None:
        free = reading.memory_mib - reading.memory_used_mib
    told: list[tuple[Family, float | None]] = [
        (TEMPERATURE, reading.temperature_c),
        (POWER, None if reading.power_mw is None else reading.power_mw / 1000),
        (BUSY, reading.gpu_busy_percent),
        (MEMORY_BUSY, reading.memory_busy_percent),
        (MEMORY_USED, reading.memory_used_mib),
        (MEMORY_FREE, free),
        (REPLAYS, reading.pcie_replays),
        (ROWS_UNCORRECTABLE, reading.rows_remapped_uncorrected),
        (ROWS_CORRECTABLE, reading.rows_remapped_corrected),
        (ROWS_FAILED, reading.rows_failed),
    ]
    return [Sample(family, labels, float(value)) for family, value in told if value is not None]
