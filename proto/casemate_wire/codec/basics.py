"""Shared pieces of the codec: times, metadata, references, free JSON."""

import re
from collections.abc import Mapping
from typing import Any

from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from casemate_core.errors import CallerError, InvalidSpec, Violation, shown
from casemate_core.spec.meta import DEFAULT_TENANT, TENANT_KINDS, Meta
from casemate_core.spec.views import Condition, ObjectRef
from casemate_wire.manifest import struct_to_plain
from casemate_wire.v1 import meta_pb2

UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z", re.ASCII)


class BadMessage(CallerError):
    """A message of the other end does not have its shape."""

    reason = "BadMessage"


def timestamp(seconds: float) -> Timestamp | None:
    """A point in time; None for 0, which means unknown."""
    if not seconds:
        return None
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


def seconds(stamp: Timestamp) -> float:
    """Seconds since the epoch; 0.0 for an unset time."""
    return stamp.seconds + stamp.nanos / 1e9


def struct(plain: Mapping[str, Any]) -> Struct:
    """Free JSON as a Struct."""
    message = Struct()
    message.update(dict(plain))
    return message


def plain(message: Struct) -> dict[str, Any]:
    """Free JSON of a Struct."""
    return struct_to_plain(message)


def meta_from_message(kind: str, message: meta_pb2.Meta) -> Meta:
    """Metadata that a user applies: only what users write. A tenant's object without a tenant is of ``default``."""
    version = message.resource_version
    if version and not (version.isascii() and version.isdigit() and len(version) < 19):
        raise InvalidSpec(
            (Violation("metadata.resourceVersion", shown(version), "is not a version", "copy it from `casemate get`"),)
        )
    return Meta(
        name=message.name,
        tenant=message.tenant or (DEFAULT_TENANT if kind in TENANT_KINDS else ""),
        labels=dict(message.labels),
        annotations=dict(message.annotations),
        resource_version=int(version or 0),
    )


def meta_to_message(meta: Meta) -> meta_pb2.Meta:
    """Metadata in full."""
    return meta_pb2.Meta(
        name=meta.name,
        tenant=meta.tenant,
        labels=meta.labels,
        annotations=meta.annotations,
        uid=meta.uid,
        generation=meta.generation,
        resource_version=str(meta.resource_version) if meta.resource_version else "",
        created=timestamp(meta.created_s),
        deleting=timestamp(meta.deleting_s),
    )


def condition_to_message(condition: Condition) -> meta_pb2.Condition:
    """One condition."""
    return meta_pb2.Condition(
        type=condition.type,
        status=condition.status,
        reason=condition.reason,
        message=condition.message,
        since=timestamp(condition.since_s),
    )


def ref_to_message(ref: ObjectRef) -> meta_pb2.ObjectRef:
    """One reference."""
    return meta_pb2.ObjectRef(kind=ref.kind, tenant=ref.tenant, name=ref.name, uid=ref.uid)


def checked_text(value: str, limit: int = 1024) -> str:
    """The text, where it is short enough and holds no NUL. Raises BadMessage."""
    if len(value) > limit or "\0" in value:
        raise BadMessage(f"text of {len(value)} characters, at most {limit} are taken")
    return value


def checked_uid(value: str) -> str:
    """The uid, where it is one. Raises BadMessage."""
    if not UID.match(value):
        raise BadMessage(f"{shown(value)!r} is not a uid")
    return value
