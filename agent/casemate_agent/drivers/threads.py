"""Affinity of a QEMU's threads, from the kernel.

What may live here: reading /proc/PID/task, and asking for the affinity of each thread there. QEMU names its threads (libvirt
asks it to): ``CPU 3/KVM`` is that of vCPU 3. Names are read once: a thread has its name before it runs a guest, and reading
one is what costs most. A thread may be so young that it has no name yet; that is read again until it has one of a vCPU's, or
the look after it is there too.
"""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from casemate_agent.drivers.ports import QemuThreads
from casemate_core.cpuset import EMPTY, CpuSet

_NAME = re.compile(r"CPU (\d+)/")
#: Of a thread that is no vCPU's.
_OTHER = -1
#: So often a name that is none of a vCPU's is read before it is believed.
_LOOKS = 3


class ThreadReader:
    """Reads where the threads of processes may run, and remembers which thread is which vCPU's."""

    def __init__(self, proc: Path = Path("/proc"), ask: Callable[[int], Iterable[int]] = os.sched_getaffinity) -> None:
        self._proc = str(proc)
        self._ask = ask
        #: By process: thread -> (vCPU or _OTHER, looks).
        self._names: dict[int, dict[int, tuple[int, int]]] = {}

    def look(self, pids: tuple[int, ...]) -> dict[int, QemuThreads]:
        """Those of each process; one that is gone is left out."""
        found = {pid: threads for pid in pids if (threads := self._one(pid)) is not None}
        self._names = {pid: self._names[pid] for pid in found}
        return found

    def bind_rest(self, pid: int, rest: CpuSet) -> None:
        """Bind those threads that are no vCPU's: where no cgroup holds them together, libvirt moves the first one alone."""
        self.look((pid,))
        for task, (vcpu, _) in self._names.get(pid, {}).items():
            if vcpu == _OTHER:
                with suppress(OSError):  # it has ended, or is one that the kernel does not let anybody move
                    os.sched_setaffinity(task, rest)

    def _one(self, pid: int) -> QemuThreads | None:
        known, names = self._names.get(pid, {}), dict[int, tuple[int, int]]()
        vcpus: dict[int, CpuSet] = {}
        rest, fifo = EMPTY, set[int]()
        try:
            tasks = os.listdir(f"{self._proc}/{pid}/task")
        except OSError:
            return None
        for task in map(int, tasks):
            try:
                name = known.get(task, (_OTHER, 0))
                if name[0] == _OTHER and name[1] < _LOOKS:
                    name = self._vcpu(pid, task), name[1] + 1
                cpus = CpuSet.from_ids(self._ask(task))
            except OSError:
                continue  # it ended while we looked
            names[task] = name
            if name[0] == _OTHER:
                rest |= cpus
            else:
                vcpus[name[0]] = cpus
                if self._policy(task) == os.SCHED_FIFO:
                    fifo.add(name[0])
        if not names:
            return None
        self._names[pid] = names
        return QemuThreads(
            tuple(vcpus.get(vcpu, EMPTY) for vcpu in range(max(vcpus, default=-1) + 1)), rest, frozenset(fifo)
        )

    @staticmethod
    def _policy(task: int) -> int:
        try:
            return os.sched_getscheduler(task)
        except OSError:
            return -1

    def _vcpu(self, pid: int, task: int) -> int:
        with open(f"{self._proc}/{pid}/task/{task}/comm", encoding="utf-8", errors="replace") as file:
            match = _NAME.match(file.read())
        return int(match[1]) if match is not None else _OTHER
