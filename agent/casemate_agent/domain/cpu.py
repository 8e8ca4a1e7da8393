"""vCPUs: how many, what they look like, and where they run. PURE."""

from xml.etree.ElementTree import Element

from casemate_agent.domain.elements import add
from casemate_agent.domain.memory import binds_memory
from casemate_agent.domain.shape import HostShape
from casemate_agent.hardware.pciplace import DEFAULT_ADDRESS_BITS, address_bits
from casemate_core.cpuset import CpuSet
from casemate_core.errors import InternalError
from casemate_core.spec.instance import DesiredInstance

#: Threads that serve the disks of a guest with dedicated vCPUs.
IO_THREADS = 1
#: Of the real-time vCPUs' threads: above all ordinary work, and below the kernel's own threads at 50 (interrupts) and 99.
REALTIME_PRIORITY = 1


def vcpu_counts(desired: DesiredInstance) -> tuple[int, int]:
    """(vCPUs online at boot, vCPUs at most). The claim has growth room; without any the maximum is what runs."""
    claim = desired.placement.claim
    return desired.cpus, max(desired.cpus, claim.vcpus_max)


def add_vcpus(domain: Element, desired: DesiredInstance, rest: CpuSet) -> None:
    """``<vcpu>``, ``<iothreads>`` and ``<cputune>``: exact pins for dedicated vCPUs, ``rest`` for everything else.

    ``rest`` is where those threads run that have none of their own: all of a guest that floats, and of one that does not its
    emulator and its I/O. The pin of the emulator is written always: it is also where libvirt lets QEMU begin, before it moves
    the vCPUs to their own threads; without it QEMU begins on all threads of the host, those of others too.
    """
    online, most = vcpu_counts(desired)
    claim = desired.placement.claim
    attributes: dict[str, str | int] = {"placement": "static"}
    if rest and not claim.vcpus:
        attributes["cpuset"] = str(rest)
    if online != most:
        attributes["current"] = online
    add(domain, "vcpu", attributes, str(most))
    if claim.vcpus:
        # The disk is served beside the emulator's main loop, whose pauses a dedicated vCPU would wait for.
        add(domain, "iothreads", text=str(IO_THREADS))
    if not claim.vcpus and not rest:
        return
    if claim.vcpus and len(claim.vcpus) < most:
        raise InternalError(f"{desired.uid}: claim pins {len(claim.vcpus)} of {most} vCPUs")
    tune = add(domain, "cputune")
    for vcpu, thread in enumerate(claim.vcpus[:most]):
        add(tune, "vcpupin", {"vcpu": vcpu, "cpuset": thread})
    if rest:
        add(tune, "emulatorpin", {"cpuset": str(rest)})
        for number in range(1, IO_THREADS + 1) if claim.vcpus else ():
            add(tune, "iothreadpin", {"iothread": number, "cpuset": str(rest)})
    if claim.realtime:
        # The first vCPU is the guest's own housekeeping: under SCHED_FIFO a spinning pod would starve it.
        for vcpu in range(1, most):
            add(tune, "vcpusched", {"vcpus": vcpu, "scheduler": "fifo", "priority": REALTIME_PRIORITY})


def add_cpu_model(domain: Element, desired: DesiredInstance, shape: HostShape, hole: int = 0) -> None:
    """``<cpu>``: what the guest sees.

    Under KVM dedicated vCPUs are the host's own (every feature, no trap for a missing one); shared ones are libvirt's
    named model of the host, which it can compare with another host's. Under TCG ``maximum`` is what QEMU can emulate.
    All vCPUs are cores of one socket: a guest that was told of hyper-threads that float would schedule on a lie. Memory
    that is bound to cells of the host is one cell of the guest's (:mod:`casemate_agent.domain.memory`). ``hole``: bytes
    of the window for the memory of devices; a guest that could not address it beside its own memory gets the host's addresses.
    """
    _, most = vcpu_counts(desired)
    if shape.kind != "kvm":
        cpu = add(domain, "cpu", {"mode": "maximum", "check": "none"})
    elif desired.placement.claim.vcpus:
        cpu = add(domain, "cpu", {"mode": "host-passthrough", "check": "none", "migratable": "on"})
    else:
        cpu = add(domain, "cpu", {"mode": "host-model", "check": "partial"})
    add(cpu, "topology", {"sockets": 1, "dies": 1, "cores": most, "threads": 1})
    if desired.placement.claim.realtime and shape.kind == "kvm":
        # A timer of the guest is one write, and no exit for each tick of an emulated APIC.
        add(cpu, "feature", {"policy": "require", "name": "tsc-deadline"})
    bits = address_bits(max(desired.memory_mib, desired.placement.claim.memory_max_mib), hole)
    if bits > DEFAULT_ADDRESS_BITS:
        emulated: dict[str, str | int] = {"mode": "emulate", "bits": bits}
        add(cpu, "maxphysaddr", {"mode": "passthrough"} if shape.kind == "kvm" else emulated)
    if binds_memory(desired, shape):
        numa = add(cpu, "numa")
        cpus = f"0-{most - 1}" if most > 1 else "0"
        add(numa, "cell", {"id": 0, "cpus": cpus, "memory": desired.memory_mib, "unit": "MiB"})
