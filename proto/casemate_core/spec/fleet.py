"""The kinds that the platform team keeps: Image, Network, Host, Policy. Frozen types and the rules of meaning."""

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from casemate_core.errors import Violation, shown
from casemate_core.spec.instance import DIGEST, File
from casemate_core.spec.meta import Meta, check_labels, check_meta

MAX_CEL_CHARS = 2048


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Where an image comes from and what it is."""

    file: File
    format: str
    type: str = "disk"
    kernel: File | None = None
    initrd: File | None = None
    cmdline: str = ""
    #: Virtual size of a disk; 0 where the manifest does not say it.
    size_mib: int = 0


@dataclass(frozen=True, slots=True)
class Image:
    """An image as it is stored."""

    meta: Meta
    spec: ImageSpec


def check_image(image: Image) -> Iterator[Violation]:
    """Violations of the rules of meaning."""
    spec = image.spec
    yield from check_meta("Image", image.meta)
    yield from _check_file("spec", spec.file)
    if spec.type == "oci-archive":
        if spec.format != "raw":
            yield Violation("spec.format", spec.format, "does not go with type oci-archive", "write raw")
        if spec.kernel or spec.initrd or spec.cmdline:
            yield Violation("spec.kernel", "", "does not go with type oci-archive", "remove kernel, initrd and cmdline")
    if spec.kernel:
        yield from _check_file("spec.kernel", spec.kernel)
    if spec.initrd:
        yield from _check_file("spec.initrd", spec.initrd)
    for name, given in (("initrd", spec.initrd is not None), ("cmdline", bool(spec.cmdline))):
        if given and not spec.kernel:
            yield Violation(f"spec.{name}", "", "is for a direct boot and there is no kernel", "set spec.kernel too")
    if len(spec.cmdline) > 2000 or not spec.cmdline.isprintable():
        yield Violation(
            "spec.cmdline", shown(spec.cmdline), "is not one printable line of at most 2000 characters", "shorten it"
        )


def _check_file(path: str, file: File) -> Iterator[Violation]:
    scheme, separator, rest = file.source.partition("://")
    if not separator or scheme not in ("file", "http", "https") or not rest:
        yield Violation(
            f"{path}.source", shown(file.source), "is not a file, http or https URL", "write file:///… or https://…"
        )
    elif scheme == "file" and (not rest.startswith("/") or "/../" in f"{rest}/"):
        yield Violation(
            f"{path}.source",
            shown(file.source),
            "is not an absolute path without '..'",
            "write file:///path/of/the/image",
        )
    elif len(file.source) > 2048 or not file.source.isprintable() or " " in file.source:
        yield Violation(
            f"{path}.source", shown(file.source), "is not a plain URL", "escape blanks and control characters"
        )
    if not DIGEST.match(file.digest):
        yield Violation(
            f"{path}.digest",
            shown(file.digest),
            "is not a SHA-256 digest",
            "write sha256: and 64 hexadecimal digits, as sha256sum prints them",
        )


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """How a network is reached. ``gateway`` is the first address of the subnet where none is given."""

    type: str
    subnet: str
    gateway: str = ""
    dns: tuple[str, ...] = ()
    mtu: int = 1500


@dataclass(frozen=True, slots=True)
class Network:
    """A network as it is stored."""

    meta: Meta
    spec: NetworkSpec

    @property
    def gateway(self) -> str:
        """Address of the hosts' bridges in this network."""
        return self.spec.gateway or first_address(self.spec.subnet)


@lru_cache(maxsize=256)
def first_address(subnet: str) -> str:
    """The first address of an IPv4 subnet; asked for each instance that is told to a host, so it is kept."""
    return str(ipaddress.IPv4Network(subnet)[1])


