"""Affinity of a QEMU's vCPU threads, from /proc.

What may live here: reading /proc/PID/task. QEMU names its threads (libvirt asks it to): ``CPU 3/KVM`` is that of vCPU 3.
"""

import re
from pathlib import Path

from casemate_core.cpuset import CpuSet

_NAME = re.compile(r"CPU (\d+)/")


def affinity_of(pid: int, proc: Path = Path("/proc")) -> tuple[frozenset[int], ...]:
    """Host threads on which each vCPU may run, by its number; empty for one that has no thread of its own (any more)."""
    found: dict[int, frozenset[int]] = {}
    for task in (proc / str(pid) / "task").glob("*"):
        try:
            match = _NAME.match((task / "comm").read_text())
            if match is not None:
                found[int(match[1])] = _allowed((task / "status").read_text())
        except OSError:
            continue  # it ended while we looked
    return tuple(found.get(vcpu, frozenset()) for vcpu in range(max(found, default=-1) + 1))


def _allowed(status: str) -> frozenset[int]:
    for line in status.splitlines():
        if line.startswith("Cpus_allowed_list:"):
            return frozenset(CpuSet.parse(line.partition(":")[2].strip()))
    return frozenset()
