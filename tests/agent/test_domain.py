"""Domain XML: golden files, libvirt's own schema, hostile words, and the way back."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import fromstring

import hypothesis.strategies as st
import pytest
from hypothesis import given
from lxml import etree

from casemate_agent.domain import HostShape, domain_xml, parse_domain
from casemate_agent.domain.elements import plain_words, xml_text
from casemate_agent.domain.metadata import full_record, record_digest
from casemate_agent.drivers.ports import DomainFiles, DomainPhase
from casemate_agent.ledger.records import from_metadata
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.errors import InternalError
from casemate_core.spec.instance import DesiredInstance, File, ImageRef, Placement
from support.instances import UID, dedicated_claim, image, instance, nic, some_digest

TCG = HostShape(kind="qemu", machine="pc-q35-7.2", numa=False)
KVM = HostShape(kind="kvm", machine="pc-q35-10.0")
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")


def files(desired: DesiredInstance, shape: HostShape | None = None) -> DomainFiles:
    rest = (
        EMPTY if shape is None or shape.kind != "kvm" else desired.placement.claim.emulator or CpuSet.parse("1-3,17-19")
    )
    folder = f"/var/lib/casemate/instances/{desired.uid}"
    stored = "/var/lib/casemate/images/sha256-"
    return DomainFiles(
        root=f"{folder}/root.qcow2",
        root_format="qcow2",
        backing=f"{stored}{1:064x}",
        backing_format=desired.image.format,
        seed=f"{folder}/seed.iso",
        archives=tuple(f"{stored}{9 + n:064x}" for n in range(len(desired.archives))),
        kernel=f"{stored}{2:064x}" if desired.image.kernel else "",
        initrd=f"{stored}{3:064x}" if desired.image.initrd else "",
        cmdline=desired.image.cmdline,
        rest=rest,
    )


def archive(number: int) -> ImageRef:
    return ImageRef(f"app-{number}", "oci-archive", File("https://images.example/a.tar", some_digest(number)), "")


CASES: dict[str, tuple[DesiredInstance, HostShape]] = {
    "plain-tcg": (instance(nics=(nic(),)), TCG),
    "plain-kvm": (instance(nics=(nic(),), archives=(archive(9), archive(10))), KVM),
    "dedicated-hugepages-kvm": (
        instance(
            cpus=2,
            memory_mib=4096,
            cpu_policy="dedicated",
            page_kib=1048576,
            nics=(nic(2), replace(nic(3), network="backhaul", mtu=9000)),
            placement=Placement(dedicated_claim(UID), 3, 7),
        ),
        KVM,
    ),
    "disk-boot": (instance(image=image(kernel=None, initrd=None, cmdline="", format="raw")), TCG),
}


@pytest.mark.parametrize("name", CASES)
def test_xml_is_the_one_that_was_read_and_kept(name: str, golden: Callable[[str, str], None]) -> None:
    desired, shape = CASES[name]
    golden(f"domain/{name}.xml", domain_xml(desired, files(desired, shape), shape))


@pytest.mark.parametrize("name", CASES)
def test_xml_is_valid_by_the_schema_of_libvirt(name: str) -> None:
    if not SCHEMA.exists():
        pytest.fail(f"{SCHEMA} is missing: install libvirt-daemon, whose schema this compares with")
    desired, shape = CASES[name]
    schema = etree.RelaxNG(etree.parse(str(SCHEMA)))
    assert schema.validate(etree.fromstring(domain_xml(desired, files(desired, shape), shape))), schema.error_log


@pytest.mark.parametrize("name", CASES)
def test_facts_come_back_from_the_xml(name: str) -> None:
    desired, shape = CASES[name]
    facts, owner = parse_domain(domain_xml(desired, files(desired, shape), shape), DomainPhase.RUNNING, 4711)
    assert owner is not None
    assert (facts.uuid, facts.instance_uid, facts.owned, facts.pid) == (UID, UID, True, 4711)
    assert (facts.generation, facts.placement_epoch, facts.placement_generation) == (5, 3, 7)
    assert (facts.vcpus, facts.memory_mib) == (desired.cpus, desired.memory_mib)
    assert facts.channel_path == f"/run/casemate/{UID}.sock"
    assert len(facts.taps) == len(desired.nics)
    given_files = files(desired)
    assert {given_files.root, given_files.backing, given_files.seed, *given_files.archives} <= set(facts.files)
    assert facts.vcpu_pins == tuple(frozenset([thread]) for thread in desired.placement.claim.vcpus)
    assert from_metadata(owner.record) == desired


def test_a_machine_has_nothing_that_a_guest_does_not_use() -> None:
    desired, shape = CASES["plain-kvm"]
    devices = fromstring(domain_xml(desired, files(desired, shape), shape)).find("devices")
    assert devices is not None
    assert {device.tag for device in devices} == {
        "emulator", "disk", "controller", "interface", "channel", "serial", "console", "rng", "memballoon",
    }  # fmt: skip
    assert [c.get("model") for c in devices.iterfind("controller[@type='usb']")] == ["none"]
    assert {target.get("bus") for target in devices.iterfind("disk/target")} == {"virtio"}


def test_every_disk_names_its_format_and_closes_its_chain() -> None:
    for desired, shape in CASES.values():
        for disk in fromstring(domain_xml(desired, files(desired, shape), shape)).iterfind("devices/disk"):
            chain = disk
            while (inner := chain.find("backingStore")) is not None and len(inner):
                assert inner.find("format") is not None
                chain = inner
            assert inner is not None, "the chain is left open, QEMU would probe it"
            driver = disk.find("driver")
            assert driver is not None and driver.get("type") in ("qcow2", "raw")


HOSTILE = ["]]>", "<disk/>", "&amp;&lt;", "&#0;", "'\"", "\x00\x01\x1b[31m", "\ud7ff￿", "名前 \u202e", "a\nb\tc\r"]


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_words_come_back_exactly_and_never_become_markup(word: str) -> None:
    desired = instance(
        tenant=word, environment=word, name=word, user_data=word, pods=({"metadata": {"name": word}},), nics=(nic(),)
    )
    plain, _ = CASES["plain-tcg"]
    xml = domain_xml(desired, files(desired), TCG)
    shape_of = [element.tag for element in fromstring(domain_xml(plain, files(plain), TCG)).iter()]
    assert [element.tag for element in fromstring(xml).iter()] == shape_of
    _, owner = parse_domain(xml, DomainPhase.SHUT_OFF)
    assert owner is not None
    assert from_metadata(owner.record) == replace(desired, user_data="", pods=())


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_survives_the_way_there_and_back(tenant: str, environment: str) -> None:
    desired = instance(tenant=tenant, environment=environment)
    _, owner = parse_domain(domain_xml(desired, files(desired), TCG), DomainPhase.SHUT_OFF)
    assert owner is not None and from_metadata(owner.record) == desired


def test_what_may_be_secret_is_not_in_the_xml_that_every_user_of_the_host_can_read() -> None:
    signed = File("https://user:pw-0815@images.example/a?signature=sig-1234", some_digest(1))
    desired = instance(
        user_data="password: hunter2", pods=({"spec": {"env": "tok-4711"}},), image=image(file=signed, initrd=signed)
    )
    xml = domain_xml(desired, files(desired), TCG)
    assert not [word for word in ("hunter2", "tok-4711", "pw-0815", "sig-1234") if word in xml]
    _, owner = parse_domain(xml, DomainPhase.SHUT_OFF)
    assert owner is not None
    assert owner.digest == record_digest(full_record(desired))
    assert json.loads(full_record(desired))["user_data"] == "password: hunter2"


def test_a_domain_without_our_metadata_is_foreign() -> None:
    xml = """<domain type='kvm'><name>other</name><uuid>0b6e1c2a-0000-4000-8000-000000000001</uuid>
      <memory unit='KiB'>1048577</memory><vcpu current='2'>4</vcpu>
      <cputune><vcpupin vcpu='1' cpuset='2-3,5'/></cputune>
      <devices><interface type='network'><target dev='vnet0'/></interface>
      <disk><source file='/srv/a.img'/></disk><disk><source dev='/dev/sdb'/></disk></devices></domain>"""
    facts, owner = parse_domain(xml, DomainPhase.RUNNING)
    assert owner is None and not facts.owned and facts.record == ""
    assert (facts.vcpus, facts.memory_mib, facts.taps) == (2, 1025, ("vnet0",))
    assert facts.files == ("/srv/a.img", "/dev/sdb")
    assert facts.vcpu_pins == (frozenset(), frozenset({2, 3, 5}), frozenset(), frozenset())


@pytest.mark.parametrize("change", ["uuid", "generation"])
def test_metadata_that_was_cloned_or_edited_makes_a_domain_foreign(change: str) -> None:
    desired, shape = CASES["plain-tcg"]
    xml = domain_xml(desired, files(desired, shape), shape)
    if change == "uuid":
        xml = xml.replace(f"<uuid>{UID}", "<uuid>0b6e1c2a-0000-4000-8000-000000000001")
    else:
        xml = xml.replace('generation="5"', 'generation="five"')
    facts, owner = parse_domain(xml, DomainPhase.RUNNING)
    assert owner is None and not facts.owned


def test_contradictions_are_our_own_defects() -> None:
    desired, shape = CASES["plain-tcg"]
    with pytest.raises(InternalError, match="absolute"):
        domain_xml(desired, replace(files(desired), seed="nbd:evil"), shape)
    with pytest.raises(InternalError, match="format"):
        domain_xml(desired, replace(files(desired), backing_format="vmdk"), shape)
    short = replace(dedicated_claim(UID), vcpus=(4,))
    with pytest.raises(InternalError, match="pins 1 of 4"):
        domain_xml(replace(desired, cpus=2, placement=Placement(short, 1, 1)), files(desired, shape), shape)
    with pytest.raises(InternalError, match="UUID"):
        domain_xml(instance(uid="../../etc"), files(desired, shape), shape)
    with pytest.raises(InternalError, match="parse"):
        parse_domain("<domain", DomainPhase.RUNNING)


def test_text_that_xml_cannot_hold_is_refused_or_shown_as_such() -> None:
    with pytest.raises(InternalError, match=r"U\+0000"):
        xml_text("a\0b")
    assert plain_words("a\0b\nc", 10) == "a\ufffdb\ufffdc"
    assert plain_words("x" * 50, 10) == "x" * 10


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "golden/domain").glob("*.xml")), ids=lambda p: p.stem
)
def test_a_domain_has_the_fewest_devices_that_its_record_needs(path: Path) -> None:
    """No USB, floppy, CD-ROM, sound, graphics, video, input: each is a way into QEMU, and costs a guest's boot time."""
    devices = fromstring(path.read_text()).find("devices")
    assert devices is not None
    kinds = {device.tag for device in devices} - {"emulator"}
    assert kinds <= {"disk", "controller", "rng", "interface", "channel", "serial", "console", "memballoon"}
    assert {disk.get("device") for disk in devices.iterfind("disk")} == {"disk"}
    assert {target.get("bus") for target in devices.iterfind("disk/target")} == {"virtio"}
    models = {(c.get("type"), c.get("model")) for c in devices.iterfind("controller")}
    assert models == {("usb", "none"), ("virtio-serial", None)}
