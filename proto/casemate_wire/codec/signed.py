"""Signed messages ⇄ messages of hosts.proto, and the bounds of what goes with them: nonces, and the pins of authorities."""

from collections.abc import Sequence

from google.protobuf.message import DecodeError

from casemate_wire.codec.basics import BadMessage
from casemate_wire.signed import MOST_PINS, NONCE_BYTES, PIN, Sealed
from casemate_wire.v1 import hosts_pb2 as pb


def checked_nonce(nonce: bytes) -> bytes:
    """Raises BadMessage."""
    if len(nonce) not in (0, NONCE_BYTES):
        raise BadMessage(f"a nonce of {len(nonce)} bytes, {NONCE_BYTES} are taken")
    return nonce


def checked_pins(pins: Sequence[str]) -> tuple[str, ...]:
    """SHA-256 of certificates, in hex. Raises BadMessage."""
    if len(pins) > MOST_PINS:
        raise BadMessage(f"{len(pins)} authorities, at most {MOST_PINS} are taken")
    if not all(map(PIN.match, pins)):
        raise BadMessage("the pin of an authority is SHA-256 of its certificate, in hex")
    return tuple(pins)


def sealed_to_wire(sealed: Sealed) -> pb.Signed:
    return pb.Signed(
        message=sealed.message,
        number=sealed.number,
        signature=sealed.signature,
        chain=list(sealed.chain),
        ephemeral=sealed.ephemeral,
    )


def sealed_from_wire(message: pb.Signed) -> Sealed:
    """What its parts are worth is found out when it is opened."""
    return Sealed(message.message, message.number, message.signature, tuple(message.chain), message.ephemeral)


def sealed_in_session(data: bytes) -> Sealed | None:
    """The signed message that a serialized ToHost is; None where it is another. Raises BadMessage."""
    return _sealed_in(pb.ToHost, data)


def sealed_in_channel(data: bytes) -> Sealed | None:
    """The same of a ChannelFrame."""
    return _sealed_in(pb.ChannelFrame, data)


def _sealed_in(kind: type[pb.ToHost] | type[pb.ChannelFrame], data: bytes) -> Sealed | None:
    try:
        message = kind.FromString(data)
    except DecodeError:
        raise BadMessage(f"what came is no message of the schema ({len(data)} bytes)") from None
    return sealed_from_wire(message.signed) if message.HasField("signed") else None
