"""What the schema says about its own fields: kinds, options, comments. Read-only, made once from the descriptors."""

import json
from functools import cache
from importlib import resources
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from casemate_wire.v1 import fleet_pb2, operators_pb2, options_pb2

API_VERSION: Final = "casemate/v1"
#: Kinds in the order of the schema, by the field of Resource that carries them.
KIND_FIELDS: Final[dict[str, str]] = {
    f.message_type.name: f.name
    for f in operators_pb2.Resource.DESCRIPTOR.oneofs_by_name["object"].fields
    if f.message_type is not None
}
#: Kinds that only the manager writes.
READ_ONLY_KINDS: Final = frozenset({"Instance", "Pod", "Placement", "Operation", "GPU", "Event"})
#: Kinds that this release takes.
SERVED_KINDS: Final = frozenset(
    {"Environment", "Image", "Network", "Host", "Policy", "Tenant", "User", "RoleBinding", "Secret", "Volume"}
)

_STRUCT: Final = "google.protobuf.Struct"
_TIMESTAMP: Final = "google.protobuf.Timestamp"
assert fleet_pb2.DESCRIPTOR is not None  # the kinds' messages must be loaded before their names are looked up


def fields_of(descriptor: Any) -> list[FieldDescriptor]:
    """Fields in the schema's order."""
    return list(descriptor.fields)


def is_struct(field: FieldDescriptor) -> bool:
    """True for a field that carries free JSON."""
    return field.message_type is not None and field.message_type.full_name == _STRUCT


def is_timestamp(field: FieldDescriptor) -> bool:
    """True for a field that carries a point in time."""
    return field.message_type is not None and field.message_type.full_name == _TIMESTAMP


def is_map(field: FieldDescriptor) -> bool:
    """True for a map field."""
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def words(field: FieldDescriptor) -> tuple[str, ...]:
    """The closed set of words that the field takes; empty where any text will do."""
    return tuple(field.GetOptions().Extensions[options_pb2.words].split())


def quantity(field: FieldDescriptor) -> int:
    """The unit of a quantity (options_pb2.BYTES, …), 0 where the field is none."""
    return int(field.GetOptions().Extensions[options_pb2.quantity])


def flag(field: FieldDescriptor, name: str) -> bool:
    """One of the yes-or-no options: ``unserved``, ``required``, ``output_only``, ``sensitive``."""
    return bool(field.GetOptions().Extensions[getattr(options_pb2, name)])


def effect(field: FieldDescriptor) -> str:
    """``live``, ``restart``, ``replace``, ``immutable``, or empty where the schema says nothing (the parent's counts)."""
    value = field.GetOptions().Extensions[options_pb2.update]
    return "" if value == options_pb2.UPDATE_UNSPECIFIED else options_pb2.Update.Name(value).lower()


@cache
def comments() -> dict[str, str]:
    """Comments of the schema by full protobuf name."""
    text = resources.files("casemate_wire.v1").joinpath("schema_docs.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def comment(full_name: str) -> str:
    """The comment of one message or field; empty where there is none."""
    return comments().get(full_name, "")


def kind_descriptor(kind: str) -> Descriptor:
    """Descriptor of a kind's message. Raises KeyError for an unknown kind."""
    field = operators_pb2.Resource.DESCRIPTOR.fields_by_name[KIND_FIELDS[kind]]
    assert field.message_type is not None
    return field.message_type


def kind_of(resource: operators_pb2.Resource) -> str:
    """Kind of the object in the envelope; empty where there is none."""
    name = resource.WhichOneof("object")
    return "" if name is None else object_of(resource).DESCRIPTOR.name


def object_of(resource: operators_pb2.Resource) -> Message:
    """The object in the envelope."""
    name = resource.WhichOneof("object")
    if name is None:
        raise ValueError("empty resource")
    message = getattr(resource, name)
    assert isinstance(message, Message)
    return message
