"""Checkpoint ⇄ message."""

from casemate_core.checkpoint import Break, Checkpoint, Witnessed
from casemate_wire.v1 import checkpoints_pb2 as pb


def checkpoint_to_message(checkpoint: Checkpoint) -> pb.AuditCheckpoint:
    """One checkpoint."""
    return pb.AuditCheckpoint(
        sequence=checkpoint.sequence,
        digest=checkpoint.digest,
        time_s=checkpoint.time_s,
        key=checkpoint.key,
        signature=checkpoint.signature,
    )


def checkpoint_from_message(message: pb.AuditCheckpoint) -> Checkpoint:
    """One checkpoint, whatever it says: who uses it asks `is_genuine`."""
    return Checkpoint(message.sequence, message.digest, message.time_s, message.key, message.signature)


def statement_to_message(host: str, found: Witnessed) -> pb.WitnessStatement:
    """What a host keeps."""
    return pb.WitnessStatement(
        host=host,
        kept=[checkpoint_to_message(c) for c in found.kept],
        breaks=[
            pb.AuditBreak(time_s=b.time_s, reason=b.reason, seen=checkpoint_to_message(b.seen)) for b in found.breaks
        ],
    )


def statement_from_message(message: pb.WitnessStatement) -> Witnessed:
    """What a host keeps, as the manager told it."""
    breaks = (Break(b.time_s, b.reason, checkpoint_from_message(b.seen)) for b in message.breaks)
    return Witnessed("", tuple(map(checkpoint_from_message, message.kept)), tuple(breaks))
