"""Hostile input to an agent: words in every field of an instance, texts in every file of sysfs, disks that a guest rewrote."""

import dataclasses
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from casemate_agent.domain import HostShape, domain_xml, parse_domain
from casemate_agent.drivers.fetch import SourceRules
from casemate_agent.drivers.image import ImageStore
from casemate_agent.drivers.imageformat import HEAD_BYTES, ImageRefused, read_qcow2
from casemate_agent.drivers.ports import DomainFiles, DomainPhase
from casemate_agent.ledger.records import from_metadata
from casemate_core.errors import CasemateError
from casemate_core.spec.instance import DesiredInstance, File, ImageRef
from casemate_core.topology.rules import check
from casemate_core.topology_loaders import from_sysfs
from support.hosts import host
from support.instances import UID, digest_of, instance, nic
from support.rendered import facts_of, files_of, with_real_addresses

TCG = HostShape(kind="qemu", machine="pc-q35-7.2")
WORDS = (
    "]]>", "<disk/>", "&amp;&lt;", "&#0;", "'\"", "\x00\x01\x1b[31m", "\ud7ff\uffff", "名前 \u202e", "a\nb\tc\r", "--><qemu:arg/>",
    "<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/shadow'>]>&x;", "../../../etc/shadow", "<?xml version='1.0'?>", "{{x}}", "%s%n",
)  # fmt: skip

# --- domain XML -------------------------------------------------------------------------------------------------------


def files(desired: DesiredInstance) -> DomainFiles:
    return DomainFiles(
        "/s/root.qcow2",
        "qcow2",
        "/s/image",
        desired.image.format,
        "/s/seed.iso",
        (),
        "/s/kernel",
        "",
        desired.image.cmdline,
    )


def text_fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a record holds free text: every field, at every depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from text_fields(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from text_fields(item, (*path, i))
    elif type(value) is str:
        yield path


def changed(value: Any, path: tuple[Any, ...], text: str) -> Any:
    if not path:
        return text
    head, *rest = path
    if isinstance(head, int):
        return (*value[:head], changed(value[head], tuple(rest), text), *value[head + 1 :])
    return replace(value, **{head: changed(getattr(value, head), tuple(rest), text)})


BASE = instance(nics=(nic(),), user_data="#!x", ssh_keys=("ssh-ed25519 AAAA x",))
#: Numbers in disguise: what is not a number there is refused when it is written.
STRUCTURED = {"claim", "mac", "address", "gateway", "uid", "digest"}
PATHS = [p for p in text_fields(BASE) if not STRUCTURED & set(map(str, p))]


def shape(element: Element) -> list[tuple[str, tuple[str, ...]]]:
    """Elements and the names of their attributes, in order: what no text may change."""
    return [(e.tag, tuple(e.attrib)) for e in element.iter()]


def test_the_fields_that_are_tried_are_those_that_tenants_write() -> None:
    assert {"tenant", "environment", "name", "user_data", "nics", "image", "ssh_keys"} <= {p[0] for p in PATHS}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
@given(word=st.sampled_from(WORDS) | st.text(max_size=20))
@settings(max_examples=40)
def test_no_word_in_any_field_becomes_markup(path: tuple[Any, ...], word: str) -> None:
    desired = changed(BASE, path, word)
    try:
        xml = domain_xml(desired, files(desired), TCG)
    except CasemateError:
        return  # refused before anything was written
    plain = fromstring(domain_xml(BASE, files(BASE), TCG))
    assert shape(fromstring(xml)) == shape(plain)
    _, owner = parse_domain(xml, DomainPhase.SHUT_OFF)
    assert owner is not None and from_metadata(owner.record).tenant == desired.tenant


# --- sysfs ------------------------------------------------------------------------------------------------------------

REAL = with_real_addresses(host("ran-edge"))
SYSFS = files_of(REAL)
FACTS = facts_of(REAL)
junk = st.sampled_from(
    ["", "\n", "-1", "0-", "-", ",", "9" * 30, "0-99999999999", "0,0,0", "1-0", "abc", "0x", "\0", "0-3:1/2", " 1", "٣"]
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(SYSFS)), junk | st.text(max_size=12), min_size=1, max_size=6), st.data())
def test_any_text_in_any_file_of_sysfs_is_read_or_refused(texts: dict[str, str], data: st.DataObject) -> None:
    tried = {**SYSFS, **texts}
    for name in data.draw(st.lists(st.sampled_from(sorted(SYSFS)), max_size=3)):
        tried.pop(name, None)
    try:
        topology = from_sysfs(tried, FACTS)
    except CasemateError:
        return
    check(topology)  # the rules judge whatever was read, and do not fail over it


