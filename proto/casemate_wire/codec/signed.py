"""Signed messages ⇄ messages of hosts.proto, and the bounds of what goes with them: nonces, and the pins of authorities."""

import re
from collections.abc import Sequence
from typing import Final

from casemate_wire.codec.basics import BadMessage
from casemate_wire.signed import Sealed
from casemate_wire.v1 import hosts_pb2 as pb

#: Bytes of a nonce, where there is one.
NONCE_BYTES: Final = 32
#: Authorities that a fleet trusts at the same time, and more.
MOST_PINS: Final = 32
PIN: Final = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)


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
    return pb.Signed(message=sealed.message, number=sealed.number, signature=sealed.signature, chain=list(sealed.chain))


def sealed_from_wire(message: pb.Signed) -> Sealed:
    """What its parts are worth is found out when it is opened."""
    return Sealed(message.message, message.number, message.signature, tuple(message.chain))
