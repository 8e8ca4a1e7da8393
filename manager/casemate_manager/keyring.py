"""The manager's own key: what tokens are signed and secrets are sealed with. Kept outside of the store.

One file of 32 random bytes beside the store (or where the settings say), mode 0600, made at the first start and never
written again. From it a key is derived for each purpose, so that none of them tells anything of another. Who has the
store's file without this one has no secret of any tenant; a backup keeps the two apart.
"""

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from casemate_core.errors import CallerError

SIZE: Final = 32


class BadKeyFile(CallerError):
    """The file is not a key of ours, or others may read it."""

    reason = "BadKeyFile"


class Keyring:
    """Keys by purpose."""

    def __init__(self, root: bytes) -> None:
        if len(root) != SIZE:
            raise BadKeyFile(f"a key has {SIZE} bytes, not {len(root)}")
        self._root = root

    def __repr__(self) -> str:
        return "Keyring(…)"

    @classmethod
    def fresh(cls) -> "Keyring":
        """A new one, that ends with the process."""
        return cls(secrets.token_bytes(SIZE))

    def key(self, purpose: str) -> bytes:
        """32 bytes for one purpose."""
        return HKDF(SHA256(), SIZE, salt=None, info=f"casemate/{purpose}".encode()).derive(self._root)


def load(path: Path) -> Keyring:
    """The key in ``path``, made where there is none. Raises BadKeyFile."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return _make(path)
    except OSError as error:
        raise BadKeyFile(f"{path}: {error.strerror}") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
            raise BadKeyFile(f"{path}: others may read it; make it a file of mode 0600 of the manager's user")
        data = os.read(descriptor, SIZE + 1)
    finally:
        os.close(descriptor)
    if len(data) != SIZE:
        raise BadKeyFile(f"{path}: is not a key of {SIZE} bytes; restore it from its backup")
    return Keyring(data)


def _make(path: Path) -> Keyring:
    """Written whole under another name, then linked: nobody ever sees a part of it, and none is ever overwritten."""
    root = secrets.token_bytes(SIZE)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, root)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        os.link(fresh, path)
    except FileExistsError:
        return load(path)
    finally:
        fresh.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return Keyring(root)
