"""What a host and an instance need for real time, line by line; and the certificate of what was measured under it.

Vocabulary of agent and manager; nothing here reads anything or decides. A line says what was wanted, what was found, and where
it was read: never what was asked for once. A certificate carries the lines as they were when it was measured, and what it was
measured under (its *basis*): where that has changed since, it is void, and says why.
"""

from dataclasses import dataclass
from enum import StrEnum


class LineState(StrEnum):
    """Whether a line of the profile holds."""

    HELD = "held"
    BROKEN = "broken"
    NOT_APPLICABLE = "not-applicable"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ProfileLine:
    """One requirement, as it was read back. ``source``: the file, or what else was asked. ``remedy`` where it is broken."""

    name: str
    state: LineState
    wanted: str
    found: str
    source: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Latency:
    """What a measurement found on one CPU of the guest, in microseconds."""

    cpu: int
    samples: int
    min_us: int
    avg_us: int
    max_us: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """``count`` samples of at most ``upto_us`` microseconds that are in no bucket before."""

    upto_us: int
    count: int


@dataclass(frozen=True, slots=True)
class Certificate:
    """A latency that was measured in a guest, and under what.

    ``order`` is the operation that it answers. ``meaningless`` says why its figures say nothing about latency (emulation),
    ``void`` why they no longer hold; each is empty where it is not so.
    """

    order: str
    measured_s: float
    duration_s: float
    tool: str
    samples: int
    min_us: int
    avg_us: int
    p99_us: int
    max_us: int
    #: Samples beyond the histogram's end; where there are any, ``max_us`` is still exact.
    overflows: int = 0
    cpus: tuple[Latency, ...] = ()
    histogram: tuple[Bucket, ...] = ()
    #: Load of the guest before and after, as its kernel tells it.
    load: str = ""
    guest_kernel: str = ""
    host_kernel: str = ""
    virtualisation: str = ""
    placement_epoch: int = 0
    placement_generation: int = 0
    profile: tuple[ProfileLine, ...] = ()
    meaningless: str = ""
    void: str = ""


def void(certificate: Certificate, epoch: int, generation: int, kernel: str, lines: tuple[ProfileLine, ...]) -> str:
    """Why a certificate no longer says anything about an instance that is there now; empty where it does."""
    if (certificate.placement_epoch, certificate.placement_generation) != (epoch, generation):
        return "the instance has another placement since"
    if certificate.host_kernel != kernel:
        return f"the host runs kernel {kernel} since, it was measured under {certificate.host_kernel}"
    before = {line.name: line.state for line in certificate.profile}
    now = {line.name: line.state for line in lines}
    # A line that is not known at the moment is no change: it is told when it is known again.
    worse = [n for n, s in now.items() if LineState.UNKNOWN not in (s, before.get(n)) and before.get(n) != s]
    if worse:
        return f"the profile has changed since: {', '.join(worse[:5])}"
    return ""
