"""What a topology needs to know beside files of the kernel.

What may live here: records that the drivers fill (NVML, netlink, configuration) and the loaders join with the PCI tree by
address. The address is true at the time of the reading, which is the only time it is used.
"""

from dataclasses import dataclass

from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.errors import MachineError
from casemate_core.topology.model import FabricPartition, ShareProfile


class BadRecording(MachineError):
    """Files that do not read as the kernel or libvirt write them. ``path`` is the file, or the place in the XML."""

    reason = "BadRecording"

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}")


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """A GPU as its library describes it."""

    address: str
    uuid: str
    model: str
    memory_mib: int
    module_id: int = -1
    peers: tuple[str, ...] = ()
    share_slots: int = 0
    share_profiles: tuple[ShareProfile, ...] = ()
    share_step_milli: int = 0
    share_alike: bool = False
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class PortFacts:
    """A NIC port as netlink and the configuration describe it. VFs are read from sysfs."""

    address: str
    mac: str
    networks: tuple[str, ...]
    capabilities: tuple[str, ...] = ()
    link_mbps: int = 0


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """Another function that may be given away."""

    address: str
    id: str
    labels: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class HostFacts:
    """All of them, and what the host keeps for itself."""

    gpus: tuple[GpuFacts, ...] = ()
    partitions: tuple[FabricPartition, ...] = ()
    ports: tuple[PortFacts, ...] = ()
    devices: tuple[DeviceFacts, ...] = ()
    reserved: CpuSet = EMPTY
    reserved_mib: int = 0
    """Of the whole host; taken from the cells in proportion to their memory."""
    disk_mib: int = 0
    name: str = ""
