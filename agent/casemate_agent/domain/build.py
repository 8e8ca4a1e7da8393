"""The whole domain, put together. PURE."""

from xml.etree.ElementTree import Element, indent, register_namespace, tostring

from casemate_agent.domain.cpu import add_cpu_model, add_vcpus
from casemate_agent.domain.devices import add_channels, add_console, add_disks, add_interfaces, add_small
from casemate_agent.domain.elements import add, plain_words
from casemate_agent.domain.functions import add_buses, add_functions, add_mediated
from casemate_agent.domain.limits import memory_limits
from casemate_agent.domain.memory import add_balloon, add_memory, add_memory_backing, binds_memory
from casemate_agent.domain.metadata import NAMESPACE, add_metadata
from casemate_agent.domain.names import check_uid, domain_name
from casemate_agent.domain.shape import HostShape
from casemate_agent.drivers.ports import DomainFiles
from casemate_agent.hardware.pciplace import hole_bytes
from casemate_core.spec.instance import DesiredInstance, bridged

register_namespace("casemate", NAMESPACE)


def domain_element(desired: DesiredInstance, files: DomainFiles, shape: HostShape) -> Element:
    """The domain of one instance. Raises InternalError where claim, files or names contradict each other."""
    domain = Element("domain", {"type": shape.kind})
    add(domain, "name", text=domain_name(desired.environment, desired.name, desired.ordinal, desired.uid))
    add(domain, "uuid", text=check_uid(desired.uid))
    title = f"{desired.tenant}/{desired.environment}: {desired.name}-{desired.ordinal}"
    add(domain, "title", text=plain_words(title, 120))
    add_metadata(domain, desired)
    add_memory(domain, desired)
    add_vcpus(domain, desired, files.rest or desired.placement.claim.emulator)
    claim = desired.placement.claim
    passed = len(files.functions) + len(files.mdevs)
    limits = memory_limits(max(desired.memory_mib, claim.memory_max_mib), passed, locked=claim.realtime)
    add_memory_backing(domain, desired, shape, limits)
    _add_boot(domain, files, shape)
    features = add(domain, "features")
    add(features, "acpi")
    add(features, "apic")
    add(features, "vmport", {"state": "off"})
    if claim.realtime:
        # Performance counters of the guest cost an interrupt that is not its own.
        add(features, "pmu", {"state": "off"})
    add_cpu_model(domain, desired, shape, hole_bytes(files.places))
    _add_clock(domain)
    add(domain, "on_poweroff", text="destroy")
    add(domain, "on_reboot", text="restart")
    add(domain, "on_crash", text="destroy")
    devices = add(domain, "devices")
    add(devices, "emulator", text=shape.emulator)
    buses = add_buses(devices, files.places, bound=binds_memory(desired, shape))
    add_disks(devices, files, shape, desired.volumes, iothread=bool(claim.vcpus))
    add_small(devices)
    add_interfaces(devices, bridged(desired.nics), desired.uid, shape)
    add_functions(devices, files.functions, buses)
    add_mediated(devices, files.mdevs)
    add_channels(devices, desired, shape)
    add_console(devices, desired, shape)
    add_balloon(devices, desired)
    return domain


def domain_xml(desired: DesiredInstance, files: DomainFiles, shape: HostShape) -> str:
    """``domain_element`` as text, indented. Text of a record is untouched by the indentation: it stands in leaves."""
    domain = domain_element(desired, files, shape)
    indent(domain)
    return tostring(domain, encoding="unicode") + "\n"


def _add_boot(domain: Element, files: DomainFiles, shape: HostShape) -> None:
    """``<os>``: the image's kernel where it brings one (no firmware menu, no boot loader), else its root disk."""
    os = add(domain, "os")
    add(os, "type", {"arch": "x86_64", "machine": shape.machine}, "hvm")
    if files.kernel:
        add(os, "kernel", text=files.kernel)
        if files.initrd:
            add(os, "initrd", text=files.initrd)
        add(os, "cmdline", text=files.cmdline)


def _add_clock(domain: Element) -> None:
    """UTC; lost ticks of the clock chip are made up for, and the timers that only cost interrupts are absent."""
    clock = add(domain, "clock", {"offset": "utc"})
    add(clock, "timer", {"name": "rtc", "tickpolicy": "catchup"})
    add(clock, "timer", {"name": "pit", "tickpolicy": "delay"})
    add(clock, "timer", {"name": "hpet", "present": "no"})
