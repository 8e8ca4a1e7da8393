"""Certificates of a fleet: what an authority, a server, a host and a user are given, and how requests are judged.

What may live here: functions from keys, requests and a time to certificates. No files, no clock, no records
(:mod:`casemate_manager.authority` keeps the authorities; who may have what is decided by the fleet).

Theory of operation. ECDSA on P-256 throughout, since gRPC is held to TLS 1.3 by leaving earlier versions no cipher that fits
an ECDSA certificate (:mod:`casemate_wire.tls`). An authority signs certificates of servers (server use only), hosts and users
(client use only), so that no host can pose as a manager; and of a key with which the manager signs what it tells hosts, which
is good for that alone (:mod:`casemate_wire.signed`; Ed25519, since it signs each message). The identity is the one URI in the
certificate. A request (CSR) is signed by the key it names; nothing else of it is taken: name, use and life are ours. A
certificate for a key that the asker does not hold is of no use to him, so a request for a key that is bound already needs no
other proof.

An authority is followed by another with `cross_sign`: the old one vouches for the new one's key, and servers send that
certificate along. Who knows only the old root and who knows only the new one then both accept the server.
"""

import datetime
import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from casemate_core.errors import InvalidSpec, Violation
from casemate_wire.signed import MANAGER
from casemate_wire.tls import SERVER_NAME

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
#: Lives of certificates, in seconds.
AUTHORITY_S: Final = 3650 * 86400.0
SERVER_S: Final = 7 * 86400.0
HOST_S: Final = 24 * 3600.0
#: A certificate is good from a little before it was made: clocks differ.
SKEW_S: Final = 300.0
#: Of a public key on X25519.
SEALING_BYTES: Final = 32
#: A request for a certificate is a few hundred bytes; more is no request.
MAX_REQUEST_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate that signs others, and its key. ``cross`` is the same key vouched for by the authority before it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    cross: x509.Certificate | None = None

    @property
    def pin(self) -> str:
        """What a join token says of it: SHA-256 of the certificate, in hex."""
        return pin_of(self.certificate)


def pin_of(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate, in hex."""
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def name_of(certificate: x509.Certificate) -> str:
    """Common name of a certificate's subject."""
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def pem(*certificates: x509.Certificate) -> bytes:
    """Certificates as PEM, one after the other."""
    return b"".join(c.public_bytes(Encoding.PEM) for c in certificates)


def der(certificate: x509.Certificate) -> bytes:
    """A certificate as DER."""
    return certificate.public_bytes(Encoding.DER)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM, not encrypted: files of it are for their owner only."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_key(data: bytes) -> ec.EllipticCurvePrivateKey:
    """A private key from PEM. Raises ValueError."""
    key = load_pem_private_key(data, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an ECDSA key")
    return key


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """Names a key: SHA-256 of it (SubjectPublicKeyInfo), in hex."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def key_id_of(certificate: bytes) -> str:
    """Names the key of a certificate given as DER; empty where it has none of ours."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    return key_id(key) if isinstance(key, ec.EllipticCurvePublicKey) else ""


@lru_cache(maxsize=4096)
def not_after_s(certificate: bytes) -> float:
    """When a certificate, given as DER, ends, in seconds since the epoch."""
    return x509.load_der_x509_certificate(certificate).not_valid_after_utc.timestamp()


def make_authority(name: str, now_s: float) -> Authority:
    """A new authority that answers to nobody."""
    key = new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, subject, key.public_key(), now_s, AUTHORITY_S)
    return Authority(_as_authority(builder, key.public_key()).sign(key, hashes.SHA256()), key)


def cross_sign(old: Authority, new: Authority, now_s: float) -> Authority:
    """The new authority, vouched for by the old one for as long as the old one lives."""
    left_s = old.certificate.not_valid_after_utc.timestamp() - now_s
    subject, key = new.certificate.subject, new.key.public_key()
    builder = _builder(subject, old.certificate.subject, key, now_s, left_s)
    return Authority(new.certificate, new.key, _as_authority(builder, key).sign(old.key, hashes.SHA256()))


def sign_server(
    authority: Authority, key: ec.EllipticCurvePublicKey, names: Iterable[str], now_s: float
) -> x509.Certificate:
    """A manager's certificate, for `SERVER_NAME` and for further names or addresses."""
    alternatives = [_alternative(name) for name in dict.fromkeys((SERVER_NAME, *names))]
    return leaf(authority, key, SERVER_NAME, alternatives, ExtendedKeyUsageOID.SERVER_AUTH, now_s, SERVER_S)


def sign_signer(authority: Authority, key: ed25519.Ed25519PublicKey, now_s: float) -> x509.Certificate:
    """The certificate of a key with which the manager signs messages: no TLS is spoken with it."""
    uri: list[x509.GeneralName] = [x509.UniformResourceIdentifier(MANAGER)]
    return leaf(authority, key, "manager", uri, ExtendedKeyUsageOID.CODE_SIGNING, now_s, SERVER_S)


def sign_client(
    authority: Authority, key: ec.EllipticCurvePublicKey, kind: str, name: str, now_s: float, life_s: float
) -> x509.Certificate:
    """A certificate of a ``host`` or a ``user``."""
    uri: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"spiffe://casemate/{kind}/{name}")]
    return leaf(authority, key, f"{kind}:{name}"[:64], uri, ExtendedKeyUsageOID.CLIENT_AUTH, now_s, life_s)


def read_request(data: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a request (CSR, DER) asks a certificate for, and whose holder signed it. Raises InvalidSpec."""
    if len(data) > MAX_REQUEST_BYTES:
        raise _bad_request(f"has {len(data)} bytes", f"send at most {MAX_REQUEST_BYTES}")
    try:
        request = x509.load_der_x509_csr(data)
        key = request.public_key()
        good = request.is_signature_valid
    except (ValueError, InvalidSignature, TypeError, NotImplementedError) as error:
        raise _bad_request("is no certificate request", "send a PKCS #10 request as DER") from error
    except (
        Exception
    ) as error:  # what the library has no class for (UnsupportedAlgorithm and its kin) is the asker's too
        raise _bad_request("is no certificate request that is understood", "use ECDSA on P-256") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _bad_request("asks for another kind of key", "use ECDSA on P-256")
    if not good:
        raise _bad_request("is not signed by the key that it names", "make it anew with the host's own key")
    return key


def _bad_request(problem: str, remedy: str) -> InvalidSpec:
    return InvalidSpec((Violation("certificateRequest", "", problem, remedy),))


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _time(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PublicKey, now_s: float, life_s: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now_s - SKEW_S))
        .not_valid_after(_time(now_s + life_s))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _as_authority(builder: x509.CertificateBuilder, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    return builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).add_extension(
        _usage(signs=True), critical=True
    )


def leaf(
    authority: Authority,
    key: PublicKey,
    name: str,
    alternatives: list[x509.GeneralName],
    use: x509.ObjectIdentifier,
    now_s: float,
    life_s: float,
) -> x509.Certificate:
    """A certificate that signs nothing, for one use."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        _builder(subject, authority.certificate.subject, key, now_s, life_s)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
