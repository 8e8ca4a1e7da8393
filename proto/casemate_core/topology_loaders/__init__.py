"""Ways to a topology: text in, value out, no opening of files.

``line``: one line of text. ``sysfs``: the files of the kernel, given as text. ``libvirt``: the capabilities XML, with files of
the kernel for the rest. ``facts``: what the drivers add (GPUs, ports, other devices, what the host keeps for itself).
"""

from casemate_core.topology_loaders.facts import BadRecording, DeviceFacts, GpuFacts, HostFacts, PortFacts
from casemate_core.topology_loaders.libvirt import from_capabilities
from casemate_core.topology_loaders.line import BadLine, from_line
from casemate_core.topology_loaders.sysfs import from_sysfs

__all__ = [
    "BadLine",
    "BadRecording",
    "DeviceFacts",
    "GpuFacts",
    "HostFacts",
    "PortFacts",
    "from_capabilities",
    "from_line",
    "from_sysfs",
]
