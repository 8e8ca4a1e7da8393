"""The real-time profile: what a host and an instance need, judged from what the kernel says. PURE.

What may live here: the lines of the profile, what each wants, how it is compared, what can be done about it. Reading and writing
are :mod:`casemate_agent.drivers.tuning`'s.

Theory of operation. A line is judged from the text of files below ``/``, as they are now; nothing that this agent wrote before
counts. A file that is not there makes its line not applicable: a kernel without the feature cannot do it wrong either. What can
be set at run time carries the text to write (`Line.writes`); what only the firmware, the kernel's command line or a module's
options can set is named with its remedy, and never applied.

QUIET are the threads that must be: the isolated ones of the host, and those of real-time instances. A host without any has no
profile.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from casemate_agent.drivers.ports import DMA_LATENCY, ProcessFacts, QemuThreads
from casemate_core.claims import Claim
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.spec.realtime import LineState, ProfileLine
from casemate_core.topology import Topology

#: Files that the profile reads, as glob patterns below the root; those with ``{t}`` for each quiet thread.
FILES = (
    "proc/cmdline",
    "proc/irq/[0-9]*/effective_affinity_list",
    "proc/irq/[0-9]*/smp_affinity_list",
    "proc/sys/kernel/nmi_watchdog",
    "proc/sys/kernel/numa_balancing",
    "proc/sys/kernel/sched_rt_runtime_us",
    "proc/sys/kernel/timer_migration",
    "proc/sys/vm/stat_interval",
    "sys/devices/system/clocksource/clocksource0/current_clocksource",
    "sys/devices/system/cpu/isolated",
    "sys/devices/system/cpu/nohz_full",
    "sys/fs/cgroup/cpuset.cpus.isolated",
    "sys/devices/virtual/workqueue/cpumask",
    "sys/devices/virtual/workqueue/writeback/cpumask",
    "sys/kernel/mm/ksm/run",
    "sys/kernel/mm/transparent_hugepage/enabled",
    "sys/module/kvm/parameters/kvmclock_periodic_sync",
    "sys/module/kvm_intel/parameters/ple_gap",
    "sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
)
PER_THREAD = (
    "sys/devices/system/cpu/cpu{t}/cpufreq/scaling_governor",
    "sys/devices/system/machinecheck/machinecheck{t}/ignore_ce",
)
#: What of a long list is shown.
SHOWN = 6


@dataclass(frozen=True, slots=True)
class Line:
    """A judged line; ``writes`` are the files and texts that would make it hold, where that can be done at run time."""

    line: ProfileLine
    writes: tuple[tuple[str, str], ...] = ()


Files = Mapping[str, str]


def patterns(quiet: CpuSet) -> tuple[str, ...]:
    """Files to read for a host with these quiet threads; none where it has none."""
    if not quiet:
        return ()
    return (*FILES, DMA_LATENCY, *(pattern.format(t=thread) for pattern in PER_THREAD for thread in quiet))


def quiet_threads(topology: Topology, claims: Mapping[str, Claim]) -> CpuSet:
    """Threads on which nothing but their owner should be heard."""
    mask = topology.isolated.mask
    for claim in claims.values():
        if claim.realtime:
            mask |= claim.owned_mask & ~(claim.emulator.mask if claim.emulator_owned else 0)
    return CpuSet(mask)


def host_lines(
    files: Files | None,
    topology: Topology,
    quiet: CpuSet,
    dma_entries: int = 0,
    partitionable: CpuSet = EMPTY,
    in_partitions: CpuSet = EMPTY,
) -> tuple[Line, ...]:
    """The host's lines, in the order in which they are shown. None: nothing was read yet. ``partitionable``: threads that are
    isolated only while a VM has them, which those in ``in_partitions`` should be now."""
    if not quiet:
        return ()
    if files is None:
        return (Line(ProfileLine("host", LineState.UNKNOWN, "the profile", "not read yet", "/")),)
    rest = CpuSet(topology.index.online) - quiet
    return (
        _isolated(files, topology, quiet, partitionable, in_partitions),
        *_kernel_line(files, topology, quiet),
        *_settings(files),
        *_masks(files, quiet, rest),
        _irqs(files, quiet, rest),
        *_per_thread(files, quiet),
        _power(files),
        *_modules(files, dma_entries),
    )


def _line(
    name: str,
    held: bool | None,
    wanted: str,
    found: str,
    source: str,
    remedy: str = "",
    writes: tuple[tuple[str, str], ...] = (),
) -> Line:
    """A line; ``held`` None: not applicable."""
    state = LineState.NOT_APPLICABLE if held is None else LineState.HELD if held else LineState.BROKEN
    broken = state is LineState.BROKEN
    return Line(
        ProfileLine(name, state, wanted, found, f"/{source}", remedy if broken else ""), writes if broken else ()
    )


def _absent(name: str, wanted: str, source: str, why: str = "this kernel has no such file") -> Line:
    return _line(name, None, wanted, why, source)


BOOT_ISOLATED = "sys/devices/system/cpu/isolated"
PARTITIONS = "sys/fs/cgroup/cpuset.cpus.isolated"


def _isolated(files: Files, topology: Topology, quiet: CpuSet, partitionable: CpuSet, due: CpuSet) -> Line:
    """Threads that the kernel balances nothing onto: since boot, or while a VM has them in a partition."""
    boot = _cpus(files[BOOT_ISOLATED]) if BOOT_ISOLATED in files else topology.isolated - partitionable
    now = _cpus(files.get(PARTITIONS, ""))
    found = str(boot) or "none"
    if partitionable:
        found += f" since boot, {now or 'none'} by partitions, {partitionable - due or 'none'} once a VM has them"
    return _line(
        "isolated",
        quiet <= boot | now | (partitionable - due),
        str(quiet),
        found,
        PARTITIONS if partitionable else BOOT_ISOLATED,
        f"set isolcpus=managed_irq,domain,{quiet} on the kernel's command line, and boot; or name them in isolate in the agent's"
        " settings",
    )


def _kernel_line(files: Files, topology: Topology, quiet: CpuSet) -> Iterator[Line]:
    """What only the kernel's command line sets: checked where the kernel shows what came of it, else on the line itself."""
    remedy = "set {} on the kernel's command line, and boot"
    split = CpuSet.from_ids(t for t in quiet if topology.index.siblings.get(t, 0) & ~quiet.mask)
    yield _line(
        "whole-cores",
        not split,
        "quiet threads have quiet siblings",
        f"{split} have not" if split else "all have",
        "sys/devices/system/cpu/cpu*/topology/core_cpus_list",
        "isolate whole cores, or switch SMT off in the firmware",
    )
    path = "sys/devices/system/cpu/nohz_full"
    if path in files:
        tickless = _cpus(files[path])
        yield _line(
            "nohz-full",
            quiet <= tickless,
            str(quiet),
            str(tickless) or "none",
            path,
            remedy.format(f"nohz_full={quiet}"),
        )
    else:
        yield _absent("nohz-full", str(quiet), path, "this kernel is built without NO_HZ_FULL")
    words = dict(word.partition("=")[::2] for word in files.get("proc/cmdline", "").split())
    offloaded = _cpus(words.get("rcu_nocbs", "")) | (_cpus(words.get("nohz_full", "")))
    yield _line(
        "rcu-nocbs",
        quiet <= offloaded or words.get("rcu_nocbs") == "all",
        str(quiet),
        words.get("rcu_nocbs", "not set"),
        "proc/cmdline",
        remedy.format(f"rcu_nocbs={quiet}"),
    )
    for name, key, value in (("skew-tick", "skew_tick", "1"), ("tsc", "tsc", "reliable"), ("iommu", "iommu", "pt")):
        yield _line(
            f"{name}",
            words.get(key) == value,
            f"{key}={value}",
            words.get(key, "not set"),
            "proc/cmdline",
            remedy.format(f"{key}={value}"),
        )
    yield _line(
        "softlockup",
        "nosoftlockup" in words or words.get("nowatchdog") == "",
        "nosoftlockup",
        "set" if "nosoftlockup" in words else "not set",
        "proc/cmdline",
        remedy.format("nosoftlockup"),
    )


