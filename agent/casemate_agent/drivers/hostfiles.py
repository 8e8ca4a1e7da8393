"""The kernel's files of which a topology is made, read as seldom as they change.

For: ``drivers.sysfs``. What may live here: collecting files and links below a root, and telling whether they are still true.

Theory of operation. What a machine is made of is told in thousands of small files (five for each thread), of which nearly all are
as they were at boot. So all of them are collected once, and again when one of the *signs* has changed: the few files whose
change comes with a change of others (threads online, cells online, which functions there are, how many VFs a port has), and
the ones that change by themselves (page pools). What has no sign (memory that is plugged into a cell that was there, a
cell's number that is written by hand) is found by collecting everything again every minute.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from casemate_core.topology_loaders.sysfs import CPU, GLOBS, LINKS, NODE

PCI = "sys/bus/pci/devices"
#: What has no sign is this old at most, in seconds.
WHOLE_S = 60.0
_SIGNS = (f"{CPU}/online", f"{CPU}/isolated", f"{NODE}/online")


def collect(root: Path) -> dict[str, str]:
    """The files that the loaders read, by path below ``root``; links as their targets. A file that goes while we look is
    left out. A kernel without NUMA is shown as one cell 0."""
    found: dict[str, str] = {}
    for pattern in GLOBS:
        for path in root.glob(pattern):
            try:
                found[str(path.relative_to(root))] = path.read_text(errors="replace").strip()
            except OSError:
                continue
    for pattern in LINKS:
        for path in root.glob(pattern):
            if path.is_symlink():
                found[str(path.relative_to(root))] = os.readlink(path)
    if f"{NODE}/online" not in found and f"{CPU}/online" in found:
        found = {name: text for name, text in found.items() if not name.startswith(f"{NODE}/")}
        found |= {f"{NODE}/online": "0", f"{NODE}/node0/cpulist": found[f"{CPU}/online"]}
    return found


class HostFiles:
    """The files below ``root``. ``clock`` in seconds, of any beginning."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._clock = clock
        self._files: Mapping[str, str] | None = None
        self._paths: tuple[str, ...] = ()
        self._signs: tuple[object, ...] = ()
        self._read_s = 0.0

    def read(self) -> Mapping[str, str]:
        """All of them as they are; the same object as before where nothing has changed."""
        now_s = self._clock()
        if self._files is not None and now_s - self._read_s < WHOLE_S and self._look() == self._signs:
            return self._files
        files = collect(self._root)
        pools = sorted(name for name in files if name.endswith("/nr_hugepages"))
        ports = [f"{PCI}/{name}/sriov_numvfs" for name in self._functions() if self._has(f"{PCI}/{name}/sriov_numvfs")]
        self._paths = tuple(str(self._root / name) for name in (*_SIGNS, *pools, *ports))
        if files != self._files:
            self._files = files
        # Looked at after: what changed between is seen as a change the next time, or is in both.
        self._signs, self._read_s = self._look(), now_s
        return self._files or files

    def _look(self) -> tuple[object, ...]:
        return (*map(_text, self._paths), *self._functions())

    def _functions(self) -> list[str]:
        try:
            return sorted(os.listdir(self._root / PCI))
        except OSError:
            return []

    def _has(self, name: str) -> bool:
        return os.path.exists(self._root / name)


def _text(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""
