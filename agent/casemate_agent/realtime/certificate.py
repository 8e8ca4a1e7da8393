"""A latency measured in a guest: the program that is run, its words as figures, and the certificate of them. PURE.

What may live here: the arguments of cyclictest, the reading of its output, and what makes a certificate meaningless. Running
it is :mod:`casemate_agent.execute.measure`'s; the types are the core's (``casemate_core.spec.realtime``).

Theory of operation. cyclictest (of rt-tests) sets a timer on each CPU of the guest, at a real-time priority, and measures
by how much later than asked it is woken. It prints a histogram in whole microseconds with a column for each CPU, and for each
the number of samples, the least, the mean and the most; the last three are exact also beyond the histogram's end. What a
guest prints is a guest's word: it is read strictly, and bounded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from casemate_core.errors import MachineError
from casemate_core.spec.realtime import Bucket, Certificate, Latency, ProfileLine

#: End of the histogram in microseconds; what is beyond is counted, and its most is known.
HISTOGRAM_US = 2000
#: Above interrupt threads of a PREEMPT_RT guest (50), below its watchdogs (99).
PRIORITY = 95
INTERVAL_US = 1000
#: Most that is read of its output: 2000 rows with a column for each of 512 CPUs.
MAX_OUTPUT_BYTES = 8 * 1024 * 1024
MAX_CPUS = 1024
#: Rows that are kept one by one; above, each bucket is a quarter wider than the one before.
EXACT_US = 64
#: Remedy of a guest that lacks the program.
MISSING = (
    "cyclictest is not in the guest: use an image that has the package rt-tests (docs/realtime.md says how to make one),"
    " or install it in the guest"
)
_ROW = re.compile(r"(\d{6,})((?:\s+\d+)+)\Z", re.ASCII)
_SUMMARY = re.compile(
    r"# (Total|Min Latencies|Avg Latencies|Max Latencies|Histogram Overflows):((?:\s+\d+)*)\s*\Z", re.ASCII
)


class BadMeasurement(MachineError):
    """The guest's program did not say what it says when it has measured."""

    reason = "BadMeasurement"


@dataclass(frozen=True, slots=True)
class Under:
    """What a measurement is made under: the certificate's basis."""

    placement_epoch: int
    placement_generation: int
    host_kernel: str
    virtualisation: str
    profile: tuple[ProfileLine, ...] = ()


@dataclass(frozen=True, slots=True)
class Told:
    """What the guest said: cyclictest's output, its kernel, its load before and after."""

    output: str
    kernel: str = ""
    load_before: str = ""
    load_after: str = ""


def arguments(duration_s: float) -> tuple[str, ...]:
    """The command to run in the guest."""
    return (
        "cyclictest",
        "--quiet",
        "--mlockall",
        "--smp",
        f"--priority={PRIORITY}",
        f"--interval={INTERVAL_US}",
        f"--duration={max(1, round(duration_s))}",
        f"--histogram={HISTOGRAM_US}",
    )


def certificate(order: str, duration_s: float, now_s: float, told: Told, under: Under) -> Certificate:
    """The certificate of what the guest said. Raises BadMeasurement."""
    rows, summary = _read(told.output)
    totals = summary["Total"]
    count = len(totals)
    if not count or count > MAX_CPUS or any(len(column) != count for column in summary.values()):
        raise BadMeasurement("cyclictest's summary has not one column for each CPU")
    if any(len(row) != count for row in rows.values()):
        raise BadMeasurement("cyclictest's histogram has not one column for each CPU")
    overflows = summary["Histogram Overflows"]
    within = [sum(row[cpu] for row in rows.values()) for cpu in range(count)]
    samples = sum(within) + sum(overflows)
    if not samples:
        raise BadMeasurement("cyclictest has measured nothing: it was given up before its first sample")
    cpus = tuple(
        Latency(
            cpu, within[cpu] + overflows[cpu], *(summary[f"{what} Latencies"][cpu] for what in ("Min", "Avg", "Max"))
        )
        for cpu in range(count)
    )
    measured = [each for each in cpus if each.samples]
    histogram = {us: sum(row) for us, row in rows.items() if any(row)}
    return Certificate(
        order=order,
        measured_s=now_s,
        duration_s=duration_s,
        tool=" ".join(arguments(duration_s)),
        samples=samples,
        min_us=min(each.min_us for each in measured),
        avg_us=round(sum(each.avg_us * each.samples for each in measured) / samples),
        p99_us=_percentile(histogram, samples, 99, max(each.max_us for each in measured)),
        max_us=max(each.max_us for each in measured),
        overflows=sum(overflows),
        cpus=cpus,
        histogram=condensed(histogram),
        load=f"{told.load_before} before, {told.load_after} after" if told.load_before or told.load_after else "",
        guest_kernel=told.kernel,
        host_kernel=under.host_kernel,
        virtualisation=under.virtualisation,
        placement_epoch=under.placement_epoch,
        placement_generation=under.placement_generation,
        profile=under.profile,
        meaningless=meaningless(under.virtualisation),
    )


def meaningless(virtualisation: str) -> str:
    """Why figures measured under it say nothing of latency."""
    match virtualisation:
        case "kvm":
            return ""
        case "tcg":
            return "the guest is EMULATED (TCG): its processors run as threads of a program, its figures are that program's"
        case "simulated":
            return "the guest is simulated: nothing was measured at all"
    return "it is not known whether the guest runs on KVM"


def condensed(histogram: Mapping[int, int]) -> tuple[Bucket, ...]:
    """The histogram in a few dozen buckets: one by one up to `EXACT_US`, then wider and wider; empty ones are left out."""
    buckets: list[Bucket] = []
    upto, count = 0, 0
    for us in sorted(histogram):
        while us > upto:
            if count:
                buckets.append(Bucket(upto, count))
                count = 0
            upto = upto + 1 if upto < EXACT_US else upto + upto // 4
        count += histogram[us]
    return (*buckets, Bucket(upto, count)) if count else tuple(buckets)


def _percentile(histogram: Mapping[int, int], samples: int, percent: int, most_us: int) -> int:
    """The least latency that so many per cent of the samples do not exceed; the most of all where it is beyond the end."""
    rank, seen = -(-samples * percent // 100), 0
    for us in sorted(histogram):
        seen += histogram[us]
        if seen >= rank:
            return us
    return most_us


def _read(output: str) -> tuple[dict[int, list[int]], dict[str, list[int]]]:
    rows: dict[int, list[int]] = {}
    summary: dict[str, list[int]] = {}
    for line in output.splitlines():
        if (row := _ROW.match(line.strip())) is not None:
            us = int(row[1])
            if us > HISTOGRAM_US or us in rows:
                raise BadMeasurement(f"cyclictest's histogram has a row {us}, which it was not asked for, or twice")
            rows[us] = list(map(int, row[2].split()))
        elif (told := _SUMMARY.match(line)) is not None:
            summary[told[1]] = list(map(int, told[2].split()))
    missing = {"Total", "Min Latencies", "Avg Latencies", "Max Latencies", "Histogram Overflows"} - summary.keys()
    if missing:
        raise BadMeasurement(f"cyclictest did not say {', '.join(sorted(missing))}: {output.strip()[-200:]!r}")
    return rows, summary
