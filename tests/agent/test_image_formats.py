"""Headers of disk images: what qemu-img writes is read, and a corpus of crafted ones is refused."""

import struct
import subprocess
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from casemate_agent.drivers.imageformat import HEAD_BYTES, ImageInfo, ImageRefused, read_header, read_qcow2

CLUSTER = 65536


def header(
    *,
    version: int = 3,
    backing: bytes = b"",
    cluster_bits: int = 16,
    size: int = 2**30,
    crypt: int = 0,
    l1_entries: int = 2,
    l1_offset: int = 3 * CLUSTER,
    refcount_offset: int = CLUSTER,
    refcount_clusters: int = 1,
    snapshots: int = 0,
    incompatible: int = 0,
    refcount_order: int = 4,
    length: int = 112,
    compression: int = 0,
    extensions: bytes = b"",
) -> bytes:
    """A qcow2 header as docs/interop/qcow2.txt lays it out, right in every field that is not asked to be wrong."""
    at = length + len(extensions) + 8
    fixed = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        at if backing else 0,
        len(backing),
        cluster_bits,
        size,
        crypt,
        l1_entries,
        l1_offset,
        refcount_offset,
        refcount_clusters,
        snapshots,
        0,
    )
    if version >= 3:
        fixed += struct.pack(">QQQII", incompatible, 0, 0, refcount_order, length)
        fixed += bytes([compression]).ljust(8, b"\0")
    return (fixed + extensions + bytes(8) + backing).ljust(CLUSTER, b"\0")


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")


FILE_BYTES = 4 * CLUSTER
V2: dict[str, Any] = {"version": 2, "length": 72}


def test_a_right_header_is_read() -> None:
    assert read_header(header(), FILE_BYTES, "qcow2") == ImageInfo("qcow2", 2**30)
    assert read_header(header(**V2), FILE_BYTES, "qcow2") == ImageInfo("qcow2", 2**30)
    zstd = header(incompatible=1 << 3, compression=1)
    assert read_header(zstd, FILE_BYTES, "qcow2").virtual_bytes == 2**30


REFUSED = {
    "backing file": (header(backing=b"/etc/shadow"), "backing file '/etc/shadow'"),
    "backing file of version 2": (header(backing=b"/etc/shadow", **V2), "backing file"),
    "backing by protocol": (header(backing=b"json:{}"), "backing file"),
    "backing name outside": (header(backing=b"x" * 2000), "outside the first cluster"),
    "external data": (header(incompatible=1 << 2), "in another file"),
    "external data by extension": (header(extensions=extension(0x44415441, b"/dev/sda")), "in another file"),
    "dirty": (header(incompatible=1), "not closed cleanly"),
    "corrupt": (header(incompatible=2), "marked corrupt"),
    "unknown feature": (header(incompatible=1 << 17), "unknown features (0x20000)"),
    "unknown compression": (header(incompatible=1 << 3, compression=7), "unknown compression"),
    "encrypted": (header(crypt=1), "encrypted"),
    "luks": (header(crypt=2), "encrypted"),
    "luks by extension": (header(extensions=extension(0x0537BE77, bytes(16))), "encrypted"),
    "snapshots": (header(snapshots=1), "internal snapshots"),
    "version": (header(version=4), "version 4"),
    "cluster bits small": (header(cluster_bits=8), "clusters"),
    "cluster bits large": (header(cluster_bits=40), "clusters"),
    "no size": (header(size=0), "virtual size"),
    "absurd size": (header(size=2**62), "virtual size"),
    "odd size": (header(size=2**30 + 1), "virtual size"),
    "short L1": (header(l1_entries=1), "L1 table"),
    "huge L1": (header(l1_entries=2**31), "L1 table"),
    "L1 in the header": (header(l1_offset=0), "L1 table"),
    "L1 unaligned": (header(l1_offset=CLUSTER + 8), "L1 table"),
    "L1 outside": (header(l1_offset=2**40), "L1 table"),
    "refcounts outside": (header(refcount_offset=2**40), "refcount table"),
    "no refcounts": (header(refcount_clusters=0), "refcount table"),
    "huge refcounts": (header(refcount_clusters=2**31), "refcount table"),
    "refcount order": (header(refcount_order=7), "refcounts"),
    "header short": (header(length=96), "header of 96"),
    "header odd": (header(length=113), "header of 113"),
    "header huge": (header(length=2**31), "header of"),
    "extended L2 in small clusters": (header(incompatible=1 << 4, cluster_bits=12), "extended L2"),
    "extension too long": (header(extensions=struct.pack(">II", 0x12345678, 2**31)), "leaves the header"),
    "cut off": (header()[:60], "cut off"),
    "cut off in version 3": (header()[:80], "cut off"),
    "empty": (b"", "does not begin like one"),
    "raw": (bytes(1024), "does not begin like one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_crafted_qcow2_is_refused(name: str) -> None:
    head, words = REFUSED[name]
    with pytest.raises(ImageRefused) as refused:
        read_header(head, FILE_BYTES, "qcow2")
    assert words in str(refused.value)
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("head", "size", "words"),
    [
        (header(), FILE_BYTES, "begins like qcow2"),
        (b"KDMV" + bytes(508), 512, "begins like vmdk"),
        (b"\x1f\x8b" + bytes(510), 512, "begins like gzip"),
        (bytes(100), 100, "no number of sectors"),
        (b"", 0, "no number of sectors"),
        (bytes(512), 2**60, "larger than any machine"),
    ],
)
def test_a_file_that_is_no_raw_disk_is_refused(head: bytes, size: int, words: str) -> None:
    with pytest.raises(ImageRefused, match=words):
        read_header(head, size, "raw")


def test_only_two_formats_are_known() -> None:
    with pytest.raises(ImageRefused, match="not supported"):
        read_header(bytes(512), 512, "vmdk")
    assert read_header(bytes(512), 1024, "raw") == ImageInfo("raw", 1024)


@given(st.binary(max_size=200), st.integers(0, 2**40))
def test_no_bytes_make_the_reader_fail_otherwise_than_by_refusing(data: bytes, size: int) -> None:
    for head in (data, b"QFI\xfb" + data, header()[:72] + data):
        try:
            info = read_header(head, size, "qcow2")
        except ImageRefused:
            continue
        assert not info.backing and 0 < info.virtual_bytes <= 64 * 2**40


@pytest.mark.parametrize(
    "options",
    ["compat=0.10", "compat=1.1", "cluster_size=2M", "cluster_size=512", "extended_l2=on", "compression_type=zstd"],
)
def test_what_qemu_img_writes_is_read(tmp_path: Path, options: str) -> None:
    path = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), "10G"], check=True)
    with path.open("rb") as file:
        assert read_header(file.read(HEAD_BYTES), path.stat().st_size, "qcow2").virtual_bytes == 10 * 2**30


def test_the_backing_file_of_an_overlay_is_read_and_refused_at_an_import(tmp_path: Path) -> None:
    base, over = tmp_path / "base.raw", tmp_path / "over.qcow2"
    base.write_bytes(bytes(2**20))
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(over)]
    subprocess.run(argv, check=True)
    head, size = over.read_bytes()[:HEAD_BYTES], over.stat().st_size
    assert read_qcow2(head, size) == ImageInfo("qcow2", 2**20, str(base), "raw")
    with pytest.raises(ImageRefused, match=r"base\.raw"):
        read_header(head, size, "qcow2")
