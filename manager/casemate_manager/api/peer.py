"""Who is at the other end of a call, as its certificate says. The one place that reads a call's authentication context.

gRPC has verified the certificate against this fleet's authorities before a handler runs; what is read here is what the
authority wrote, never what the caller says of itself. The subject's URI is shaped like a SPIFFE id:
``spiffe://casemate/host/<name>`` or ``spiffe://casemate/user/<name>``. A certificate with another name, with two names, or
with none names nobody. A certificate is no permission: whether a host is still enrolled, and what a user may do, is asked of
committed records by whoever handles the call.

The port for enrolment asks for no certificate, and plain text on loopback has none: a caller there is `NOBODY` with
``secure`` true or false. The first operator of a fleet, whose certificate ``casemate-manager operator`` writes, is the user
``admin``.
"""

import hashlib
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import grpc

TRUST_DOMAIN: Final = "casemate"
_URI: Final = re.compile(r"spiffe://casemate/(host|user)/([a-z0-9]([a-z0-9.@_-]{0,251}[a-z0-9])?)")


@dataclass(frozen=True, slots=True)
class Host:
    """An enrolled machine. ``certificate`` is its certificate as DER."""

    name: str
    certificate: bytes = b""


@dataclass(frozen=True, slots=True)
class User:
    """A person or a program. ``certificate`` is the certificate as DER."""

    name: str
    certificate: bytes = b""

    @property
    def fingerprint(self) -> str:
        """Names this one certificate: SHA-256 of it, in hex."""
        return hashlib.sha256(self.certificate).hexdigest()


@dataclass(frozen=True, slots=True)
class Nobody:
    """No certificate. ``secure``: the connection is TLS all the same; else it is plain text on loopback."""

    secure: bool


Peer = Host | User | Nobody


def peer_of(context: "grpc.ServicerContext | grpc.aio.ServicerContext[Any, Any]") -> Peer:
    """The caller's identity."""
    properties = cast("Mapping[str, Sequence[bytes]]", context.auth_context())
    secure = list(properties.get("transport_security_type", ())) == [b"ssl"]
    named = properties.get("peer_uri") or properties.get("peer_spiffe_id") or ()
    pem = properties.get("x509_pem_cert", ())
    if not secure or len(named) != 1 or len(pem) != 1:
        return Nobody(secure)
    found = _URI.fullmatch(named[0].decode("utf-8", "replace"))
    if found is None:
        return Nobody(True)
    certificate = ssl.PEM_cert_to_DER_cert(pem[0].decode("ascii"))
    return Host(found[2], certificate) if found[1] == "host" else User(found[2], certificate)
