"""Which hosts a request may go to by labels, taints and neighbours. PURE.

May live here: node selectors, tolerations, affinity between instances, and the domains of labels. Amounts are not looked
at here; policies come as masks that are made elsewhere.

Theory of operation. What depends on hosts alone (selectors, taints, the domain of a label) is computed once for each
distinct question and kept until a host's labels or taints change. What depends on instances is counted: for each question
"where are instances with these labels" a counter by host is kept up as instances come and go, so that an affinity rule is
one look at a small array. Required rules to stay apart hold in both directions: an instance that asks for distance keeps
later ones away, too.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from casemate_core.spec.environment import Affinity, Toleration
from casemate_core.spec.fleet import Taint
from casemate_manager.columns import FleetColumns

NO_SCHEDULE, PREFER_NO_SCHEDULE = "NoSchedule", "PreferNoSchedule"

#: The domain that is the host itself.
HOST_DOMAIN = "host"

#: Distinct questions kept; the one asked longest ago is dropped beyond it.
MAX_KEPT = 256

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Instance:
    """A placed instance, as constraints see it."""

    uid: str
    host: str
    labels: Labels
    group: str = ""
    apart: tuple[Affinity, ...] = ()


def tolerated(taint: Taint, tolerations: tuple[Toleration, ...]) -> bool:
    """Whether one of the tolerations covers the taint (the rules of Kubernetes, "Taints and Tolerations")."""
    for t in tolerations:
        if t.effect and t.effect != taint.effect:
            continue
        if t.key and t.key != taint.key:
            continue
        if t.operator == "Exists" or not t.key or t.value == taint.value:
            return True
    return False


@dataclass(slots=True)
class _Domain:
    """Values of a label by row: ``number`` (N,) int64, -1 where a host lacks the label; ``count`` of values."""

    number: NDArray[np.int64]
    count: int


@dataclass(slots=True)
class Constraints:
    """Masks by row, and the counters behind affinity. Changed only by the scheduler that owns it."""

    columns: FleetColumns
    _instances: dict[str, Instance] = field(default_factory=dict)
    _version: tuple[int, int] = (-1, -1)
    _static: dict[object, tuple[NDArray[np.bool_], NDArray[np.float64] | None]] = field(default_factory=dict)
    _everything: set[int] = field(default_factory=set)
    _domains: dict[str, _Domain] = field(default_factory=dict)
    _matches: dict[Labels, Counter[str]] = field(default_factory=dict)
    _apart: dict[tuple[Labels, str], Counter[str]] = field(default_factory=dict)
    _groups: dict[str, Counter[str]] = field(default_factory=dict)

    # --- hosts -----------------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        now = (self.columns.layout, self.columns.meta_version)
        if self._version != now:
            self._version = now
            self._static.clear()
            self._everything.clear()
            self._domains.clear()

    def hosts(
        self, selector: Mapping[str, str], tolerations: tuple[Toleration, ...]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64] | None]:
        """(rows that selector and taints allow, dislike by row from taints that only prefer; None where there is none)."""
        self._refresh()
        key = (frozenset(selector.items()), tolerations)
        kept = self._static.get(key)
        if kept is None:
            allowed = self.columns.available.copy()
            dislike = np.zeros(len(allowed))
            for row in self.columns.live_rows():
                labels, taints = row.view.labels, row.view.taints
                if any(labels.get(k) != v for k, v in selector.items()):
                    allowed[row.number] = False
                for taint in taints:
                    if not tolerated(taint, tolerations):
                        if taint.effect == NO_SCHEDULE:
                            allowed[row.number] = False
                        else:
                            dislike[row.number] += 1.0
            kept = (allowed, dislike if dislike.any() else None)
            if len(self._static) >= MAX_KEPT:
                self._everything.discard(id(self._static.pop(next(iter(self._static)))[0]))
            self._static[key] = kept
            if np.array_equal(allowed, self.columns.live):
                self._everything.add(id(allowed))
        return kept

    def is_everything(self, allowed: NDArray[np.bool_]) -> bool:
        """Whether ``allowed`` is a kept mask that excludes no host there is: cheap, may say no where it could say yes."""
        return id(allowed) in self._everything

    def domain(self, label: str) -> _Domain:
        """Numbers of the values of a host label; every host is its own domain for ``host``."""
        self._refresh()
        found = self._domains.get(label)
        if found is None:
            number = np.full(len(self.columns.available), -1, dtype=np.int64)
            values: dict[str, int] = {}
            for row in self.columns.live_rows():
                value = row.view.name if label == HOST_DOMAIN else row.view.labels.get(label)
                if value is not None:
                    number[row.number] = values.setdefault(value, len(values))
            found = self._domains[label] = _Domain(number, len(values))
        return found

    # --- instances -------------------------------------------------------------------------------------------------------

    def add(self, instance: Instance) -> None:
        """An instance has been placed."""
        old = self._instances.get(instance.uid)
        if old is not None:
            self._count(old, -1)
        self._instances[instance.uid] = instance
        self._count(instance, 1)

    def remove(self, uid: str, host: str) -> None:
        """An instance has gone from a host; nothing where it was never told of, or has been told of elsewhere since."""
        instance = self._instances.get(uid)
        if instance is not None and instance.host == host:
            del self._instances[uid]
            self._count(instance, -1)

    def _count(self, instance: Instance, sign: int) -> None:
        for match, rows in self._matches.items():
            if match <= instance.labels:
                _bump(rows, instance.host, sign)
        if instance.group:
            _bump(self._groups.setdefault(instance.group, Counter()), instance.host, sign)
            if not self._groups[instance.group]:
                del self._groups[instance.group]
        for rule in instance.apart:
            key = (frozenset(rule.match.items()), rule.topology)
            _bump(self._apart.setdefault(key, Counter()), instance.host, sign)
            if not self._apart[key]:
                del self._apart[key]

    def _where(self, match: Labels) -> Counter[str]:
        rows = self._matches.get(match)
        if rows is None:
            rows = Counter(i.host for i in self._instances.values() if match <= i.labels)
            if len(self._matches) >= MAX_KEPT:
                self._matches.pop(next(iter(self._matches)))
            self._matches[match] = rows
        return rows

    def _in_domains(self, rows: Counter[str], label: str) -> NDArray[np.float64]:
        """How many of ``rows`` are in each row's domain (N,); -1 where a host has no such label."""
        domain = self.domain(label)
        counts = np.zeros(domain.count + 1)
        self._add_up(counts, domain, rows)
        counts[-1] = -1.0
        out: NDArray[np.float64] = counts[domain.number]
        return out

    def _add_up(self, counts: NDArray[np.float64], domain: _Domain, hosts: Counter[str]) -> None:
        for host, count in hosts.items():
            if host in self.columns:
                counts[domain.number[self.columns.row(host).number]] += count

    def neighbours(
        self, labels: Labels, affinity: tuple[Affinity, ...]
    ) -> tuple[NDArray[np.bool_] | None, NDArray[np.float64] | None]:
        """(rows that required rules allow, liking by row from preferred ones); None where no rule speaks."""
        allowed: NDArray[np.bool_] | None = None
        liking: NDArray[np.float64] | None = None
        for rule in affinity:
            match = frozenset(rule.match.items())
            there = self._in_domains(self._where(match), rule.topology)
            if rule.required:
                if rule.kind == "near":
                    # The first of a group that wants to be near to itself may go anywhere with the label.
                    alone = match <= labels and not self._where(match)
                    keep = there >= 0 if alone else there > 0
                else:
                    keep = there <= 0
                allowed = keep if allowed is None else allowed & keep
            else:
                value = np.minimum(np.maximum(there, 0.0), 1.0) * (1.0 if rule.kind == "near" else -1.0)
                liking = value if liking is None else liking + value
        for (match, topology), rows in self._apart.items():
            if match <= labels:
                keep = self._in_domains(rows, topology) <= 0
                allowed = keep if allowed is None else allowed & keep
        return allowed, liking

    def group_counts(self, group: str, label: str) -> NDArray[np.float64]:
        """Instances of a group in each row's domain (N,); hosts without the label count as one more domain."""
        domain = self.domain(label)
        counts = np.zeros(domain.count + 1)
        self._add_up(counts, domain, self._groups.get(group, Counter()))
        out: NDArray[np.float64] = counts[domain.number]
        return out


def _bump(hosts: Counter[str], host: str, sign: int) -> None:
    hosts[host] += sign
    if not hosts[host]:
        del hosts[host]
