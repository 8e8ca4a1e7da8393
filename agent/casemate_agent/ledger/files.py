"""The few file operations that the ledger is made of, as a port, and their real form.

What may live here: the narrow interface of a folder on a disk, one operation a system call, so that a simulated disk can
fail or tear at each of them (:mod:`casemate_agent.drivers.simulated_disk`). Names are relative to the folder, with ``/``.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class Files(Protocol):
    """A folder. Every method raises OSError as the operating system does; what was not synced may be lost or torn."""

    def listing(self, folder: str) -> list[str]:
        """Names in a folder, without it; empty where there is no such folder."""
        ...

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, data: bytes) -> None:
        """Make or overwrite a file; not durable before ``sync``."""
        ...

    def sync(self, name: str) -> None:
        """fsync the file's data."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Atomically; not durable before ``sync_folder``."""
        ...

    def remove(self, name: str) -> None:
        """Unlink; no error where there is none."""
        ...

    def sync_folder(self, folder: str) -> None:
        """fsync a folder's entries."""
        ...

    def make_folder(self, folder: str) -> None: ...


class OsFiles:
    """A folder of the operating system, for its owner only: records carry user data."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _path(self, name: str) -> Path:
        return self._root / name

    def listing(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self._path(folder)))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        fd = os.open(self._path(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)

    def sync(self, name: str) -> None:
        self._sync(self._path(name), os.O_RDONLY)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._path(old), self._path(new))

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def sync_folder(self, folder: str) -> None:
        self._sync(self._path(folder), os.O_RDONLY | os.O_DIRECTORY)

    def make_folder(self, folder: str) -> None:
        self._path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)

    def _sync(self, path: Path, flags: int) -> None:
        fd = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class MeasuredFiles(OsFiles):
    """As OsFiles; ``observe`` is told how long each fsync took, and whether it failed."""

    def __init__(self, root: Path, observe: Callable[[float, bool], None]) -> None:
        super().__init__(root)
        self._observe = observe

    def _sync(self, path: Path, flags: int) -> None:
        begun_s, failed = time.monotonic(), True
        try:
            super()._sync(path, flags)
            failed = False
        finally:
            self._observe(time.monotonic() - begun_s, failed)
