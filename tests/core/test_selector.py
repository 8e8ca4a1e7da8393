"""Label selectors mean what they mean in kubectl."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_core.errors import InvalidSpec
from casemate_core.selector import parse

LABELS = {"tier": "web", "site": "fra1", "casemate.dev/x": ""}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("tier=web", True),
        ("tier==web,site=fra1", True),
        ("tier!=web", False),
        ("rack!=a", True),
        ("site in (ams1, fra1)", True),
        ("site notin (ams1,fra1),tier", False),
        ("rack notin (a)", True),
        ("tier", True),
        ("!tier", False),
        ("!rack,tier=web", True),
        ("casemate.dev/x=", True),
        ("rack=", False),
    ],
)
def test_selection(text: str, matches: bool) -> None:
    assert parse(text).matches(LABELS) is matches


@pytest.mark.parametrize(
    "text", ["=a", "a=b=c", "a in b", "a in (b", ",", "a,,b", "-x", "a b", "a=" + "x" * 64, "x" * 5000]
)
def test_what_is_no_selector_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpec) as bad:
        parse(text)
    assert bad.value.violations[0].path == "selector"


@given(st.text(max_size=60))
def test_any_text_is_a_selector_or_refused(text: str) -> None:
    try:
        parse(text).matches(LABELS)
    except InvalidSpec:
        pass
