"""Policies: what matches, what wins, what is denied, and what an expression may cost."""

import numpy as np
import pytest

from casemate_core.claims import HostClaims
from casemate_core.errors import InvalidSpec
from casemate_core.spec.environment import PlacementRules
from casemate_core.spec.fleet import Policy, PolicySpec, Preference
from casemate_core.spec.meta import Meta
from casemate_core.topology_loaders import from_line
from casemate_manager.columns import FleetColumns, HostView
from casemate_manager.fleet.commands import ApplyResources
from casemate_manager.policy.book import PolicyBook
from casemate_manager.policy.cel import Cel
from casemate_manager.policy.expressions import (
    MAX_CHARS,
    MAX_FACT_ELEMENTS,
    BadExpression,
    EvaluationFailed,
    Language,
    Program,
    check_bounds,
)
from casemate_manager.scheduler.request import PlacementPolicy
from support.small_fleet import SmallFleet, environment, image, network


def policy(name: str, **spec: object) -> Policy:
    return Policy(Meta(name), PolicySpec(**spec))  # type: ignore[arg-type]


def view(name: str, line: str = "1s 4k/c 8G", **labels: str) -> HostView:
    return HostView(name, from_line(f"{line} name={name}"), HostClaims.empty(), labels=labels)


@pytest.fixture
def columns() -> FleetColumns:
    made = FleetColumns()
    made.upsert(view("h0", site="fra1"))
    made.upsert(view("h1", "1s 4k/c 8G gpu=2xH200", site="fra1", tier="gold"))
    made.upsert(view("h2", site="ams2"))
    return made


def resolve(columns: FleetColumns, *policies: Policy, tenant: str = "t", **labels: str) -> PlacementPolicy:
    book = PolicyBook(Cel())
    book.set(policies)
    return book.resolve(columns, "env", tenant, labels)


def hosts(columns: FleetColumns, resolved: PlacementPolicy) -> set[str]:
    names = {row.view.name: row.number for row in columns.live_rows()}
    return {n for n, i in names.items() if resolved.allowed is None or resolved.allowed[i]}


def denial(columns: FleetColumns, resolved: PlacementPolicy, name: str) -> str:
    assert resolved.denied is not None
    return resolved.reasons[int(resolved.denied[columns.row(name).number])]


def test_without_policies_everything_is_as_by_default(columns: FleetColumns) -> None:
    resolved = resolve(columns)
    assert resolved.allowed is None and resolved.strategy == "pack" and resolved.overcommit.cpu_percent == 100


def test_all_requirements_of_all_matching_policies_hold(columns: FleetColumns) -> None:
    resolved = resolve(
        columns,
        policy("site", require=("host.labels.site == 'fra1'",)),
        policy("gpu", require=("host.gpus > 0",), match_labels={"gpu": "yes"}),
        gpu="yes",
    )
    assert hosts(columns, resolved) == {"h1"}
    assert denial(columns, resolved, "h0") == "policy gpu (require[0])"
    assert denial(columns, resolved, "h2") == "policy gpu (require[0])"
    unmatched = resolve(columns, policy("gpu", require=("host.gpus > 0",), match_labels={"gpu": "yes"}))
    assert hosts(columns, unmatched) == {"h0", "h1", "h2"}


def test_matching_by_expression(columns: FleetColumns) -> None:
    only = policy("ran", match="environment.tenant == 'ran' && 'tier' in environment.labels", require=("false",))
    assert hosts(columns, resolve(columns, only, tenant="ran", tier="x")) == set()
    assert hosts(columns, resolve(columns, only, tenant="ran")) == {"h0", "h1", "h2"}
    assert hosts(columns, resolve(columns, only, tenant="other", tier="x")) == {"h0", "h1", "h2"}


