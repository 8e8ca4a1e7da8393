"""A writer of cpio archives in the "new ASCII" form, which is what the kernel unpacks as its initial root.

PURE: bytes in, bytes out. The order of entries is the caller's, times are zero and owners are root, so that the same
input always gives the same archive. The layout of the header is that of ``Documentation/driver-api/early-userspace/
buffer-format.rst`` in the kernel's source: the magic ``070701``, thirteen numbers of eight hexadecimal digits, the name
with its terminating NUL, then the data, both padded to four bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from stat import S_IFDIR, S_IFREG

TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One member: a path relative to the root, its mode with the type bits, and its contents (empty for a folder)."""

    path: str
    mode: int
    data: bytes = b""


def folder(path: str, mode: int = 0o755) -> Entry:
    """A folder member."""
    return Entry(path, S_IFDIR | mode)


def regular(path: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file member."""
    return Entry(path, S_IFREG | mode, data)


def _padding(length: int) -> bytes:
    return b"\0" * (-length % 4)


def _member(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    # Fields: inode, mode, uid, gid, links, mtime, size, device major and minor (of the file, then of a node), length
    # of the name, checksum (always zero in this form).
    fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return head + _padding(len(head)) + entry.data + _padding(len(entry.data))


def archive(entries: Iterable[Entry]) -> bytes:
    """Return the archive that holds ``entries`` in their order."""
    members = [_member(number, entry) for number, entry in enumerate(entries, start=1)]
    members.append(_member(0, Entry(TRAILER, 0)))
    return b"".join(members)
