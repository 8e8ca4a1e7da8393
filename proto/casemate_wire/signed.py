"""Signed messages of the manager to a host: the only place that knows what is signed, and whose signature counts.

What may live here: making and opening one, and the way from a certificate to an authority that is pinned. No files and no
clock. The library is imported when it is used: most who import wire never do.

Theory of operation. Where TLS ends in a process that is not believed (the relay of a split agent), the stream says nothing of
who speaks. So whoever listens behind it draws a nonce for each stream and has it taken to the manager; the manager signs, with
a key that an authority of the fleet has certified for nothing else, each message together with the host, what the stream is
for, the nonce, and the message's number in the stream. What was signed for another host, another stream or another day has
another nonce; what was changed has another digest; what was left out, repeated or exchanged has another number. Who carries
the messages can cut the stream, and no more.

Where root has enrolled a key of its own (X25519), the messages of a stream are also encrypted for it (AES-256-GCM, under a key
that HKDF makes of one exchange with a key that the manager draws for the stream): who carries them learns their number and
their length.

The signer is believed by its certificate: its one name is the manager's, its one use is to sign, and from it certificates lead
to an authority whose SHA-256 the listener knows. An authority that follows another is vouched for by it (``casemate ca roll``),
so a listener who knows only the old one finds the way.
"""

import hashlib
import re
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from casemate_core.errors import MachineError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

#: The name in the certificate of a manager's signing key.
MANAGER: Final = "spiffe://casemate/manager"
#: Certificates that go with a first message: the signer's, and two of each authority.
MOST_CERTIFICATES: Final = 64
#: Bytes of a nonce, where there is one.
NONCE_BYTES: Final = 32
#: Authorities that a fleet trusts at the same time, and more.
MOST_PINS: Final = 32
PIN: Final = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)
_FORM: Final = b"casemate signed message 1"


class NotSigned(MachineError):
    """What came is not what the fleet's manager has signed for this stream."""

    reason = "NotSigned"


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a stream is for, as both ends know it. ``topic``: of a channel its ticket."""

    kind: str
    host: str
    topic: str
    nonce: bytes

    def statement(self, number: int, message: bytes, ephemeral: bytes) -> bytes:
        """What is signed; ``ephemeral`` is that of the stream, so that nobody passes off what is encrypted as plain."""
        return self._joined(hashlib.sha256(message).digest(), ephemeral) + struct.pack("!Q", number)

    def cipher(self, shared: bytes, ephemeral: bytes, sealing: bytes) -> "AESGCM":
        """For the messages of the stream. ``shared`` is what the exchange gave; the others are the public keys."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return AESGCM(HKDF(SHA256(), 32, self.nonce, self._joined(ephemeral, sealing)).derive(shared))

    def _joined(self, *more: bytes) -> bytes:
        parts = (_FORM, self.kind.encode(), self.host.encode(), self.topic.encode(), self.nonce, *more)
        return b"".join(struct.pack("!I", len(part)) + part for part in parts)


@dataclass(frozen=True, slots=True)
class Sealed:
    """A signed message. ``chain``: certificates as DER, with the first of a stream; ``ephemeral`` too, where it is encrypted."""

    message: bytes
    number: int
    signature: bytes
    chain: tuple[bytes, ...] = ()
    ephemeral: bytes = b""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A manager's key with its certificate, and those that lead from there to every authority."""

    key: "Ed25519PrivateKey"
    chain: tuple[bytes, ...]


class Signer:
    """The manager's end of one stream. ``sealing``: the public key (X25519) for which it is encrypted; empty: it is not."""

    def __init__(self, key: SigningKey, purpose: Purpose, sealing: bytes = b"") -> None:
        self._key = key
        self._purpose = purpose
        self._number = 0
        self._ephemeral = b""
        self._cipher: AESGCM | None = None
        if sealing:
            self._ephemeral, self._cipher = _exchanged(purpose, sealing)

    def sign(self, message: bytes) -> Sealed:
        """The next message of the stream."""
        self._number += 1
        if self._cipher is not None:
            message = self._cipher.encrypt(_counted(self._number), message, None)
        signature = self._key.key.sign(self._purpose.statement(self._number, message, self._ephemeral))
        if self._number > 1:
            return Sealed(message, self._number, signature)
        return Sealed(message, self._number, signature, self._key.chain, self._ephemeral)


