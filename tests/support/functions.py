"""A host with ports and devices, and instances that are given functions of it."""

from typing import Any

from casemate_core.claims import Claim, PlainMemory, SharedCpu, VfClaim
from casemate_core.spec.instance import DesiredInstance, Nic, Placement
from casemate_core.topology_loaders import from_line
from support.agents import instance, uid

HOST = from_line("1s 8k/c 2t 64G disk=1T vf=2x2@fronthaul dev=2xfec name=box")
PORTS = tuple(pf.mac for pf in HOST.pfs)
DEVICES = tuple(device.id for device in HOST.devices)


def with_functions(
    number: int, *vfs: tuple[int, int], devices: tuple[str, ...] = (), generation: int = 1, **nic: Any
) -> DesiredInstance:
    """An instance with a bridged interface, VFs (port, index), and devices."""
    name = uid(number)
    nics = [Nic("default", f"52:54:00:00:00:{number:02x}", f"10.1.0.{number + 10}", 24, "10.1.0.1")]
    nics += [
        Nic(
            "fronthaul",
            f"52:54:00:0f:{i:02x}:{number:02x}",
            f"10.71.0.{number}",
            24,
            "10.71.0.1",
            type="sriov",
            **({"vlan": 100} | nic),
        )
        for i in range(len(vfs))
    ]
    claim = Claim(
        owner=name,
        epoch=1,
        generation=generation,
        vcpus_online=1,
        vcpus_max=1,
        shared=(SharedCpu(0, 1000),),
        memory=(PlainMemory(0, 1024, 0, 1024),),
        disk_mib=4096,
        vfs=tuple(VfClaim(PORTS[port], index, i) for i, (port, index) in enumerate(vfs)),
        devices=devices,
    )
    return instance(number, claim=claim, nics=tuple(nics), placement=Placement(claim, 1, generation))