def test_the_higher_precedence_wins_and_then_the_earlier_name(columns: FleetColumns) -> None:
    resolved = resolve(
        columns,
        policy("b", strategy="spread", cpu_overcommit=2.0, precedence=1),
        policy("a", strategy="balance", memory_overcommit=1.5, precedence=1),
        policy("z", cpu_overcommit=4.0, spread_by="rack", precedence=5),
        policy("low", strategy="pack", spread_by="host", cpu_overcommit=8.0),
    )
    assert (resolved.strategy, resolved.spread_by) == ("balance", "rack")
    assert (resolved.overcommit.cpu_percent, resolved.overcommit.memory_percent) == (400, 150)


def test_preferences_add_up(columns: FleetColumns) -> None:
    resolved = resolve(
        columns,
        policy("a", prefer=(Preference("host.gpus == 0", 5), Preference("host.labels.site == 'ams2'", 2))),
        policy("b", prefer=(Preference("host.name == 'h0'", -9), Preference("host.labels.nope == 'x'", 100))),
    )
    assert resolved.weights is not None
    told = {row.view.name: resolved.weights[row.number] for row in columns.live_rows()}
    assert told == {"h0": -4.0, "h1": 0.0, "h2": 7.0}


def test_reserved_hosts_are_for_those_the_policy_matches(columns: FleetColumns) -> None:
    gold = policy("gold", match_labels={"tier": "gold"}, reserve="has(host.labels.tier) && host.labels.tier == 'gold'")
    also = policy("also", match_labels={"tier": "silver"}, reserve="host.name == 'h1'")
    assert hosts(columns, resolve(columns, gold, also)) == {"h0", "h2"}
    assert hosts(columns, resolve(columns, gold, also, tier="gold")) == {"h0", "h1", "h2"}
    assert hosts(columns, resolve(columns, gold, also, tier="silver")) == {"h0", "h1", "h2"}
    assert denial(columns, resolve(columns, gold), "h1") == "policy gold (reserve)"


@pytest.mark.parametrize("text", ["host.labels.tier == 'gold'", "1 + 1", "host.gpus > 'x'", "nobody == 1"])
def test_a_rule_that_fails_denies_and_says_so(columns: FleetColumns, text: str) -> None:
    resolved = resolve(columns, policy("p", require=(text,)))
    assert "h0" not in hosts(columns, resolved)
    assert denial(columns, resolved, "h0").startswith("policy p (require[0]), which failed: ")
    reserved = resolve(columns, policy("p", match_labels={"a": "b"}, reserve=text))
    assert "h0" not in hosts(columns, reserved)


def test_a_match_that_fails_denies_every_host(columns: FleetColumns) -> None:
    resolved = resolve(columns, policy("p", match="environment.labels.team == 'x'"))
    assert hosts(columns, resolved) == set()
    assert "match failed" in denial(columns, resolved, "h2")


class Counting:
    """CEL that counts evaluations."""

    def __init__(self) -> None:
        self.count = 0

    def compile(self, text: str) -> Program:
        inner, outer = Cel().compile(text), self

        class Counted:
            def evaluate(self, values: object) -> bool:
                outer.count += 1
                return inner.evaluate(values)  # type: ignore[arg-type]

        return Counted()


def test_a_rule_is_evaluated_once_for_each_change_of_a_host(columns: FleetColumns) -> None:
    language: Language = Counting()
    book = PolicyBook(language)
    book.set([policy("p", require=("host.labels.site == 'fra1'",))])
    for i in range(5):
        book.resolve(columns, f"env{i}", "t", {})
    assert language.count == 3  # type: ignore[attr-defined]
    columns.upsert(view("h3", site="fra1"))
    assert hosts(columns, book.resolve(columns, "env", "t", {})) == {"h0", "h1", "h3"}
    assert language.count == 4  # type: ignore[attr-defined]
    row = columns.row("h2").view
    columns.upsert(HostView("h2", row.topology, row.claims, labels={"site": "fra1"}))
    assert hosts(columns, book.resolve(columns, "env", "t", {})) == {"h0", "h1", "h2", "h3"}
    assert language.count == 5  # type: ignore[attr-defined]


