"""A file or folder as a tar archive whose root is ``x``, and such an archive as files: the local half of `casemate cp`.

What is read here was written by a guest, so an archive is hostile: only files and folders that lie within the copy are
made, nothing is written through a symbolic link, modes lose what is more than read, write and execute. Each file is written
beside its place and renamed: none is ever half there.
"""

import contextlib
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from casemate_cli.failure import Exit, Failure

BLOCK = 512
CHUNK = 64 * 1024


def pack(path: Path, skipped: Callable[[str], None]) -> Iterator[bytes]:
    """The archive of ``path``, piece by piece. What is neither file nor folder is told to ``skipped`` and left out."""
    waiting = [(Path(os.path.realpath(path)), "x")]
    while waiting:
        here, name = waiting.pop()
        facts = here.lstat()
        member = tarfile.TarInfo(name)
        member.mode, member.mtime = facts.st_mode & 0o7777, int(facts.st_mtime)
        if here.is_symlink() or not (here.is_dir() or here.is_file()):
            skipped(f"{here}: is {'a symbolic link' if here.is_symlink() else 'neither a file nor a folder'}")
        elif here.is_dir():
            member.type = tarfile.DIRTYPE
            yield _header(member)
            waiting += [(child, f"{name}/{child.name}") for child in sorted(here.iterdir(), reverse=True)]
        else:
            with here.open("rb") as file:
                member.size = os.fstat(file.fileno()).st_size
                yield _header(member)
                left = member.size
                while left:
                    data = file.read(min(left, CHUNK))
                    if not data:
                        raise Failure(f"{here} became shorter while it was read", remedy="copy it again")
                    left -= len(data)
                    yield data
                yield b"\0" * (-member.size % BLOCK)
    yield b"\0" * (2 * BLOCK)


def _header(member: tarfile.TarInfo) -> bytes:
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


class _Source:
    """Pieces as the file that tarfile reads."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def read(self, size: int) -> bytes:
        found = [self._rest]
        have = len(self._rest)
        while have < size and (piece := next(self._pieces, None)) is not None:
            found.append(piece)
            have += len(piece)
        whole = b"".join(found)
        self._rest = whole[size:]
        return whole[:size]


def unpack(pieces: Iterator[bytes], destination: str, name: str) -> int:
    """Make ``destination``, or ``name`` in it where it is a folder; how many files. Raises Failure for a bad archive."""
    target = _target(destination, name)
    folders: list[tuple[Path, int]] = []
    count = 0
    source = _Source(pieces)
    try:
        with tarfile.open(fileobj=source, mode="r|", errorlevel=2) as tar:  # type: ignore[call-overload]
            for member in tar:
                here = _place(target, member)
                mode = member.mode & 0o777
                if member.isdir():
                    here.mkdir(mode=0o700, exist_ok=True)
                    folders.append((here, mode))
                    continue
                _write(tar, member, here, mode)
                count += 1
    except (tarfile.TarError, EOFError) as error:
        raise Failure(f"what came is no whole archive: {error}", remedy="copy it again") from error
    except OSError as error:
        raise Failure(f"cannot write {error.filename or target}: {error.strerror}") from error
    for _ in pieces:  # up to the last word
        pass
    for here, mode in reversed(folders):
        here.chmod(mode)
    return count


def unpack_file(pieces: Iterator[bytes], out: IO[bytes], name: str) -> None:
    """Write the one file of the archive to ``out``. Raises Failure for a folder, before anything is written."""
    try:
        with tarfile.open(fileobj=_Source(pieces), mode="r|", errorlevel=2) as tar:  # type: ignore[call-overload]
            for member in tar:
                _place(Path(), member)
                if not member.isreg():
                    raise Failure(f"{name} is a folder", remedy="name a folder of yours as the destination, not -")
                content = tar.extractfile(member)
                while data := content.read(CHUNK):
                    out.write(data)
    except (tarfile.TarError, EOFError) as error:
        raise Failure(f"what came is no whole archive: {error}", remedy="copy it again") from error
    out.flush()
    for _ in pieces:  # up to the last word
        pass


def _target(destination: str, name: str) -> Path:
    path = Path(destination)
    if path.is_dir():
        if name in ("", ".", "..", "/"):
            raise Failure(f"a copy of the root needs a name of its own in {destination}", remedy="name a new folder")
        return Path(os.path.realpath(path)) / name
    if destination.endswith("/") or not path.parent.is_dir():
        raise Failure(
            f"{destination if destination.endswith('/') else path.parent} is no folder",
            code=Exit.NOT_FOUND,
            remedy="make it first",
        )
    return Path(os.path.realpath(path))


def _place(target: Path, member: tarfile.TarInfo) -> Path:
    """Where a member goes. Raises Failure where that is not within the copy."""
    first, *parts = member.name.split("/")
    if first != "x" or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise Failure(f"the archive is refused: {member.name!r} is outside of the copy")
    if not (member.isreg() or member.isdir()):
        raise Failure(f"the archive is refused: {member.name!r} is neither a file nor a folder")
    here = target
    for part in (*parts, None):
        if here.is_symlink():
            raise Failure(
                f"{here} is a symbolic link; nothing is written through it", remedy="remove it, or copy elsewhere"
            )
        if part is None:
            break
        here = here / part
    return here


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, here: Path, mode: int) -> None:
    part = here.with_name(f".{here.name[:200]}.{os.getpid()}.part")
    content = tar.extractfile(member)
    assert content is not None  # a regular file
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            while data := content.read(CHUNK):
                file.write(data)
            os.fchmod(file.fileno(), mode)
        os.utime(part, (member.mtime, member.mtime))
        part.replace(here)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
