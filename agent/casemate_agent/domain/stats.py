"""What libvirt counts of a domain, as values. PURE.

Reads one record of ``virConnectGetAllDomainStats``: a flat mapping in which lists are written as ``block.count``,
``block.0.name``. Which keys are there depends on libvirt, on QEMU, on whether the domain runs and on what its guest tells;
what is not there is None, never 0, and what is not a number of its kind is not there.
"""

from collections.abc import Mapping
from typing import Any, Final

from casemate_agent.drivers.ports import BlockStats, DomainPhase, DomainStats, InterfaceStats, VcpuStats

#: More devices or vCPUs than any domain has; a count beyond it is not believed.
MOST: Final = 4096
KIB: Final = 1024
#: Name in ours -> key of libvirt, in KiB.
_MEMORY: Final = {
    "rss": "balloon.rss",
    "unused": "balloon.unused",
    "available": "balloon.available",
    "usable": "balloon.usable",
    "swap_in": "balloon.swap_in",
    "swap_out": "balloon.swap_out",
}


def parse_stats(uuid: str, name: str, phase: DomainPhase, record: Mapping[str, Any]) -> DomainStats:
    """The statistics of one domain."""
    return DomainStats(
        uuid=uuid,
        name=name,
        phase=phase,
        cpu_time_ns=_number(record, "cpu.time"),
        vcpus=_number(record, "vcpu.current"),
        memory_bytes=_kib(record, "balloon.current"),
        max_memory_bytes=_kib(record, "balloon.maximum"),
        memory={ours: value for ours, key in _MEMORY.items() if (value := _kib(record, key)) is not None},
        vcpu_stats=tuple(
            VcpuStats(
                number,
                _number(record, f"vcpu.{number}.time"),
                _number(record, f"vcpu.{number}.wait"),
                _number(record, f"vcpu.{number}.delay"),
            )
            for number in range(_count(record, "vcpu.maximum"))
            if f"vcpu.{number}.time" in record
        ),
        blocks=tuple(
            BlockStats(
                _text(record, f"block.{index}.name"),
                _text(record, f"block.{index}.path"),
                read_bytes=_number(record, f"block.{index}.rd.bytes"),
                read_requests=_number(record, f"block.{index}.rd.reqs"),
                write_bytes=_number(record, f"block.{index}.wr.bytes"),
                write_requests=_number(record, f"block.{index}.wr.reqs"),
            )
            for index in range(_count(record, "block.count"))
            if _text(record, f"block.{index}.name")
        ),
        interfaces=tuple(
            InterfaceStats(
                _text(record, f"net.{index}.name"),
                {
                    f"{ours}_{what}": value
                    for ours, way in (("receive", "rx"), ("transmit", "tx"))
                    for what, key in (("bytes", "bytes"), ("packets", "pkts"), ("errors", "errs"), ("drops", "drop"))
                    if (value := _number(record, f"net.{index}.{way}.{key}")) is not None
                },
            )
            for index in range(_count(record, "net.count"))
            if _text(record, f"net.{index}.name")
        ),
    )


def _number(record: Mapping[str, Any], key: str) -> int | None:
    value = record.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _kib(record: Mapping[str, Any], key: str) -> int | None:
    value = _number(record, key)
    return None if value is None else value * KIB


def _count(record: Mapping[str, Any], key: str) -> int:
    value = _number(record, key) or 0
    return value if value <= MOST else 0


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    return value if isinstance(value, str) else ""
