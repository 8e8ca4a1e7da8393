"""Accelerators in a domain: buses as on the host, a window that holds their memory, locks; on HGX H200 and GB200."""

from collections.abc import Callable
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring, indent, tostring

import pytest
from lxml import etree

from casemate_agent.domain import HostShape, domain_xml
from casemate_agent.domain.functions import add_buses, add_functions
from casemate_agent.drivers.pciplaces import read_places
from casemate_agent.drivers.ports import DomainFiles
from casemate_agent.hardware.pciplace import (
    DEFAULT_HOLE,
    GIB,
    FunctionPlace,
    address_bits,
    bar_bytes,
    hole_bytes,
    mirrored,
    power_of_two,
)
from casemate_core.claims import Claim, HostClaims
from casemate_core.fit import (
    CellPolicy,
    CpuPolicy,
    CpuRequest,
    Fit,
    GpuLink,
    GpuRequest,
    MemoryRequest,
    Near,
    NicRequest,
    Request,
    fit,
)
from casemate_core.spec.instance import Placement
from casemate_core.topology import Topology
from support.hosts import host
from support.instances import UID, instance, nic

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
KVM = HostShape(kind="kvm", machine="pc-q35-10.0")
#: BAR 1 of an H200 covers its 141 GB, rounded up to a power of two; BAR 0 has registers and BAR 3 the rest.
H200 = power_of_two(141 * 10**9) + (16 << 20) + (32 << 20)
VF = 64 << 10


def asked(count: int, cpus: int, memory_gib: int, cells: CellPolicy, page_kib: int) -> Request:
    return Request(
        CpuRequest(cpus, policy=CpuPolicy.DEDICATED),
        MemoryRequest(memory_gib * 1024, page_kib=page_kib, cells=cells),
        gpus=(GpuRequest(count, link=GpuLink.NVLINK),),
        nics=tuple(NicRequest("compute", near=Near.SWITCH) for _ in range(count)),
    )


def placed(topology: Topology, request: Request) -> Claim:
    found = fit(topology, HostClaims.empty(), request, owner=UID, epoch=3, generation=7)
    assert isinstance(found, Fit), found
    return found.claim


def places_of(topology: Topology, claim: Claim, gpu_bytes: int) -> tuple[FunctionPlace, ...]:
    """As sysfs would tell them: virtual functions in the order of the interfaces, then GPUs."""
    ports = {pf.mac: pf for pf in topology.pfs}
    found = []
    for vf in sorted(claim.vfs, key=lambda v: v.nic):
        port = ports[vf.pf]
        address = next(v.address for v in port.vfs if v.index == vf.index)
        found.append(FunctionPlace(address, port.place.path[0], port.place.cell, VF))
    by_uuid = {gpu.uuid: gpu.place for gpu in topology.gpus}
    for uuid in claim.gpus:
        place = by_uuid[uuid]
        found.append(FunctionPlace(place.address, place.path[0], place.cell, gpu_bytes))
    return tuple(found)


def domain(topology: Topology, request: Request, gpu_bytes: int) -> str:
    claim = placed(topology, request)
    places = places_of(topology, claim, gpu_bytes)
    desired = instance(
        cpus=request.cpu.count,
        memory_mib=request.memory.size_mib,
        page_kib=request.memory.page_kib,
        cpu_policy="dedicated",
        nics=(nic(),),
        placement=Placement(claim, 3, 7),
    )
    folder = f"/var/lib/casemate/instances/{UID}"
    files = DomainFiles(
        root=f"{folder}/root.qcow2",
        root_format="qcow2",
        backing="",
        backing_format="qcow2",
        seed=f"{folder}/seed.iso",
        functions=tuple(place.address for place in places),
        places=places,
    )
    return domain_xml(desired, files, KVM)


def hgx() -> str:
    return domain(host("hgx-h200"), asked(8, 96, 1024, CellPolicy.PREFER, 1048576), H200)


