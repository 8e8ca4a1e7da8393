"""Checks of a message against what the schema says: unknown fields, required, words, quantities, unserved fields.

Runs on the manager for everything that arrives, whoever sent it; a client that is newer than the manager may send fields that
the manager does not know, and those are refused too, never dropped.
"""

from collections.abc import Callable, Iterator

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.unknown_fields import UnknownFieldSet

from casemate_core.errors import Violation, shown
from casemate_core.quantity import (
    BadQuantity,
    parse_bits_per_second,
    parse_mib,
    parse_millicpus,
    parse_seconds,
)
from casemate_wire import schema
from casemate_wire.manifest import struct_to_plain
from casemate_wire.v1 import options_pb2

MAX_TEXT = 256 * 1024
_PARSERS: dict[int, Callable[[str], int]] = {
    options_pb2.BYTES: parse_mib,
    options_pb2.CPUS: parse_millicpus,
    options_pb2.DURATION: parse_seconds,
    options_pb2.BITRATE: parse_bits_per_second,
}


def check_message(message: Message, path: str = "") -> Iterator[Violation]:
    """Every violation of the schema in ``message``, with field paths below ``path``. Output-only fields are not looked at."""
    if len(UnknownFieldSet(message)):
        yield Violation(
            path or "object", "", "has fields that this manager does not know", "use a client of the manager's version"
        )
    present = {f.name for f, _ in message.ListFields()}
    for field in schema.fields_of(message.DESCRIPTOR):
        here = f"{path}.{field.json_name}" if path else field.json_name
        if schema.flag(field, "output_only"):
            continue
        if field.name not in present:
            if schema.flag(field, "required"):
                yield Violation(here, "", "is missing", _how_to_write(field))
            elif here == "spec" and field.message_type is not None and not schema.is_struct(field):
                # An object without a spec lacks what a spec must have.
                yield from check_message(getattr(message, field.name), here)
            continue
        if schema.flag(field, "unserved"):
            yield Violation(here, "", "is not served by this release", "remove it")
            continue
        yield from _check_field(message, field, here)


def _how_to_write(field: FieldDescriptor) -> str:
    if words := schema.words(field):
        return f"write {' or '.join(words)}"
    if schema.quantity(field) == options_pb2.BYTES:
        return "write a size such as 1Gi"
    return "set it"


def _check_field(message: Message, field: FieldDescriptor, path: str) -> Iterator[Violation]:
    value = getattr(message, field.name)
    if schema.is_map(field) or schema.is_timestamp(field):
        return
    if schema.is_struct(field):
        for i, item in enumerate(value if field.is_repeated else [value]):
            yield from _check_struct(item, f"{path}[{i}]" if field.is_repeated else path)
        return
    if field.message_type is not None:
        items = value if field.is_repeated else [value]
        for i, item in enumerate(items):
            yield from (
                () if isinstance(item, Struct) else check_message(item, f"{path}[{i}]" if field.is_repeated else path)
            )
        return
    if field.cpp_type != FieldDescriptor.CPPTYPE_STRING:
        return
    for i, text in enumerate(value if field.is_repeated else [value]):
        yield from _check_text(field, str(text), f"{path}[{i}]" if field.is_repeated else path)


def _check_struct(struct: Struct, path: str) -> Iterator[Violation]:
    """Free JSON can hold what JSON cannot: NaN and infinities, and values of no kind."""
    try:
        struct_to_plain(struct)
    except (ValueError, RecursionError):
        yield Violation(path, "", "holds a number that is not finite, or is nested too deep", "write plain JSON")


def _check_text(field: FieldDescriptor, text: str, path: str) -> Iterator[Violation]:
    if len(text) > MAX_TEXT or "\0" in text:
        yield Violation(path, shown(text), "is too long or holds a NUL", f"keep it within {MAX_TEXT} characters")
    elif (words := schema.words(field)) and text not in words:
        yield Violation(path, shown(text), "is not one of the words for this field", f"write {' or '.join(words)}")
    elif unit := schema.quantity(field):
        try:
            _PARSERS[unit](text)
        except BadQuantity as bad:
            yield Violation(path, shown(text), bad.problem, bad.remedy)
