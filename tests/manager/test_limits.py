"""How often one may ask: never more than the bucket holds, never fewer than the rate gives, and operators get through."""

from hypothesis import given
from hypothesis import strategies as st

from casemate_manager.limits import BUCKETS, Limiter


@given(st.lists(st.floats(0, 3), max_size=200))
def test_in_any_span_no_more_pass_than_burst_and_rate_allow(gaps: list[float]) -> None:
    limiter, now_s = Limiter(rate=5, burst=10), 1000.0
    passed: list[float] = []
    for gap in gaps:
        now_s += gap
        wait_s = limiter.wait_s("t", now_s)
        if wait_s == 0.0:
            passed.append(now_s)
        else:
            assert 0 < wait_s <= 1 / 5 + 1e-9
    for i, start_s in enumerate(passed):
        for count, end_s in enumerate(passed[i:], 1):
            assert count <= 10 + (end_s - start_s) * 5 + 1e-6


def test_who_waits_as_long_as_he_is_told_passes() -> None:
    limiter, now_s = Limiter(rate=2, burst=1), 0.0
    for _ in range(20):
        while wait_s := limiter.wait_s("t", now_s):
            now_s += wait_s
    assert 9.4 < now_s < 9.6


def test_tenants_do_not_take_each_others_tokens() -> None:
    limiter = Limiter(rate=1, burst=1)
    assert limiter.wait_s("a", 0.0) == 0.0 and limiter.wait_s("a", 0.0) > 0
    assert limiter.wait_s("b", 0.0) == 0.0


def test_a_clock_that_goes_back_gives_nothing() -> None:
    limiter = Limiter(rate=1, burst=1)
    assert limiter.wait_s("a", 100.0) == 0.0
    assert limiter.wait_s("a", 50.0) > 0
    assert limiter.wait_s("a", 100.5) > 0


def test_what_is_kept_is_bounded() -> None:
    limiter = Limiter(rate=10, burst=10)
    for n in range(BUCKETS * 3):
        limiter.wait_s(f"t{n}", n * 0.01)
    assert len(limiter) <= BUCKETS + 1


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.booleans()), max_size=60))
def test_a_lane_is_kept_free_for_operators(calls: list[tuple[str, bool]]) -> None:
    limiter = Limiter(in_flight=10, tenants_in_flight=6, tenant_in_flight=3)
    inside: list[tuple[str, bool]] = []
    for key, operator in calls:
        tenants = [k for k, o in inside if not o]
        fits = len(inside) < 10 and (operator or (len(tenants) < 6 and tenants.count(key) < 3))
        assert limiter.enter(key, operator=operator) == fits
        if fits:
            inside.append((key, operator))
    while inside:
        key, operator = inside.pop()
        limiter.leave(key, operator=operator)
    assert all(limiter.enter(k, operator=False) for k in "aaabbb")
    assert not limiter.enter("c", operator=False)
    assert all(limiter.enter("op", operator=True) for _ in range(4)) and not limiter.enter("op", operator=True)
