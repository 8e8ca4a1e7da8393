"""Hostile words in every text that the schema can bring to a host, and what of them comes back out of a domain's XML.

The fields are those of the message itself: one that is added to it is tried here, or this fails until the whole instance below has it.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import hypothesis.strategies as st
import pytest
from google.protobuf import struct_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import example, given, settings
from lxml import etree

from casemate_agent.domain import HostShape, domain_xml, parse_domain
from casemate_agent.domain.build import domain_element
from casemate_agent.drivers.ports import DomainFiles, DomainPhase
from casemate_agent.ledger.desired import from_metadata
from casemate_core.errors import CallerError, MachineError
from casemate_core.spec.instance import DesiredInstance, File, Peer, VolumeRef
from casemate_core.spec.operation import Move, Order, Verb
from casemate_core.spec.secret import SecretText
from casemate_wire.codec.hosts import to_host_from_wire, to_host_to_wire
from casemate_wire.stream import Desired
from casemate_wire.v1 import hosts_pb2 as pb
from support.instances import UID, image, instance, nic, some_digest

TCG = HostShape(kind="qemu", machine="pc-q35-7.2")
WORDS = (
    "]]>", "<disk/>", "&amp;&lt;", "&#0;", "'\"", "\x00\x01\x1b[31m", "\ufffe", "名前 \u202e", "a\nb\tc\r", "\r\n", "\r", "--><qemu:arg/>",
    "<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/shadow'>]>&x;", "../../../etc/shadow", "<?xml version='1.0'?>", "\x85\u2028", " ", "",
)  # fmt: skip
#: One of everything: no field of the message is empty.
WHOLE = instance(
    nics=(replace(nic(), pod="web"),),
    user_data="#!x",
    ssh_keys=("ssh-ed25519 AAAA x",),
    pods=({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"}, "spec": {"containers": [{"name": "c", "image": "x"}]}},),
    archives=(replace(image(), name="app", type="oci-archive", file=File("https://images.example/a.tar", some_digest(9))),),
    volumes=(VolumeRef("6a0c1a3e-9d42-4b61-8a77-0c2d4e6f8a91", "data", 16, made=True),),
    peers=(Peer("web-1", "10.219.7.9"),),
    order=Order("7a0c1a3e-9d42-4b61-8a77-0c2d4e6f8a92", Verb.RESTART, 1.0, guest_boot_id="b", move=Move("h1", "h2", address="10.0.0.2:49152")),
    secrets={"s/k": SecretText("f" * 8, "text")},
    cause="cause-1",
)  # fmt: skip

Step = tuple[FieldDescriptor, int | str | None]


def message_of(desired: DesiredInstance) -> pb.DesiredInstance:
    return to_host_to_wire(Desired(1, 1, instances=(desired,))).desired.instances[0]


def texts_of(descriptor: Descriptor, path: str = "") -> Iterator[str]:
    """Every text field below a message, by the schema alone."""
    for field in descriptor.fields:
        name = f"{path}.{field.name}".lstrip(".")
        inner = field.message_type
        if field.type == FieldDescriptor.TYPE_STRING or (
            inner is not None and inner.full_name == "google.protobuf.Struct"
        ):
            yield name
        elif (inner is not None and inner.GetOptions().map_entry) or (
            inner is not None and not inner.full_name.startswith("google.")
        ):
            yield from texts_of(inner, name)


def is_set(message: Message, path: str) -> bool:
    """Whether a field has a value in one of the messages that lie on the way to it."""
    name, _, rest = path.partition(".")
    field = message.DESCRIPTOR.fields_by_name[name]
    value = getattr(message, name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        if rest == "key":
            return bool(value)
        return any(is_set(each, rest.partition(".")[2]) for each in value.values())
    values = list(value) if field.is_repeated else [value]
    return any(is_set(each, rest) if rest else bool(each) for each in values)


def replaced(message: Message, path: str, word: str) -> bool:
    """Put a word into the first place of this path. Whether there was one."""
    name, _, rest = path.partition(".")
    field = message.DESCRIPTOR.fields_by_name[name]
    value = getattr(message, name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key = next(iter(value))
        if rest == "key":
            value[word].CopyFrom(value[key])
            return True
        return replaced(value[key], rest.partition(".")[2], word)
    if field.is_repeated and not rest and field.message_type is None:
        value[0] = word
        return True
    target = value[0] if field.is_repeated else value
    if isinstance(target, struct_pb2.Struct):
        return _in_struct(target, word)
    if rest:
        return replaced(target, rest, word)
    setattr(message, name, word)
    return True


def _in_struct(struct: struct_pb2.Struct, word: str) -> bool:
    """Every text of a JSON object."""
    for value in struct.fields.values():
        match value.WhichOneof("kind"):
            case "string_value":
                value.string_value = word
            case "struct_value":
                _in_struct(value.struct_value, word)
            case "list_value":
                for each in value.list_value.values:
                    if each.WhichOneof("kind") == "struct_value":
                        _in_struct(each.struct_value, word)
    return True


PATHS = sorted(texts_of(pb.DesiredInstance.DESCRIPTOR))


def test_no_text_of_the_schema_is_left_out() -> None:
    message = message_of(WHOLE)
    assert [path for path in PATHS if not is_set(message, path)] == []
    assert {
        "tenant",
        "image.cmdline",
        "nics.mac",
        "peers.name",
        "secrets.key",
        "secrets.value.text",
        "pods",
        "claim",
    } <= set(PATHS)


def files(desired: DesiredInstance) -> DomainFiles:
    folder, stored = f"/var/lib/casemate/instances/{desired.uid}", "/var/lib/casemate/images/sha256-"
    return DomainFiles(
        root=f"{folder}/root.qcow2",
        root_format="qcow2",
        backing=f"{stored}1",
        backing_format=desired.image.format,
        seed=f"{folder}/seed.iso",
        archives=tuple(f"{stored}{9 + n}" for n in range(len(desired.archives))),
        kernel=f"{stored}2" if desired.image.kernel else "",
        initrd=f"{stored}3" if desired.image.initrd else "",
        cmdline=desired.image.cmdline,
        volumes=tuple(f"/var/lib/casemate/volumes/{n}.raw" for n in range(len(desired.volumes))),
    )


def plain(element: Any) -> Any:
    """An element with all that it says, but for the white space of indentation between elements."""
    text = element.text or ""
    children = [plain(child) for child in element]
    return (element.tag, dict(element.attrib), "" if children and not text.strip() else text, children)


def shape(element: Element) -> list[tuple[str, tuple[str, ...]]]:
    return [(e.tag, tuple(e.attrib)) for e in element.iter()]


SHAPE = shape(fromstring(domain_xml(WHOLE, files(WHOLE), TCG)))


@pytest.mark.parametrize("path", PATHS)
@given(word=st.sampled_from(WORDS) | st.text(st.characters(codec="utf-8"), max_size=20))
@example(word="a\rb\r\nc")
@settings(max_examples=12)
def test_what_is_read_back_is_exactly_what_was_built(path: str, word: str) -> None:
    """From the bytes of the wire: refused, or a domain whose XML is our tree to the letter, whoever parses it."""
    message = message_of(WHOLE)
    assert replaced(message, path, word)
    try:
        (desired,) = to_host_from_wire(
            pb.ToHost(desired=pb.Desired(epoch=1, revision=1, instances=[message]))
        ).instances  # type: ignore[union-attr]
        if desired.placement.claim.owner != UID:
            return  # refused by admission: the claim of another
        built = domain_element(desired, files(desired), TCG)
        xml = domain_xml(desired, files(desired), TCG)
    except (CallerError, MachineError):
        return  # refused before anything was written
    assert plain(fromstring(xml)) == plain(built)
    strict = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    assert plain(etree.fromstring(xml.encode(), strict)) == plain(built)
    # And of the same elements as that of any other word: none became markup, none went astray.
    if path.split(".")[0] not in {
        "claim",
        "image",
        "cpu_policy",
        "virtualisation",
    }:  # these say what the machine is made of
        assert shape(fromstring(xml)) == SHAPE
    _, owner = parse_domain(xml, DomainPhase.SHUT_OFF)
    assert owner is not None and owner.digest
    kept = from_metadata(owner.record)
    assert (
        kept is not None and (kept.uid, kept.tenant, kept.name) == (UID, desired.tenant, desired.name)
    ) or path == "uid"
