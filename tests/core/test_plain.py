"""Plain values: what is written comes back, and what does not fit is refused with its path."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_core.plain import BadPlain, from_plain, to_plain


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Leaf:
    name: str
    size: int = 3
    colour: Colour = Colour.RED


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    pair: tuple[int, str]
    marks: frozenset[int] = frozenset()
    notes: dict[str, float] | None = None
    free: Any = None
    one: Leaf | None = None


leaves = st.builds(Leaf, st.text(), st.integers(), st.sampled_from(Colour))
trees = st.builds(
    Tree,
    st.tuples(leaves, leaves) | st.just(()),
    st.tuples(st.integers(), st.text()),
    st.frozensets(st.integers()),
    st.none() | st.dictionaries(st.text(), st.floats(allow_nan=False)),
    st.none() | st.lists(st.integers()),
    st.none() | leaves,
)


@given(trees)
def test_a_value_comes_back(tree: Tree) -> None:
    assert from_plain(Tree, to_plain(tree)) == tree


def test_defaults_are_not_written_and_may_be_missing() -> None:
    assert to_plain(Leaf("a")) == {"name": "a"}
    assert from_plain(Leaf, {"name": "a"}) == Leaf("a")


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"leaves": [], "pair": [1, "x"], "more": 1}, "more"),
        ({"leaves": [{"size": 1}], "pair": [1, "x"]}, "leaves[0].name"),
        ({"leaves": [{"name": 1}], "pair": [1, "x"]}, "leaves[0].name"),
        ({"leaves": [{"name": "a", "size": True}], "pair": [1, "x"]}, "leaves[0].size"),
        ({"leaves": [{"name": "a", "colour": "green"}], "pair": [1, "x"]}, "leaves[0].colour"),
        ({"leaves": [], "pair": [1]}, "pair"),
        ([], ""),
    ],
)
def test_what_does_not_fit_is_named(data: Any, path: str) -> None:
    with pytest.raises(BadPlain) as bad:
        from_plain(Tree, data)
    assert bad.value.path == path


def test_unknown_keys_of_newer_releases_can_be_let_through() -> None:
    assert from_plain(Leaf, {"name": "a", "new": 1}, ignore_unknown=True) == Leaf("a")