#: (name, file, what it must be, what is written)
_SETTINGS: tuple[tuple[str, str, str], ...] = (
    ("rt-throttling", "proc/sys/kernel/sched_rt_runtime_us", "-1"),
    ("nmi-watchdog", "proc/sys/kernel/nmi_watchdog", "0"),
    ("numa-balancing", "proc/sys/kernel/numa_balancing", "0"),
    ("timer-migration", "proc/sys/kernel/timer_migration", "0"),
    ("ksm", "sys/kernel/mm/ksm/run", "0"),
)
STAT_INTERVAL_S = 10


def _settings(files: Files) -> Iterator[Line]:
    for name, path, wanted in _SETTINGS:
        if path not in files:
            yield _absent(name, wanted, path)
            continue
        yield _line(name, files[path] == wanted, wanted, files[path], path, f"write {wanted} there", ((path, wanted),))
    path = "proc/sys/vm/stat_interval"
    if path in files:
        held = files[path].isdigit() and int(files[path]) >= STAT_INTERVAL_S
        text = str(STAT_INTERVAL_S)
        yield _line("stat-interval", held, f"{text} or more", files[path], path, f"write {text} there", ((path, text),))
    path = "sys/kernel/mm/transparent_hugepage/enabled"
    if path in files:
        chosen = next((w.strip("[]") for w in files[path].split() if w.startswith("[")), files[path])
        yield _line("thp", chosen == "never", "never", chosen, path, "write never there", ((path, "never"),))
    else:
        yield _absent("thp", "never", path)
    path = "sys/devices/system/clocksource/clocksource0/current_clocksource"
    if path in files:
        yield _line(
            "clocksource",
            files[path] == "tsc",
            "tsc",
            files[path],
            path,
            "find out in the kernel's log why it does not trust the TSC (firmware, a virtual machine)",
        )


