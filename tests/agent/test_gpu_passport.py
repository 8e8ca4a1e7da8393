"""The ladder between two tenants: each way up, each reason to stop, and what a passport does not claim."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_agent.gpu.checks import Check, Result
from casemate_agent.gpu.passport import Card, Climb, Hygiene, Rung, Step, climb, passport

CARD = Card(methods=("flr", "bus"))
FULL = Hygiene(scrub=True)


def ascend(outcome: Callable[[Rung], Step], card: Card = CARD, hygiene: Hygiene = FULL) -> tuple[list[Step], Climb]:
    """Climb until the end, each rung ending as ``outcome`` says."""
    steps: list[Step] = []
    while (answer := climb(steps, card, hygiene)).next is not None:
        assert len(steps) < 10, "it never ends"
        step = outcome(answer.next)
        assert step.rung is answer.next
        steps.append(step)
    return steps, answer


def well(rung: Rung) -> Step:
    found = (Check("ecc", Result.PASSED, "0"),) if rung is Rung.CHECKS else ()
    return Step(rung, Result.PASSED, "ok", checks=found)


def failing(*rungs: Rung, times: int = 9) -> Callable[[Rung], Step]:
    left = dict.fromkeys(rungs, times)

    def outcome(rung: Rung) -> Step:
        if left.get(rung, 0) > 0:
            left[rung] -= 1
            return Step(rung, Result.FAILED, f"{rung} went wrong")
        return well(rung)

    return outcome


def rungs(steps: list[Step]) -> list[str]:
    return [str(step.rung) for step in steps]


def test_all_of_it_in_order() -> None:
    steps, end = ascend(well)
    assert rungs(steps) == ["released", "function-reset", "proved", "scrub", "checks"]
    assert end == Climb(clean=True)


def test_a_reset_that_is_not_proved_is_followed_by_a_bus_reset() -> None:
    steps, end = ascend(failing(Rung.PROVED, times=1))
    assert rungs(steps)[1:5] == ["function-reset", "proved", "bus-reset", "proved"]
    assert end.clean


def test_a_card_without_function_reset_gets_the_bus_reset() -> None:
    steps, end = ascend(well, Card(methods=("pm", "bus")))
    assert rungs(steps)[1] == "bus-reset" and end.clean


def test_a_bus_is_never_reset_under_others() -> None:
    shared = Card(methods=("bus",), strangers=("0000:17:00.1",))
    steps, end = ascend(well, shared)
    assert rungs(steps) == ["released"]
    assert "would reset others on its bus too: 0000:17:00.1" in end.reason


@pytest.mark.parametrize(
    ("wrong", "card", "reason"),
    [
        (Rung.RELEASED, CARD, "still held: released went wrong"),
        (Rung.SCRUB, CARD, "scrub: scrub went wrong"),
        (Rung.PROVED, CARD, "no reset is left to try"),
        (Rung.FUNCTION_RESET, Card(methods=("flr",)), "knows no other reset of it (flr)"),
        (None, Card(), "knows no other reset of it (none)"),
        (None, Card(methods=("flr",), holders=("4711 (python)",)), "held by 4711 (python)"),
    ],
)
def test_what_stops_it_is_named(wrong: Rung | None, card: Card, reason: str) -> None:
    _, end = ascend(failing(wrong) if wrong else well, card)
    assert not end.clean and reason in end.reason


def test_a_failed_check_holds_it_back_and_an_unknown_one_only_where_it_is_required() -> None:
    def outcome(rung: Rung, result: Result) -> Step:
        return Step(rung, Result.PASSED, "", checks=(Check("rows", result, "told so"),) if rung is Rung.CHECKS else ())

    assert ascend(lambda r: outcome(r, Result.FAILED))[1].reason == "rows: told so"
    assert ascend(lambda r: outcome(r, Result.UNKNOWN))[1].clean
    strict = Hygiene(scrub=True, required=frozenset({"rows"}))
    assert ascend(lambda r: outcome(r, Result.UNKNOWN), hygiene=strict)[1].reason == "rows: told so"


def test_what_is_required_and_was_not_made_holds_it_back() -> None:
    _, end = ascend(well, hygiene=Hygiene(scrub=False, required=frozenset({"scrub"})))
    assert end.reason == "scrub: was not made"


def test_a_passport_says_what_it_does_not_prove() -> None:
    steps, end = ascend(well, hygiene=Hygiene(scrub=False))
    said = passport("GPU-1", 3, "a", steps, end)
    assert said.clean and "its memory was emptied" in said.not_proven[0]
    steps, end = ascend(well)
    assert passport("GPU-1", 3, "a", steps, end).not_proven == ("that its firmware is what its maker shipped",)
    with pytest.raises(ValueError, match="goes on"):
        passport("GPU-1", 3, "a", steps[:1], climb(steps[:1], CARD, FULL))


@given(
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.lists(st.sampled_from(["flr", "bus", "pm"]), unique=True),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_clean_means_that_a_reset_was_proved_and_nothing_after_it_failed(
    luck: list[bool], methods: list[str], shared: bool, scrub: bool, driver: bool
) -> None:
    outcomes = iter(luck)
    card = Card(methods=tuple(methods), strangers=("0000:17:00.1",) if shared else ())

    def outcome(rung: Rung) -> Step:
        return Step(rung, Result.PASSED if next(outcomes) else Result.FAILED, "", checks=())

    steps, end = ascend(outcome, card, Hygiene(scrub=scrub, driver_checks=driver))
    if shared:
        assert Rung.BUS_RESET not in {s.rung for s in steps}
    if end.clean:
        passed = [s.rung for s in steps if s.result is Result.PASSED]
        assert Rung.PROVED in passed and (not scrub or Rung.SCRUB in passed)
        assert Rung.RELEASED in passed
    else:
        assert end.reason
