"""Signatures of checkpoints: the only place that knows how they are made (Ed25519, RFC 8032).

What may live here: making and checking one. The library is imported when it is used: most who import wire never do.
"""

from casemate_core.audit import Link
from casemate_core.checkpoint import Checkpoint, is_formed, statement


class Notary:
    """Signs with one key, made of 32 bytes."""

    def __init__(self, seed: bytes) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        #: The public key, in hex.
        self.public = self._key.public_key().public_bytes_raw().hex()

    def __repr__(self) -> str:
        return f"Notary({self.public})"

    def sign(self, link: Link, time_s: float) -> Checkpoint:
        """A checkpoint of a place in the chain."""
        whole_s = int(time_s)
        signature = self._key.sign(statement(link, whole_s)).hex()
        return Checkpoint(link.sequence, link.digest, whole_s, self.public, signature)


def is_genuine(checkpoint: Checkpoint) -> bool:
    """Whether the key that a checkpoint names has signed it."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not is_formed(checkpoint):
        return False
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(checkpoint.key))
        key.verify(bytes.fromhex(checkpoint.signature), statement(checkpoint.link, checkpoint.time_s))
    except (InvalidSignature, ValueError):
        return False
    return True
