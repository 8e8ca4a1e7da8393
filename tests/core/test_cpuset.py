"""CPU sets: the kernel's list syntax, both ways, and the algebra of sets."""

import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_core.cpuset import EMPTY, MAX_CPU, CpuSet, bits, lowest
from casemate_core.plain import BadPlain

ids = st.sets(st.integers(0, 300))


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("", set()),
        ("\n", set()),
        ("0\n", {0}),
        ("0-3,8", {0, 1, 2, 3, 8}),
        ("8,0-3", {0, 1, 2, 3, 8}),
        ("0-7:2/4", {0, 1, 4, 5}),
        ("3-9:1/3", {3, 6, 9}),
        ("0-8:3/4", {0, 1, 2, 4, 5, 6, 8}),
        ("5,5,4-6", {4, 5, 6}),
    ],
)
def test_parse(text: str, cpus: set[int]) -> None:
    assert set(CpuSet.parse(text)) == cpus


@pytest.mark.parametrize(
    "text", ["a", "1-", "-1", "3-1", "1,,2", "0-3:0/4", "0-3:5/4", "1 2", "0x1", f"{MAX_CPU + 1}", "٣", "0-3:1"]
)
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match="CPU list"):
        CpuSet.parse(text)
    with pytest.raises(BadPlain):
        CpuSet.from_dict(text)


def test_ids_outside() -> None:
    for cpu in (-1, MAX_CPU + 1):
        with pytest.raises(ValueError, match="outside"):
            CpuSet.of(cpu)
    with pytest.raises(ValueError, match="negative"):
        CpuSet(-1)
    with pytest.raises(ValueError, match="no first"):
        _ = EMPTY.first
    with pytest.raises(BadPlain):
        CpuSet.from_dict(3)


@given(ids)
def test_text_is_canonical_and_returns(cpus: set[int]) -> None:
    made = CpuSet.from_ids(cpus)
    assert CpuSet.parse(str(made)) == made == CpuSet.from_dict(made.to_dict())
    assert list(made) == sorted(cpus)
    assert len(made) == len(cpus)
    assert bool(made) == bool(cpus)
    # canonical: ascending, and no two items could be joined
    ends = [tuple(map(int, item.split("-"))) for item in str(made).split(",") if item]
    assert all(a[-1] + 1 < b[0] for a, b in pairwise(ends))
    assert all(len(item) == 1 or item[0] < item[1] for item in ends)


@given(ids, ids)
def test_algebra_is_that_of_sets(a: set[int], b: set[int]) -> None:
    left, right = CpuSet.from_ids(a), CpuSet.from_ids(b)
    assert set(left | right) == a | b
    assert set(left & right) == a & b
    assert set(left - right) == a - b
    assert set(left ^ right) == a ^ b
    assert (left <= right) == (a <= b)
    assert (left < right) == (a < b)
    assert left.isdisjoint(right) == a.isdisjoint(b)
    assert (left == right) == (a == b)
    assert hash(left) == hash(CpuSet.from_ids(a))
    for cpu in a | b | {301}:
        assert (cpu in left) == (cpu in a)
    if a:
        assert left.first == min(a)


@given(ids, st.integers(0, 10))
def test_lowest(cpus: set[int], count: int) -> None:
    assert list(bits(lowest(CpuSet.from_ids(cpus).mask, count))) == sorted(cpus)[:count]


def test_a_value() -> None:
    cpus = CpuSet.parse("0-2")
    with pytest.raises(AttributeError):
        cpus._mask = 1
    assert pickle.loads(pickle.dumps(cpus)) == cpus
    assert repr(cpus) == "CpuSet.parse('0-2')"
    assert cpus != {0, 1, 2}
    assert "0" not in cpus
