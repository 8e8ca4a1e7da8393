"""Environment: what a tenant asks for. Frozen types, defaults, the rules between fields, and the effect of a change.

Shapes and words are checked where messages are decoded (`casemate_wire.codec`); the rules here speak of meaning.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from casemate_core.errors import Violation, shown
from casemate_core.quantity import format_mib, format_seconds
from casemate_core.spec.meta import Meta, check_labels, check_meta, check_name
from casemate_core.spec.pod import check_pods
from casemate_core.spec.podresources import check_against_vm
from casemate_core.spec.volume import VolumeMount, check_claims, check_mounts

MAX_REPLICAS = 1000
MAX_CPUS = 512
MIN_MEMORY_MIB = 64
MAX_MEMORY_MIB = 64 * 1024 * 1024
MAX_DISK_MIB = 64 * 1024 * 1024
MAX_NICS = 16
MAX_DEVICES = 16
MAX_GPU_REQUESTS = 8
MAX_GPUS = 64
MAX_GPU_TEXT = 128
MAX_VLAN = 4094
MAX_RATE_MBPS = 1_000_000
MAX_ARCHIVES = 8
MAX_SSH_KEYS = 32
MAX_USER_DATA_BYTES = 64 * 1024
DEFAULT_NETWORK = "default"
MAX_STOP_GRACE_S = 3600
MIN_LIFETIME_S = 60
MAX_LIFETIME_S = 10 * 366 * 86400
MAX_CRASH_LIMIT = 1000
_SSH_KEY = re.compile(
    r"(ssh-(ed25519|rsa)|ecdsa-sha2-nistp(256|384|521)|sk-[a-z0-9@.-]+) [A-Za-z0-9+/=]{16,}( [^\x00-\x1f\x7f]*)?\Z",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Cpu:
    """Processors of each instance; words as in the schema."""

    count: int
    max: int = 0
    policy: str = "shared"
    threads: str = "any"
    emulator: str = "share"
    realtime: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of each instance. ``hugepages_kib`` 0: ordinary pages."""

    size_mib: int
    max_mib: int = 0
    hugepages_kib: int = 0
    cells: str = "prefer"


@dataclass(frozen=True, slots=True)
class NicSpec:
    """A network interface as asked for."""

    network: str = DEFAULT_NETWORK
    type: str = "bridge"
    #: Of a virtual function (type ``sriov``); 0: none. Rates in Mbit/s.
    vlan: int = 0
    trust: bool = False
    min_rate_mbps: int = 0
    max_rate_mbps: int = 0
    #: Name of the pod whose network it goes into; empty: it stays in the guest's.
    pod: str = ""


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """Other PCI functions as asked for: ``count`` of those that carry all of ``labels``."""

    labels: Mapping[str, str]
    count: int = 1
    near: bool = False


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """GPUs as asked for: ``count`` of a model, whole or one slice of each (``share``: a profile, or thousandths of it), ``near``:
    in a cell of the instance's CPUs."""

    model: str = "*"
    count: int = 1
    link: str = "any"
    #: Name of a MIG or vGPU profile; empty: not by profile.
    share: str = ""
    #: A slice of so many thousandths, by whatever profile has them; 0: not by size.
    share_milli: int = 0
    near: bool = False
    #: Only GPUs that carry all of them.
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Toleration:
    """A taint that is tolerated."""

    key: str = ""
    operator: str = "Equal"
    value: str = ""
    effect: str = ""


@dataclass(frozen=True, slots=True)
class Affinity:
    """Keeps instances near to, or apart from, those whose environment carries the labels ``match``."""

    kind: str
    match: Mapping[str, str]
    topology: str = "host"
    required: bool = False


@dataclass(frozen=True, slots=True)
class PlacementRules:
    """Where instances may run and where they had better run."""

    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    affinity: tuple[Affinity, ...] = ()
    spread_by: str = ""


