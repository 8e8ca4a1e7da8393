"""AuditRecord ⇄ message, total in both directions: the client computes digests from what it gets."""

from casemate_core.audit import AuditRecord, Link
from casemate_wire.v1 import audit_pb2 as pb


def record_to_message(record: AuditRecord) -> pb.AuditEntry:
    """One record."""
    return pb.AuditEntry(
        sequence=record.sequence,
        time_s=record.time_s,
        actor=record.actor,
        how=record.how,
        act=record.act,
        outcome=record.outcome,
        targets=record.targets,
        tenants=record.tenants,
        detail=record.detail,
        address=record.address,
        client=record.client,
        request=record.request,
        revision=record.revision,
        previous=record.previous,
        digest=record.digest,
    )


def record_from_message(message: pb.AuditEntry) -> AuditRecord:
    """One record."""
    return AuditRecord(
        sequence=message.sequence,
        time_s=message.time_s,
        actor=message.actor,
        how=message.how,
        act=message.act,
        outcome=message.outcome,
        targets=tuple(message.targets),
        tenants=tuple(message.tenants),
        detail=message.detail,
        address=message.address,
        client=message.client,
        request=message.request,
        revision=message.revision,
        previous=message.previous,
        digest=message.digest,
    )


def link_to_message(link: Link) -> pb.AuditLink:
    """One place of the chain."""
    return pb.AuditLink(sequence=link.sequence, digest=link.digest)


def link_from_message(message: pb.AuditLink) -> Link:
    """One place of the chain."""
    return Link(message.sequence, message.digest)
