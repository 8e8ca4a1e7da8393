"""What libvirt counts is parsed whatever it says."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from casemate_agent.domain.stats import parse_stats
from casemate_agent.drivers.ports import DomainPhase

KEYS = [
    "cpu.time", "vcpu.current", "vcpu.maximum", "vcpu.0.time", "vcpu.0.wait", "balloon.current", "balloon.rss",
    "block.count", "block.0.name", "block.0.path", "block.0.rd.bytes", "block.0.backingIndex", "net.count", "net.0.name",
    "net.0.rx.bytes", "net.0.tx.drop",
]  # fmt: skip
VALUES = st.one_of(st.integers(), st.text(max_size=5), st.booleans(), st.floats(), st.none())


@given(st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_no_record_breaks_the_parser_and_every_number_is_a_count(record: dict[str, Any]) -> None:
    stats = parse_stats("u", "n", DomainPhase.RUNNING, record)
    numbers = [stats.cpu_time_ns, stats.vcpus, stats.memory_bytes, stats.max_memory_bytes, *stats.memory.values()]
    numbers += [value for disk in stats.blocks for value in (disk.read_bytes, disk.read_requests)]
    numbers += [value for interface in stats.interfaces for value in interface.counts.values()]
    assert all(number is None or (type(number) is int and number >= 0) for number in numbers)
    assert all(disk.name for disk in stats.blocks)


def test_a_count_beyond_belief_is_not_followed() -> None:
    stats = parse_stats(
        "u", "n", DomainPhase.RUNNING, {"block.count": 2**40, "net.count": 2**40, "vcpu.maximum": 2**40}
    )
    assert (stats.blocks, stats.interfaces, stats.vcpu_stats) == ((), (), ())
