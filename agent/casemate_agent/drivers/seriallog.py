"""What guests wrote to their serial consoles: kept within bounds of size and time, and read from a time on.

For: ``sideports.SerialLogs``. What may live here: the files beside an instance's disks that hold it.

Layout, in ``instances/<uid>``: ``console.log`` is what libvirt (virtlogd) or QEMU appends to; ``console.log.0``,
``console.log.1`` … are older, the lower number the newer (virtlogd names them so); ``console.marks`` says how far each
file had got at which time.

Theory of operation. A serial console has no times, so `keep` notes, every few seconds and only where something was
written, a mark: (time, inode, size). What lies behind a mark was written after its time. A file that is renamed keeps its
inode, and with it its marks. Where virtlogd does not bound the log (there is none, or it is set otherwise), `keep` turns it:
it is copied to ``console.log.0`` and cut to nothing, which is safe since its writer appends. What is written in the moment
between is lost. What is older than `MAX_AGE_S` goes.

While no agent runs no marks are made: what is read from a time on begins at the last mark before it, and so may begin
earlier, never later.
"""

import os
import re
import shutil
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from casemate_agent.domain.names import check_uid
from casemate_agent.drivers.deadline import DeadlineExecutor

LOG: Final = "console.log"
MARKS: Final = "console.marks"
#: virtlogd turns at 2 MiB by default; a log that is longer is bounded by nobody else.
TURN_BYTES: Final = 4 << 20
MAX_OLDER: Final = 3
MAX_AGE_S: Final = 14 * 86400.0
MAX_MARKS: Final = 4096
CHUNK: Final = 64 * 1024
_OLDER = re.compile(r"console\.log\.([0-9]{1,4})\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Mark:
    """By ``time_s`` (seconds since the epoch) the file ``inode`` had so many bytes."""

    time_s: float
    inode: int
    size: int


class SerialLogFiles:
    """``sideports.SerialLogs`` in the folder of the instances. ``now`` is the wall clock; close it with ``close``."""

    def __init__(self, instances_dir: Path, now: Callable[[], float]) -> None:
        self._instances = instances_dir
        self._now = now
        self._calls = DeadlineExecutor("serial")
        #: Last mark of each instance: where nothing was written, nothing is read.
        self._last: dict[str, tuple[int, int]] = {}

    def close(self) -> None:
        """Let the thread go."""
        self._calls.close()

    async def keep(self, deadline_s: float) -> None:
        """Mark how far the logs have got, and hold them within their bounds."""
        await self._calls.run("keep serial logs", self._keep, deadline_s)

    def _keep(self) -> None:
        now_s = self._now()
        seen = set()
        for entry in os.scandir(self._instances):
            seen.add(entry.name)
            try:
                self._keep_one(Path(entry.path), entry.name, now_s)
            except OSError:
                continue  # it is being removed, or its disk is full: the next time
        for name in set(self._last) - seen:
            del self._last[name]

    def _keep_one(self, folder: Path, name: str, now_s: float) -> None:
        log = folder / LOG
        try:
            status = log.stat()
        except FileNotFoundError:
            return
        place = (status.st_ino, status.st_size)
        if self._last.get(name) != place:
            marks = read_marks(folder)
            if not marks or (marks[-1].inode, marks[-1].size) != place:
                write_marks(folder, [*marks, Mark(now_s, *place)])
            self._last[name] = place
        old = status.st_size and _oldest(folder, status.st_ino, now_s) < now_s - MAX_AGE_S
        if status.st_size > TURN_BYTES or old:
            turn(folder, now_s)
            self._last.pop(name, None)
        for path in _older(folder):
            if path.stat().st_mtime < now_s - MAX_AGE_S:
                path.unlink(missing_ok=True)

    async def read(self, uid: str, since_s: float, deadline_s: float) -> AsyncGenerator[bytes, None]:
        """What is kept, oldest first, from a time on; everything where that is 0."""
        folder = self._instances / check_uid(uid)
        # All at once: files that are renamed while they are read are the same files.
        found = await self._calls.run("open serial log", lambda: _open(folder, since_s), deadline_s)
        try:
            for file in found:
                while data := await self._calls.run("read serial log", partial(file.read, CHUNK), deadline_s):
                    yield data
        finally:
            for file in found:
                file.close()


def _open(folder: Path, since_s: float) -> list[BinaryIO]:
    """The files of a log, oldest first, each at its place."""
    opened: list[BinaryIO] = []
    for path, start in parts(folder, since_s):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue
        file.seek(start)
        opened.append(file)
    return opened


def parts(folder: Path, since_s: float) -> list[tuple[Path, int]]:
    """Files of a log, oldest first, each with the place from which it was written after ``since_s``."""
    marks = read_marks(folder)
    if not folder.is_dir():
        return []
    found = []
    for path in [*reversed(_older(folder)), folder / LOG]:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if status.st_mtime < since_s:
            continue
        before = [m.size for m in marks if m.inode == status.st_ino and m.time_s <= since_s]
        start = max(before, default=0)
        found.append((path, start if start <= status.st_size else 0))
    return found


def turn(folder: Path, now_s: float) -> None:
    """Make a log that has grown the first of the older ones, and begin it anew."""
    log, beside = folder / LOG, folder / f"{LOG}.new"
    older = _older(folder)
    for path in older[MAX_OLDER - 1 :]:
        path.unlink(missing_ok=True)
    for path in reversed(older[: MAX_OLDER - 1]):
        number = int(path.name.rpartition(".")[2])
        path.rename(folder / f"{LOG}.{number + 1}")
    before = log.stat()
    inode = before.st_ino
    with log.open("rb") as source, beside.open("wb") as target:
        os.fchmod(target.fileno(), 0o600)
        shutil.copyfileobj(source, target)
    os.utime(beside, (before.st_atime, before.st_mtime))  # when it was written last, not when it was copied
    os.truncate(log, 0)
    beside.rename(folder / f"{LOG}.0")
    moved = (folder / f"{LOG}.0").stat().st_ino
    marks = [Mark(m.time_s, moved if m.inode == inode else m.inode, m.size) for m in read_marks(folder)]
    write_marks(folder, [*marks, Mark(now_s, inode, 0)])


def _older(folder: Path) -> list[Path]:
    """The older files of a log, the newest of them first."""
    found = [(int(match[1]), name) for name in os.listdir(folder) if (match := _OLDER.match(name))]
    return [folder / name for _, name in sorted(found)]


def _oldest(folder: Path, inode: int, now_s: float) -> float:
    return min((m.time_s for m in read_marks(folder) if m.inode == inode and m.size), default=now_s)


def read_marks(folder: Path) -> list[Mark]:
    """The marks of a log; what is no mark (a line cut short) is left out."""
    found = []
    try:
        lines = (folder / MARKS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        words = line.split()
        if len(words) == 3:
            try:
                found.append(Mark(float(words[0]), int(words[1]), int(words[2])))
            except ValueError:
                continue
    return found


def write_marks(folder: Path, marks: list[Mark]) -> None:
    """Replace the marks: those of files that are there, thinned out where they are too many."""
    inodes = {path.stat().st_ino for path in [*_older(folder), folder / LOG] if path.exists()}
    kept = [m for m in marks if m.inode in inodes]
    if len(kept) > MAX_MARKS:
        kept = [*kept[: MAX_MARKS // 2 : 2], *kept[MAX_MARKS // 2 :]]
    beside = folder / f"{MARKS}.new"
    beside.write_text("".join(f"{m.time_s:.3f} {m.inode} {m.size}\n" for m in kept))
    beside.rename(folder / MARKS)
