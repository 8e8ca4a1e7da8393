"""Buses and windows of accelerators, as libvirt, QEMU and its firmware take them: eight expanders, each with a device of 256 GiB and
an ordinary one. Emulated devices stand where functions of the host would be passed through; the guest lists what it has.
"""

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

import libvirt
import pytest

from casemate_agent.domain import HostShape
from casemate_agent.domain.build import domain_element
from casemate_agent.drivers.ports import DomainFiles
from casemate_agent.hardware.pciplace import GIB, FunctionPlace, hole_bytes
from casemate_agent.sandbox import Sandbox
from casemate_core.claims import Claim, PlainMemory
from casemate_core.spec.instance import Placement
from support.hostlab.build import tiny_guest
from support.instances import instance

pytestmark = [pytest.mark.libvirt, pytest.mark.timeout(240)]
LARGE, SMALL = 256 * GIB, 64 << 10


def places(count: int, size: int) -> tuple[FunctionPlace, ...]:
    """A large function and a small one on each of so many root complexes of a host."""
    roots = [f"pci0000:{17 + n:02x}" for n in range(count)]
    found = [FunctionPlace(f"0000:{n + 1:02x}:00.0", root, 0, size) for n, root in enumerate(roots)]
    return tuple(found + [FunctionPlace(f"0000:{n + 1:02x}:10.0", root, 0, SMALL) for n, root in enumerate(roots)])


def prepared(folder: Path, given: tuple[FunctionPlace, ...]) -> Element:
    """The domain that the agent would make, with an emulated device at each bus where a function of the host would be."""
    uid = str(uuid.uuid4())
    tiny_guest(folder / "guest.elf")
    for name in ("root.img", "seed.img"):
        (folder / name).write_bytes(bytes(1 << 20))
    (folder / uid).mkdir()
    files = DomainFiles(
        str(folder / "root.img"),
        "raw",
        "",
        "raw",
        str(folder / "seed.img"),
        kernel=str(folder / "guest.elf"),
        places=given,
    )
    claim = Claim(uid, memory=(PlainMemory(0, 64, 0, 64),))
    desired = instance(uid, memory_mib=64, placement=Placement(claim, 1, 1))
    shape = HostShape("qemu", "q35", run_dir=str(folder), instances_dir=str(folder))
    domain = domain_element(desired, files, shape)
    devices = domain.find("devices")
    assert devices is not None
    ports = [c.get("index") or "" for c in devices.findall("controller[@model='pcie-root-port']")]
    for n, port in enumerate(ports):
        if n % 2:
            stand_in = SubElement(devices, "rng", {"model": "virtio"})
            SubElement(stand_in, "backend", {"model": "random"}).text = "/dev/urandom"
        else:
            stand_in = SubElement(devices, "shmem", {"name": f"casemate-{uid}-{n}"})
            SubElement(stand_in, "model", {"type": "ivshmem-plain"})
            SubElement(stand_in, "size", {"unit": "B"}).text = str(given[0].window_bytes)
        place = {"domain": "0", "bus": port, "slot": "0", "function": "0"}
        SubElement(stand_in, "address", {"type": "pci", **place})
    return domain


@contextmanager
def started(sandbox: Sandbox, domain: Element) -> Iterator[libvirt.virDomain]:
    connection = libvirt.open(sandbox.uri)
    try:
        made = connection.createXML(tostring(domain, encoding="unicode"), 0)
        try:
            yield made
        finally:
            made.destroy()
    finally:
        connection.close()
        for left in Path("/dev/shm").glob(f"casemate-{domain.findtext('uuid')}-*"):
            left.unlink()


def listed(folder: Path, domain: Element) -> list[str]:
    """What the guest wrote until it was ready."""
    log = folder / (domain.findtext("uuid") or "") / "console.log"
    give_up_s = time.monotonic() + 120
    while "GUEST-READY" not in (text := log.read_text() if log.exists() else ""):
        assert time.monotonic() < give_up_s, text
        time.sleep(0.2)
    return text.splitlines()


def test_eight_expanders_each_with_a_large_function_and_a_small_one_come_up(sandbox: Sandbox, tmp_path: Path) -> None:
    given = places(8, LARGE)
    domain = prepared(tmp_path, given)
    with started(sandbox, domain):
        lines = listed(tmp_path, domain)
    behind = {line.rpartition(" to ")[2]: line.split(" at ")[1][:2] for line in lines if " to " in line}
    large = [(line.split(" at ")[1][:2], line) for line in lines if line.startswith("PCI 1af4:1110 ")]
    small = [line.split(" at ")[1][:2] for line in lines if re.match(r"PCI 1af4:10(05|44) .* at [4-9a-f]", line)]
    expanders = [behind[bus] for bus, _ in large]
    assert len(set(expanders)) == 8 and expanders == [behind[bus] for bus in small], lines
    taken = []
    for _, line in large:
        (size, place) = re.findall(r" bar2 ([0-9a-f]{16})@([0-9a-f]{16})", line)[0]
        assert int(size, 16) == LARGE and int(place, 16) % LARGE == 0 and int(place, 16) >= 4 * GIB
        taken.append(int(place, 16))
    assert len(set(taken)) == 8 and max(taken) + LARGE - min(taken) <= hole_bytes(given)


def test_without_as_many_address_bits_qemu_refuses(sandbox: Sandbox, tmp_path: Path) -> None:
    """So it is for this that they are written."""
    domain = prepared(tmp_path, places(8, LARGE))
    cpu = domain.find("cpu")
    assert cpu is not None
    bits = cpu.find("maxphysaddr")
    assert bits is not None and bits.get("bits") == "43"
    cpu.remove(bits)
    with pytest.raises(libvirt.libvirtError, match="phys-bits too low"), started(sandbox, domain):
        pass
