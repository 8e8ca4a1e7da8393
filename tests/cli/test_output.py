"""Objects in the forms of `-o`; tables; nothing hostile reaches the terminal in any of them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_cli import columns, kinds, output
from casemate_wire import manifest, schema
from casemate_wire.v1 import operators_pb2 as pb

ESC = "\x1b[31m\u202e"
PLAIN = {
    "apiVersion": "casemate/v1",
    "kind": "Environment",
    "metadata": {"name": "hello", "tenant": "default", "labels": {"app": "x"}},
    "spec": {
        "cpu": {"count": 2},
        "memory": {"size": "1Gi"},
        "image": "debian-13",
        "userData": "#!/bin/sh\necho hi\n",
        "pods": [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"}, "spec": {"containers": []}}],
    },
}


def hostile() -> pb.Resource:
    resource = manifest.parse(PLAIN)
    resource.environment.status.phase = ESC
    resource.environment.metadata.annotations["note"] = ESC
    resource.environment.spec.image = ESC
    return resource


@pytest.mark.parametrize("form", ["json", "yaml", "name", "jsonpath={.spec.image}"])
def test_no_form_lets_an_escape_through(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.write([hostile()], form, listed=False)
    assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)


@pytest.mark.parametrize("kind", [k.name for k in kinds.KINDS])
@pytest.mark.parametrize("wide", [False, True])
def test_tables_of_every_kind_show_an_empty_object(kind: str, wide: bool, capsys: pytest.CaptureFixture[str]) -> None:
    resource = pb.Resource()
    message = getattr(resource, schema.KIND_FIELDS[kind])
    message.SetInParent()
    message.metadata.name = ESC
    chosen = columns.columns(kind, wide=wide, with_tenant=True)
    columns.Table([c.heading for c in chosen]).write([[c.value(message) for c in chosen]])
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert out.startswith("TENANT")


def test_yaml_can_be_applied_again() -> None:
    resource = manifest.parse(PLAIN)
    text = output.to_yaml(output.plain(resource))
    assert "userData: |\n" in text
    assert manifest.load(text.encode(), "again") == [resource]


def test_json_of_several_is_a_list_that_can_be_applied_again(capsys: pytest.CaptureFixture[str]) -> None:
    resource = manifest.parse(PLAIN)
    output.write([resource, resource], "json", listed=True)
    text = capsys.readouterr().out
    assert json.loads(text)["kind"] == "List"
    assert manifest.load(text.encode(), "again") == [resource, resource]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_json_is_the_value_and_safe(value: object) -> None:
    text = output.to_json(value)
    assert json.loads(text) == value
    assert all(c.isprintable() or c == "\n" for c in text)


def test_later_rows_keep_the_widths_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    table = columns.Table(("A", "B"))
    table.write([("long-enough", "1")])
    table.write([("x", "2")])
    assert capsys.readouterr().out.splitlines() == ["A            B", "long-enough  1", "x            2"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (310, "5m10s"),
        (3599, "59m"),
        (12000, "3h20m"),
        (90000, "25h"),
        (1e6, "11d"),
    ],
)
def test_spans(seconds: float, text: str) -> None:
    assert columns.span(seconds) == text
