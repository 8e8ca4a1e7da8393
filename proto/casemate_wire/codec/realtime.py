"""Lines of the real-time profile and certificates ⇄ messages, for operators and for hosts alike.

What comes from a host is bounded here: texts by their length, lists by their number.
"""

from collections.abc import Iterable

from casemate_core.spec.realtime import Bucket, Certificate, Latency, LineState, ProfileLine
from casemate_wire.codec.basics import seconds, timestamp
from casemate_wire.v1 import realtime_pb2 as pb

MAX_LINES = 256
MAX_CPUS = 1024
MAX_BUCKETS = 1024
_SHORT, _LONG = 256, 1024


def line_to_message(line: ProfileLine) -> pb.ProfileLine:
    """One line."""
    return pb.ProfileLine(
        name=line.name,
        state=line.state.value,
        wanted=line.wanted,
        found=line.found,
        source=line.source,
        remedy=line.remedy,
    )


def lines_from_messages(messages: Iterable[pb.ProfileLine]) -> tuple[ProfileLine, ...]:
    """Lines as a host tells them. Raises ValueError for a state that there is not."""
    return tuple(
        ProfileLine(
            m.name[:_SHORT], LineState(m.state), m.wanted[:_LONG], m.found[:_LONG], m.source[:_SHORT], m.remedy[:_LONG]
        )
        for m in list(messages)[:MAX_LINES]
    )


def certificate_to_message(c: Certificate) -> pb.Certificate:
    """All of it."""
    return pb.Certificate(
        order=c.order,
        measured=timestamp(c.measured_s),
        duration_s=c.duration_s,
        tool=c.tool,
        samples=c.samples,
        min_us=c.min_us,
        avg_us=c.avg_us,
        p99_us=c.p99_us,
        max_us=c.max_us,
        overflows=c.overflows,
        cpus=[
            pb.Latency(cpu=x.cpu, samples=x.samples, min_us=x.min_us, avg_us=x.avg_us, max_us=x.max_us) for x in c.cpus
        ],
        histogram=[pb.Bucket(upto_us=b.upto_us, count=b.count) for b in c.histogram],
        load=c.load,
        guest_kernel=c.guest_kernel,
        host_kernel=c.host_kernel,
        virtualisation=c.virtualisation,
        placement_epoch=c.placement_epoch,
        placement_generation=c.placement_generation,
        profile=[line_to_message(line) for line in c.profile],
        meaningless=c.meaningless,
        void=c.void,
    )


def certificate_from_message(m: pb.Certificate) -> Certificate:
    """A certificate as a host tells it."""
    return Certificate(
        order=m.order[:_SHORT],
        measured_s=seconds(m.measured),
        duration_s=m.duration_s,
        tool=m.tool[:_SHORT],
        samples=m.samples,
        min_us=m.min_us,
        avg_us=m.avg_us,
        p99_us=m.p99_us,
        max_us=m.max_us,
        overflows=m.overflows,
        cpus=tuple(Latency(x.cpu, x.samples, x.min_us, x.avg_us, x.max_us) for x in m.cpus[:MAX_CPUS]),
        histogram=tuple(Bucket(b.upto_us, b.count) for b in m.histogram[:MAX_BUCKETS]),
        load=m.load[:_SHORT],
        guest_kernel=m.guest_kernel[:_SHORT],
        host_kernel=m.host_kernel[:_SHORT],
        virtualisation=m.virtualisation[:_SHORT],
        placement_epoch=m.placement_epoch,
        placement_generation=m.placement_generation,
        profile=lines_from_messages(m.profile),
        meaningless=m.meaningless[:_LONG],
        void=m.void[:_LONG],
    )