def check_network(network: Network) -> Iterator[Violation]:
    """Violations of the rules of meaning."""
    spec = network.spec
    yield from check_meta("Network", network.meta)
    if spec.type not in ("nat", "physical"):
        yield Violation("spec.type", shown(spec.type), "is not served by this release", "write nat or physical")
    try:
        subnet = ipaddress.IPv4Network(spec.subnet)
    except ValueError:
        yield Violation(
            "spec.subnet", shown(spec.subnet), "is not an IPv4 network", "write it as 10.99.0.0/16, host bits zero"
        )
        return
    if not 8 <= subnet.prefixlen <= 29:
        yield Violation("spec.subnet", spec.subnet, "has an unfit prefix length", "write /8 to /29")
    if spec.gateway:
        try:
            inside = ipaddress.IPv4Address(spec.gateway) in subnet
        except ValueError:
            inside = False
        if not inside:
            yield Violation(
                "spec.gateway", shown(spec.gateway), f"is not an address of {spec.subnet}", f"write {subnet[1]}"
            )
    for i, server in enumerate(spec.dns):
        try:
            ipaddress.ip_address(server)
        except ValueError:
            yield Violation(
                f"spec.dns[{i}]", shown(server), "is not an IP address", "write an address such as 10.99.0.1"
            )
    if not 576 <= spec.mtu <= 65521:
        yield Violation("spec.mtu", str(spec.mtu), "is out of range", "write 576 to 65521")


@dataclass(frozen=True, slots=True)
class Taint:
    """Keeps instances away that do not tolerate it."""

    key: str
    value: str = ""
    effect: str = "NoSchedule"


@dataclass(frozen=True, slots=True)
class HostSpec:
    """What operators say of a host."""

    cordoned: bool = False
    taints: tuple[Taint, ...] = ()


@dataclass(frozen=True, slots=True)
class Host:
    """A host as it is stored."""

    meta: Meta
    spec: HostSpec


def check_host(host: Host) -> Iterator[Violation]:
    """Violations of the rules of meaning."""
    yield from check_meta("Host", host.meta)
    yield from check_labels("spec.taints", {t.key: t.value for t in host.spec.taints})


@dataclass(frozen=True, slots=True)
class Preference:
    """A CEL expression over ``host`` and the weight that it adds where it is true."""

    when: str
    weight: int


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """The placement part of a policy. Overcommit 0.0: not set by this policy."""

    match_labels: Mapping[str, str] = field(default_factory=dict)
    match: str = ""
    precedence: int = 0
    require: tuple[str, ...] = ()
    prefer: tuple[Preference, ...] = ()
    strategy: str = ""
    spread_by: str = ""
    cpu_overcommit: float = 0.0
    memory_overcommit: float = 0.0
    reserve: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy as it is stored."""

    meta: Meta
    spec: PolicySpec


def check_policy(policy: Policy) -> Iterator[Violation]:
    """Violations of the rules of meaning; that the expressions compile is checked where CEL is known."""
    spec = policy.spec
    yield from check_meta("Policy", policy.meta)
    yield from check_labels("spec.matchLabels", spec.match_labels)
    expressions = [("spec.match", spec.match), ("spec.reserve", spec.reserve)]
    expressions += [(f"spec.require[{i}]", e) for i, e in enumerate(spec.require)]
    expressions += [(f"spec.prefer[{i}].when", p.when) for i, p in enumerate(spec.prefer)]
    for path, text in expressions:
        if len(text) > MAX_CEL_CHARS:
            yield Violation(
                path, f"{len(text)} characters", "is too long", f"keep it within {MAX_CEL_CHARS} characters"
            )
    for path, ratio, high in (
        ("spec.cpuOvercommit", spec.cpu_overcommit, 64.0),
        ("spec.memoryOvercommit", spec.memory_overcommit, 4.0),
    ):
        if ratio and not 1.0 <= ratio <= high:
            yield Violation(path, str(ratio), "is out of range", f"write 1.0 to {high}")
    for i, preference in enumerate(spec.prefer):
        if not -1000 <= preference.weight <= 1000:
            yield Violation(
                f"spec.prefer[{i}].weight", str(preference.weight), "is out of range", "write -1000 to 1000"
            )
