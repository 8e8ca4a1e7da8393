"""The PCI tree, from the links of /sys/bus/pci/devices.

What may live here: places of functions, and the join of facts by address.

Theory of operation. ``/sys/bus/pci/devices/<address>`` is a link whose target spells out the way from the root complex:
``devices/pci0000:17/0000:17:01.0/0000:18:00.0/0000:19:04.0/0000:1a:00.0``. After the root come a root port, then for each
switch its upstream and a downstream port, then the function. So the bridges at odd positions (the 2nd, 4th, ...) are the
upstream ports, which stand for the switches.
"""

import re
from collections.abc import Mapping

from casemate_core.topology.model import Device, Gpu, PciPlace, PhysicalFunction, VirtualFunction
from casemate_core.topology_loaders.facts import BadRecording, HostFacts

DEVICES = "sys/bus/pci/devices"
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_ROOT = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")


def _cell(files: Mapping[str, str], path: str) -> int:
    """The NUMA node that firmware told of a function; -1 where it told none."""
    text = files.get(path, "-1").strip()
    if not re.fullmatch(r"-1|[0-9]{1,6}", text, re.ASCII):
        raise BadRecording(path, f"is no NUMA node: {text[:20]!r}")
    return int(text)


def place_of(files: Mapping[str, str], address: str) -> PciPlace:
    """Where a function hangs. Raises BadRecording where sysfs does not have it."""
    path = f"{DEVICES}/{address}"
    if path not in files:
        raise BadRecording(path, "no such PCI function")
    steps = files[path].strip().split("/")
    root = next((i for i, step in enumerate(steps) if _ROOT.fullmatch(step)), None)
    if root is None or steps[-1] != address or not all(_ADDRESS.fullmatch(step) for step in steps[root + 1 :]):
        raise BadRecording(path, f"is no link to a PCI function: {files[path].strip()!r}")
    bridges = steps[root + 1 : -1]
    group = files.get(f"{path}/iommu_group", "").strip().rpartition("/")[2]
    return PciPlace(
        path=(steps[root], *bridges[1::2]),
        cell=_cell(files, f"{path}/numa_node"),
        iommu_group=int(group) if group.isdecimal() and len(group) < 10 else -1,
        address=address,
    )


def gpus_of(files: Mapping[str, str], facts: HostFacts) -> tuple[Gpu, ...]:
    """The GPUs, by UUID."""
    found = [
        Gpu(
            g.uuid,
            g.model,
            g.memory_mib,
            place_of(files, g.address),
            g.module_id,
            g.peers,
            g.share_slots,
            g.share_profiles,
            g.share_step_milli,
            g.share_alike,
            g.labels,
        )
        for g in facts.gpus
    ]
    return tuple(sorted(found, key=lambda g: g.uuid))


def ports_of(files: Mapping[str, str], facts: HostFacts) -> tuple[PhysicalFunction, ...]:
    """The PFs with their VFs, by MAC."""
    found = [
        PhysicalFunction(
            mac=p.mac.lower(),
            networks=tuple(sorted(p.networks)),
            vfs=_vfs_of(files, p.address),
            capabilities=tuple(sorted(p.capabilities)),
            place=place_of(files, p.address),
            link_mbps=p.link_mbps,
        )
        for p in facts.ports
    ]
    return tuple(sorted(found, key=lambda p: p.mac))


def devices_of(files: Mapping[str, str], facts: HostFacts) -> tuple[Device, ...]:
    """The other functions, by identity."""
    found = [Device(d.id, tuple(sorted(d.labels)), place_of(files, d.address)) for d in facts.devices]
    return tuple(sorted(found, key=lambda d: d.id))


def _vfs_of(files: Mapping[str, str], address: str) -> tuple[VirtualFunction, ...]:
    """``virtfn<n>`` are links to the VFs that exist now."""
    prefix = f"{DEVICES}/{address}/virtfn"
    found = []
    for path, target in files.items():
        if path.startswith(prefix):
            index = path[len(prefix) :]
            if not index.isdecimal():
                raise BadRecording(path, "is no VF")
            vf = target.strip().rpartition("/")[2]
            found.append(VirtualFunction(int(index), place_of(files, vf).iommu_group, vf))
    return tuple(sorted(found, key=lambda v: v.index))