@dataclass(frozen=True, slots=True)
class UpdateStrategy:
    """How changes that need a restart or a new root disk are brought to instances that run."""

    type: str = "rolling"
    max_unavailable: int = 1


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """What is wanted. Defaults are those of the schema."""

    cpu: Cpu
    memory: Memory
    image: str
    replicas: int = 1
    nics: tuple[NicSpec, ...] = (NicSpec(),)
    archives: tuple[str, ...] = ()
    #: 0: the size of the image.
    disk_mib: int = 0
    pods: tuple[Mapping[str, Any], ...] = ()
    ssh_keys: tuple[str, ...] = ()
    user_data: str = field(default="", repr=False)
    run: str = "started"
    placement: PlacementRules = PlacementRules()
    priority: int = 0
    virtualisation: str = "prefer"
    gang: bool = False
    on_crash: str = "restart"
    #: 0: never given up.
    crash_limit: int = 0
    #: None: that of the host's agent.
    stop_grace_s: int | None = None
    #: 0: it has no end.
    lifetime_s: int = 0
    protected: bool = False
    #: None: changes wait until an instance is stopped or rebuilt.
    update_strategy: UpdateStrategy | None = None
    devices: tuple[DeviceSpec, ...] = ()
    #: No network interface at all; ``nics`` is empty then, and only then.
    isolated: bool = False
    gpus: tuple[GpuSpec, ...] = ()
    volumes: tuple[VolumeMount, ...] = ()

    @property
    def gpu_count(self) -> int:
        """GPUs, whole or in part, that each instance has."""
        return sum(gpu.count for gpu in self.gpus)


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment as it is stored."""

    meta: Meta
    spec: EnvironmentSpec


def check_environment(env: Environment) -> Iterator[Violation]:
    """Violations of the rules of meaning; none if the environment can be stored."""
    spec = env.spec
    yield from check_meta("Environment", env.meta)
    yield from _between("spec.replicas", spec.replicas, 0, MAX_REPLICAS)
    yield from _check_cpu(spec.cpu)
    yield from _check_memory(spec.memory)
    yield from check_name("spec.image", spec.image)
    if spec.disk_mib and not 1 <= spec.disk_mib <= MAX_DISK_MIB:
        yield Violation(
            "spec.disk.size", format_mib(spec.disk_mib), "is out of range", f"write 1Mi to {format_mib(MAX_DISK_MIB)}"
        )
    yield from _at_most("spec.nics", len(spec.nics), MAX_NICS)
    if spec.isolated and spec.nics:
        yield Violation(
            "spec.isolated", "true", "excludes interfaces, and spec.nics names some", "leave out one of them"
        )
    if not spec.isolated and not spec.nics:
        yield Violation("spec.nics", "[]", "is empty", "name a network, or write isolated: true")
    for i, nic in enumerate(spec.nics):
        yield from check_name(f"spec.nics[{i}].network", nic.network)
        yield from _check_nic(f"spec.nics[{i}]", nic)
        if nic.pod:
            yield from _check_nic_pod(f"spec.nics[{i}].pod", nic.pod, spec.pods)
    yield from _at_most("spec.devices", len(spec.devices), MAX_DEVICES)
    for i, device in enumerate(spec.devices):
        yield from _check_device(f"spec.devices[{i}]", device)
    yield from _at_most("spec.archives", len(spec.archives), MAX_ARCHIVES)
    for i, archive in enumerate(spec.archives):
        yield from check_name(f"spec.archives[{i}]", archive)
    yield from _check_gpus(spec.gpus)
    yield from check_mounts(spec.volumes, spec.replicas)
    unsound = list(check_pods("spec.pods", spec.pods))
    yield from unsound
    if not unsound:
        yield from check_against_vm(
            "spec.pods", spec.pods, gpus=spec.gpu_count, cpus=spec.cpu.count, memory_mib=spec.memory.size_mib
        )
        yield from check_claims(spec.pods, spec.volumes)
    yield from _at_most("spec.sshKeys", len(spec.ssh_keys), MAX_SSH_KEYS)
    for i, key in enumerate(spec.ssh_keys):
        if not _SSH_KEY.match(key):
            yield Violation(
                f"spec.sshKeys[{i}]", shown(key[:24]), "is not a public SSH key", "paste the one line of a .pub file"
            )
    if len(spec.user_data.encode()) > MAX_USER_DATA_BYTES:
        yield Violation("spec.userData", "", "is too large", f"keep it within {MAX_USER_DATA_BYTES} bytes")
    elif spec.user_data and not spec.user_data.startswith(("#cloud-config", "#!")):
        yield Violation(
            "spec.userData",
            shown(spec.user_data[:24]),
            "is neither #cloud-config nor a script",
            "begin it with #cloud-config or #!",
        )
    yield from _between("spec.priority", spec.priority, -1000, 1000)
    yield from _check_placement(spec.placement)
    yield from _check_life(spec)


def _check_life(spec: EnvironmentSpec) -> Iterator[Violation]:
    yield from _between("spec.crashLimit", spec.crash_limit, 0, MAX_CRASH_LIMIT)
    if spec.crash_limit and spec.on_crash == "leave":
        yield Violation(
            "spec.crashLimit", str(spec.crash_limit), "counts restarts, and onCrash: leave makes none", "leave it out"
        )
    if spec.stop_grace_s is not None and not 0 <= spec.stop_grace_s <= MAX_STOP_GRACE_S:
        yield Violation(
            "spec.stopGrace",
            format_seconds(spec.stop_grace_s),
            "is out of range",
            f"write 0s to {format_seconds(MAX_STOP_GRACE_S)}",
        )
    if spec.lifetime_s and not MIN_LIFETIME_S <= spec.lifetime_s <= MAX_LIFETIME_S:
        yield Violation(
            "spec.lifetime",
            format_seconds(spec.lifetime_s),
            "is out of range",
            f"write {format_seconds(MIN_LIFETIME_S)} or more, for example 72h",
        )
    if spec.update_strategy is not None:
        yield from _between("spec.updateStrategy.maxUnavailable", spec.update_strategy.max_unavailable, 1, MAX_REPLICAS)


def _check_nic(path: str, nic: NicSpec) -> Iterator[Violation]:
    if nic.type != "sriov":
        for name, value in (
            ("vlan", nic.vlan),
            ("trust", nic.trust),
            ("minRate", nic.min_rate_mbps),
            ("maxRate", nic.max_rate_mbps),
        ):
            if value:
                yield Violation(
                    f"{path}.{name}", str(value).lower(), "is for virtual functions", "write type: sriov, or remove it"
                )
        return
    yield from _between(f"{path}.vlan", nic.vlan, 0, MAX_VLAN)
    for name, rate in (("minRate", nic.min_rate_mbps), ("maxRate", nic.max_rate_mbps)):
        if not 0 <= rate <= MAX_RATE_MBPS:
            yield Violation(
                f"{path}.{name}", f"{rate}Mbit", "is out of range", f"write 1Mbit to {MAX_RATE_MBPS // 1000}Gbit"
            )
    if nic.max_rate_mbps and nic.min_rate_mbps > nic.max_rate_mbps:
        yield Violation(
            f"{path}.minRate", f"{nic.min_rate_mbps}Mbit", "is above the highest rate", "write at most maxRate"
        )


def _check_nic_pod(path: str, pod: str, pods: tuple[Mapping[str, Any], ...]) -> Iterator[Violation]:
    """Violations of an interface's pod, where pods have the form that is checked elsewhere."""
    specs = {
        p["metadata"].get("name"): p.get("spec")
        for p in pods
        if isinstance(p, Mapping) and isinstance(p.get("metadata"), Mapping)
    }
    names = ", ".join(sorted(str(name) for name in specs)[:8])
    if pod not in specs:
        yield Violation(
            path, shown(pod), "is no pod of this environment", f"name one of spec.pods ({names or 'none yet'})"
        )
        return
    found = specs[pod]
    if isinstance(found, Mapping) and found.get("hostNetwork") is True:
        yield Violation(path, shown(pod), "has the guest's own network", "leave pod out, or remove hostNetwork from it")


