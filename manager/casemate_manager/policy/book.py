"""Policies, resolved: which speak of an environment, and what they mean for every host. PURE.

May live here: matching, precedence, and the masks made of rules. How an expression is evaluated is behind ``Language``.

Precedence, where several policies match an environment:

* ``require``: all rules of all of them must be true for a host.
* ``prefer``: the weights of all rules that are true add up.
* ``strategy``, ``spread_by``, ``cpu_overcommit``, ``memory_overcommit``: each from the policy of the highest precedence that
  sets it; of equal ones from the one with the earlier name.
* ``reserve``: a host that any policy reserves is taken only by environments that one of the reserving policies matches.

A rule that cannot be evaluated denies, and the reason says so: a ``require`` or a ``reserve`` denies that host, a ``match``
denies every host; a ``prefer`` adds nothing.

Theory of operation. Rules see facts that change only with a host's labels, taints or picture. So each rule is evaluated once
for each host and each such change, and kept as arrays by row, from which policies are put together by ``and`` and ``+``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from casemate_core.fit import Overcommit
from casemate_core.spec.fleet import Policy
from casemate_manager.columns import FleetColumns, HostView
from casemate_manager.policy.expressions import BadExpression, EvaluationFailed, Language, Program
from casemate_manager.policy.facts import environment_facts, host_facts
from casemate_manager.scheduler.request import PACK, PlacementPolicy

#: Environments whose policies are remembered; the one asked longest ago is dropped beyond it.
MAX_ENVIRONMENTS = 4096

FALSE, TRUE, FAILED = 0, 1, 2


@dataclass(slots=True)
class _Rule:
    """One expression over hosts. ``value`` by row: FALSE, TRUE or FAILED; ``error``: the first failure, for people."""

    program: Program | None
    error: str = ""
    seen: dict[str, tuple[HostView, int]] = field(default_factory=dict)
    version: tuple[int, int] = (-1, -1)
    value: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, dtype=np.int8))


class PolicyBook:
    """The policies in force. Give it a new tuple whenever one changes; rules that stay the same keep their masks."""

    def __init__(self, language: Language) -> None:
        self._language = language
        self._policies: tuple[Policy, ...] = ()
        self._rules: dict[str, _Rule] = {}
        self._matchers: dict[str, _Rule] = {}
        self._matched: dict[tuple[str, str, frozenset[tuple[str, str]]], tuple[tuple[Policy, ...], str]] = {}
        self._resolved: dict[tuple[tuple[str, ...], str], tuple[tuple[int, int], PlacementPolicy]] = {}

    @property
    def policies(self) -> tuple[Policy, ...]:
        """In order of precedence: what wins comes first."""
        return self._policies

    def set(self, policies: Iterable[Policy]) -> None:
        """Replace the policies."""
        self._policies = tuple(sorted(policies, key=lambda p: (-p.spec.precedence, p.meta.name)))
        used = {text for p in self._policies for text in _host_rules(p)}
        self._rules = {text: rule for text, rule in self._rules.items() if text in used}
        self._matched.clear()
        self._resolved.clear()

    def resolve(self, columns: FleetColumns, name: str, tenant: str, labels: Mapping[str, str]) -> PlacementPolicy:
        """What the policies say of an environment, on these columns."""
        matching, failed = self._matching(name, tenant, labels)
        if not self._policies:
            return _NO_POLICY
        key = (tuple(p.meta.name for p in matching), failed)
        version = (columns.layout, columns.meta_version)
        kept = self._resolved.get(key)
        if kept is None or kept[0] != version:
            kept = (version, self._resolve(columns, matching, failed))
            self._resolved[key] = kept
        return kept[1]

    def _matching(self, name: str, tenant: str, labels: Mapping[str, str]) -> tuple[tuple[Policy, ...], str]:
        """The policies that match, winners first, and the failure of a match, empty where none failed."""
        key = (name, tenant, frozenset(labels.items()))
        found = self._matched.get(key)
        if found is None:
            facts = {"environment": environment_facts(name, tenant, labels)}
            matching: list[Policy] = []
            failed = ""
            for policy in self._policies:
                if any(labels.get(k) != v for k, v in policy.spec.match_labels.items()):
                    continue
                if policy.spec.match:
                    rule = self._matchers.setdefault(policy.spec.match, self._compile(policy.spec.match))
                    try:
                        if not _evaluate(rule, facts):
                            continue
                    except EvaluationFailed as error:
                        failed = failed or f"policy {policy.meta.name}: match failed: {error}"
                        continue
                matching.append(policy)
            if len(self._matched) >= MAX_ENVIRONMENTS:
                self._matched.pop(next(iter(self._matched)))
            found = self._matched[key] = (tuple(matching), failed)
        return found

    def _resolve(self, columns: FleetColumns, matching: tuple[Policy, ...], failed: str) -> PlacementPolicy:
        size = len(columns.available)
        allowed = np.ones(size, dtype=np.bool_)
        denied = np.full(size, -1, dtype=np.int64)
        weights = np.zeros(size)
        reasons: list[str] = []

        def deny(rows: NDArray[np.bool_], reason: str) -> None:
            rows = rows & allowed
            if rows.any():
                denied[rows] = len(reasons)
                reasons.append(reason)
                allowed[rows] = False

        if failed:
            deny(np.ones(size, dtype=np.bool_), failed)
        for policy in matching:
            for i, text in enumerate(policy.spec.require):
                value, error = self._values(columns, text)
                where = f"policy {policy.meta.name} (require[{i}])"
                deny(value == FALSE, where)
                deny(value == FAILED, f"{where}, which failed: {error}")
            for preference in policy.spec.prefer:
                value, _ = self._values(columns, preference.when)
                weights += (value == TRUE) * float(preference.weight)
        self._reserve(columns, matching, deny)
        return PlacementPolicy(
            strategy=next((p.spec.strategy for p in matching if p.spec.strategy), PACK),
            spread_by=next((p.spec.spread_by for p in matching if p.spec.spread_by), ""),
            overcommit=Overcommit(
                _percent(next((p.spec.cpu_overcommit for p in matching if p.spec.cpu_overcommit), 1.0)),
                _percent(next((p.spec.memory_overcommit for p in matching if p.spec.memory_overcommit), 1.0)),
            ),
            allowed=None if allowed.all() else allowed,
            weights=weights if weights.any() else None,
            denied=denied,
            reasons=tuple(reasons),
        )

    def _reserve(self, columns: FleetColumns, matching: tuple[Policy, ...], deny: "_Deny") -> None:
        ours = np.zeros(len(columns.available), dtype=np.bool_)
        reserving = [(p, *self._values(columns, p.spec.reserve)) for p in self._policies if p.spec.reserve]
        for policy, value, _ in reserving:
            if policy in matching:
                ours |= value == TRUE
        for policy, value, error in reserving:
            if policy not in matching:
                deny((value == TRUE) & ~ours, f"policy {policy.meta.name} (reserve)")
                deny(value == FAILED, f"policy {policy.meta.name} (reserve), which failed: {error}")

    # --- rules -----------------------------------------------------------------------------------------------------------

    def _compile(self, text: str) -> _Rule:
        try:
            return _Rule(self._language.compile(text))
        except BadExpression as error:
            return _Rule(None, str(error))

    def _values(self, columns: FleetColumns, text: str) -> tuple[NDArray[np.int8], str]:
        """The value of a rule by row (N,), and the first failure."""
        rule = self._rules.get(text)
        if rule is None:
            rule = self._rules[text] = self._compile(text)
        version = (columns.layout, columns.meta_version)
        if rule.version != version:
            rule.version = version
            rule.value = np.zeros(len(columns.available), dtype=np.int8)
            if rule.program is not None:
                rule.error = ""
            seen: dict[str, tuple[HostView, int]] = {}
            for row in columns.live_rows():
                view = row.view
                old = rule.seen.get(view.name)
                if old is not None and _same_facts(old[0], view) and old[1] != FAILED:
                    value = old[1]
                else:
                    try:
                        value = TRUE if _evaluate(rule, {"host": host_facts(view)}) else FALSE
                    except EvaluationFailed as error:
                        value = FAILED
                        rule.error = rule.error or str(error)
                seen[view.name] = (view, value)
                rule.value[row.number] = value
            rule.seen = seen
        return rule.value, rule.error


class _Deny(Protocol):
    """The form of the function that denies rows for a reason."""

    def __call__(self, rows: NDArray[np.bool_], reason: str) -> None: ...


_NO_POLICY = PlacementPolicy()


def _evaluate(rule: _Rule, facts: Mapping[str, object]) -> bool:
    if rule.program is None:
        raise EvaluationFailed(rule.error)
    return rule.program.evaluate(facts)


def _host_rules(policy: Policy) -> list[str]:
    spec = policy.spec
    return [*spec.require, *(p.when for p in spec.prefer), *([spec.reserve] if spec.reserve else [])]


def _same_facts(old: HostView, new: HostView) -> bool:
    return old.topology is new.topology and old.labels == new.labels and old.taints == new.taints


def _percent(ratio: float) -> int:
    return round(ratio * 100)
