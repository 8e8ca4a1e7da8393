"""Hostile input to the manager: any bytes as a message, any message as a request, any text as an expression."""

import random
from collections.abc import Iterator
from typing import Any

import grpc
import hypothesis.strategies as st
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, Phase, given, note, settings

from casemate_core.errors import CasemateError, InvalidSpec
from casemate_core.spec.pod import FIELDS, check_pods
from casemate_core.spec.secret import references, resolved
from casemate_manager.access import RPCS, Permission
from casemate_manager.policy.cel import Cel
from casemate_wire.codec import resources
from casemate_wire.v1 import operators_pb2 as pb
from support.gatekeeping import as_user, house
from support.rpcs import methods

#: Texts that have broken somebody's parser, shell, terminal or page.
WORDS = (
    "", " ", "\0", "\x1b[2J", "\u202e", "\ud7ff", "]]>", "<!ENTITY a 'b'>", "&a;", "../../etc/shadow", "/dev/sda", "$(id)",
    "`id`", "'; DROP TABLE records; --", "%s%n", "{{7*7}}", "json:{}", "a" * 300, "-1", "1e309", "NaN", "１６Gi", "16Gi\n",
    "0x10", "true", "null", "[]", "{}", "🦀" * 40, "casemate/v2", "spiffe://casemate/host/h1",
)  # fmt: skip
text = st.sampled_from(WORDS) | st.text(max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(2**70), 2**70) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150)
@given(st.binary(max_size=300))
def test_any_bytes_are_an_object_or_refused(data: bytes) -> None:
    try:
        message = pb.Resource.FromString(data)
    except DecodeError:
        return
    try:
        resources.from_message(message)
    except InvalidSpec as refused:
        assert all(v.path and v.problem for v in refused.violations)


def filled(message: Message, draw: Any, depth: int = 0) -> Message:
    """A message with hostile values in some of its fields."""
    for field in message.DESCRIPTOR.fields:
        if draw(st.integers(0, 2)) == 0 or depth > 4:
            continue
        _fill(message, field, draw, depth)
    return message


def _fill(message: Message, field: FieldDescriptor, draw: Any, depth: int) -> None:
    numbers = {
        FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
        FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
        FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
        FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
        FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
        FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
        FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
        FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 9),
    }
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entries = getattr(message, field.name)
        value_field = field.message_type.fields_by_name["value"]
        if value_field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            entries[draw(text)] = draw(text)
    elif field.message_type is not None and field.message_type.full_name == "google.protobuf.Struct":
        plain = draw(st.dictionaries(text, json_values, max_size=3))
        target = getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name)
        try:
            target.update(plain)
        except (ValueError, TypeError, json_format.ParseError):
            pass  # not to be written at all
    elif field.message_type is not None:
        target = getattr(message, field.name)
        filled(target.add() if field.is_repeated else target, draw, depth + 1)
    else:
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            strategy: Any = st.binary(max_size=20) if field.type == FieldDescriptor.TYPE_BYTES else text
        else:
            strategy = numbers[field.cpp_type]
        value = draw(strategy)
        if isinstance(value, str):
            value = value.encode("utf-8", "replace").decode()
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)


# Not shrunk: what is drawn has hundreds of parts, and the message that failed is small enough to read.
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_any_object_with_hostile_fields_is_taken_or_refused_by_path(data: st.DataObject) -> None:
    resource = filled(pb.Resource(), data.draw)
    note(str(resource))
    try:
        resources.from_message(resource)
    except InvalidSpec as refused:
        assert all(v.path and v.problem for v in refused.violations)


#: Services that are there where there are certificates.
WITH_TLS = {"HostAccess", "Enrolment"}
#: What a caller may be told. Internal, Unknown and Data Loss would be our own fault.
FAIR = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAUTHENTICATED,
}


def hostile_requests(seed: int) -> Iterator[tuple[str, Message]]:
    """One request for each method, the same for the same seed."""
    random_ = random.Random(seed)

    def draw(strategy: Any) -> Any:
        return _from(strategy, random_)

    for name, method in methods().items():
        if RPCS[name].permission is Permission.HOST or method.service in WITH_TLS:
            continue
        yield name, filled(method.request(), draw)


