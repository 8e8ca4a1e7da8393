"""The first operator's certificate, made from the authorities' files by whoever may read them.

The file is one that `casemate` reads as its file of contexts: address, roots, certificate and key of one user.
"""

import os
import re
from pathlib import Path

from casemate_core.errors import InvalidSpec, MachineError, Violation, shown
from casemate_manager import pki
from casemate_manager.authority import Authorities

USER = re.compile(r"[a-z0-9]([a-z0-9.@_-]{0,251}[a-z0-9])?")


class NotWritten(MachineError):
    """The file cannot be written."""

    reason = "NotWritten"


def write_context(folder: Path, user: str, manager: str, out: Path, days: int, now_s: float) -> None:
    """Write a file of contexts for ``user``. Raises InvalidSpec, NotWritten."""
    import yaml

    if not USER.fullmatch(user):
        raise InvalidSpec(
            (Violation("name", shown(user), "is no user's name", "use small letters, digits and . @ _ -"),)
        )
    authorities = Authorities(folder, now_s)
    key = pki.new_key()
    certificate = pki.sign_client(authorities.signing, key.public_key(), "user", user, now_s, days * 86400.0)
    context = {
        "manager": manager,
        "roots": authorities.roots.decode(),
        "certificate": pki.pem(certificate).decode(),
        "key": pki.key_pem(key).decode(),
    }
    text = yaml.safe_dump({"current": user, "contexts": {user: context}}, sort_keys=False)
    fresh = out.with_name(out.name + ".new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(text)
        fresh.rename(out)
    except OSError as error:
        raise NotWritten(f"{out}: {error.strerror}") from error
