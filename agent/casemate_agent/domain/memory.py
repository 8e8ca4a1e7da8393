"""Memory: how much, from which cells, in pages of which size. PURE."""

from xml.etree.ElementTree import Element

from casemate_agent.domain.elements import add
from casemate_agent.domain.limits import MemoryLimits
from casemate_agent.domain.shape import HostShape
from casemate_core.errors import InternalError
from casemate_core.spec.instance import DesiredInstance


def add_memory(domain: Element, desired: DesiredInstance) -> None:
    """``<memory>``: what the guest has, in MiB. Secrets are in it: no core dump of QEMU has it, whatever the host sets."""
    add(domain, "memory", {"unit": "MiB", "dumpCore": "off"}, str(desired.memory_mib))


def binds_memory(desired: DesiredInstance, shape: HostShape) -> bool:
    """Whether its memory is bound to cells: where there is more than one, it could be elsewhere."""
    return shape.numa and bool(desired.placement.claim.cells)


def add_memory_backing(domain: Element, desired: DesiredInstance, shape: HostShape, limits: MemoryLimits) -> None:
    """``<memtune>``, ``<memoryBacking>`` and ``<numatune>``.

    Pages are never merged with those of another guest (KSM): merging tells one tenant what another has in memory.
    The cells are those of the claim, strictly: memory elsewhere is what somebody else was promised. They are bound by QEMU, for
    the guest's memory as one cell of the guest's, and not by the element that binds a whole process: with that one libvirt
    lets QEMU begin on every thread of these cells, dedicated ones of others among them.
    """
    claim = desired.placement.claim
    sizes = {pages.page_kib for pages in claim.pages}
    if len(sizes) > 1:
        raise InternalError(f"{desired.uid}: claim mixes pages of {sorted(sizes)} KiB")
    # Of what is locked as a whole libvirt lifts the limit. One would be no protection: mlockall(2) counts all that QEMU has
    # mapped, threads' arenas and the translator's code among it, and fails where that is more, however little is used.
    if limits.lock_mib and not claim.realtime:
        add(add(domain, "memtune"), "hard_limit", {"unit": "MiB"}, str(limits.lock_mib))
    backing = add(domain, "memoryBacking")
    if sizes:
        add(add(backing, "hugepages"), "page", {"size": sizes.pop(), "unit": "KiB"})
    add(backing, "nosharepages")
    if claim.realtime:
        add(backing, "locked")
    if binds_memory(desired, shape):
        nodes = ",".join(map(str, claim.cells))
        add(add(domain, "numatune"), "memnode", {"cellid": 0, "mode": "strict", "nodeset": nodes})


def add_balloon(devices: Element, desired: DesiredInstance) -> None:
    """A balloon for guests in ordinary pages alone, and only to hand free pages back.

    With free page reporting a guest that freed memory gives it back to the host while it runs, which is what makes
    overcommitted plain memory work. Where pages are set aside for the guest (huge pages) nothing can be given back, and a
    guest with dedicated processors is not interrupted for it: these have no balloon.
    """
    claim = desired.placement.claim
    if claim.pages or claim.vcpus:
        add(devices, "memballoon", {"model": "none"})
    else:
        add(devices, "memballoon", {"model": "virtio", "freePageReporting": "on"})