def _masks(files: Files, quiet: CpuSet, rest: CpuSet) -> Iterator[Line]:
    """Where the kernel's own unbound work may run."""
    for name, path in (
        ("workqueues", "sys/devices/virtual/workqueue/cpumask"),
        ("writeback", "sys/devices/virtual/workqueue/writeback/cpumask"),
    ):
        if path not in files:
            yield _absent(name, f"off {quiet}", path)
            continue
        cpus = from_hex(files[path])
        text = to_hex(rest)
        yield _line(
            name,
            cpus is not None and not cpus & quiet,
            f"off {quiet}",
            str(cpus) if cpus is not None else files[path],
            path,
            f"write {text} there",
            ((path, text),) if rest else (),
        )


def _irqs(files: Files, quiet: CpuSet, rest: CpuSet) -> Line:
    """Interrupts that would be delivered to a quiet thread. Those that the kernel manages by itself refuse to be moved."""
    loud: dict[int, CpuSet] = {}
    writes: list[tuple[str, str]] = []
    for path, text in files.items():
        if not path.startswith("proc/irq/") or not path.endswith("/smp_affinity_list"):
            continue
        folder = path.rpartition("/")[0]
        allowed = _cpus(text)
        where = _cpus(files.get(f"{folder}/effective_affinity_list", "")) or allowed
        if where & quiet:
            loud[int(folder.rpartition("/")[2])] = where & quiet
            writes.append((path, str(allowed - quiet or rest)))
    found = ", ".join(f"{number} on {cpus}" for number, cpus in sorted(loud.items())[:SHOWN])
    if len(loud) > SHOWN:
        found += f" and {len(loud) - SHOWN} more"
    remedy = (
        "write other threads to their smp_affinity_list, keep irqbalance off these, isolcpus=managed_irq for the rest"
    )
    return _line(
        "interrupts",
        not loud,
        f"none on {quiet}",
        found or "none",
        "proc/irq/*/smp_affinity_list",
        remedy,
        tuple(writes),
    )