def test_all_of_an_hgx_goes_to_one_guest(golden: Callable[[str, str], None]) -> None:
    xml = hgx()
    golden("attachment/hgx-h200.xml", xml)
    schema = etree.RelaxNG(etree.parse(str(SCHEMA)))
    assert schema.validate(etree.fromstring(xml)), schema.error_log


def test_buses_of_the_guest_are_those_of_the_host() -> None:
    tree = fromstring(hgx())
    expanders = tree.findall("devices/controller[@model='pcie-expander-bus']")
    ports = tree.findall("devices/controller[@model='pcie-root-port']")
    assert (len(expanders), len(ports)) == (8, 16), "a root complex each for a GPU and the NIC beside it"
    behind = {p.get("index"): p.find("address").get("bus") for p in ports}  # type: ignore[union-attr]
    where: dict[str, set[str]] = {}
    for hostdev in tree.iterfind("devices/hostdev"):
        source, at = hostdev.find("source/address"), hostdev.find("address")
        assert source is not None and at is not None
        bus = behind[str(int(at.get("bus", ""), 16))]
        where.setdefault(str(bus), set()).add(f"{source.get('domain')}:{source.get('bus')}")
    assert len(where) == 8 and all(len(hosts) == 1 for hosts in where.values()), where
    hole = tree.find("devices/controller[@model='pcie-root']/pcihole64")
    assert hole is not None and int(hole.text or "") << 10 >= 8 * H200
    assert tree.find("cpu/maxphysaddr[@mode='passthrough']") is not None
    limit = tree.find("memtune/hard_limit")
    assert limit is not None and int(limit.text or "") > 1024 * 1024


def test_two_gpus_of_a_gb200_share_no_bus_and_each_has_its_nic(golden: Callable[[str, str], None]) -> None:
    """Its processor is no x86: the buses alone are read and kept, which are the same on any machine with PCI Express."""
    topology = host("gb200")
    claim = placed(topology, asked(2, 8, 16, CellPolicy.PREFER, 0))
    places = places_of(topology, claim, 256 << 20)
    devices = Element("devices")
    buses = add_buses(devices, places, bound=True)
    add_functions(devices, tuple(p.address for p in places), buses)
    indent(devices)
    golden("attachment/gb200.xml", tostring(devices, encoding="unicode") + "\n")
    assert len(set(buses.values())) == len(places) == 4
    assert len(mirrored(places)) == 2
    assert devices.find("controller/pcihole64") is None, "its memory is coherent, its BARs are small"


def test_without_an_accelerator_libvirt_chooses() -> None:
    vf = FunctionPlace("0000:17:01.0", "pci0000:17", 0, VF)
    devices = Element("devices")
    assert add_buses(devices, (vf,), bound=False) == {} and len(devices) == 0
    unknown = (FunctionPlace("0000:18:00.0", "", -1, H200), vf)
    assert add_buses(devices, unknown, bound=False) == {}, "of one that is not known nothing is claimed"
    assert [c.get("model") for c in devices] == ["pcie-root"], "but its memory has room"


def test_the_window_is_computed_from_what_sysfs_says() -> None:
    """The file of an H100: registers, 128 GiB of memory, 32 MiB, then no I/O port, then the BARs of its virtual functions."""
    lines = [
        "0x000038e042000000 0x000038e042ffffff 0x000000000014220c",
        "0x0000000000000000 0x0000000000000000 0x0000000000000000",
        "0x000038c000000000 0x000038dfffffffff 0x000000000014220c",
        "0x0000000000000000 0x0000000000000000 0x0000000000000000",
        "0x000038e040000000 0x000038e041ffffff 0x000000000014220c",
        "0x0000000000000000 0x0000000000000000 0x0000000000000000",
        "0x00000000fe000000 0x00000000fe07ffff 0x0000000000046200",
        "0x000038b000000000 0x000038bfffffffff 0x000000000014220c",
    ]
    assert bar_bytes("\n".join(lines)) == 128 * GIB + (16 << 20) + (32 << 20)
    assert bar_bytes("nonsense\n\n0x1") == 0
    assert bar_bytes("0x00000000fe000000 0x00000000feffffff 0x0000000000040200") == 0, "a BAR of 32 bits lies elsewhere"


