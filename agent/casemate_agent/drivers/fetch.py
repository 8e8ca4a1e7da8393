"""Brings one file, known by its digest, from where it is said to be into the store.

For: the image store. What may live here: which sources there are (a folder of this host; http and https, of which ``http``
brings the bytes), their bounds, and the check of the digest. What is in the file is not looked at here.

Theory of operation. Bytes are hashed as they are written, into a file beside the final one; only a file whose digest is
the one asked for, and that is synced, gets its name. So a file that has its name is whole and right, whatever happened
before. A local file is copied too (the copy shares its blocks where the file system can), never linked: a link could be
changed by its owner after it was checked.
"""

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.files import UNFINISHED, sync_folder
from casemate_agent.drivers.http import CHUNK, SILENCE_S, Download, SourceFailed, http_download, public_url
from casemate_agent.drivers.imageformat import ImageRefused
from casemate_core.errors import MachineError, Unavailable, shown
from casemate_core.quantity import MIB, format_mib
from casemate_core.spec.instance import DIGEST, File

#: linux/fs.h: _IOW(0x94, 9, int), "make this file share the blocks of that one".
FICLONE = 0x40049409


class DiskFull(MachineError):
    """The store's file system has no room."""

    reason = "DiskFull"


@dataclass(frozen=True, slots=True)
class SourceRules:
    """Where files may come from, and how large they may be. ``folders`` are those that file URLs may point into."""

    folders: tuple[str, ...] = ()
    max_mib: int = 64 * 1024


async def fetch(
    file: File,
    target: Path,
    rules: SourceRules,
    calls: DeadlineExecutor,
    deadline_s: float,
    download: Download = http_download,
) -> None:
    """Have ``file`` at ``target``; by ``download`` where it is not a file of this host.

    Raises ImageRefused, SourceFailed, DiskFull, DeadlineExceeded; leaves no rest.
    """
    if not DIGEST.match(file.digest):
        raise ImageRefused(f"digest {shown(file.digest)!r} is not sha256 in hex", "write sha256: and 64 hex digits")
    scheme = urlsplit(file.source).scheme
    if scheme not in ("file", "http", "https"):
        raise ImageRefused(f"source {public_url(file.source)!r} is no file, http or https URL", "use one of these")
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=UNFINISHED)
    temporary = Path(name)
    try:
        if scheme == "file":
            digest = await _copy(file.source, descriptor, rules, calls, deadline_s)
        else:
            digest = await _download(file.source, descriptor, rules, calls, deadline_s, download)
        if digest != file.digest:
            raise ImageRefused(
                f"{public_url(file.source)} has the digest {digest}, not {file.digest}",
                "correct the digest, or the source",
            )
        await calls.run("sync image", lambda: _finish(descriptor, temporary, target), deadline_s)
    except OSError as error:
        raise storage_error(public_url(file.source), error) from error
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def _finish(descriptor: int, temporary: Path, target: Path) -> None:
    # Readable by QEMU's user, writable by nobody: it is the backing of every instance's disk.
    os.fchmod(descriptor, 0o444)
    os.fsync(descriptor)
    os.rename(temporary, target)
    sync_folder(target.parent)


def storage_error(what: str, error: OSError) -> MachineError:
    """``error`` of the store's file system in our words; ``what`` says what was being done."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{what}: {error.strerror}")
    return Unavailable(f"{what}: {error.strerror or error}")


async def _copy(source: str, descriptor: int, rules: SourceRules, calls: DeadlineExecutor, deadline_s: float) -> str:
    path = _allowed(source, rules)
    stop = threading.Event()
    try:
        return await calls.run("copy image", lambda: _copy_file(path, descriptor, rules, stop.is_set), deadline_s)
    finally:
        stop.set()


def _allowed(source: str, rules: SourceRules) -> Path:
    """The real path of a file URL, inside a folder that the host's configuration allows. Raises ImageRefused."""
    parts = urlsplit(source)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise ImageRefused(f"{public_url(source)!r} is not a file of this host", "write file:///path")
    path = Path(unquote(parts.path))
    if not path.is_absolute() or "\0" in str(path):
        raise ImageRefused(f"{public_url(source)!r} has no absolute path", "write file:///path")
    # Symbolic links are followed first: what counts is where the file really is.
    real = Path(os.path.realpath(path))
    folders = [Path(os.path.realpath(folder)) for folder in rules.folders]
    if not any(real.is_relative_to(folder) for folder in folders):
        known = ", ".join(map(str, folders)) or "none"
        raise ImageRefused(
            f"{public_url(source)} is outside the folders that this host takes images from ({known})",
            "move the file there, or add the folder to the agent's configuration",
        )
    return real


def _copy_file(path: Path, descriptor: int, rules: SourceRules, stopped: Callable[[], bool]) -> str:
    try:
        # O_NOFOLLOW: the path was resolved, a link here now was put in meanwhile. O_NONBLOCK: a FIFO does not hang.
        source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ImageRefused(f"{path}: {error.strerror}", "check the image's source on this host") from error
    try:
        facts = os.fstat(source)
        if not stat.S_ISREG(facts.st_mode):
            raise ImageRefused(f"{path} is no regular file", "give the path of an image file")
        _check_size(facts.st_size, rules, str(path))
        digest = hashlib.sha256()
        # What is hashed is what was stored: the clone is read back, the copy is hashed as it is written.
        cloned = _clone(source, descriptor)
        total = 0
        while chunk := os.read(descriptor if cloned else source, CHUNK):
            if stopped():
                raise Unavailable(f"{path}: the copy was given up")
            total += len(chunk)
            _check_size(total, rules, str(path))
            digest.update(chunk)
            if not cloned:
                _write_all(descriptor, chunk)
        return f"sha256:{digest.hexdigest()}"
    finally:
        os.close(source)


def _clone(source: int, descriptor: int) -> bool:
    try:
        fcntl.ioctl(descriptor, FICLONE, source)
    except OSError:
        return False  # another file system, or one that cannot
    return True


def _check_size(size: int, rules: SourceRules, what: str) -> None:
    if size > rules.max_mib * MIB:
        raise ImageRefused(
            f"{what} is larger than the {format_mib(rules.max_mib)} that this host takes",
            "use a smaller image, or raise the bound in the agent's configuration",
        )


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


async def _download(
    source: str, descriptor: int, rules: SourceRules, calls: DeadlineExecutor, deadline_s: float, download: Download
) -> str:
    digest = hashlib.sha256()
    where = public_url(source)

    def keep(chunk: bytes) -> None:
        digest.update(chunk)
        _write_all(descriptor, chunk)

    async with download(source, deadline_s) as (length, chunks):
        if length is not None:
            _check_size(length, rules, where)
            room = os.fstatvfs(descriptor)
            if length > room.f_bavail * room.f_frsize:
                raise DiskFull(f"no room for {where}: {length} bytes")
        total = 0
        async for chunk in chunks:
            total += len(chunk)
            _check_size(total, rules, where)
            await calls.run("write image", lambda data=chunk: keep(data), SILENCE_S)  # type: ignore[misc]
        if length is not None and total != length:
            raise SourceFailed(f"{where}: the transfer ended after {total} of {length} bytes")
    return f"sha256:{digest.hexdigest()}"