def _per_thread(files: Files, quiet: CpuSet) -> Iterator[Line]:
    for name, pattern, wanted in (("governor", PER_THREAD[0], "performance"), ("machine-checks", PER_THREAD[1], "1")):
        found = {thread: files[path] for thread in quiet if (path := pattern.format(t=thread)) in files}
        source = pattern.format(t="*")
        if not found:
            yield _absent(name, wanted, source)
            continue
        wrong = {thread: text for thread, text in found.items() if text != wanted}
        told = ", ".join(sorted(set(wrong.values()))) + f" on {CpuSet.from_ids(wrong)}" if wrong else wanted
        writes = tuple((pattern.format(t=thread), wanted) for thread in wrong)
        yield _line(name, not wrong, wanted, told, source, f"write {wanted} there", writes)


def _power(files: Files) -> Line:
    wanted, source = "0 µs", DMA_LATENCY
    if source not in files:
        return _absent("power-states", wanted, source)
    held = files[source] == "0"
    remedy = 'hold it at 0 (realtime = "apply" in the agent\'s settings), or processor.max_cstate=1'
    return _line("power-states", held, wanted, f"{files[source]} µs", source, remedy, ((source, "0"),))


def _modules(files: Files, dma_entries: int) -> Iterator[Line]:
    for name, path, good, option in (
        (
            "kvmclock-sync",
            "sys/module/kvm/parameters/kvmclock_periodic_sync",
            ("N", "0"),
            "kvm kvmclock_periodic_sync=0",
        ),
        ("pause-exits", "sys/module/kvm_intel/parameters/ple_gap", ("0",), "kvm_intel ple_gap=0"),
    ):
        if path not in files:
            yield _absent(name, good[0], path, "the module is not loaded, or has no such option")
            continue
        remedy = f"write 'options {option}' to /etc/modprobe.d, and load the module anew"
        yield _line(name, files[path] in good, good[0], files[path], path, remedy)
    path = "sys/module/vfio_iommu_type1/parameters/dma_entry_limit"
    if path in files and dma_entries:
        held = files[path].isdigit() and int(files[path]) >= dma_entries
        remedy = f"write 'options vfio_iommu_type1 dma_entry_limit={dma_entries}' to /etc/modprobe.d, and load the module anew"
        yield _line("dma-mappings", held, f"{dma_entries} or more", files[path], path, remedy)


def _cpus(text: str) -> CpuSet:
    """A list of the kernel's; ``(null)`` and flags before it are none."""
    try:
        return CpuSet.parse(",".join(w for w in text.split(",") if w and w[0].isdigit()))
    except ValueError:
        return EMPTY


def from_hex(text: str) -> CpuSet | None:
    """A mask as the kernel prints it: hexadecimal, in groups of 32 bits. None for what is none."""
    try:
        return CpuSet(int(text.replace(",", ""), 16))
    except ValueError:
        return None


def to_hex(cpus: CpuSet) -> str:
    """The same back."""
    digits = f"{cpus.mask:x}"
    groups = [digits[max(0, end - 8) : end] for end in range(len(digits), 0, -8)]
    return ",".join(reversed([group.zfill(8) if i < len(groups) - 1 else group for i, group in enumerate(groups)]))


# --- instances --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """What was read of a running instance's process; None: not read."""

    threads: QemuThreads | None = None
    process: ProcessFacts | None = None
    isolated: CpuSet = field(default=EMPTY)


def instance_lines(claim: Claim, seen: Seen, rest: CpuSet, pid: int, lock_mib: int) -> tuple[ProfileLine, ...]:
    """What dedicated threads, set-aside pages and real time need of one instance. ``rest``: where its emulator belongs."""
    if not claim.vcpus:
        return ()
    lines = [*_thread_lines(claim, seen, rest, pid), *_memory_lines(claim, seen.process, pid, lock_mib)]
    return tuple(line.line for line in lines)


def _unknown(name: str, wanted: str, source: str) -> Line:
    return Line(ProfileLine(name, LineState.UNKNOWN, wanted, "not read", f"/{source}"))


