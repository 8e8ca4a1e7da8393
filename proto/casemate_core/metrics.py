"""Metrics: what is measured, by what name, and the values. Standard library only.

What may live here: families (name, kind, help, labels), the meter that counts, and the rules that names keep. How values
travel is ``casemate_wire.exposition``; each process declares its own families in its module ``metrics``.

Theory of operation. Counters and histograms are kept in a :class:`Meter`, which costs a dictionary look-up and is always
on, whether somebody scrapes or not. Gauges are not kept: they are read off the present state when somebody asks, so that
they cannot be stale. Both come together as :class:`Rows`. What is not known has no row: absent, never 0. A counter without
labels starts at 0 when its process starts, since it is known that nothing was counted yet.

Names follow Prometheus' conventions: base units (seconds, bytes) in the name, ``_total`` for counters and only for them.
Names and labels of the common libvirt exporters are used where the meaning is the same, so that dashboards made for them
work, and so are those of dcgm-exporter, which keep other rules; everything else begins with ``casemate_``. Labels come from
closed sets or from the names of objects, never from sentences.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import Final

#: Seconds: a commit or an fsync is in the first ones, an image in the last.
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
PREFIXES: Final = ("casemate_", "libvirt_")
#: Families that are named by somebody else: their names and labels are his.
FOREIGN: Final = "DCGM_FI_DEV_"


class Kind(StrEnum):
    """How values of a family go on: up only, up and down, or as a distribution."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    """Everything that is known of a metric but its values. ``buckets`` are upper bounds, ascending, without infinity."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of a histogram: for each bucket how many were at most its bound (the last is infinity), and their sum."""

    cumulated: tuple[int, ...]
    sum: float


@dataclass(frozen=True, slots=True)
class Rows:
    """A family with the values that it has now, by the values of its labels."""

    family: Family
    values: Mapping[tuple[str, ...], float | Distribution]


def counter(name: str, help: str, *labels: str) -> Family:
    """A family that only goes up."""
    return Family(name, Kind.COUNTER, help, labels)


def gauge(name: str, help: str, *labels: str) -> Family:
    """A family that goes up and down."""
    return Family(name, Kind.GAUGE, help, labels)


