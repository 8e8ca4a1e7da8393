"""What the standard library lacks of the kernel: inotify, and holes in files."""

from __future__ import annotations

import ctypes
import os
import select
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
IN_MODIFY, IN_CLOSE_WRITE, IN_MOVED_TO, IN_ONESHOT, IN_IGNORED = 0x2, 0x8, 0x80, 0x80000000, 0x8000
PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01


class Inotify:
    """Watches on files and folders, each with its callback, which gets the name of the changed member."""

    def __init__(self, loop: Loop) -> None:
        self._fd = LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._callbacks: dict[int, Callable[[str], None]] = {}
        loop.watch(self._fd, select.EPOLLIN, lambda _: self._read())

    def add(self, path: str, mask: int, callback: Callable[[str], None]) -> int:
        """Watch ``path``; returns a number for `remove`, or -1 when it cannot be watched."""
        number = int(LIBC.inotify_add_watch(self._fd, path.encode(), ctypes.c_uint32(mask)))
        if number >= 0:
            self._callbacks[number] = callback
        return number

    def remove(self, number: int) -> None:
        """End a watch."""
        if self._callbacks.pop(number, None) is not None:
            LIBC.inotify_rm_watch(self._fd, number)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            number, mask, _, length = struct.unpack_from("iIII", data, at)
            name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode(errors="replace")
            at += 16 + length
            callback = self._callbacks.get(number)
            if mask & IN_IGNORED:
                self._callbacks.pop(number, None)
            elif callback is not None:
                callback(name)
