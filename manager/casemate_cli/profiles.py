"""The real-time profile and the certificate of an object, as lines for people."""

from collections.abc import Iterator
from typing import Any

from casemate_cli.columns import NONE, age

#: Width of the longest bar of a histogram.
BAR = 40
_WORDS = {"held": "held", "broken": "BROKEN", "not-applicable": "n/a", "unknown": "unknown"}


def profile(lines: Any) -> Iterator[str]:
    """One line each: name, whether it holds, what was found and where; wanted and remedy of what is broken below it."""
    for line in lines:
        yield f"{line.name:<20}{_WORDS.get(line.state, line.state):<9}{line.found or NONE}  ({line.source})"
        if line.state == "broken":
            yield f"{'':<20}{'':<9}wanted {line.wanted}" + (f": {line.remedy}" if line.remedy else "")


def certificate(c: Any) -> Iterator[str]:
    """The figures first, and before them why they do not count, where they do not."""
    if c.meaningless:
        yield f"MEANINGLESS: {c.meaningless}"
    if c.void:
        yield f"VOID: {c.void}"
    figures = f"min {c.min_us}, avg {c.avg_us}, p99 {c.p99_us}, max {c.max_us} µs"
    yield f"{figures} in {c.samples} samples over {c.duration_s:g} s, {age(c.measured)} ago"
    yield f"measured with {c.tool}"
    kernels = f"guest kernel {c.guest_kernel or NONE}, host kernel {c.host_kernel or NONE}"
    yield f"{kernels}, {c.virtualisation or NONE}; load {c.load or NONE}"
    for cpu in c.cpus:
        yield f"CPU {cpu.cpu:<4}min {cpu.min_us}, avg {cpu.avg_us}, max {cpu.max_us} µs in {cpu.samples} samples"
    most = max((bucket.count for bucket in c.histogram), default=0)
    for bucket in c.histogram:
        yield f"≤{bucket.upto_us:>6} µs {bucket.count:>10}  {'#' * -(-BAR * bucket.count // most)}"
    if c.overflows:
        yield f"beyond    {c.overflows:>10}"
    broken = sum(line.state == "broken" for line in c.profile)
    yield f"profile when it was measured: {len(c.profile)} lines, {broken} broken"
