"""One record of a GPU: the link as sysfs tells it, the judgement, and the figures under names that dashboards know."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_agent.gpu import metrics
from casemate_agent.gpu.health import Health, judge
from casemate_agent.gpu.link import FILES, LinkReading, link_of
from casemate_agent.gpu.readings import GpuFault, GpuReading
from support.whole_fleet import WholeFleet, until, whole_fleet

ADDRESS = "0000:17:00.0"
AER = "RxErr 0\nBadTLP 3\nBadDLLP 4\nRollover 0\nTimeout 0\nNonFatalErr 0\nCorrIntErr 0\nHeaderOF 0\nTOTAL_ERR_COR 7\n"
SYSFS = {
    "aer_dev_correctable": AER,
    "aer_dev_nonfatal": "Undefined 0\nTOTAL_ERR_NONFATAL 1\n",
    "aer_dev_fatal": "Undefined 0\nTOTAL_ERR_FATAL 0\n",
    "current_link_speed": "16.0 GT/s PCIe\n",
    "max_link_speed": "32.0 GT/s PCIe\n",
    "current_link_width": "8\n",
    "max_link_width": "16\n",
    "driver": "../../../../bus/pci/drivers/vfio-pci",
}
WELL = GpuReading("GPU-1", ADDRESS, "NVIDIA H200", memory_mib=100, memory_used_mib=4, temperature_c=31, power_mw=76_500)
LINK = LinkReading(ADDRESS, "vfio-pci", 16.0, 32.0, 16, 16, 0, 0, 0)


def test_a_link_is_read_as_the_kernel_writes_it() -> None:
    assert set(SYSFS) == set(FILES)
    assert link_of(ADDRESS, SYSFS) == LinkReading(ADDRESS, "vfio-pci", 16.0, 32.0, 8, 16, 7, 1, 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("current_link_speed", "Unknown"),
        ("current_link_width", "255"),
        ("current_link_width", "0"),
        ("aer_dev_fatal", ""),
    ],
)
def test_what_is_not_told_is_unknown(name: str, text: str) -> None:
    whole, link = link_of(ADDRESS, SYSFS), link_of(ADDRESS, SYSFS | {name: text})
    field = {"current_link_speed": "speed", "current_link_width": "width", "aer_dev_fatal": "fatal"}[name]
    assert getattr(link, field) is None
    assert replace(link, **{field: getattr(whole, field)}) == whole


@given(st.dictionaries(st.sampled_from(FILES), st.text(max_size=60)))
def test_no_text_breaks_the_reading(files: dict[str, str]) -> None:
    link = link_of(ADDRESS, files)
    assert link.width is None or 0 < link.width < 255


def test_a_gpu_of_a_guest_is_seen_by_its_link_alone() -> None:
    record = judge("GPU-1", None, LINK)
    assert (record.owner, record.health, record.reading) == ("guest", Health.WELL, None)
    assert judge("GPU-1", None, None).health is Health.UNKNOWN
    assert judge("GPU-1", WELL, replace(LINK, driver="nvidia")).owner == "host"
    assert judge("GPU-1", None, replace(LINK, driver="")).owner == "nobody"


@pytest.mark.parametrize(
    ("record", "health", "reason"),
    [
        (judge("GPU-1", replace(WELL, lost=True), LINK), Health.BROKEN, "fallen off the bus"),
        (judge("GPU-1", WELL, LINK, [GpuFault("GPU-1", 79)]), Health.BROKEN, "XID 79"),
        (judge("GPU-1", replace(WELL, rows_failed=True), LINK), Health.BROKEN, "could not be remapped"),
        (judge("GPU-1", replace(WELL, rows_pending=True), LINK), Health.SUSPECT, "waits for a reset"),
        (judge("GPU-1", replace(WELL, ecc_uncorrected=2), LINK), Health.SUSPECT, "2 uncorrected ECC"),
        (judge("GPU-1", None, replace(LINK, width=4)), Health.SUSPECT, "x4 of x16"),
        (judge("GPU-1", None, replace(LINK, driver=""), given=True), Health.SUSPECT, "being pulled out"),
        (judge("GPU-1", None, replace(LINK, driver="")), Health.WELL, ""),
        (judge("GPU-1", None, replace(LINK, fatal=1)), Health.BROKEN, "1 fatal"),
        (judge("GPU-1", None, replace(LINK, nonfatal=1)), Health.SUSPECT, "not corrected"),
        (judge("GPU-1", None, replace(LINK, corrected=50), before=LINK, since_s=60), Health.SUSPECT, "50 corrected"),
        (judge("GPU-1", None, replace(LINK, fatal=3), before=replace(LINK, fatal=3)), Health.WELL, ""),
        (judge("GPU-1", WELL, LINK, [GpuFault("GPU-2", 79), GpuFault("GPU-1", 31)]), Health.WELL, ""),
    ],
)
def test_each_sign_is_judged(record: object, health: Health, reason: str) -> None:
    assert record.health is health  # type: ignore[attr-defined]
    assert reason in " ".join(record.reasons)  # type: ignore[attr-defined]


def test_figures_of_the_host_carry_the_labels_of_dcgm_exporter_and_unknown_ones_are_absent() -> None:
    found = metrics.gpu_values("h1", [judge("GPU-1", WELL, LINK)], {})
    assert metrics.POWER.labels == ("gpu", "UUID", "pci_bus_id", "device", "modelName", "Hostname")
    assert found[metrics.POWER] == {("0", "GPU-1", ADDRESS, "nvidia0", "NVIDIA H200", "h1"): 76.5}
    assert list(found[metrics.MEMORY_FREE].values()) == [96]
    assert metrics.BUSY not in found and metrics.XID not in found
    assert {labels[2]: value for labels, value in found[metrics.HEALTH].items()} == {
        "well": 1,
        "suspect": 0,
        "broken": 0,
        "unknown": 0,
    }


def test_a_guests_gpu_has_no_figure_that_only_its_guest_could_know() -> None:
    found = metrics.gpu_values("h1", [judge("GPU-1", None, LINK)], {"GPU-1": 79})
    assert set(found) == {metrics.XID, metrics.HEALTH, metrics.LINK, metrics.LINK_ERRORS}
    assert found[metrics.XID] == {("GPU-1", "h1"): 79}


def test_every_family_has_a_figure_somewhere() -> None:
    full = GpuReading(
        "GPU-1", ADDRESS, "X", None, 100, 4, 31, 1, 1, 1, 0, 0, 0, 0, False, False, 5, 5, 16, 16, 0, 1, False
    )
    assert set(metrics.gpu_values("h1", [judge("GPU-1", full, LINK)], {"GPU-1": 13})) == set(metrics.FAMILIES)


async def test_an_agent_tells_what_its_gpus_tell(tmp_path: Path) -> None:
    async with whole_fleet(tmp_path, {"a": "1s 4k/c 1t 16G gpu=2xH200 disk=1T"}) as fleet:
        host = fleet.hosts["a"]
        uuid = host.host.topology.gpus[0].uuid
        host.host.xids += [GpuFault(uuid, 13), GpuFault(uuid, 79)]
        await until(lambda: len(host.agent.gpu_faults) == 2)
        by_name = {each.family: each.values for each in await host.metrics.rows()}
        assert by_name[metrics.XID] == {(uuid, "a"): 79}
        assert by_name[metrics.HEALTH][uuid, "host", "broken"] == 1
        await until(lambda: len(gpu_events(fleet)) == 2)
        severities = [(e.severity, e.message.partition(": ")[2]) for e in gpu_events(fleet)]
        assert severities[1] == ("Warning", "XID 79: the GPU has fallen off the bus")
        assert severities[0][0] == "Normal"


def gpu_events(fleet: WholeFleet) -> list[Any]:
    return [event for event in fleet.manager.writer.state.events.values() if event.reason == "GpuFault"]
