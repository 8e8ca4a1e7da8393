"""Instances for the tests of drivers, and files that real QEMU starts from."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

from casemate_core.claims import Claim, Pages, PlainMemory, SharedCpu
from casemate_core.cpuset import CpuSet
from casemate_core.spec.instance import DesiredInstance, File, HostNetwork, ImageRef, Nic, Placement, Run

UID = "5f0c1a3e-9d42-4b61-8a77-0c2d4e6f8a90"
NETWORK = HostNetwork("default", "nat", "10.219.7.0/24", "10.219.7.1")


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def some_digest(number: int) -> str:
    return f"sha256:{number:064x}"


def nic(number: int = 2, network: str = "default") -> Nic:
    return Nic(network, f"52:54:00:00:00:{number:02x}", f"10.219.7.{number}", 24, "10.219.7.1", ("10.219.7.1",))


def shared_claim(uid: str, cpus: int = 1, memory_mib: int = 256) -> Claim:
    return Claim(
        owner=uid,
        epoch=3,
        generation=7,
        vcpus_online=cpus,
        vcpus_max=cpus,
        shared=(SharedCpu(0, 500 * cpus),),
        memory=(PlainMemory(0, memory_mib, 0, memory_mib),),
        disk_mib=1024,
    )


def dedicated_claim(uid: str) -> Claim:
    return Claim(
        owner=uid,
        epoch=3,
        generation=7,
        vcpus=(4, 20, 5, 21),
        vcpus_online=2,
        vcpus_max=4,
        emulator=CpuSet.parse("0,16"),
        pages=(Pages(0, 1048576, 4),),
        disk_mib=4096,
        exclusive_cores=True,
        one_cell=True,
    )


def image(**changes: Any) -> ImageRef:
    fields: dict[str, Any] = {
        "name": "debian-13",
        "type": "disk",
        "file": File("https://images.example/debian-13.qcow2", some_digest(1)),
        "format": "qcow2",
        "kernel": File("https://images.example/vmlinux", some_digest(2)),
        "initrd": File("https://images.example/initrd", some_digest(3)),
        "cmdline": "root=/dev/vda console=ttyS0",
    }
    return ImageRef(**(fields | changes))


def instance(uid: str = UID, **changes: Any) -> DesiredInstance:
    fields: dict[str, Any] = {
        "uid": uid,
        "tenant": "default",
        "environment": "hello",
        "name": "web",
        "ordinal": 0,
        "generation": 5,
        "run": Run.STARTED,
        "cpus": 1,
        "memory_mib": 256,
        "disk_mib": 1024,
        "image": image(),
        "placement": Placement(shared_claim(uid), 3, 7),
    }
    return DesiredInstance(**(fields | changes))


def empty_disk(path: Path, virtual_mib: int = 8) -> ImageRef:
    """A qcow2 image with nothing in it, and the reference to it: QEMU runs, its firmware finds nothing to boot."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), f"{virtual_mib}M"], check=True)
    return ImageRef("empty", "disk", File(f"file://{path}", digest_of(path.read_bytes())), "qcow2")