def histogram(name: str, help: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Family:
    """A family of durations."""
    return Family(name, Kind.HISTOGRAM, help, labels, buckets)


@dataclass(slots=True)
class _Counts:
    buckets: list[int]
    sum: float = 0.0


@dataclass(slots=True)
class Meter:
    """Counters and histograms of one process or host. For one thread: that of the event loop."""

    _values: dict[Family, dict[tuple[str, ...], float]] = field(default_factory=dict)
    _counts: dict[Family, dict[tuple[str, ...], _Counts]] = field(default_factory=dict)

    @classmethod
    def of(cls, families: Iterable[Family]) -> "Meter":
        """A meter on which counters without labels stand at 0."""
        meter = cls()
        for family in families:
            if family.kind is Kind.COUNTER and not family.labels:
                meter.add(family, by=0)
        return meter

    def add(self, family: Family, *labels: str, by: float = 1) -> None:
        """Count."""
        if by < 0 or family.kind is not Kind.COUNTER or len(labels) != len(family.labels):
            raise ValueError(f"{family.name} is not counted with {labels} by {by}")
        values = self._values.setdefault(family, {})
        values[labels] = values.get(labels, 0) + by

    def observe(self, family: Family, value: float, *labels: str) -> None:
        """Take one value of a histogram."""
        if family.kind is not Kind.HISTOGRAM or len(labels) != len(family.labels):
            raise ValueError(f"{family.name} does not take {value} with {labels}")
        counts = self._counts.setdefault(family, {})
        if labels not in counts:
            counts[labels] = _Counts([0] * (len(family.buckets) + 1))
        counts[labels].buckets[bisect_left(family.buckets, value)] += 1
        counts[labels].sum += value

    def value(self, family: Family, *labels: str) -> float:
        """What a counter stands at; 0 where it never counted."""
        return self._values.get(family, {}).get(labels, 0)

    def rows(self) -> list[Rows]:
        """Everything, as it stands now."""
        found = [Rows(family, dict(values)) for family, values in self._values.items()]
        for family, counts in self._counts.items():
            shown = {k: Distribution(tuple(accumulate(c.buckets)), c.sum) for k, c in counts.items()}
            found.append(Rows(family, shown))
        return found


def with_label(rows: Iterable[Rows], label: str, value: str) -> Iterator[Rows]:
    """The same rows, told apart from another's by one more label."""
    for each in rows:
        family = each.family
        wider = Family(family.name, family.kind, family.help, (label, *family.labels), family.buckets)
        yield Rows(wider, {(value, *labels): number for labels, number in each.values.items()})


def joined(rows: Iterable[Rows]) -> list[Rows]:
    """One entry for each family, by name, whatever the number of entries that came in."""
    found: dict[Family, dict[tuple[str, ...], float | Distribution]] = {}
    for each in rows:
        found.setdefault(each.family, {}).update(each.values)
    return [Rows(family, values) for family, values in sorted(found.items(), key=lambda item: item[0].name)]


_KIND_OF_DRIFT: Final = re.compile(r"(?:[A-Z]\d+ )?([A-Z][A-Za-z]{1,40}):", re.ASCII)


def drift_kind(line: str) -> str:
    """The kind of a line of drift, ``A2 ClaimMismatch: …`` or ``GuardMissing: …``; ``Other`` where it has no such form."""
    match = _KIND_OF_DRIFT.match(line)
    return match[1] if match else "Other"


# --- the rules that names keep ----------------------------------------------------------------------------------------

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*\Z", re.ASCII)
_RESERVED_ENDS: Final = ("_count", "_sum", "_bucket", "_created", "_info_total")
_RESERVED_LABELS: Final = frozenset({"le", "quantile", "job", "instance", "__name__"})
#: Words of other units than the base ones, and abbreviations of them.
_WRONG_UNITS: Final = frozenset(
    {"ms", "us", "ns", "sec", "secs", "milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days"}
    | {"kb", "mb", "gb", "kib", "mib", "gib", "kilobytes", "megabytes", "gigabytes", "bits", "percent", "milli"}
)
_KIND_WORDS: Final = frozenset({"counter", "gauge", "histogram", "summary"})


def problems(families: Iterable[Family]) -> list[str]:
    """Every rule of naming that a family breaks, in words; those that ``promtool check metrics`` knows are among them."""
    found: list[str] = []
    seen: set[str] = set()
    for family in families:
        found += [f"{family.name}: {problem}" for problem in _problems(family)]
        if family.name in seen:
            found.append(f"{family.name}: is declared twice")
        seen.add(family.name)
    return found


def _problems(family: Family) -> Iterator[str]:
    name, words = family.name, family.name.split("_")
    if name.startswith(FOREIGN):
        if not family.help.endswith("."):
            yield "has no sentence that says what it is"
        return
    if not _NAME.match(name):
        yield "is not in lower_snake_case"
    if not name.startswith(PREFIXES):
        yield f"begins with none of {', '.join(PREFIXES)}"
    if not family.help or family.help != family.help.strip() or not family.help.endswith("."):
        yield "has no sentence that says what it is"
    if (family.kind is Kind.COUNTER) != name.endswith("_total"):
        yield "_total is for counters, and for all of them"
    if name.endswith(_RESERVED_ENDS):
        yield "ends as the parts of a histogram do"
    if wrong := _WRONG_UNITS.intersection(words):
        yield f"{', '.join(sorted(wrong))}: not a base unit"
    if wrong := _KIND_WORDS.intersection(words):
        yield f"{', '.join(sorted(wrong))}: the kind is no part of a name"
    if family.kind is Kind.HISTOGRAM and (not name.endswith(("_seconds", "_bytes")) or not family.buckets):
        yield "a histogram names its unit last, and has buckets"
    if list(family.buckets) != sorted(set(family.buckets)):
        yield "buckets do not ascend"
    for label in family.labels:
        if not _NAME.match(label) or label in _RESERVED_LABELS:
            yield f"label {label} is not in lower_snake_case, or is one of Prometheus' own"
    if len(set(family.labels)) != len(family.labels):
        yield "a label is there twice"