def _check_device(path: str, device: DeviceSpec) -> Iterator[Violation]:
    yield from check_labels(f"{path}.labels", device.labels)
    if not device.labels:
        yield Violation(f"{path}.labels", "", "is empty", "name what it is, for example {type: fec}")
    yield from _between(f"{path}.count", device.count, 1, 64)


def _check_gpus(gpus: tuple[GpuSpec, ...]) -> Iterator[Violation]:
    yield from _at_most("spec.gpus", len(gpus), MAX_GPU_REQUESTS)
    for i, gpu in enumerate(gpus):
        path = f"spec.gpus[{i}]"
        yield from _between(f"{path}.count", gpu.count, 1, MAX_GPUS)
        yield from check_labels(f"{path}.labels", gpu.labels)
        for name, text in (("model", gpu.model), ("share", gpu.share)):
            if len(text) > MAX_GPU_TEXT or not text.isprintable():
                yield Violation(
                    f"{path}.{name}", shown(text), "is no name", f"keep it within {MAX_GPU_TEXT} characters"
                )
        if (gpu.share or gpu.share_milli) and gpu.link != "any":
            yield Violation(f"{path}.link", gpu.link, "is for whole GPUs: slices have none", "leave out link, or share")


def _check_cpu(cpu: Cpu) -> Iterator[Violation]:
    yield from _between("spec.cpu.count", cpu.count, 1, MAX_CPUS)
    if cpu.policy == "shared":
        if cpu.threads != "any":
            yield Violation(
                "spec.cpu.threads",
                cpu.threads,
                "speaks of dedicated threads, and the policy is shared",
                "write policy: dedicated",
            )
        if cpu.emulator == "isolate":
            yield Violation("spec.cpu.emulator", cpu.emulator, "needs dedicated threads", "write policy: dedicated")
        if cpu.realtime:
            yield Violation("spec.cpu.realtime", "true", "needs dedicated threads", "write policy: dedicated")
    if cpu.threads == "require" and cpu.count % 2 and cpu.count > 1:
        yield Violation(
            "spec.cpu.count",
            str(cpu.count),
            "is odd, and whole cores are required",
            f"write {cpu.count + 1}, or threads: isolate",
        )


