"""What a host lacks, and the remedy. PURE: facts in, findings out.

Each check is one function of the survey; ``CHECKS`` names them in the order in which they are shown. A check is *ok*; or
it *lacks* something and says the remedy; or it is *not applicable*, because nothing on this machine could use it; or it is
*unknown*, because it could not be looked at, which is no more reassuring than a lack. Only what is required decides
whether the host is fit: a machine without GPUs is a good host, and one without KVM is not, unless told otherwise.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from casemate_agent.doctor.facts import HostSurvey
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.errors import CallerError

GIB_MIB: Final = 1024
#: The oldest libvirt that the agent is built and tested against (Debian 12's).
OLDEST_LIBVIRT: Final = (9, 0, 0)
#: An image, its overlay and a seed of the smallest guest fit; below it no instance starts.
LEAST_FREE_MIB: Final = 4 * GIB_MIB
LEAST_FREE_FRACTION: Final = 0.1
#: Controllers that libvirt puts a guest's limits into.
CONTROLLERS: Final = frozenset({"cpu", "cpuset", "memory"})
#: Certificates, lifetimes and windows are a matter of seconds; half of one is plenty.
LARGEST_CLOCK_ERROR_US: Final = 500_000
PAGE_1G_KIB: Final = 1024 * 1024


class Verdict(StrEnum):
    """What a check comes to."""

    OK = "ok"
    LACKS = "lacks"
    NOT_APPLICABLE = "not applicable"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. ``remedy`` is empty where nothing is to be done."""

    check: str
    verdict: Verdict
    message: str
    remedy: str = ""
    required: bool = False

    @property
    def blocks(self) -> bool:
        """Whether the host is unfit for what is required of it."""
        return self.required and self.verdict in (Verdict.LACKS, Verdict.UNKNOWN)


def _ok(message: str) -> Finding:
    return Finding("", Verdict.OK, message)


def _lacks(message: str, remedy: str) -> Finding:
    return Finding("", Verdict.LACKS, message, remedy)


def _not_applicable(message: str) -> Finding:
    return Finding("", Verdict.NOT_APPLICABLE, message)


# --- the checks -------------------------------------------------------------------------------------------------------


def _virtualisation(host: HostSurvey) -> Finding | None:
    found = host.virtualisation
    if found is None:
        return None
    if found.kind != "tcg":
        return _ok("a probe guest ran on KVM" if found.kind == "kvm" else "guests are simulated")
    vendor = "svm" if host.cpu_vendor == "AuthenticAMD" else "vmx"
    if not host.cpu_flags & {"vmx", "svm"}:
        remedy = (
            "this machine is a VM: have nested virtualisation turned on for it, or use a physical one"
            if "hypervisor" in host.cpu_flags
            else f"turn on {'AMD-V (SVM)' if vendor == 'svm' else 'Intel VT-x'} in the firmware"
        )
    else:
        module = "kvm_amd" if vendor == "svm" else "kvm_intel"
        remedy = f"modprobe {module}; have qemu-system-x86 installed; see `dmesg | grep -i kvm` for what it says"
    return _lacks(f"KVM runs no guests here, so they are emulated, many times slower: {found.reason}", remedy)


def _libvirt(host: HostSurvey) -> Finding | None:
    found = host.libvirt
    if found is None:
        why = host.problems.get("libvirt", "")
        if not why:
            return None
        return _lacks(
            f"libvirt does not answer: {why}",
            "apt-get install libvirt-daemon libvirt-daemon-driver-qemu qemu-system-x86, start libvirtd "
            "(or virtqemud), and name it with --libvirt-uri where it is not qemu:///system",
        )
    if found.version < OLDEST_LIBVIRT:
        return _lacks(
            f"libvirt {_dotted(found.version)} at {found.uri} is older than {_dotted(OLDEST_LIBVIRT)}",
            "upgrade libvirt; Debian 12 and newer have one that will do",
        )
    return _ok(f"libvirt {_dotted(found.version)} with QEMU {_dotted(found.qemu)} at {found.uri}")


def _network(host: HostSurvey) -> Finding | None:
    if host.network_problem is None:
        return None
    if host.network_problem:
        return _lacks(
            host.network_problem, "run as root, apt-get install nftables, and use a kernel with nf_tables and bridges"
        )
    return _ok("the kernel takes the rules of guests' networks")


def _disk(host: HostSurvey) -> Finding | None:
    disk = host.disk
    if disk is None:
        return None
    percent = 100 * disk.free_mib // max(1, disk.total_mib)
    message = (
        f"{disk.free_mib / GIB_MIB:.1f} of {disk.total_mib / GIB_MIB:.1f} GiB ({percent} %) are free at {disk.path}"
    )
    if disk.free_mib < max(LEAST_FREE_MIB, LEAST_FREE_FRACTION * disk.total_mib):
        need = f"{LEAST_FREE_MIB / GIB_MIB:.0f} GiB and {LEAST_FREE_FRACTION:.0%} are the least"
        return _lacks(f"{message}; {need}", "free or add space, or put --state-dir on a larger file system")
    return _ok(message)