def test_masks_follow_when_the_columns_are_laid_out_anew(columns: FleetColumns) -> None:
    book = PolicyBook(Cel())
    book.set([policy("p", require=("host.gpus == 0",))])
    for i in range(300):
        columns.upsert(view(f"x{i}"))
    resolved = book.resolve(columns, "e", "t", {})
    assert resolved.allowed is not None and len(resolved.allowed) == len(columns.available)
    assert len(hosts(columns, resolved)) == 302
    assert np.count_nonzero(resolved.denied == 0) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "x" * (MAX_CHARS + 1),
        "(" * 30 + "true" + ")" * 30,
        "host.a.all(x, host.b.all(y, host.c.all(z, true)))",
        " && ".join(["host.a.exists(x, x)"] * 5),
        "[" + ",".join(["1"] * 300) + "].size() > 3",
        "(",
        "",
    ],
)
def test_what_may_cost_too_much_or_is_none_is_not_compiled(text: str) -> None:
    with pytest.raises(BadExpression):
        Cel().compile(text)


def test_bounds_do_not_count_what_stands_in_strings() -> None:
    check_bounds("host.name == '" + "((((,,,,.all(" * 40 + "'")
    check_bounds('host.name.startsWith("a\\"((") || host.gpu_models.exists(m, m == "H200")')


def test_the_most_that_is_allowed_ends() -> None:
    """Two comprehensions nested over the longest lists that facts may have."""
    program = Cel().compile("host.m.all(a, host.m.all(b, a != 'x' && b != 'y'))")
    assert program.evaluate({"host": {"m": [str(i) for i in range(MAX_FACT_ELEMENTS)]}}) is True


def test_a_value_that_is_not_true_or_false_is_a_failure() -> None:
    with pytest.raises(EvaluationFailed, match="int"):
        Cel().compile("1 + 1").evaluate({})
    with pytest.raises(EvaluationFailed, match="no such key"):
        Cel().compile("a.b").evaluate({"a": {}})


# --- through the fleet ----------------------------------------------------------------------------------------------------


def small_fleet() -> SmallFleet:
    fleet = SmallFleet()
    fleet.apply(image(), network())
    return fleet


def test_a_policy_steers_the_fleet_and_its_refusal_is_told() -> None:
    fleet = small_fleet()
    for name in ("h1", "h2", "h3"):
        fleet.join(name)
    fleet.apply(policy("only-h3", require=("host.name == 'h3'",), match_labels={"kept": "yes"}))
    kept = environment("kept")
    fleet.apply(type(kept)(Meta("kept", "default", labels={"kept": "yes"}), kept.spec))
    assert [p.host for p in fleet.state.placements.values()] == ["h3"]
    fleet.apply(policy("nowhere", require=("false",), match_labels={"lost": "yes"}))
    fleet.apply(type(kept)(Meta("lost", "default", labels={"lost": "yes"}), kept.spec))
    messages = [e.message for e in fleet.state.events.values() if e.reason == "Unschedulable"]
    assert any("policy nowhere (require[0])" in message for message in messages), messages


def test_spreading_and_distance_hold_within_one_batch() -> None:
    fleet = small_fleet()
    for name in ("h1", "h2", "h3"):
        fleet.join(name)
    fleet.apply(environment("wide", replicas=3, placement=PlacementRules(spread_by="host")))
    assert sorted(p.host for p in fleet.state.placements.values()) == ["h1", "h2", "h3"]


def test_a_policy_that_does_not_compile_is_refused_with_its_field() -> None:
    fleet = small_fleet()
    with pytest.raises(InvalidSpec, match=r"spec\.require\[1\]"):
        fleet.do(ApplyResources("key", (policy("bad", require=("true", "host.(")),), "s"))
