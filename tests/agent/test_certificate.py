"""What cyclictest says in a guest, as figures of a certificate; and when a certificate is void or meaningless."""

from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from casemate_agent.realtime.certificate import (
    HISTOGRAM_US,
    BadMeasurement,
    Told,
    Under,
    arguments,
    certificate,
    condensed,
    meaningless,
)
from casemate_core.spec.realtime import Certificate, LineState, ProfileLine, void

RECORDED = (Path(__file__).parent.parent / "support/recorded/cyclictest-2.4.txt").read_text()
LINE = ProfileLine("thp", LineState.HELD, "never", "never", "/sys/kernel/mm/transparent_hugepage/enabled")
UNDER = Under(3, 7, "6.12.0-rt", "kvm", (LINE,))


def measured(output: str = RECORDED, under: Under = UNDER) -> Certificate:
    return certificate("order-1", 2.0, 1_800_000_000.0, Told(output, "6.12", "0.10 0.05 0.01", "0.90 0.20 0.05"), under)


def test_the_words_of_cyclictest_as_they_were_recorded() -> None:
    found = measured()
    summary = {
        line.split(":")[0].removeprefix("# "): [int(n) for n in line.split(":")[1].split()]
        for line in RECORDED.splitlines()
        if line.startswith(("# Total", "# Min", "# Avg", "# Max", "# Histogram Overflows"))
    }
    assert [c.max_us for c in found.cpus] == summary["Max Latencies"]
    assert (found.min_us, found.max_us) == (min(summary["Min Latencies"]), max(summary["Max Latencies"]))
    assert found.overflows == sum(summary["Histogram Overflows"])
    assert (
        found.samples == sum(b.count for b in found.histogram) + found.overflows == sum(c.samples for c in found.cpus)
    )
    assert found.min_us <= found.avg_us <= found.max_us and found.min_us <= found.p99_us <= found.max_us
    assert found.load == "0.10 0.05 0.01 before, 0.90 0.20 0.05 after" and found.guest_kernel == "6.12"
    assert (found.meaningless, found.void) == ("", "")


def output_of(*columns: dict[int, int]) -> str:
    """What cyclictest would print for these histograms, one a CPU."""
    rows = [f"{us:06} " + "\t".join(f"{c.get(us, 0):06}" for c in columns) for us in range(max(map(max, columns)) + 1)]
    words = {
        "Total": [sum(c.values()) for c in columns],
        "Min Latencies": [min(c) for c in columns],
        "Avg Latencies": [sum(us * n for us, n in c.items()) // sum(c.values()) for c in columns],
        "Max Latencies": [max(c) for c in columns],
        "Histogram Overflows": [0 for _ in columns],
    }
    return "\n".join(
        ["# Histogram", *rows, *(f"# {name}: " + " ".join(f"{n:05}" for n in v) for name, v in words.items())]
    )


def test_the_99th_percentile_is_the_latency_that_one_of_a_hundred_exceeds() -> None:
    assert measured(output_of({3: 99, 80: 1})).p99_us == 3
    assert measured(output_of({3: 98, 80: 2})).p99_us == 80
    both = measured(output_of({2: 50, 9: 49}, {4: 1}))
    assert (both.samples, both.p99_us, both.min_us, both.max_us) == (100, 9, 2, 9)


def test_what_is_beyond_the_end_is_at_most_the_most() -> None:
    text = (
        output_of({3: 90})
        .replace("Histogram Overflows: 00000", "Histogram Overflows: 00010")
        .replace("Max Latencies: 00003", "Max Latencies: 04637")
    )
    found = measured(text)
    assert (found.samples, found.overflows, found.p99_us, found.max_us) == (100, 10, 4637, 4637)


@given(st.dictionaries(st.integers(0, HISTOGRAM_US), st.integers(1, 10**6), min_size=1))
def test_buckets_keep_every_sample_and_its_bound(histogram: dict[int, int]) -> None:
    buckets = condensed(histogram)
    assert sum(b.count for b in buckets) == sum(histogram.values())
    assert [b.upto_us for b in buckets] == sorted({b.upto_us for b in buckets}) and len(buckets) < 90
    for upto in (b.upto_us for b in buckets):
        within = sum(n for us, n in histogram.items() if us <= upto)
        assert within == sum(b.count for b in buckets if b.upto_us <= upto)


@pytest.mark.parametrize(
    "output",
    [
        "",
        "Unable to change scheduling policy!",
        RECORDED.split("# Total")[0],
        RECORDED.replace("# Max Latencies:", "# Max Latencies: 7"),
        RECORDED.replace("000001 ", "000001 1 2 3 "),
        RECORDED.replace("000001 ", "000002 "),
        RECORDED.replace("000001 ", "999999 "),
        "\n".join(
            f"# {n}: 0" for n in ("Total", "Min Latencies", "Avg Latencies", "Max Latencies", "Histogram Overflows")
        ),
        "\n".join(
            f"# {n}:" for n in ("Total", "Min Latencies", "Avg Latencies", "Max Latencies", "Histogram Overflows")
        ),
    ],
)
def test_other_words_are_no_certificate(output: str) -> None:
    with pytest.raises(BadMeasurement):
        measured(output)


@given(st.text())
def test_whatever_a_guest_says_is_figures_or_a_refusal(output: str) -> None:
    with pytest.raises(BadMeasurement):
        measured(output)


def test_a_certificate_is_meaningless_unless_the_guest_runs_on_kvm() -> None:
    assert meaningless("kvm") == ""
    assert "EMULATED" in meaningless("tcg") and meaningless("simulated") and meaningless("")
    assert "EMULATED" in measured(under=replace(UNDER, virtualisation="tcg")).meaningless


def test_a_certificate_is_void_when_what_it_was_measured_under_has_changed() -> None:
    found = measured()
    assert void(found, 3, 7, "6.12.0-rt", (LINE,)) == ""
    assert void(found, 3, 8, "6.12.0-rt", (LINE,)) == "the instance has another placement since"
    assert void(found, 3, 7, "6.13", (LINE,)) == "the host runs kernel 6.13 since, it was measured under 6.12.0-rt"
    broken = replace(LINE, state=LineState.BROKEN, found="always")
    assert void(found, 3, 7, "6.12.0-rt", (broken,)) == "the profile has changed since: thp"
    assert void(found, 3, 7, "6.12.0-rt", (replace(LINE, state=LineState.UNKNOWN),)) == "", "not known is no change"
    other = replace(LINE, name="ksm")
    assert void(found, 3, 7, "6.12.0-rt", (LINE, other)) == "the profile has changed since: ksm"


def test_the_command_measures_as_long_as_was_asked() -> None:
    assert "--duration=30" in arguments(30.0) and arguments(0.2)[0] == "cyclictest" and "--duration=1" in arguments(0.2)
