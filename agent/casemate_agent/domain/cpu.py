"""vCPUs: how many, what they look like, and where they run. PURE."""

from xml.etree.ElementTree import Element

from casemate_agent.domain.elements import add
from casemate_agent.domain.shape import HostShape
from casemate_core.errors import InternalError
from casemate_core.spec.instance import DesiredInstance


def vcpu_counts(desired: DesiredInstance) -> tuple[int, int]:
    """(vCPUs online at boot, vCPUs at most). The claim has growth room; without any the maximum is what runs."""
    claim = desired.placement.claim
    return desired.cpus, max(desired.cpus, claim.vcpus_max)


def add_vcpus(domain: Element, desired: DesiredInstance, shape: HostShape) -> None:
    """``<vcpu>`` and ``<cputune>``: exact pins for dedicated vCPUs, the pool of shared threads for all others.

    The element ``cpuset`` of ``<vcpu>`` is the mask of whatever has no pin of its own: the emulator's threads too.
    """
    online, most = vcpu_counts(desired)
    claim = desired.placement.claim
    attributes: dict[str, str | int] = {"placement": "static"}
    if shape.shared_threads and not claim.vcpus:
        attributes["cpuset"] = str(shape.shared_threads)
    if online != most:
        attributes["current"] = online
    add(domain, "vcpu", attributes, str(most))
    emulator = claim.emulator or (shape.shared_threads if claim.vcpus else claim.emulator)
    if not claim.vcpus and not emulator:
        return
    if claim.vcpus and len(claim.vcpus) < most:
        raise InternalError(f"{desired.uid}: claim pins {len(claim.vcpus)} of {most} vCPUs")
    tune = add(domain, "cputune")
    for vcpu, thread in enumerate(claim.vcpus[:most]):
        add(tune, "vcpupin", {"vcpu": vcpu, "cpuset": thread})
    if emulator:
        add(tune, "emulatorpin", {"cpuset": str(emulator)})


def add_cpu_model(domain: Element, desired: DesiredInstance, shape: HostShape) -> None:
    """``<cpu>``: what the guest sees.

    Under KVM dedicated vCPUs are the host's own (every feature, no trap for a missing one); shared ones are libvirt's
    named model of the host, which it can compare with another host's. Under TCG ``maximum`` is what QEMU can emulate.
    All vCPUs are cores of one socket: a guest that was told of hyper-threads that float would schedule on a lie.
    """
    _, most = vcpu_counts(desired)
    if shape.kind != "kvm":
        cpu = add(domain, "cpu", {"mode": "maximum", "check": "none"})
    elif desired.placement.claim.vcpus:
        cpu = add(domain, "cpu", {"mode": "host-passthrough", "check": "none", "migratable": "on"})
    else:
        cpu = add(domain, "cpu", {"mode": "host-model", "check": "partial"})
    add(cpu, "topology", {"sockets": 1, "dies": 1, "cores": most, "threads": 1})
