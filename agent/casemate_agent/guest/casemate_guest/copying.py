"""Files in and out, as a process of its own."""

from __future__ import annotations

import contextlib
import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def copy_main(options: Mapping[str, str]) -> int:
    """A process that copies one file or folder as a tar archive whose root is ``x``, and ends.

    0: all was copied; 1: not all; 4: there is no such file. What was not copied is told on standard error. Within a
    container its root is ours, so that no link of it leads out.
    """
    import tarfile  # before the root changes, and only here: it takes an emulated processor a second

    with contextlib.suppress(LookupError):
        "".encode("idna")  # the same for codecs that are imported when they are first used
    try:
        if not os.path.samestat(os.stat(options["in"]), os.stat("/")):
            os.chroot(options["in"])
            os.chdir("/")
        path = options["path"]
        if not path.startswith("/"):
            raise OSError(errno.EINVAL, "is not an absolute path", path)
        if options["copy"] == "out":
            return copy_out(tarfile, path)
        return copy_in(tarfile, path, options["name"])
    except (OSError, tarfile.TarError, EOFError) as error:
        name = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        os.write(2, f"{name}{text}\n".encode(errors="replace"))
        return 4 if isinstance(error, FileNotFoundError) else 1


def copy_out(tarfile: Any, path: str) -> int:
    """Write an archive of ``path`` to standard output. A link is followed where ``path`` itself is one, and nowhere else."""
    real, skipped = os.path.realpath(path), 0
    os.stat(real)
    with (
        os.fdopen(1, "wb", closefd=False) as out,
        tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        waiting = [(real, "x")]
        while waiting:
            here, name = waiting.pop()
            member = tar.gettarinfo(here, name)
            if member is not None and member.isdir():
                tar.addfile(member)
                waiting += [(f"{here}/{child}", f"{name}/{child}") for child in sorted(os.listdir(here), reverse=True)]
            elif member is not None and (member.isreg() or member.islnk()):
                with open(here, "rb") as file:
                    # Of a file that has another name in the archive too, the whole all the same: no links arrive.
                    member.type, member.linkname = tarfile.REGTYPE, ""
                    member.size = os.fstat(file.fileno()).st_size
                    tar.addfile(member, file)
            else:
                kind = "a symbolic link" if os.path.islink(here) else "neither a file nor a folder"
                os.write(2, f"{here}: is {kind}, and was not copied\n".encode(errors="replace"))
                skipped = 1
    return skipped


def copy_in(tarfile: Any, path: str, name: str) -> int:
    """Make ``path``, or ``name`` in the folder ``path``, from an archive on standard input.

    Each file is written beside its place and renamed: none is ever half there.
    """
    target = os.path.realpath(path)
    if os.path.isdir(target):
        if not name or "/" in name or name in (".", ".."):
            raise OSError(errno.EINVAL, "cannot be the name of a copy", name)
        target = os.path.join(target, name)
    elif path.endswith("/") or not os.path.isdir(os.path.dirname(target)):
        raise FileNotFoundError(errno.ENOENT, "is no folder", path if path.endswith("/") else os.path.dirname(target))
    folders = []
    with os.fdopen(0, "rb", closefd=False) as source, tarfile.open(fileobj=source, mode="r|") as tar:
        for member in tar:
            parts = member.name.split("/")
            if (
                parts[0] != "x"
                or any(part in ("", ".", "..") for part in parts[1:])
                or not (member.isreg() or member.isdir())
            ):
                raise OSError(errno.EPERM, "is refused: neither a file nor a folder of the copy", member.name)
            here = "/".join([target, *parts[1:]])
            for depth in range(1, len(parts)):
                if os.path.islink("/".join([target, *parts[1:depth]])):
                    raise OSError(errno.EPERM, "is refused: it would be written through a symbolic link", here)
            if member.isdir():
                os.makedirs(here, mode=0o700, exist_ok=True)
                folders.append((here, member))
                continue
            part = f"{here}.casemate-{os.getpid()}"
            content = tar.extractfile(member)
            try:
                with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                    while block := content.read(1 << 20):
                        file.write(block)
                    os.fchmod(file.fileno(), member.mode & 0o7777)
                os.utime(part, (member.mtime, member.mtime))
                os.rename(part, here)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                raise
    for here, member in reversed(folders):
        os.chmod(here, member.mode & 0o7777)
        os.utime(here, (member.mtime, member.mtime))
    return 0
