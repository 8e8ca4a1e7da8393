"""What a kind or a field is for, from the schema's own comments: the data behind ``casemate explain``."""

import difflib
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from casemate_core.errors import CallerError, shown
from casemate_wire import schema

_TYPES = {
    FieldDescriptor.CPPTYPE_STRING: "string",
    FieldDescriptor.CPPTYPE_BOOL: "boolean",
    FieldDescriptor.CPPTYPE_INT32: "integer",
    FieldDescriptor.CPPTYPE_INT64: "integer",
    FieldDescriptor.CPPTYPE_DOUBLE: "number",
}
_QUANTITIES = {1: "bytes (16Gi)", 2: "CPUs (1500m)", 3: "time span (15m)", 4: "bit rate (10Gbit)"}


class UnknownField(CallerError):
    """There is no such kind or field."""

    reason = "NotFound"


@dataclass(frozen=True, slots=True)
class Explanation:
    """One field (or kind) and, for objects, the fields below it. ``update`` is inherited from the parent where unset."""

    path: str
    name: str
    type: str
    doc: str
    update: str = ""
    words: tuple[str, ...] = ()
    required: bool = False
    served: bool = True
    fields: tuple["Explanation", ...] = ()


def explain(path: str) -> Explanation:
    """The explanation of ``environment`` or ``environment.spec.cpu``. Raises UnknownField with the nearest name."""
    first, *rest = path.split(".")
    kinds = {kind.lower(): kind for kind in schema.KIND_FIELDS}
    kind = kinds.get(first.lower()) or kinds.get(first.lower().removesuffix("s"))
    if kind is None:
        raise UnknownField(_unknown("kind", first, list(kinds)))
    descriptor: Any = schema.kind_descriptor(kind)
    here = Explanation(
        kind.lower(),
        kind,
        "object",
        schema.comment(descriptor.full_name),
        served=kind in schema.SERVED_KINDS or kind in schema.READ_ONLY_KINDS,
    )
    update = ""
    for part in rest:
        if descriptor is None:
            raise UnknownField(f"{here.path} has no fields")
        name = part.partition("[")[0]
        fields = {f.json_name: f for f in schema.fields_of(descriptor)}
        if name not in fields:
            raise UnknownField(_unknown(f"field of {here.path}", name, list(fields)))
        update = schema.effect(fields[name]) or update
        here = _field(fields[name], here, update)
        descriptor = _below(fields[name])
    if descriptor is None:
        return here
    below = tuple(_field(f, here, schema.effect(f) or update) for f in schema.fields_of(descriptor))
    return Explanation(
        here.path, here.name, here.type, here.doc, here.update, here.words, here.required, here.served, below
    )


def _unknown(what: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"{shown(name)!r} is no {what}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")


def _below(field: FieldDescriptor) -> Any:
    if schema.is_map(field) or schema.is_struct(field) or schema.is_timestamp(field):
        return None
    return field.message_type


def _field(field: FieldDescriptor, parent: Explanation, update: str) -> Explanation:
    return Explanation(
        path=f"{parent.path}.{field.json_name}",
        name=field.json_name,
        type=_type(field),
        doc=schema.comment(field.full_name),
        update=update,
        words=schema.words(field),
        required=schema.flag(field, "required"),
        served=parent.served and not schema.flag(field, "unserved"),
    )


def _type(field: FieldDescriptor) -> str:
    if schema.is_map(field):
        return "map of strings"
    if schema.is_struct(field):
        one = "free object"
    elif schema.is_timestamp(field):
        one = "time"
    elif field.message_type is not None:
        one = "object"
    else:
        one = _QUANTITIES.get(schema.quantity(field)) or _TYPES.get(field.cpp_type, "value")
    return f"list of {one}s" if field.is_repeated else one