# --- disks ------------------------------------------------------------------------------------------------------------


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, timeout=60)


def evil_qcow2(path: Path, backing: Path) -> bytes:
    """A whole qcow2 whose header names another file, as qemu-img itself writes it."""
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", str(backing), str(path), "8M")
    return path.read_bytes()


async def test_a_raw_disk_that_its_guest_reformats_as_qcow2_stays_raw(tmp_path: Path) -> None:
    """The oldest of them: a guest writes a header with a backing file on its disk, and the next one to open it reads the host."""
    sources, secret = tmp_path / "sources", tmp_path / "shadow"
    sources.mkdir()
    secret.write_bytes(b"root:x".ljust(512, b"\0"))
    data = bytes(8 * 2**20)
    (sources / "raw.img").write_bytes(data)
    ref = ImageRef("raw", "disk", File(f"file://{sources}/raw.img", digest_of(data)), "raw")
    store = ImageStore(tmp_path / "state", SourceRules(folders=(str(sources),)))
    try:
        await store.fetch(ref, 10)
        await store.create_overlay(UID, ref, 8, 10)
        made = store.files(instance(image=ref))
        header = evil_qcow2(tmp_path / "evil.qcow2", secret)
        # By the guest's own write, through its overlay: into the virtual disk, not into the file's header.
        blob = tmp_path / "blob"
        blob.write_bytes(header[: 192 * 1024])
        write = f"write -s {blob} 0 {192 * 1024}"
        run("qemu-io", "-f", "qcow2", "-c", write, made.root)
        info = read_qcow2(Path(made.root).read_bytes()[:HEAD_BYTES], Path(made.root).stat().st_size)
        assert (info.backing, info.backing_format) == (made.backing, "raw")
        # What is opened says its format itself, and QEMU reads the guest's bytes back as bytes.
        out = tmp_path / "out"
        opened = f"driver=qcow2,file.filename={made.root}"
        run("qemu-img", "convert", "--image-opts", opened, "-O", "raw", str(out))
        assert out.read_bytes()[:4] == b"QFI\xfb" and b"root:x" not in out.read_bytes()
        # The stored image, were it rewritten (it is not the guest's to write), is refused and nothing is made of it.
        image = Path(made.backing)
        image.chmod(0o600)
        image.write_bytes(header)
        await store.remove_instance(UID, 10)
        with pytest.raises(ImageRefused, match="begins like qcow2"):
            await store.create_overlay(UID, ref, 8, 10)
        assert not (await store.observe(5)).overlays
    finally:
        await store.aclose()


@pytest.mark.parametrize("form", ["qcow2", "raw"])
async def test_an_image_that_names_the_hosts_files_is_refused_at_its_import(tmp_path: Path, form: str) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    data = evil_qcow2(sources / "evil.img", Path("/etc/shadow"))
    ref = ImageRef("evil", "disk", File(f"file://{sources}/evil.img", digest_of(data)), form)
    store = ImageStore(tmp_path / "state", SourceRules(folders=(str(sources),)))
    try:
        with pytest.raises(ImageRefused):
            await store.fetch(ref, 10)
        assert not (await store.observe(5)).images
    finally:
        await store.aclose()


async def test_a_bomb_is_refused_by_what_it_says_and_by_what_it_takes(tmp_path: Path) -> None:
    """A small file that is a disk of petabytes, and one whose tables would be."""
    sources = tmp_path / "sources"
    sources.mkdir()
    bomb = sources / "bomb.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", str(bomb), "1P")
    data = bomb.read_bytes()
    ref = ImageRef("bomb", "disk", File(f"file://{bomb}", digest_of(data)), "qcow2")
    store = ImageStore(tmp_path / "state", SourceRules(folders=(str(sources),)))
    try:
        with pytest.raises(ImageRefused, match="virtual size"):
            await store.fetch(ref, 10)
    finally:
        await store.aclose()
