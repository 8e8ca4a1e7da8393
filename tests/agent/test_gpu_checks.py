"""What is judged of a GPU from its readings: each check passes, fails and is unknown, with its numbers."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_agent.gpu.checks import FATAL_XIDS, Check, Result, checks, verdict
from casemate_agent.gpu.readings import GpuFault, GpuReading

WELL = GpuReading(
    uuid="GPU-1",
    address="0000:17:00.0",
    model="NVIDIA H200",
    memory_mib=143771,
    memory_used_mib=4,
    temperature_c=31,
    ecc_uncorrected=0,
    rows_remapped_uncorrected=0,
    rows_pending=False,
    rows_failed=False,
    link_width=16,
    link_width_max=16,
    pcie_replays=0,
    processes=(),
)


def by_name(found: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in found}


def test_a_healthy_gpu_passes_everything() -> None:
    found = checks(WELL, WELL)
    assert {check.result for check in found} == {Result.PASSED}
    assert verdict(found, by_name(found)) == ()


@pytest.mark.parametrize(
    ("change", "name", "evidence"),
    [
        ({"ecc_uncorrected": 2}, "ecc", "2 uncorrected"),
        ({"rows_failed": True}, "rows", "could not be remapped"),
        ({"rows_pending": True}, "rows", "waits for a reset"),
        ({"link_width": 8}, "link-width", "x8 of x16"),
        ({"pcie_replays": 5000}, "pcie-replays", "5000 PCIe replays"),
        ({"temperature_c": 90}, "temperature", "90 °C"),
        ({"processes": (4711,)}, "idle", "4711"),
        ({"memory_used_mib": 9000}, "idle", "9000 MiB"),
        ({"lost": True}, "reachable", "fallen off the bus"),
    ],
)
def test_each_fault_is_told_by_its_check_alone(change: dict[str, object], name: str, evidence: str) -> None:
    found = checks(replace(WELL, **change), WELL)  # type: ignore[arg-type]
    failed = verdict(found)
    assert [check.name for check in failed] == [name]
    assert evidence in failed[0].evidence


def test_counters_count_from_the_hand_over_before() -> None:
    before, now = replace(WELL, ecc_uncorrected=5), replace(WELL, ecc_uncorrected=5)
    assert by_name(checks(now, before))["ecc"].result is Result.PASSED
    assert by_name(checks(replace(now, ecc_uncorrected=6), before))["ecc"].evidence.startswith("1 ")
    # the driver was loaded anew, and counts from 0
    assert by_name(checks(replace(now, ecc_uncorrected=2), before))["ecc"].evidence.startswith("2 ")


@given(st.sampled_from([f.name for f in fields(GpuReading) if f.default is None]))
def test_what_is_not_told_is_never_taken_for_good(name: str) -> None:
    found = checks(replace(WELL, **{name: None}), WELL)  # type: ignore[arg-type]
    assert all(check.result is not Result.FAILED for check in found)
    unknown = [check.name for check in found if check.result is Result.UNKNOWN]
    judged = {"memory_used_mib", "temperature_c", "ecc_uncorrected", "rows_pending", "rows_failed", "link_width"}
    judged |= {"link_width_max", "pcie_replays", "processes"}
    assert bool(unknown) == (name in judged)
    assert [check.name for check in verdict(found, unknown)] == unknown
    assert verdict(found) == ()


def test_a_check_that_was_never_made_holds_back_what_requires_it() -> None:
    (missing,) = verdict(checks(WELL), ["scrub"])
    assert (missing.name, missing.result) == ("scrub", Result.UNKNOWN)


@pytest.mark.parametrize("xid", sorted(FATAL_XIDS))
def test_xids_of_the_board_fail_it_and_those_of_programs_do_not(xid: int) -> None:
    program = GpuFault("GPU-1", 13)
    assert verdict(checks(WELL, faults=[program, GpuFault("GPU-2", xid)])) == ()
    (failed,) = verdict(checks(WELL, faults=[program, GpuFault("GPU-1", xid)]))
    assert f"XID {xid}" in failed.evidence


def test_readings_of_two_gpus_are_never_compared() -> None:
    with pytest.raises(ValueError, match="two GPUs"):
        checks(WELL, replace(WELL, uuid="GPU-2"))