class Opener:
    """The listener's end of one stream: ``pins`` are SHA-256, in hex, of the authorities that it believes; ``sealing`` is the key
    that it has enrolled."""

    def __init__(self, purpose: Purpose, pins: Collection[str], sealing: "X25519PrivateKey | None" = None) -> None:
        self._sealing = sealing
        self._ephemeral = b""
        self._cipher: AESGCM | None = None
        self._purpose = purpose
        self._pins = pins
        self._number = 0
        self._key: Ed25519PublicKey | None = None

    def open(self, sealed: Sealed, now_s: float) -> bytes:
        """The message. Raises NotSigned: the stream is not to be listened to any more."""
        from cryptography.exceptions import InvalidSignature

        if sealed.number != self._number + 1:
            raise NotSigned(f"message {sealed.number} of the manager came where {self._number + 1} was due")
        if self._key is None:
            key, self._ephemeral = signer_of(sealed.chain, self._pins, now_s), sealed.ephemeral
        else:
            key = self._key
        try:
            key.verify(sealed.signature, self._purpose.statement(sealed.number, sealed.message, self._ephemeral))
        except InvalidSignature:
            raise NotSigned("a message is not signed by the manager for this stream of this host") from None
        message = self._decrypted(sealed) if self._ephemeral else sealed.message
        self._key = key
        self._number += 1
        return message

    def _decrypted(self, sealed: Sealed) -> bytes:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        if self._sealing is None:
            raise NotSigned("what the manager says is encrypted for a key that this host has lost: join again")
        try:
            if self._cipher is None:
                shared = self._sealing.exchange(X25519PublicKey.from_public_bytes(self._ephemeral))
                ours = self._sealing.public_key().public_bytes_raw()
                self._cipher = self._purpose.cipher(shared, self._ephemeral, ours)
            return self._cipher.decrypt(_counted(sealed.number), sealed.message, None)
        except (InvalidTag, ValueError):
            raise NotSigned("what the manager says is encrypted for another key than this host's: join again") from None


def _exchanged(purpose: Purpose, sealing: bytes) -> "tuple[bytes, AESGCM]":
    """A key drawn for one stream, public, and the cipher that it gives with the listener's."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    drawn = X25519PrivateKey.generate()
    public = drawn.public_key().public_bytes_raw()
    return public, purpose.cipher(drawn.exchange(X25519PublicKey.from_public_bytes(sealing)), public, sealing)


def _counted(number: int) -> bytes:
    """The nonce of AES-GCM for a message: its number. A key is of one stream alone, and says nothing twice."""
    return number.to_bytes(12, "big")


def signer_of(chain: Sequence[bytes], pins: Collection[str], now_s: float) -> "Ed25519PublicKey":
    """The key of the first certificate, if it is a manager's and the others lead to a pinned authority. Raises NotSigned."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not 1 <= len(chain) <= MOST_CERTIFICATES:
        raise NotSigned(
            f"{len(chain)} certificates come with a first message, where 1 to {MOST_CERTIFICATES} are taken"
        )
    try:
        leaf, *others = map(x509.load_der_x509_certificate, chain)
        key = leaf.public_key()
        if not isinstance(key, Ed25519PublicKey) or not _is_managers(leaf) or not _is_in_time(leaf, now_s):
            raise NotSigned(
                "the certificate of who signed is not a manager's, or its time is not now: look at the clock"
            )
        at = leaf
        for _ in range(len(others)):
            issuers = [c for c in others if _is_authority(c) and _is_in_time(c, now_s) and _has_signed(c, at)]
            if any(c.fingerprint(hashes.SHA256()).hex() in pins for c in issuers):
                return key
            # One that signed itself leads nowhere else; the same key vouched for by the authority before it does.
            at = next(c for c in issuers if c.subject != c.issuer)
    except StopIteration:
        pass
    except NotSigned:
        raise
    except (
        Exception
    ) as error:  # the library has many classes for what is no certificate of ours (UnsupportedAlgorithm, ...)
        raise NotSigned(f"what came as a certificate is none that is understood: {type(error).__name__}") from error
    raise NotSigned("who signed is of another fleet: no authority that this host knows vouches for it")


def _is_managers(certificate: "x509.Certificate") -> bool:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    extensions = certificate.extensions
    names = list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    return (
        [n.value for n in names if isinstance(n, x509.UniformResourceIdentifier)] == [MANAGER]
        and len(names) == 1
        and list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CODE_SIGNING]
        and not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    )


def _is_authority(certificate: "x509.Certificate") -> bool:
    from cryptography import x509

    extensions = certificate.extensions
    return (
        extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        and extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    )


def _is_in_time(certificate: "x509.Certificate", now_s: float) -> bool:
    return certificate.not_valid_before_utc.timestamp() <= now_s < certificate.not_valid_after_utc.timestamp()


def _has_signed(issuer: "x509.Certificate", certificate: "x509.Certificate") -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True
