"""Spec and claim to libvirt's domain XML, and back. PURE.

For: the libvirt driver. What may live here: values to elements (``build``) and elements to values (``facts``), one file
for each concern: ``cpu``, ``memory``, ``devices``, ``metadata``; ``names`` gives every name that an instance has on its
host. No libvirt, no files, no clock.

Theory of operation. The XML is a tree of elements from beginning to end; no piece of it is ever text that is pasted
together, so that no string of a tenant's can become an element. What depends on the host and not on the instance (the
emulator, its machine type, folders) comes as one value, ``HostShape``. A domain is made from
the instance's exact claim: the claim is not interpreted a second time here, only written down.

The machine is bare: q35, virtio devices, and nothing that a guest of ours does not use: no USB, graphics, sound, floppy,
optical drive or tablet.
"""

from casemate_agent.domain.build import domain_element, domain_xml
from casemate_agent.domain.facts import parse_domain
from casemate_agent.domain.shape import HostShape

__all__ = ["HostShape", "domain_element", "domain_xml", "parse_domain"]
