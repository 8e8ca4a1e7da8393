"""What one host is made of: cells, cores, threads, memory, and the PCI tree with GPUs, NICs and other devices.

``model`` has the records, ``rules`` the invariants that a true picture keeps, ``index`` the derived masks that make
``fit`` fast. Loaders are in :mod:`casemate_core.topology_loaders`.
"""

from casemate_core.topology.functions import FunctionIndex, GpuSet
from casemate_core.topology.index import CellIndex, CoreClass, L3Index, TopologyIndex
from casemate_core.topology.model import (
    BASE_PAGE_KIB,
    FORMAT_VERSION,
    Cell,
    Core,
    CoreKind,
    Device,
    FabricPartition,
    Gpu,
    PagePool,
    PciPlace,
    PhysicalFunction,
    ShareProfile,
    Topology,
    VirtualFunction,
)
from casemate_core.topology.rules import TopologyRule, TopologyViolation, check

__all__ = [
    "BASE_PAGE_KIB",
    "FORMAT_VERSION",
    "Cell",
    "CellIndex",
    "Core",
    "CoreClass",
    "CoreKind",
    "Device",
    "FabricPartition",
    "FunctionIndex",
    "Gpu",
    "GpuSet",
    "L3Index",
    "PagePool",
    "PciPlace",
    "PhysicalFunction",
    "ShareProfile",
    "Topology",
    "TopologyIndex",
    "TopologyRule",
    "TopologyViolation",
    "VirtualFunction",
    "check",
]
