"""What the manager's ports show and ask for, and what its messages are signed with: credentials that follow the authorities,
renewed by themselves.

Theory of operation. gRPC asks for the credentials at each handshake, on a thread of its own; what it gets is made once and
kept until the authorities change or two thirds of the certificate's life are over. The server's keys are made anew with each
certificate and are never on disk. Open connections are not touched by any of it.
"""

import threading
from collections.abc import Callable, Iterable

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casemate_manager import pki
from casemate_manager.authority import Authorities
from casemate_wire.signed import MOST_CERTIFICATES, SigningKey

#: Part of a certificate's life after which the next one is made.
RENEW_AFTER = 2 / 3


class ServerTls:
    """Credentials of a manager's ports. ``names``: further names and addresses that its certificate is good for."""

    def __init__(self, authorities: Authorities, names: Iterable[str], clock: Callable[[], float]) -> None:
        self.authorities = authorities
        self._names = tuple(names)
        self._clock = clock
        self._lock = threading.Lock()
        self._due_s = 0.0
        self._made_of = -1
        self._pair: tuple[bytes, bytes] = (b"", b"")
        self._signing = SigningKey(Ed25519PrivateKey.generate(), ())

    def pair(self) -> tuple[bytes, bytes]:
        """The server's key and its chain, as PEM; fresh."""
        return self._fresh()[0]

    def signing(self) -> SigningKey:
        """What messages of a stream that begins now are signed with; fresh."""
        return self._fresh()[1]

    @property
    def pins(self) -> tuple[str, ...]:
        """SHA-256 of the authorities that are trusted now."""
        return tuple(authority.pin for authority in self.authorities.trusted)

    def _fresh(self) -> tuple[tuple[bytes, bytes], SigningKey]:
        with self._lock:
            authorities = self.authorities
            made_of, now_s = authorities.version, self._clock()
            if made_of != self._made_of or now_s >= self._due_s:
                key = pki.new_key()
                leaf = pki.sign_server(authorities.signing, key.public_key(), self._names, now_s)
                self._pair = (pki.key_pem(key), pki.pem(leaf, *authorities.chain))
                signing = Ed25519PrivateKey.generate()
                signer = pki.sign_signer(authorities.signing, signing.public_key(), now_s)
                # Listeners know an authority by its digest alone, so all that may be known go along, newest first.
                whole = (signer, *authorities.chain, *(a.certificate for a in reversed(authorities.every)))
                self._signing = SigningKey(signing, tuple(map(pki.der, whole[:MOST_CERTIFICATES])))
                self._due_s = now_s + RENEW_AFTER * pki.SERVER_S
                self._made_of = made_of
            return self._pair, self._signing

    def mutual(self) -> grpc.ServerCredentials:
        """For the port of sessions and operators: nobody gets in without a certificate of a trusted authority."""
        return self._credentials(ask=True)

    def enrolment(self) -> grpc.ServerCredentials:
        """For the port of enrolment: the server alone shows who it is."""
        return self._credentials(ask=False)

    def _credentials(self, *, ask: bool) -> grpc.ServerCredentials:
        def made() -> tuple[grpc.ServerCertificateConfiguration, tuple[object, ...]]:
            pair, roots = self.pair(), self.authorities.roots if ask else None
            return grpc.ssl_server_certificate_configuration([pair], roots), (pair, roots)

        first, shown = made()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            fresh, of = made()
            if of == shown:
                return None  # as before; the stub does not say that this may be
            shown = of
            return fresh

        return grpc.dynamic_ssl_server_credentials(first, fetch, ask)  # type: ignore[arg-type]
