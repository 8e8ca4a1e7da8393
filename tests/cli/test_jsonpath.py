"""JSONPath as scripts use it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_cli import jsonpath
from casemate_cli.failure import Failure

VALUE = {
    "metadata": {"name": "hello", "labels": {"app.kubernetes.io/name": "x"}},
    "status": {"ready": 2, "ok": True, "phase": "Ready"},
    "items": [{"n": "a"}, {"n": "b"}, {"m": 1}],
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{.status.phase}", "Ready"),
        ("{$.status.phase}", "Ready"),
        (".status.phase", "Ready"),
        ("status.phase", "Ready"),
        ("{.status.ready}", "2"),
        ("{.status.ok}", "true"),
        ("{.items[0].n}", "a"),
        ("{.items[-1].m}", "1"),
        ("{.items[*].n}", "a b"),
        ("{.items[9].n}", ""),
        ("{.nothing.here}", ""),
        ("{.metadata.labels['app.kubernetes.io/name']}", "x"),
        ('{.metadata.labels["app.kubernetes.io/name"]}', "x"),
        (r"{.metadata.name}\t{.status.phase}\n", "hello\tReady\n"),
        (r"{.metadata.name}{'\n'}", "hello\n"),
        ("name={.metadata.name}", "name=hello"),
        ("{.items[0]}", '{"n": "a"}'),
        ("{.status.*}", "2 true Ready"),
    ],
)
def test_render(template: str, text: str) -> None:
    assert jsonpath.parse(template).render(VALUE) == text


@pytest.mark.parametrize("template", ["{.a", ".a}", "{.a[}", "{.a[?(@.b)]}", "{.a b}", "{..}", "{range .items[*]}"])
def test_refuses_what_it_does_not_understand(template: str) -> None:
    with pytest.raises(Failure) as raised:
        jsonpath.parse(template)
    assert raised.value.details[0].remedy


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parsed = jsonpath.parse(text)
    except Failure:
        return
    parsed.render(VALUE)
