"""Files of the kernel by which a host is tuned, and what the kernel says of processes.

For: ``ports.Tuning``. What may live here: reading and writing below ``root``, and this process's own affinity. What is
wanted of them is decided elsewhere.

Theory of operation. ``/dev/cpu_dma_latency`` is no ordinary file: its value is a 32-bit number, and what is written holds for
as long as the file stays open; so it is kept open until the driver is closed. ``numa_maps`` is read once for each process:
the kernel walks all of its page tables for it, and holds up page faults of the guest meanwhile; pages that are set aside do
not move afterwards.
"""

import os
import re
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.ports import DMA_LATENCY, ProcessFacts
from casemate_core.cpuset import CpuSet
from casemate_core.errors import MachineError

#: Most that is read of one file.
MAX_BYTES = 64 * 1024
_LOCKED = re.compile(r"^VmLck:\s+(\d+) kB$", re.MULTILINE)
_LIMIT = re.compile(r"^Max locked memory\s+(\S+)", re.MULTILINE)
_NODE = re.compile(r"\bN(\d+)=(\d+)")
_PAGE = re.compile(r"\bkernelpagesize_kB=(\d+)")


class HostTuning:
    """``ports.Tuning`` on the files below ``root``."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._calls = DeadlineExecutor("tuning", threads=1)
        self._latency: int | None = None
        self._huge: dict[int, Mapping[int, int]] = {}

    async def aclose(self) -> None:
        """Let the thread go, and what was held."""
        self._calls.close()
        if self._latency is not None:
            os.close(self._latency)
            self._latency = None

    async def read(self, patterns: tuple[str, ...], deadline_s: float) -> Mapping[str, str]:
        return await self._calls.run("read tuning", lambda: self._read(patterns), deadline_s)

    async def write(self, path: str, text: str, deadline_s: float) -> None:
        try:
            await self._calls.run(f"write {path}", lambda: self._write(path, text), deadline_s)
        except OSError as error:
            raise MachineError(f"/{path}: {error.strerror or error}; {text!r} was to be written") from error

    async def processes(self, pids: tuple[int, ...], deadline_s: float) -> Mapping[int, ProcessFacts]:
        return await self._calls.run("read processes", lambda: self._processes(pids), deadline_s)

    async def confine(self, quiet: CpuSet, deadline_s: float) -> CpuSet:
        return await self._calls.run("confine this process", lambda: confine(quiet), deadline_s)

    # --- in the thread ---

    def _read(self, patterns: tuple[str, ...]) -> dict[str, str]:
        found: dict[str, str] = {}
        for pattern in patterns:
            for path in self._root.glob(pattern) if any(c in pattern for c in "*?[") else [self._root / pattern]:
                with suppress(OSError):
                    with path.open("rb", buffering=0) as file:
                        data = file.read(MAX_BYTES)
                    name = str(path.relative_to(self._root))
                    binary = name == DMA_LATENCY and len(data) == 4
                    found[name] = str(struct.unpack("=i", data)[0]) if binary else data.decode(errors="replace").strip()
        return found

    def _write(self, path: str, text: str) -> None:
        if path == DMA_LATENCY:
            if self._latency is None:
                self._latency = os.open(self._root / path, os.O_RDWR | os.O_CLOEXEC)
            os.write(self._latency, struct.pack("=i", int(text)))
            return
        with (self._root / path).open("w") as file:
            file.write(text)

    def _processes(self, pids: tuple[int, ...]) -> dict[int, ProcessFacts]:
        found = {}
        for pid in pids:
            folder = self._root / "proc" / str(pid)
            with suppress(OSError):
                locked = _LOCKED.search((folder / "status").read_text())
                limit = _LIMIT.search((folder / "limits").read_text())
                soft = limit[1] if limit is not None else "unlimited"
                found[pid] = ProcessFacts(
                    int(locked[1]) if locked is not None else 0,
                    None if soft == "unlimited" else int(soft) // 1024,
                    self._pages(folder, pid),
                )
        self._huge = {pid: pages for pid, pages in self._huge.items() if pid in found}
        return found

    def _pages(self, folder: Path, pid: int) -> Mapping[int, int] | None:
        if pid not in self._huge:
            try:
                text = (folder / "numa_maps").read_text()
            except OSError:
                return None  # a kernel without NUMA
            pages: dict[int, int] = {}
            for line in text.splitlines():
                size = _PAGE.search(line)
                if " huge " in f"{line} " and size is not None:
                    for cell, count in _NODE.findall(line):
                        pages[int(cell)] = pages.get(int(cell), 0) + int(count) * int(size[1])
            if not pages:
                return pages  # it may not have taken them yet
            self._huge[pid] = pages
        return self._huge[pid]


def confine(quiet: CpuSet) -> CpuSet:
    """Keep every thread of this process off these threads of the host, and later ones, which begin where their parents are.
    Where they may run then. Does nothing where they would have no place."""
    allowed = CpuSet()
    for task in map(int, os.listdir("/proc/self/task")):
        with suppress(OSError):  # it has ended
            before = CpuSet.from_ids(os.sched_getaffinity(task))
            if before & quiet and before - quiet:
                os.sched_setaffinity(task, before - quiet)
            allowed |= CpuSet.from_ids(os.sched_getaffinity(task))
    return allowed
