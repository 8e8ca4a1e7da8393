"""Certificates for migrations: who may have one, and what it says.

What may live here: the authority that signs for migrations alone, and the judgement of who asks. It is apart from the fleet's
authorities: what it signs lets nobody into the manager, and a host's own certificate lets nobody into a migration.

Theory of operation. The authority's key is made when it is first needed, and is never on disk: it ends with the manager, and
with it every certificate that it has signed (docs/adr/032). A certificate names one end of one migration, ``source`` or
``target``, and its host; the source's is good for dialling alone and the target's for being dialled. It is given to the hosts
of a migration that is under way, by the committed records, for a key that the host has made for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from casemate_core.errors import Conflict, InvalidSpec, NotFound, Violation, shown
from casemate_core.spec.operation import Verb
from casemate_manager import pki
from casemate_manager.fleet.enrolment import refused
from casemate_manager.fleet.state import State

#: How long a certificate is good, in seconds: for the dialling, not for the transfer. Ends ask for a fresh one meanwhile.
MOVE_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class MoveCertificate:
    """PEM: the certificate and its issuer. ``end``: ``source`` or ``target``."""

    certificate: bytes
    issuer: bytes
    end: str


class MoveAuthority:
    """Signs for migrations."""

    def __init__(self, state: Callable[[], State], clock: Callable[[], float]) -> None:
        self._state = state
        self._clock = clock
        self._signing: pki.Authority | None = None

    def issue(self, host: str, identity: str | None, migration: str, request: bytes) -> MoveCertificate:
        """A certificate for the end of a migration that this host is; ``identity`` is the key of its own certificate, None on
        plain text. Raises NotFound, InvalidSpec, Conflict."""
        key, state = pki.read_request(request), self._state()
        if identity is not None and (why := refused(state.enrolments.get(host), identity)):
            raise Conflict(why)
        if identity == pki.key_id(key):
            found = Violation("certificateRequest", "", "is for the host's own key", "make a key for this migration")
            raise InvalidSpec((found,))
        open_ = (r for r in state.open_operations() if r.meta.uid == migration and r.verb == Verb.MIGRATE)
        record = next(open_, None)
        if record is None or host not in (record.host, record.target):
            # the same answer for one that there is not: a host hears nothing of others' migrations
            raise NotFound(f"migration of host {host} that is under way", shown(migration))
        end = "source" if host == record.host else "target"
        now_s = self._clock()
        if self._signing is None:
            self._signing = pki.make_authority("casemate migrations", now_s)
        certificate = sign_end(self._signing, key, migration, end, host, now_s)
        return MoveCertificate(pki.pem(certificate), pki.pem(self._signing.certificate), end)


def sign_end(
    authority: pki.Authority, key: pki.PublicKey, migration: str, end: str, host: str, now_s: float
) -> x509.Certificate:
    """The certificate of one end of a migration."""
    uri: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(f"spiffe://casemate/migration/{migration}/{end}/{host}")
    ]
    use = ExtendedKeyUsageOID.CLIENT_AUTH if end == "source" else ExtendedKeyUsageOID.SERVER_AUTH
    return pki.leaf(authority, key, f"migration:{migration}"[:64], uri, use, now_s, MOVE_S)
