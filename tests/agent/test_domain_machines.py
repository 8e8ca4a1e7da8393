"""The domain of each class on each named machine: what the scheduler's arithmetic gives, as the XML that libvirt gets.

Golden files hold canonical XML without our metadata, which repeats the record; a class that a machine cannot carry has its reasons.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import canonicalize, fromstring, indent, tostring

import pytest
from lxml import etree

from casemate_agent.domain import HostShape, domain_xml, parse_domain
from casemate_agent.drivers.ports import DomainFiles, DomainPhase
from casemate_agent.plan.pool import Pool
from casemate_core.claims import Claim, HostClaims, verify_claim
from casemate_core.cpuset import CpuSet
from casemate_core.fit import (
    CellPolicy,
    CpuPolicy,
    CpuRequest,
    EmulatorPolicy,
    Fit,
    GpuRequest,
    MemoryRequest,
    NicRequest,
    Refusal,
    Request,
    ThreadPolicy,
    fit,
)
from casemate_core.spec.instance import Nic, Placement
from casemate_core.topology import Topology
from support.hosts import host, names
from support.instances import UID, instance, nic

GIB_KIB = 1024 * 1024
DEDICATED = CpuRequest(4, policy=CpuPolicy.DEDICATED, threads=ThreadPolicy.PREFER)
CLASSES: dict[str, Request] = {
    "shared": Request(CpuRequest(2), MemoryRequest(2048), 4096),
    "dedicated": Request(DEDICATED, MemoryRequest(4096, cells=CellPolicy.ONE), 4096),
    "isolated": Request(
        replace(DEDICATED, threads=ThreadPolicy.ISOLATE, emulator=EmulatorPolicy.ISOLATE), MemoryRequest(4096), 4096
    ),
    "realtime": Request(
        replace(DEDICATED, realtime=True), MemoryRequest(4096, page_kib=GIB_KIB, cells=CellPolicy.ONE), 4096
    ),
    "gpu": Request(DEDICATED, MemoryRequest(8192), 4096, gpus=(GpuRequest(2),)),
    "sriov": Request(DEDICATED, MemoryRequest(4096), 4096, nics=(NicRequest("fronthaul"),)),
}
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")


def network_of(topology: Topology) -> str:
    return next((network for pf in topology.pfs for network in pf.networks), "none")


def placed(machine: str, name: str) -> Claim | Refusal:
    topology, request = host(machine), CLASSES[name]
    if request.nics:
        request = replace(request, nics=(NicRequest(network_of(topology)),))
    found = fit(topology, HostClaims.empty(), request, owner=UID, epoch=3, generation=7)
    return found.claim if isinstance(found, Fit) else found


def addresses(topology: Topology, claim: Claim) -> tuple[str, ...]:
    """Where its functions are, as the agent finds them before each start; one without an address gets one by its rank."""
    vfs = {(pf.mac, vf.index): vf.address for pf in topology.pfs for vf in pf.vfs}
    gpus = {gpu.uuid: gpu.place.address for gpu in topology.gpus}
    found = [*(vfs[vf.pf, vf.index] for vf in claim.vfs), *(gpus[uuid] for uuid in claim.gpus)]
    return tuple(address or f"0000:{0x10 + rank:02x}:00.0" for rank, address in enumerate(found))


def xml_of(machine: str, name: str, claim: Claim) -> str:
    topology = host(machine)
    nics: tuple[Nic, ...] = (nic(),)
    pool = Pool(
        topology, dict.fromkeys(claim.owned, UID), claim.owned
    )  # its own threads are in use, as they are when it starts
    desired = instance(
        cpus=claim.vcpus_online,
        memory_mib=claim.memory_mib,
        cpu_policy="dedicated" if claim.vcpus else "shared",
        page_kib=claim.pages[0].page_kib if claim.pages else 0,
        nics=nics,
        placement=Placement(claim, 3, 7),
    )
    files = DomainFiles(
        root="/i/root.qcow2", root_format="qcow2", backing="/i/base", backing_format="qcow2", seed="/i/seed.iso",
        functions=addresses(topology, claim), rest=pool.defined(claim),
    )  # fmt: skip
    return domain_xml(desired, files, HostShape("kvm", "pc-q35-10.0", numa=len(topology.cells) > 1))


PAIRS = [(machine, name) for machine in names() for name in CLASSES]


@pytest.mark.parametrize("machine, name", PAIRS, ids=lambda x: x)
def test_the_domain_of_a_class_on_a_machine(machine: str, name: str, golden: Callable[[str, str], None]) -> None:
    claim = placed(machine, name)
    if isinstance(claim, Refusal):
        golden(f"domain/machines/{machine}-{name}.txt", claim.sentence + "\n")
        return
    assert verify_claim(host(machine), HostClaims.empty(), claim) == []
    xml = xml_of(machine, name, claim)
    domain = fromstring(xml)
    metadata = domain.find("metadata")
    assert metadata is not None
    domain.remove(metadata)
    indent(domain)
    golden(f"domain/machines/{machine}-{name}.xml", canonicalize(tostring(domain, encoding="unicode")) + "\n")
    facts, _ = parse_domain(xml, DomainPhase.RUNNING, 1)
    assert [set(pin) for pin in facts.vcpu_pins] == [{thread} for thread in claim.vcpus]
    assert not facts.emulator_pin & CpuSet.from_ids(claim.vcpus), "the emulator is on no vCPU's thread"
    if not SCHEMA.exists():
        pytest.fail(f"{SCHEMA} is missing: install libvirt-daemon, whose schema this compares with")
    schema = etree.RelaxNG(etree.parse(str(SCHEMA)))
    assert schema.validate(etree.fromstring(xml)), schema.error_log


def test_each_class_is_carried_by_some_machine() -> None:
    for name in CLASSES:
        assert any(isinstance(placed(machine, name), Claim) for machine in names()), name
