"""How a host asks a manager for certificates: to join by a token, and to renew by its key.

What may live here: requests for certificates, and the calls that carry them. When to renew is
:mod:`casemate_agent.enrolment.renewal`.

Theory of operation of joining. The token says SHA-256 of the authority that signs the manager's certificate. First we look
whom we reach: a TLS handshake, after which nothing is said. Trusting exactly the certificate seen, we ask for the
certificates of the authorities, which is public, and keep the one that the token names. Without it, that is the end. Then we
dial anew, trusting that authority alone, and only there say the token's secret. Who sits between sees a handshake and a
public question.
"""

import asyncio
import contextlib
import hashlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from casemate_agent.enrolment.identity import Identity, pending_key, save
from casemate_core.errors import CallerError, Unavailable
from casemate_wire.tls import SERVER_NAME, TARGET_NAME
from casemate_wire.token import Token

if TYPE_CHECKING:
    from casemate_wire.v1 import enrolment_pb2
    from casemate_wire.v1.enrolment_pb2_grpc import EnrolmentStub

#: Longest time for one question to the manager, and for a handshake, in seconds.
CALL_S: Final = 20.0
#: More is no list of authorities.
MAX_ROOTS_BYTES: Final = 1 << 20


class OtherAuthority(CallerError):
    """Who answers is not the manager that the token is for."""

    reason = "OtherAuthority"


class JoinRefused(CallerError):
    """The manager knows the token or the key, and says no."""

    reason = "JoinRefused"


def new_key() -> bytes:
    """A fresh ECDSA key on P-256, as PEM."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def request_for(key: bytes) -> bytes:
    """A certificate request (PKCS #10, DER) signed by a key; it says nothing else."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

    private = load_pem_private_key(key, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    built = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(private, hashes.SHA256())
    return built.public_bytes(Encoding.DER)


def pinned(roots: bytes, pin: str) -> bytes:
    """The certificate of a list (PEM) that the pin names. Raises OtherAuthority."""
    end = b"-----END CERTIFICATE-----"
    for part in roots.split(end)[:-1]:
        pem = part.strip() + b"\n" + end + b"\n"
        with contextlib.suppress(ValueError):
            if hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))).hexdigest() == pin:
                return pem
    raise OtherAuthority(
        "who answers there is not the manager that the token is for; nothing was sent. Check the address, and make a new"
        " token if the fleet's authority was rolled over since"
    )


async def join(token: Token, address: str, folder: Path, sealing: bytes = b"") -> Identity:
    """Become the token's host; its identity is on disk when this returns.

    ``sealing``: root's public key (X25519), where the agent is split. Raises OtherAuthority, JoinRefused, Unavailable.
    """
    seen = await asyncio.to_thread(_leaf_of, address)
    from casemate_wire.v1 import enrolment_pb2 as pb

    async with _stub(address, seen) as stub:
        answer = await _asked(stub.Roots(pb.RootsRequest(), timeout=CALL_S))
    root = pinned(answer.roots[:MAX_ROOTS_BYTES], token.pin)
    key = pending_key(folder, token.id)
    async with _stub(address, root) as stub:
        request = pb.EnrolRequest(
            token=token.id, secret=token.secret, certificate_request=request_for(key), sealing_key=sealing
        )
        got: enrolment_pb2.Certificates = await _asked(stub.Enrol(request, timeout=CALL_S))
    if got.host != token.host:
        raise OtherAuthority(f"the token is for host {token.host} and the manager speaks of {got.host}")
    identity = Identity(
        got.host,
        f"{address.rpartition(':')[0]}:{got.session_port}",
        address,
        key.decode(),
        got.certificate.decode(),
        got.roots.decode(),
        got.not_before,
        got.not_after,
    )
    save(folder, identity)
    return identity


async def renew(identity: Identity) -> Identity:
    """The same host with a fresh certificate for its key; its old one need not be good any more.

    Raises JoinRefused where the host or its key is not known any more, Unavailable.
    """
    from casemate_wire.v1 import enrolment_pb2 as pb

    async with _stub(identity.enrolment, identity.roots.encode()) as stub:
        request = pb.RenewRequest(host=identity.host, certificate_request=request_for(identity.key.encode()))
        got: enrolment_pb2.Certificates = await _asked(stub.Renew(request, timeout=CALL_S))
    return identity.renewed(got.certificate.decode(), got.roots.decode(), got.not_before, got.not_after)


def _leaf_of(address: str) -> bytes:
    """The certificate that is shown at an address, as PEM, believed by nobody yet. Raises Unavailable."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Whom we reach is found out here and judged afterwards, by the pin; nothing is said on this connection.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), CALL_S) as plain,
            context.wrap_socket(plain, server_hostname=SERVER_NAME) as secured,
        ):
            shown = secured.getpeercert(binary_form=True)
    except (OSError, ValueError) as error:
        raise Unavailable(f"no manager answers at {address} by TLS 1.3: {error}") from error
    if not shown:
        raise Unavailable(f"who answers at {address} shows no certificate")
    return ssl.DER_cert_to_PEM_cert(shown).encode()


@contextlib.asynccontextmanager
async def _stub(address: str, roots: bytes) -> "AsyncIterator[EnrolmentStub]":
    import grpc.aio

    from casemate_wire.v1.enrolment_pb2_grpc import EnrolmentStub

    options = [TARGET_NAME, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    credentials = grpc.ssl_channel_credentials(root_certificates=roots)
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        yield EnrolmentStub(channel)


async def _asked(call: Any) -> Any:
    import grpc.aio

    try:
        return await call
    except grpc.aio.AioRpcError as error:
        words = error.details() or error.code().name
        if error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT):
            raise JoinRefused(words) from error
        raise Unavailable(f"the manager did not answer: {words.splitlines()[0]}") from error