def _volumes(host: HostSurvey) -> Finding | None:
    if host.mkfs_ext4 is None:
        return None
    if not host.mkfs_ext4:
        return _lacks("there is no mkfs.ext4: no volume can be made here", "apt-get install e2fsprogs")
    return _ok(f"file systems of volumes are made by {host.mkfs_ext4}")


def _cgroup(host: HostSurvey) -> Finding | None:
    found = host.cgroup
    if found is None:
        return None
    unified = "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 alone at /sys/fs/cgroup"
    if found.version < 2:
        how = "cgroup v1 holds the controllers and v2 is beside it" if found.hybrid else "cgroup v1 is mounted"
        return _lacks(f"{how}; limits of guests work, pressure and clean shares do not", unified)
    if missing := CONTROLLERS - found.controllers:
        return _lacks(
            f"cgroup v2 lacks the controllers {', '.join(sorted(missing))}",
            "use a kernel with them, and take them out of cgroup_disable= and of v1 mounts",
        )
    return _ok("cgroup v2 with " + ", ".join(sorted(CONTROLLERS)))


def _clock(host: HostSurvey) -> Finding | None:
    clock = host.clock
    if clock is None:
        return None
    remedy = "apt-get install chrony (or enable systemd-timesyncd) and let it reach a time server"
    if not clock.synchronised:
        return _lacks("nothing keeps the clock: the kernel says that it is not synchronised", remedy)
    if clock.error_us > LARGEST_CLOCK_ERROR_US:
        return _lacks(f"the clock may be wrong by {clock.error_us / 1e6:.1f} s", remedy)
    return _ok(f"synchronised, wrong by at most {clock.error_us / 1000:.1f} ms")


def _iommu(host: HostSurvey) -> Finding | None:
    groups, functions = host.iommu_groups, host.functions
    if groups is None or functions is None:
        return None
    if groups:
        return _ok(f"{groups} groups")
    if not functions:
        return _not_applicable("there is no PCI device to pass through")
    words = set((host.cmdline or "").split())
    if host.iommu_table is False:
        remedy = (
            "this machine is a VM: give it an emulated IOMMU"
            if "hypervisor" in host.cpu_flags
            else "turn on VT-d (Intel) or AMD-Vi in the firmware"
        )
        return _lacks("the firmware describes no IOMMU, so no device can be passed through", remedy)
    if "iommu=off" in words or "intel_iommu=off" in words or "amd_iommu=off" in words:
        return _lacks("the kernel's command line turns the IOMMU off", "take iommu=off off the kernel's command line")
    word = "amd_iommu=on" if host.cpu_vendor == "AuthenticAMD" else "intel_iommu=on"
    return _lacks(
        "the kernel made no IOMMU groups, so no device can be passed through",
        f"add {word} iommu=pt to the kernel's command line (GRUB_CMDLINE_LINUX) and reboot",
    )


def _vfio(host: HostSurvey) -> Finding | None:
    if host.iommu_groups is None or host.vfio_loaded is None:
        return None
    if not host.iommu_groups:
        return _not_applicable("there is no IOMMU to put devices behind")
    if host.vfio_loaded:
        held = sum(function.driver == "vfio-pci" for function in host.functions or ())
        return _ok(f"vfio-pci is loaded and holds {held} functions")
    if host.vfio_available:
        return _lacks(
            "vfio-pci is not loaded", "modprobe vfio-pci, and write vfio-pci into /etc/modules-load.d/vfio.conf"
        )
    return _lacks(
        "this kernel has no vfio-pci", "boot a kernel with CONFIG_VFIO_PCI (Debian's linux-image-amd64 has it)"
    )


def _hugepages(host: HostSurvey) -> Finding | None:
    if host.pools is None:
        return None
    some = [pool for pool in host.pools if pool.count]
    if some:
        return _ok(
            "; ".join(
                f"cell {pool.cell}: {pool.count} of {_size(pool.page_kib)}, {pool.free} free"
                for pool in sorted(some, key=lambda pool: (pool.cell, pool.page_kib))
            )
        )
    size = "1G" if "pdpe1gb" in host.cpu_flags else "2M"
    return _lacks(
        "no huge pages are set aside: environments that ask for them fit nowhere here",
        f"add default_hugepagesz={size} hugepagesz={size} hugepages=N to the kernel's command line"
        + ("" if size == "1G" else " (or sysctl vm.nr_hugepages=N)"),
    )


def _sriov(host: HostSurvey) -> Finding | None:
    if host.functions is None:
        return None
    able = [function for function in host.functions if function.total_vfs]
    if not able:
        return _not_applicable("no device offers virtual functions")
    idle = [function for function in able if not function.vfs]
    if idle:
        first = idle[0]
        return _lacks(
            f"{len(idle)} of {len(able)} devices have no virtual functions made: "
            + ", ".join(function.address for function in idle[:8]),
            f"echo {first.total_vfs} > /sys/bus/pci/devices/{first.address}/sriov_numvfs",
        )
    return _ok(", ".join(f"{function.address}: {function.vfs} of {function.total_vfs}" for function in able[:8]))


