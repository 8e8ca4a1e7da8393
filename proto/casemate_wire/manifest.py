"""Manifests: plain JSON values ⇄ messages of the schema, with a field path for everything that is wrong.

Names are those of the schema in lowerCamelCase. An unknown field is refused, with the nearest known name; a wrong type is
refused, with what to write. What only the manager writes (``status``, ``metadata.uid``, …) is left out, so that the output of
``casemate get -o yaml`` can be applied again. Meaning is checked by the manager, through `casemate_wire.codec`.
"""

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf import json_format, struct_pb2, timestamp_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from casemate_core.errors import InvalidSpec, Violation, shown
from casemate_core.spec.pod import whole_numbers
from casemate_wire import schema
from casemate_wire.v1 import operators_pb2


def load(text: bytes, source: str) -> list[operators_pb2.Resource]:
    """All objects of a YAML (or JSON) stream; ``kind: List`` is flattened. Raises InvalidSpec with every violation."""
    from casemate_wire import yamldoc

    found: list[operators_pb2.Resource] = []
    violations: list[Violation] = []
    for where, document in yamldoc.load(text, source):
        items = [document]
        if isinstance(document, dict) and document.get("kind") == "List" and isinstance(document.get("items"), list):
            items = document["items"]
        for item in items:
            try:
                found.append(parse(item, where))
            except InvalidSpec as invalid:
                violations += invalid.violations
    if violations:
        raise InvalidSpec(tuple(violations))
    return found


def parse(document: Any, where: str = "") -> operators_pb2.Resource:
    """The object that ``document`` describes. Violations' paths begin with ``where: kind/name`` as far as they are known."""
    prefix = f"{where}: " if where else ""
    if not isinstance(document, dict):
        raise InvalidSpec(
            (Violation(f"{prefix}document", shown(document), "is not an object", "begin it with apiVersion and kind"),)
        )
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in schema.KIND_FIELDS or document.get("apiVersion") == "v1":
        raise InvalidSpec((_unknown_kind(prefix, document, kind),))
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    subject = f"{kind.lower()}/{shown(name)}" if isinstance(name, str) and name else kind.lower()
    if kind in schema.READ_ONLY_KINDS:
        raise InvalidSpec(
            (Violation(f"{prefix}kind", kind, "is written by the manager only", "apply an Environment"),), subject
        )
    found: list[Violation] = []
    if document.get("apiVersion") != schema.API_VERSION:
        found.append(
            Violation(
                "apiVersion",
                shown(document.get("apiVersion", "")),
                "is not a version that is served",
                f"write {schema.API_VERSION}",
            )
        )
    resource = operators_pb2.Resource()
    message = getattr(resource, schema.KIND_FIELDS[kind])
    message.SetInParent()
    found += _fill(message, {k: v for k, v in document.items() if k != "apiVersion"}, "")
    message.api_version = schema.API_VERSION
    if (empty := _no_interfaces(document)) is not None:
        found.append(empty)
    if not message.metadata.name and not any(v.path.startswith("metadata") for v in found):
        found.append(Violation("metadata.name", "", "is missing", "name the object"))
    if found:
        raise InvalidSpec(
            tuple(Violation(f"{prefix}{subject}: {v.path}", v.value, v.problem, v.remedy) for v in found), subject
        )
    return resource


def _no_interfaces(document: Mapping[str, Any]) -> Violation | None:
    """The wire cannot tell an empty list from none: who writes one means no interface, and would get one."""
    spec = document.get("spec")
    if document.get("kind") != "Environment" or not isinstance(spec, dict):
        return None
    if spec.get("nics") != [] or spec.get("isolated"):
        return None
    return Violation(
        "spec.nics",
        "[]",
        "is empty",
        "write isolated: true for no interface, or leave it out for one on network default",
    )


def _unknown_kind(prefix: str, document: Mapping[str, Any], kind: Any) -> Violation:
    if kind is None:
        return Violation(f"{prefix}kind", "", "is missing", f"write one of {', '.join(_writable())}")
    if kind == "Pod" or document.get("apiVersion") == "v1":
        return Violation(
            f"{prefix}kind", shown(kind), "is a Kubernetes object", "put Pods under spec.pods of an Environment"
        )
    near = difflib.get_close_matches(str(kind), _writable(), 1, 0.5)
    remedy = f"did you mean {near[0]}?" if near else f"write one of {', '.join(_writable())}"
    return Violation(f"{prefix}kind", shown(kind), "is unknown", remedy)


def _writable() -> list[str]:
    return [k for k in schema.KIND_FIELDS if k in schema.SERVED_KINDS]


def _fill(message: Message, values: Mapping[str, Any], path: str) -> Iterator[Violation]:
    """Set the message's fields from plain values; yields what is wrong."""
    by_name = _fields_by_json_name(message)
    for key, value in values.items():
        here = f"{path}.{key}" if path else str(key)
        field = by_name.get(key)
        if field is None:
            near = difflib.get_close_matches(str(key), by_name, 1, 0.6)
            yield Violation(
                f"{path}.{shown(key)}".lstrip("."),
                "",
                "is no field of the schema",
                f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(by_name))}",
            )
        elif not schema.flag(field, "output_only") and value is not None:
            yield from _set(message, field, value, here)


def _fields_by_json_name(message: Message) -> dict[str, FieldDescriptor]:
    return {f.json_name: f for f in schema.fields_of(message.DESCRIPTOR)}