def _from(strategy: Any, random_: Any) -> Any:
    """A value of one of the few strategies that `filled` draws from."""
    word = repr(strategy)
    if strategy is text:
        return random_.choice(WORDS)
    if word.startswith("booleans"):
        return random_.random() < 0.5
    if word.startswith("floats"):
        return random_.choice([0.0, -1.0, 1e308, float("inf"), float("nan")])
    if word.startswith("binary"):
        return random_.randbytes(random_.randint(0, 20))
    if word.startswith("dictionaries"):
        return {random_.choice(WORDS): random_.choice([None, True, -1e308, "x", ["y"], {"z": {}}])}
    low, high = _bounds(word)
    return random_.choice([low, high, 0 if low <= 0 <= high else low, random_.randint(low, high)])


def _bounds(word: str) -> tuple[int, int]:
    inner = word[word.index("(") + 1 : word.rindex(")")]
    parts = dict(p.strip().split("=") if "=" in p else (str(i), p) for i, p in enumerate(inner.split(",")))
    numbers = [int(v) for v in parts.values()]
    return numbers[0], numbers[-1]


@pytest.mark.parametrize("seed", range(6))
async def test_no_request_makes_the_manager_fail(seed: int) -> None:
    """Every method of every service, with hostile values in its fields: answered, or refused for what is wrong."""
    unfair: list[object] = []
    async with house() as found:
        for name, request in hostile_requests(seed):
            method = methods()[name]
            call = method.of(found.channel)
            try:
                if method.streams_in:
                    stream = call(metadata=as_user("root"), timeout=5)
                    await stream.write(request)
                    await stream.done_writing()
                    await stream.read()
                    stream.cancel()
                    await stream.code()
                elif method.streams_out:
                    stream = call(request, metadata=as_user("root"), timeout=5)
                    await stream.read()
                    stream.cancel()
                    await stream.code()
                else:
                    await call(request, metadata=as_user("root"), timeout=5)
            except grpc.aio.AioRpcError as error:
                if error.code() not in FAIR:
                    unfair.append((name, str(request), error.code(), error.details()))
        assert not unfair
        assert found.manager.writer.state.check() == []


@settings(max_examples=150)
@given(st.text(max_size=60) | st.text("ab().[]{}<>=!&|?:'\"+-*/%0123456789 ,e\\\n", max_size=60))
def test_any_text_is_an_expression_or_refused(source: str) -> None:
    try:
        program = Cel().compile(source)
        program.evaluate({"host": {"name": "h", "labels": {"a": "b"}, "gpus": 4}})
    except CasemateError:
        pass


@pytest.mark.parametrize(
    "source",
    ["(" * 500 + "1" + ")" * 500, "!" * 1500 + "true", "-" * 1500 + "1", "[" * 300 + "]" * 300, "a." * 900 + "b", "1+" * 900 + "1",
     "true ? " * 200 + "1", "'" + "\\" * 999, "b'\\xff' == b'\\xff'", "9223372036854775807 + 1 > 0", "1 / 0 == 1", "size('x' * 9)",
     "matches('a' , '(a+)+$')", "timestamp('9999-99-99T00:00:00Z') > timestamp('0')", "duration('1e99s') > duration('1s')"],
)  # fmt: skip
def test_expressions_that_have_broken_engines_are_refused(source: str) -> None:
    with pytest.raises(CasemateError):
        if Cel().compile(source).evaluate({"host": {}}):
            raise CasemateError("it is true, which is an answer")


pod_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | text,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(text | st.sampled_from(["name", "env", "valueFrom"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def _with(path: str, value: Any) -> dict[str, Any]:
    """A pod that runs, with one field of the table set to something else."""
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"containers": [{"name": "c", "image": "x"}], "initContainers": [{"name": "i", "image": "x"}]},
    }
    node: Any = pod
    *parents, leaf = path.split(".")
    for part in parents:
        key = part.removesuffix("[]")
        if part.endswith("[]"):
            node = node.setdefault(key, [{"name": "n"}])[0]
        else:
            node = node.setdefault(key, {})
    node[leaf] = value
    return pod


@settings(max_examples=200)
@given(st.sampled_from(sorted(FIELDS)), pod_values)
def test_any_value_in_any_field_of_a_pod_is_taken_or_refused_by_path(path: str, value: Any) -> None:
    pod = _with(path, value)
    found = list(check_pods("spec.pods", (pod,)))
    assert all(v.path.startswith("spec.pods") for v in found)
    if not found:
        values = {(s, k): "x" for _, s, k in references((pod,))}
        assert not list(references((resolved(pod, values),)))


@settings(max_examples=200)
@given(pod_values)
def test_anything_as_a_pod_is_refused_by_path(value: Any) -> None:
    pods = (value if isinstance(value, dict) else {"spec": value},)
    assert list(check_pods("spec.pods", pods))