def _check_memory(memory: Memory) -> Iterator[Violation]:
    size = memory.size_mib
    if not MIN_MEMORY_MIB <= size <= MAX_MEMORY_MIB:
        yield Violation(
            "spec.memory.size",
            format_mib(size),
            "is out of range",
            f"write {MIN_MEMORY_MIB}Mi to {format_mib(MAX_MEMORY_MIB)}",
        )
    pages = memory.hugepages_kib
    if pages not in (0, 2048, 1048576):
        yield Violation(
            "spec.memory.hugepages", format_mib(pages // 1024), "is not a size of huge pages", "write 2Mi or 1Gi"
        )
    elif pages and (size * 1024) % pages:
        whole = -(-size * 1024 // pages) * pages // 1024
        yield Violation(
            "spec.memory.size",
            format_mib(size),
            f"is not a multiple of the page size {format_mib(pages // 1024)}",
            f"write {format_mib(whole)}",
        )


def _check_placement(rules: PlacementRules) -> Iterator[Violation]:
    yield from check_labels("spec.placement.nodeSelector", rules.node_selector)
    yield from _at_most("spec.placement.tolerations", len(rules.tolerations), 32)
    yield from _at_most("spec.placement.affinity", len(rules.affinity), 16)
    for i, affinity in enumerate(rules.affinity):
        yield from check_labels(f"spec.placement.affinity[{i}].match", affinity.match)
        if not affinity.match:
            yield Violation(
                f"spec.placement.affinity[{i}].match", "", "is empty", "name the labels of the other environments"
            )


def _between(path: str, value: int, low: int, high: int) -> Iterator[Violation]:
    if not low <= value <= high:
        yield Violation(path, str(value), "is out of range", f"write {low} to {high}")


def _at_most(path: str, count: int, high: int) -> Iterator[Violation]:
    if count > high:
        yield Violation(path, str(count), "are too many entries", f"keep at most {high}")
