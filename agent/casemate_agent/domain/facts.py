"""What libvirt says of a domain, as facts. PURE.

Reads the XML of any domain of the host, also of those that we did not make and that have devices we know nothing of.
"""

from xml.etree.ElementTree import Element, ParseError, fromstring

from casemate_agent.domain.devices import HELPER_PORT
from casemate_agent.domain.metadata import Ownership, parse_metadata
from casemate_agent.drivers.ports import DomainFacts, DomainPhase
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.errors import InternalError

#: Factors of libvirt's units of memory (formatdomain, "Memory Allocation"); KiB is its default.
_BYTES = {
    "b": 1,
    "bytes": 1,
    "KB": 10**3,
    "k": 2**10,
    "KiB": 2**10,
    "MB": 10**6,
    "M": 2**20,
    "MiB": 2**20,
    "GB": 10**9,
    "G": 2**30,
    "GiB": 2**30,
    "TB": 10**12,
    "T": 2**40,
    "TiB": 2**40,
}


def parse_domain(xml: str, phase: DomainPhase, pid: int = 0) -> tuple[DomainFacts, Ownership | None]:
    """Facts of the domain that ``xml`` describes. Raises InternalError for what is no domain XML."""
    try:
        return _parsed(fromstring(xml), phase, pid)
    except (ParseError, ValueError) as error:
        raise InternalError(f"libvirt's XML does not parse: {error}") from error


def _parsed(domain: Element, phase: DomainPhase, pid: int) -> tuple[DomainFacts, Ownership | None]:
    """Raises ValueError for what is no number where one belongs."""
    uuid = domain.findtext("uuid", "")
    owner = parse_metadata(domain, uuid)
    vcpu = domain.find("vcpu")
    most = int(vcpu.text or "1") if vcpu is not None else 1
    facts = DomainFacts(
        uuid=uuid,
        name=domain.findtext("name", ""),
        phase=phase,
        owned=owner is not None,
        instance_uid=owner.uid if owner else "",
        generation=owner.generation if owner else 0,
        placement_epoch=owner.placement_epoch if owner else 0,
        placement_generation=owner.placement_generation if owner else 0,
        pid=pid,
        vcpus=int(vcpu.get("current", most)) if vcpu is not None else 1,
        memory_mib=_memory_mib(domain),
        taps=tuple(sorted(t.get("dev", "") for t in domain.iterfind("devices/interface/target") if t.get("dev"))),
        files=_files(domain),
        channel_path=_channel_path(domain),
        vcpu_pins=_vcpu_pins(domain, most),
        emulator_pin=_emulator_pin(domain),
        record=owner.record if owner else "",
    )
    return facts, owner


def machine_type(xml: str) -> str:
    """The machine type that a domain was made with."""
    element = fromstring(xml).find("os/type")
    return "" if element is None else element.get("machine", "")


def serial_path(xml: str) -> str:
    """The terminal of a running domain's first serial port; empty where it has none."""
    source = fromstring(xml).find("devices/serial[@type='pty']/source")
    return "" if source is None else source.get("path", "")


def _memory_mib(domain: Element) -> int:
    memory = domain.find("memory")
    if memory is None or not memory.text:
        return 0
    # Rounded up: what a foreign domain takes of the host is never told smaller than it is.
    return -(-int(memory.text) * _BYTES.get(memory.get("unit", "KiB"), 2**10) // 2**20)


def _files(domain: Element) -> tuple[str, ...]:
    found = [path for tag in ("kernel", "initrd") if (path := domain.findtext(f"os/{tag}"))]
    for disk in domain.iterfind("devices/disk"):
        found += [path for source in disk.iter("source") if (path := source.get("file") or source.get("dev"))]
    return tuple(dict.fromkeys(found))


def _channel_path(domain: Element) -> str:
    for channel in domain.iterfind("devices/channel"):
        target, source = channel.find("target"), channel.find("source")
        if target is not None and source is not None and target.get("name") == HELPER_PORT:
            return source.get("path", "")
    return ""


def _emulator_pin(domain: Element) -> CpuSet:
    pin = domain.find("cputune/emulatorpin")
    return CpuSet.parse(pin.get("cpuset", "")) if pin is not None else EMPTY


def _vcpu_pins(domain: Element, most: int) -> tuple[frozenset[int], ...]:
    pins: dict[int, frozenset[int]] = {}
    for pin in domain.iterfind("cputune/vcpupin"):
        pins[int(pin.get("vcpu", "-1"))] = frozenset(CpuSet.parse(pin.get("cpuset", "")))
    if not pins:
        return ()
    return tuple(pins.get(vcpu, frozenset()) for vcpu in range(most))