@pytest.mark.parametrize(
    ("sizes", "hole_gib"),
    [((), 0), ((VF,) * 16, 0), ((16 * GIB,), 0), ((32 * GIB,), 64), ((128 * GIB + 1,), 512), ((H200,) * 8, 8192)],
)
def test_the_window_holds_every_function_at_a_multiple_of_its_size(sizes: tuple[int, ...], hole_gib: int) -> None:
    places = [FunctionPlace(f"0000:{n:02x}:00.0", "pci0000:00", 0, size) for n, size in enumerate(sizes)]
    hole = hole_bytes(places)
    assert hole == hole_gib * GIB
    # laid out one after another, each where its size allows
    at = 0
    for size in sizes:
        step = power_of_two(size)
        at = -(-at // step) * step + step
    assert at <= (hole or DEFAULT_HOLE)


@pytest.mark.parametrize(
    ("memory_gib", "hole_gib", "bits"),
    # Those on both sides of each bound were tried on QEMU 7.2, with processors of both makers: one bit less is refused there.
    [
        (64, 0, 40),
        (975, 0, 40),
        (980, 0, 41),
        (256, 512, 40),
        (496, 512, 40),
        (500, 512, 41),
        (1024, 8192, 44),
        (1100, 0, 42),
    ],
)
def test_a_guest_that_reaches_further_is_told_so(memory_gib: int, hole_gib: int, bits: int) -> None:
    assert address_bits(memory_gib * 1024, hole_gib * GIB) == bits


def test_an_emulated_guest_is_given_as_many_address_bits_as_it_needs() -> None:
    tcg = HostShape(kind="qemu", machine="pc-q35-10.0")
    files = DomainFiles("/d/root", "raw", "", "raw", "/d/seed")
    small, large = (fromstring(domain_xml(instance(memory_mib=gib * 1024), files, tcg)) for gib in (1, 980))
    assert small.find("cpu/maxphysaddr") is None
    told = large.find("cpu/maxphysaddr")
    assert told is not None and (told.get("mode"), told.get("bits")) == ("emulate", "41")


def test_places_are_read_from_sysfs(tmp_path: Path) -> None:
    real = tmp_path / "devices/pci0000:17/0000:17:01.0/0000:18:00.0"
    real.mkdir(parents=True)
    (real / "numa_node").write_text("1\n")
    (real / "resource").write_text("0x000038c000000000 0x000038dfffffffff 0x000000000014220c\n")
    links = tmp_path / "bus/pci/devices"
    links.mkdir(parents=True)
    (links / "0000:18:00.0").symlink_to(real)
    found = read_places(("0000:18:00.0", "0000:99:00.0"), tmp_path)
    assert found == (FunctionPlace("0000:18:00.0", "pci0000:17", 1, 128 * GIB), FunctionPlace("0000:99:00.0"))


def test_a_slice_is_a_mediated_device_or_a_virtual_function(golden: Callable[[str, str], None]) -> None:
    claim = placed(host("hgx-h200"), Request(CpuRequest(4), MemoryRequest(8192)))
    folder = f"/var/lib/casemate/instances/{UID}"
    files = DomainFiles(
        root=f"{folder}/root.qcow2",
        root_format="qcow2",
        backing="",
        backing_format="qcow2",
        seed=f"{folder}/seed.iso",
        functions=("0000:41:00.4",),
        mdevs=("8f3c2d9e-4b1a-5c6d-9e0f-1a2b3c4d5e6f",),
    )
    desired = instance(cpus=4, memory_mib=8192, nics=(nic(),), placement=Placement(claim, 3, 7))
    xml = domain_xml(desired, files, KVM)
    golden("attachment/vgpu.xml", xml)
    schema = etree.RelaxNG(etree.parse(str(SCHEMA)))
    assert schema.validate(etree.fromstring(xml)), schema.error_log
