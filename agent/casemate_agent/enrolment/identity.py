"""Who this host is, on disk: its key, its certificate, and whom it trusts. And when the certificate is to be renewed.

What may live here: the file, and arithmetic on its times. Asking for certificates is :mod:`casemate_agent.enrolment.enrol`.

Theory of operation. One file, for root alone, replaced as a whole: key, certificate and roots always belong together. The key
is made on this host and never leaves it. It is written down before it is first shown to a manager, so that an answer that
was lost can be asked for again with the same token. A certificate lives for a day and is renewed after two thirds of that,
earlier by a random part, so that hosts that joined together do not renew together.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Final

from casemate_agent.enrolment.privatefile import write_private
from casemate_core.errors import CallerError, MachineError

#: Part of a certificate's life after which it is renewed, and the random part before that.
RENEW_AFTER: Final = 2 / 3
SPREAD: Final = 1 / 20
FILE: Final = "identity.json"
PENDING: Final = "identity.pending"


class IdentityDamaged(MachineError):
    """The file cannot be read as it was written."""

    reason = "IdentityDamaged"


class NotJoined(CallerError):
    """This host has no identity yet."""

    reason = "NotJoined"


@dataclass(frozen=True, slots=True)
class Identity:
    """An enrolled host. PEM as text; ``manager`` takes its streams and ``enrolment`` its renewals, both ``host:port``."""

    host: str
    manager: str
    enrolment: str
    key: str = field(repr=False)
    certificate: str
    roots: str
    not_before_s: float
    not_after_s: float

    def renewal_s(self, random: Random) -> float:
        """When to renew, in seconds since the epoch."""
        life_s = self.not_after_s - self.not_before_s
        return self.not_before_s + life_s * (RENEW_AFTER - SPREAD * random.random())

    def renewed(self, certificate: str, roots: str, not_before_s: float, not_after_s: float) -> "Identity":
        """The same host with a fresh certificate."""
        return replace(self, certificate=certificate, roots=roots, not_before_s=not_before_s, not_after_s=not_after_s)


def load(folder: Path) -> Identity | None:
    """The identity in a state folder; None where the host has not joined. Raises IdentityDamaged."""
    path = folder / FILE
    try:
        return Identity(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise IdentityDamaged(f"{path}: {error}") from error


def save(folder: Path, identity: Identity) -> None:
    """Write it, whole or not at all; durable when this returns. Raises OSError."""
    write_private(folder, FILE, json.dumps(asdict(identity)).encode())
    (folder / PENDING).unlink(missing_ok=True)


def pending_key(folder: Path, token: str) -> bytes:
    """The key with which this host asks to join by the token of this id: one for each token, kept until it has joined."""
    from casemate_agent.enrolment.enrol import new_key

    path = folder / PENDING
    try:
        kept = json.loads(path.read_bytes())
        if kept["token"] == token:
            return str(kept["key"]).encode()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    key = new_key()
    write_private(folder, PENDING, json.dumps({"token": token, "key": key.decode()}).encode())
    return key
