"""A folder in memory that loses what was not synced.

What may live here: the simulated form of :class:`casemate_agent.ledger.files.Files`. Like a disk, it keeps apart what a program
sees and what survives a power cut: data of a file that was not synced is torn, entries of a folder that was not synced are
as they were. A disk may be full, or fail a number of operations.
"""

from dataclasses import dataclass, field


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


@dataclass(slots=True)
class _Inode:
    """A file's data, as seen and as it survives."""

    data: bytes = b""
    durable: bytes = b""


@dataclass(slots=True)
class SimulatedDisk:
    """Implements Files. ``failing``: so many operations from now on fail."""

    full: bool = False
    failing: int = 0
    _seen: dict[str, _Inode] = field(default_factory=dict)
    _durable: dict[str, _Inode] = field(default_factory=dict)
    folders: set[str] = field(default_factory=lambda: {""})

    def _operate(self, writes: bool = False) -> None:
        if self.failing > 0:
            self.failing -= 1
            raise OSError(5, "Input/output error")
        if writes and self.full:
            raise OSError(28, "No space left on device")

    def listing(self, folder: str) -> list[str]:
        return sorted(name.rpartition("/")[2] for name in self._seen if _folder(name) == folder)

    def read(self, name: str) -> bytes:
        if name not in self._seen:
            raise FileNotFoundError(2, "No such file or directory", name)
        return self._seen[name].data

    def write(self, name: str, data: bytes) -> None:
        self._operate(writes=True)
        inode = self._seen.setdefault(name, _Inode())
        inode.data = data

    def sync(self, name: str) -> None:
        self._operate()
        inode = self._seen[name]
        inode.durable = inode.data

    def rename(self, old: str, new: str) -> None:
        self._operate()
        self._seen[new] = self._seen.pop(old)

    def remove(self, name: str) -> None:
        self._operate()
        self._seen.pop(name, None)

    def sync_folder(self, folder: str) -> None:
        self._operate()
        for name in [n for n in self._durable if _folder(n) == folder]:
            del self._durable[name]
        self._durable.update({n: inode for n, inode in self._seen.items() if _folder(n) == folder})

    def make_folder(self, folder: str) -> None:
        self.folders.add(folder)

    def power_cut(self) -> None:
        """Only what was synced is left; the data of a file that was not is torn in the middle."""
        for inode in self._durable.values():
            if inode.data != inode.durable:
                inode.durable = inode.data[: len(inode.data) // 2]
            inode.data = inode.durable
        self._seen = dict(self._durable)

    def erase(self) -> None:
        """Someone removed the folder."""
        self._seen.clear()
        self._durable.clear()