def _set(message: Message, field: FieldDescriptor, value: Any, path: str) -> Iterator[Violation]:
    if schema.is_map(field):
        yield from _set_map(message, field, value, path)
    elif field.is_repeated:
        if not isinstance(value, list):
            yield Violation(path, shown(value), "is not a list", "begin each entry with '-'")
            return
        target = getattr(message, field.name)
        for i, item in enumerate(value):
            here = f"{path}[{i}]"
            if field.message_type is None:
                good, plain = _scalar(field, item)
                if good:
                    target.append(plain)
                else:
                    yield _wrong_type(field, item, here)
            elif isinstance(item, dict):
                yield from _fill_message(target.add(), field, item, here)
            else:
                yield Violation(here, shown(item), "is not an object", "write fields below it")
    elif field.message_type is not None:
        if schema.is_timestamp(field):
            yield Violation(path, shown(value), "is written by the manager only", "remove it")
        elif isinstance(value, dict):
            sub = getattr(message, field.name)
            sub.SetInParent()
            yield from _fill_message(sub, field, value, path)
        else:
            yield Violation(path, shown(value), "is not an object", "write fields below it")
    else:
        good, plain = _scalar(field, value)
        if good:
            setattr(message, field.name, plain)
        else:
            yield _wrong_type(field, value, path)


def _fill_message(message: Message, field: FieldDescriptor, value: dict[str, Any], path: str) -> Iterator[Violation]:
    if isinstance(message, struct_pb2.Struct):
        yield from _check_json(value, path)
        message.update(value)
    else:
        yield from _fill(message, value, path)


def _check_json(value: Any, path: str) -> Iterator[Violation]:
    """JSON numbers are doubles in a Struct: a whole number beyond 2**53 would be changed silently."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _check_json(item, f"{path}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _check_json(item, f"{path}[{i}]")
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**53:
        yield Violation(path, shown(value), "is too large a number", "put it in quotes")
    elif isinstance(value, float) and not math.isfinite(value):
        yield Violation(path, shown(value), "is not a number", "write a number such as 1.5")


def _set_map(message: Message, field: FieldDescriptor, value: Any, path: str) -> Iterator[Violation]:
    if not isinstance(value, dict):
        yield Violation(path, shown(value), "is not a map", "write key: value")
        return
    target = getattr(message, field.name)
    for key, item in value.items():
        if isinstance(item, str):
            target[key] = item
        else:
            yield Violation(
                f"{path}.{shown(key)}", shown(item), "is not text", f'write "{shown(_plain_text(item))}" in quotes'
            )


_INTS = frozenset({FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64})


def _scalar(field: FieldDescriptor, value: Any) -> tuple[bool, Any]:
    """Whether ``value`` fits the field, and it as the field takes it."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if number and (schema.quantity(field) or field.name == "resource_version"):
            return True, _plain_text(value)
        return isinstance(value, str), value
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return isinstance(value, bool), value
    if field.cpp_type in _INTS:
        bits = 31 if field.cpp_type == FieldDescriptor.CPPTYPE_INT32 else 63
        whole = number and float(value).is_integer() and -(2**bits) <= value < 2**bits
        return whole, int(value) if whole else value
    return number and math.isfinite(value), value


def _plain_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _wrong_type(field: FieldDescriptor, value: Any, path: str) -> Violation:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if isinstance(value, dict | list):
            return Violation(path, shown(value), "is not text", "write one value")
        return Violation(path, shown(value), "is not text", f'write "{shown(_plain_text(value))}" in quotes')
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return Violation(path, shown(value), "is neither true nor false", "write true or false")
    if field.cpp_type in _INTS:
        return Violation(path, shown(value), "is not a whole number in range", "write a number such as 2")
    return Violation(path, shown(value), "is not a number", "write a number such as 1.5")


def to_plain(resource: operators_pb2.Resource) -> dict[str, Any]:
    """The object as plain JSON values, fields in the schema's order: the inverse of ``parse`` and the shape of ``-o json``."""
    message = schema.object_of(resource)
    plain = message_to_plain(message)
    return {"apiVersion": schema.API_VERSION, "kind": schema.kind_of(resource)} | {
        k: v for k, v in plain.items() if k not in ("apiVersion", "kind")
    }


def message_to_plain(message: Message) -> dict[str, Any]:
    """A message as plain JSON values: names in lowerCamelCase, fields in the schema's order, unset ones left out.

    Unlike protobuf's own JSON, 64-bit numbers stay numbers: none of ours passes 2**53.
    """
    return {field.json_name: _field_to_plain(field, value) for field, value in message.ListFields()}


def _field_to_plain(field: FieldDescriptor, value: Any) -> Any:
    if schema.is_map(field):
        return {str(k): value[k] for k in sorted(value)}
    if field.is_repeated:
        return [_one_to_plain(item) for item in value]
    return _one_to_plain(value)


def _one_to_plain(value: Any) -> Any:
    if isinstance(value, struct_pb2.Struct):
        return struct_to_plain(value)
    if isinstance(value, timestamp_pb2.Timestamp):
        return value.ToJsonString()
    if isinstance(value, Message):
        return message_to_plain(value)
    return value


def struct_to_plain(struct: struct_pb2.Struct) -> dict[str, Any]:
    """Free JSON of a Struct, keys sorted as Kubernetes shows manifests; whole numbers come back as whole numbers."""
    plain: dict[str, Any] = _sorted(whole_numbers(json_format.MessageToDict(struct)))
    return plain


def _sorted(value: Any) -> Any:
    """A Struct's keys come in no order; text for people and digests need one."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value
