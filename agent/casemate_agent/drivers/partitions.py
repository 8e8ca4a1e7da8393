"""cpuset partitions of libvirt's cgroups, by the files of cgroup v2.

For: ``ports.Partitions``. What may live here: reading and writing below ``sys/fs/cgroup``. Which threads are wanted is decided in
:mod:`casemate_agent.plan.partitions`.

Theory of operation. libvirt gives each vCPU a threaded cgroup, ``SLICE/SCOPE/libvirt/vcpuN``, in which it writes
``cpuset.cpus``. A *remote* partition can be made of it without its parents being partitions (Linux 6.7):
``cpuset.cpus.exclusive`` must name the threads in each cgroup from the root down, and then ``isolated`` is written to
``cpuset.cpus.partition``. The write succeeds even where the partition is not made: the file then reads ``isolated invalid
(why)``. A thread that leaves the parents' permission ends the partition, so permissions are widened from the top and narrowed
only by what no child has. When libvirt removes the cgroup of a VM that has ended, the kernel gives its threads back; the
permission of the slice stays (`reclaim`). libvirt may write the same or another ``cpuset.cpus`` meanwhile: what counts for a
partition is ``cpuset.cpus.exclusive``, which libvirt does not know. Memory nodes (``cpuset.mems``) stay as libvirt wrote them:
a partition says nothing of them. (Kernel documentation, admin-guide/cgroup-v2, "Cpuset Interface Files"; all of it tried on
Linux 6.12.)
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from casemate_agent.drivers.attributes import write_attribute
from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.ports import Partition, PartitionFacts, PartitionRefused
from casemate_core.cpuset import EMPTY, CpuSet

CGROUPS = "sys/fs/cgroup"
EXCLUSIVE, STATE = "cpuset.cpus.exclusive", "cpuset.cpus.partition"
#: The cgroup of libvirt's below a VM's own.
LIBVIRT = "libvirt"
#: Where libvirt puts its VMs, with systemd and without. Another's cgroup is never written to, whatever threads it has.
MACHINES = ("machine.slice", "machine")


def why_not(root: Path) -> str:
    """Why no partition can be made below ``root``; empty where one can."""
    top = root / CGROUPS
    try:
        controllers = (top / "cgroup.controllers").read_text().split()
    except OSError:
        return f"/{CGROUPS} is not cgroup v2; boot with systemd.unified_cgroup_hierarchy=1"
    if "cpuset" not in controllers:
        return f"cgroup v2 has no cpuset controller (/{CGROUPS}/cgroup.controllers); do not mount it as version 1"
    if not (top / "cpuset.cpus.isolated").exists():
        return f"/{CGROUPS} has no cpuset.cpus.isolated; it takes Linux 6.7, or isolcpus= on the kernel's command line"
    return ""


class CgroupPartitions:
    """``ports.Partitions`` on the files below ``root``."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._top = root / CGROUPS
        self._calls = DeadlineExecutor("partitions", threads=1)

    async def aclose(self) -> None:
        """Let the thread go."""
        self._calls.close()

    async def look(self, pids: tuple[int, ...], deadline_s: float) -> PartitionFacts:
        return await self._calls.run("read partitions", lambda: self._look(pids), deadline_s)

    async def isolate(self, pid: int, sets: tuple[CpuSet, ...], deadline_s: float) -> None:
        await self._calls.run("make partitions", lambda: self._isolate(pid, sets), deadline_s)

    async def reclaim(self, cpus: CpuSet, deadline_s: float) -> None:
        await self._calls.run("reclaim threads", lambda: self._reclaim(cpus), deadline_s)

    # --- in the thread ---

    def _look(self, pids: tuple[int, ...]) -> PartitionFacts:
        domains: dict[int, tuple[Partition, ...]] = {}
        for pid in pids:
            with suppress(OSError, PartitionRefused):
                base = self._base(pid)
                numbers = sorted(int(path.name[4:]) for path in base.glob("vcpu[0-9]*"))
                each = {number: _read(base / f"vcpu{number}") for number in numbers}
                domains[pid] = tuple(each.get(n, Partition("not there")) for n in range(max(each, default=-1) + 1))
        aside = EMPTY
        for folder, inner in self._of_machines():
            aside |= _cpus(folder / EXCLUSIVE) - inner
        return PartitionFacts(domains, aside)

    def _isolate(self, pid: int, sets: tuple[CpuSet, ...]) -> None:
        base = self._base(pid)
        wanted = EMPTY
        for cpus in sets:
            wanted |= cpus
        above = self._top
        for part in base.relative_to(self._top).parts:
            folder = above / part
            if not (folder / EXCLUSIVE).exists():
                write_attribute(above / "cgroup.subtree_control", "+cpuset", PartitionRefused)
            self._permit(folder, wanted)
            above = folder
        if not (base / "vcpu0" / EXCLUSIVE).exists():
            write_attribute(base / "cgroup.subtree_control", "+cpuset", PartitionRefused)
        for vcpu, cpus in enumerate(sets):
            if cpus:
                self._make(base / f"vcpu{vcpu}", cpus)

    def _make(self, folder: Path, cpus: CpuSet) -> None:
        """One partition; where the kernel refuses it, its cgroup is a member again."""
        found = _read(folder)
        if found.isolated == cpus:
            return
        try:
            if _cpus(folder / EXCLUSIVE) != cpus:
                write_attribute(folder / EXCLUSIVE, str(cpus), PartitionRefused)
            write_attribute(folder / STATE, "isolated", PartitionRefused)
            found = _read(folder)
            if found.isolated != cpus:
                raise PartitionRefused(f"{folder}: threads {cpus} were asked for; the kernel says {found.words}")
        except PartitionRefused:
            with suppress(PartitionRefused):
                write_attribute(folder / STATE, "member", PartitionRefused)
                write_attribute(folder / EXCLUSIVE, "\n", PartitionRefused)
            raise

    @staticmethod
    def _permit(folder: Path, cpus: CpuSet) -> None:
        have = _cpus(folder / EXCLUSIVE)
        if cpus - have:
            write_attribute(folder / EXCLUSIVE, str(have | cpus), PartitionRefused)

    def _reclaim(self, cpus: CpuSet) -> None:
        for folder, inner in self._of_machines():
            have = _cpus(folder / EXCLUSIVE)
            keep = have - (cpus - inner)
            if keep != have:
                write_attribute(folder / EXCLUSIVE, str(keep) or "\n", PartitionRefused)

    def _of_machines(self) -> Iterator[tuple[Path, CpuSet]]:
        """As `_permitted`, where libvirt's VMs are."""
        for name in MACHINES:
            yield from self._permitted(self._top, name)

    def _permitted(self, folder: Path, names: str = "*") -> Iterator[tuple[Path, CpuSet]]:
        """Cgroups below that may take threads for themselves and are no partition, innermost first; and what those below each
        of them may."""
        for path in sorted(folder.glob(f"{names}/{EXCLUSIVE}")):
            if _cpus(path) and not _text(path.parent / STATE).startswith(("isolated", "root")):
                yield from self._permitted(path.parent)
                inner = EMPTY
                for each in path.parent.glob(f"*/{EXCLUSIVE}"):
                    inner |= _cpus(each)
                yield path.parent, inner

    def _base(self, pid: int) -> Path:
        """libvirt's cgroup of a VM. Raises PartitionRefused where it has none; OSError for a process that is gone."""
        for line in (self._root / "proc" / str(pid) / "cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                parts = PurePosixPath(line[4:]).parts
                if LIBVIRT in parts:
                    return self._top.joinpath(*parts[: parts.index(LIBVIRT) + 1])
        raise PartitionRefused(
            f"process {pid} is in no cgroup of libvirt's (/proc/{pid}/cgroup); let libvirt use the controller cpuset"
            " (cgroup_controllers in /etc/libvirt/qemu.conf)"
        )


def _read(folder: Path) -> Partition:
    return Partition(_text(folder / STATE) or "without cpuset", _cpus(folder / "cpuset.cpus.effective"))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cpus(path: Path) -> CpuSet:
    return CpuSet.parse(_text(path))