def _nvml(host: HostSurvey) -> Finding | None:
    if host.functions is None:
        return None
    gpus = [function for function in host.functions if function.is_nvidia_gpu]
    if not gpus:
        return _not_applicable("there is no NVIDIA GPU")
    if all(gpu.driver == "vfio-pci" for gpu in gpus):
        return _not_applicable(f"all {len(gpus)} NVIDIA GPUs are held by vfio-pci for guests")
    if host.nvml is None:
        why = host.problems.get("nvml", "it was not asked")
        return _lacks(
            f"there are {len(gpus)} NVIDIA GPUs, and NVML does not answer: {why}",
            "install NVIDIA's driver (nvidia-driver, libnvidia-ml1), or bind the GPUs to vfio-pci",
        )
    return _ok(f"driver {host.nvml.driver} sees {host.nvml.gpus} of {len(gpus)} NVIDIA GPUs")


def _kernel_line(host: HostSurvey) -> Finding | None:
    if host.cmdline is None:
        return None
    isolated = _threads_of(host.cmdline, "isolcpus", host.threads)
    if not isolated:
        return _not_applicable(
            "no threads are isolated since boot; real-time guests want isolcpus, nohz_full and rcu_nocbs of theirs, or isolate in"
            " the agent's settings"
        )
    lines = {word: isolated - _threads_of(host.cmdline, word, host.threads) for word in ("nohz_full", "rcu_nocbs")}
    missing = {word: threads for word, threads in lines.items() if threads}
    if missing:
        return _lacks(
            "isolated threads are still interrupted: "
            + "; ".join(f"{word} leaves out {threads}" for word, threads in missing.items()),
            "add " + " ".join(f"{word}={isolated}" for word in missing) + " to the kernel's command line and reboot",
        )
    return _ok(f"threads {isolated} are isolated, without ticks and callbacks")


CHECKS: Final[Mapping[str, Callable[[HostSurvey], Finding | None]]] = {
    "virtualisation": _virtualisation,
    "libvirt": _libvirt,
    "network": _network,
    "disk": _disk,
    "volumes": _volumes,
    "clock": _clock,
    "cgroup": _cgroup,
    "hugepages": _hugepages,
    "iommu": _iommu,
    "vfio": _vfio,
    "sriov": _sriov,
    "nvml": _nvml,
    "kernel-line": _kernel_line,
}
#: Without these no instance runs as it should.
REQUIRED: Final = frozenset({"virtualisation", "libvirt", "network", "disk"})


class UnknownCheck(CallerError):
    """There is no check of this name."""

    reason = "UnknownCheck"


def required_of(require: Iterable[str], optional: Iterable[str]) -> frozenset[str]:
    """What is required: the usual, with some more and some less. Raises UnknownCheck."""
    for name in (*require, *optional):
        if name not in CHECKS:
            raise UnknownCheck(f"{name}: there is no such check; there are {', '.join(CHECKS)}")
    return (REQUIRED | frozenset(require)) - frozenset(optional)


def diagnose(host: HostSurvey, required: frozenset[str] = REQUIRED) -> tuple[Finding, ...]:
    """All findings about a host, in the order of ``CHECKS``."""
    found = []
    for name, check in CHECKS.items():
        finding = check(host)
        if finding is None:
            why = host.problems.get(name, "the machine does not tell")
            finding = Finding(
                name, Verdict.UNKNOWN, f"could not be looked at: {why}", "run as root, with /proc and /sys mounted"
            )
        found.append(Finding(name, finding.verdict, finding.message, finding.remedy, required=name in required))
    return tuple(found)


def plain(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Findings as plain values, for JSON."""
    return [asdict(finding) | {"verdict": str(finding.verdict)} for finding in findings]


def lines(findings: Iterable[Finding]) -> list[str]:
    """Findings as lines for people: verdict, check, what was found; below it the remedy."""
    shown = []
    for finding in findings:
        mark = " (required)" if finding.blocks else ""
        shown.append(f"{finding.verdict:<14}  {finding.check:<14}  {finding.message}{mark}")
        if finding.remedy:
            shown.append(f"{'':<32}remedy: {finding.remedy}")
    return shown


# --- words ------------------------------------------------------------------------------------------------------------


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def _size(page_kib: int) -> str:
    return f"{page_kib // PAGE_1G_KIB}Gi" if page_kib >= PAGE_1G_KIB else f"{page_kib // 1024}Mi"


def _threads_of(cmdline: str, word: str, online: CpuSet) -> CpuSet:
    """Threads that a word of the command line names, as the kernel reads lists: flags may go before the numbers
    (``isolcpus=managed_irq,domain,2-7``), ``N`` is the last thread and ``all`` all. What is none of that names none."""
    found = EMPTY
    last = max(online, default=0)
    for part in cmdline.split():
        if not part.startswith(word + "="):
            continue
        value = part.partition("=")[2]
        numbers = [text.replace("N", str(last)) for text in value.split(",") if text[:1].isdecimal() or text[:1] == "N"]
        try:
            found = online if value == "all" else CpuSet.parse(",".join(numbers))
        except ValueError:
            found = EMPTY
    return found