def _thread_lines(claim: Claim, seen: Seen, rest: CpuSet, pid: int) -> Iterator[Line]:
    source = f"proc/{pid}/task/*: sched_getaffinity"
    wanted = ", ".join(f"{vcpu}→{thread}" for vcpu, thread in enumerate(claim.vcpus[: claim.vcpus_online]))
    threads = seen.threads
    if threads is None:
        yield _unknown("vcpus", wanted, source)
        yield _unknown("emulator", str(rest), source)
    else:
        found = {vcpu: cpus for vcpu, cpus in enumerate(threads.vcpus) if cpus}
        right = bool(found) and all(
            cpus == CpuSet.of(claim.vcpus[v]) for v, cpus in found.items() if v < len(claim.vcpus)
        )
        told = ", ".join(f"{vcpu}→{cpus}" for vcpu, cpus in found.items())
        yield _line(
            "vcpus",
            right,
            wanted,
            told or "no thread of a vCPU",
            source,
            "they are bound again, unless affinity_drift is hold",
        )
        off = bool(threads.rest) and not threads.rest - rest
        yield _line("emulator", off, f"within {rest}", str(threads.rest), source, "as for vcpus")
    if not claim.realtime:
        return
    mine = CpuSet.from_ids(claim.vcpus)
    yield _line(
        "isolated",
        mine <= seen.isolated,
        str(mine),
        str(mine & seen.isolated) or "none",
        f"{BOOT_ISOLATED}, or the cpusets of its vCPUs",
        f"isolcpus=managed_irq,domain,{mine} on the kernel's command line, or isolate in the agent's settings",
    )
    source = f"proc/{pid}/task/*: sched_getscheduler"
    due = range(1, claim.vcpus_online)
    if threads is None:
        yield _unknown("scheduler", "fifo", source)
    elif due:
        plain = [vcpu for vcpu in due if vcpu not in threads.fifo]
        told = f"not of vCPU {', '.join(map(str, plain))}" if plain else "fifo"
        yield _line(
            "scheduler", not plain, "fifo, but for vCPU 0", told, source, "restart the instance: casemate restart"
        )


def _memory_lines(claim: Claim, process: ProcessFacts | None, pid: int, lock_mib: int) -> Iterator[Line]:
    cells = CpuSet.from_ids(claim.cells)
    if claim.pages:
        page_kib = claim.pages[0].page_kib
        wanted = f"pages of {page_kib} KiB on cells {cells}"
        source = f"proc/{pid}/numa_maps"
        if process is None or process.huge_kib is None:
            yield _unknown("pages", wanted, source)
        else:
            told = ", ".join(f"{kib // 1024} MiB on cell {cell}" for cell, kib in sorted(process.huge_kib.items()))
            right = bool(process.huge_kib) and set(process.huge_kib) <= set(cells)
            yield _line(
                "pages", right, wanted, told or "none", source, "restart the instance: pages lie where they were taken"
            )
    if not lock_mib:
        return
    source = f"proc/{pid}/limits"
    if process is None:
        yield _unknown("memory-lock-limit", f"{lock_mib} MiB", source)
        yield _unknown("memory-locked", "all of it", f"proc/{pid}/status")
        return
    limit = process.lock_limit_kib
    told = "unlimited" if limit is None else f"{limit // 1024} MiB"
    yield _line(
        "memory-lock-limit",
        limit is None or limit >= lock_mib * 1024,
        f"{lock_mib} MiB or more",
        told,
        source,
        "restart the instance; where libvirt runs in a container, allow it CAP_SYS_RESOURCE",
    )
    if claim.realtime:
        least = claim.memory_mib * 1024
        # Pages of hugetlbfs cannot be swapped, and are not counted as locked.
        held = process.locked_kib + sum((process.huge_kib or {}).values())
        yield _line(
            "memory-locked",
            held >= least,
            f"{least // 1024} MiB",
            f"{held // 1024} MiB",
            f"proc/{pid}/status",
            "restart the instance",
        )
