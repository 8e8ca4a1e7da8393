"""The table of kinds agrees with the schema, and names are understood as people write them."""

import pytest

from casemate_cli import kinds
from casemate_cli.failure import Failure
from casemate_wire import schema
from casemate_wire.v1 import meta_pb2


def test_table_names_every_kind_of_the_schema() -> None:
    assert {k.name for k in kinds.KINDS} == set(schema.KIND_FIELDS)


def test_table_agrees_with_the_schema_on_who_writes_and_what_is_served() -> None:
    for kind in kinds.KINDS:
        assert kind.writable == (kind.name not in schema.READ_ONLY_KINDS), kind.name
        if kind.served and kind.writable:
            assert kind.name in schema.SERVED_KINDS, kind.name


def test_every_kind_has_metadata_to_show() -> None:
    for kind in kinds.KINDS:
        field = schema.kind_descriptor(kind.name).fields_by_name["metadata"]
        assert field.message_type is meta_pb2.Meta.DESCRIPTOR


def test_no_word_names_two_kinds() -> None:
    words = [w for k in kinds.KINDS for w in {k.name.lower(), k.word, k.plural, *k.aliases}]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("env",), ["environments"]),
        (("ENVS", "a", "b"), ["environment/a", "environment/b"]),
        (("env/a", "inst/b-0"), ["environment/a", "instance/b-0"]),
        (("env,pods",), ["environments", "pods"]),
        (("po", "x-0.web"), ["pod/x-0.web"]),
        # A GPU that no library tells is named by its way through the slots.
        (("gpu", "GPU-1002:744c@0000:20/04.0/00.0"), ["gpu/GPU-1002:744c@0000:20/04.0/00.0"]),
        (("gpu/GPU-1002:744c@0000:20/04.0/00.0",), ["gpu/GPU-1002:744c@0000:20/04.0/00.0"]),
    ],
)
def test_targets(arguments: tuple[str, ...], expected: list[str]) -> None:
    assert [str(t) for t in kinds.targets(arguments)] == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("hello",), ["environment/hello"]),
        (("hello", "other"), ["environment/hello", "environment/other"]),
        (("env", "hello"), ["environment/hello"]),
        (("env/hello", "other"), ["environment/hello", "environment/other"]),
        # A single word is a name, even if it is a kind's word too.
        (("env",), ["environment/env"]),
    ],
)
def test_targets_with_a_default_kind(arguments: tuple[str, ...], expected: list[str]) -> None:
    assert [str(t) for t in kinds.targets(arguments, default_kind="environment")] == expected


@pytest.mark.parametrize("arguments", [(), ("nope",), ("env/",), ("env/a", "b"), ("env,pods", "a"), ("/a",)])
def test_what_is_not_understood_is_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(Failure):
        kinds.targets(arguments)


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(Failure) as raised:
        kinds.find("enviroment")
    assert "did you mean environment?" in raised.value.details[0].remedy
