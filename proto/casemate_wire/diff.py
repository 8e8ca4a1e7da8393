"""What changes between two versions of an object, in the words of the schema, and how each change takes effect.

A pure function of two values; the fleet is given it, since only here are both the core types and the schema known.
"""

from collections.abc import Iterator
from typing import Any

from casemate_core.spec.views import Change
from casemate_wire import manifest, schema
from casemate_wire.codec.resources import Object, to_message

_MISSING = object()


def changes(before: Object | None, after: Object) -> tuple[Change, ...]:
    """Every field of ``spec``, labels and annotations that differs, in the schema's order; all of them for a new object."""
    old = _written(before) if before is not None else {}
    new = _written(after)
    descriptor = schema.kind_descriptor(type(after).__name__)
    return tuple(_walk(old, new, descriptor, "", "live"))


def _written(value: Object) -> dict[str, Any]:
    plain = manifest.to_plain(to_message(value))
    metadata = {k: v for k, v in plain.get("metadata", {}).items() if k in ("labels", "annotations")}
    return {"metadata": metadata, "spec": plain.get("spec", {})}


def _walk(old: Any, new: Any, descriptor: Any, path: str, effect: str) -> Iterator[Change]:
    fields = {f.json_name: f for f in schema.fields_of(descriptor)}
    for name, field in fields.items():
        was, now = old.get(name, _MISSING), new.get(name, _MISSING)
        if was == now:
            continue
        here = f"{path}.{name}" if path else name
        how = schema.effect(field) or effect
        nested = not (
            field.is_repeated or schema.is_map(field) or schema.is_struct(field) or field.message_type is None
        )
        if nested and (was is _MISSING or isinstance(was, dict)) and (now is _MISSING or isinstance(now, dict)):
            yield from _walk(
                {} if was is _MISSING else was, {} if now is _MISSING else now, field.message_type, here, how
            )
        else:
            yield Change(here, None if was is _MISSING else was, None if now is _MISSING else now, how)
