"""The pure parts of the image builder, and its cache."""

import gzip
import hashlib
import io
import json
import lzma
import os
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

from casemate_agent.guestimage import archive, build, cpio, kernel, mirror, recipe

ELF = b"\x7fELF" + bytes(range(256)) * 40


def bz_image(payload: bytes, version: int = 0x20F) -> bytes:
    """A bzImage with two setup sectors, whose payload lies 64 bytes into the protected-mode part."""
    head = bytearray(3 * 512)
    head[0x1F1] = 2
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, 64, len(payload))
    return bytes(head) + bytes(64) + payload + b"signature"


@pytest.mark.parametrize(
    ("packing", "packed"),
    [
        ("none", ELF),
        ("gzip", gzip.compress(ELF)),
        ("xz", lzma.compress(ELF) + struct.pack("<I", len(ELF))),
    ],
)
def test_the_kernel_inside_a_bzimage(packing: str, packed: bytes) -> None:
    part = kernel.payload(bz_image(packed))
    assert (part.packing, part.unpacked_bytes) == (packing, len(ELF))
    plain = kernel.unpack(part)
    assert plain is not None
    assert kernel.check_unpacked(plain, part) == ELF


def test_zstd_is_left_to_its_tool() -> None:
    part = kernel.payload(bz_image(b"\x28\xb5\x2f\xfd" + b"x" * 50 + struct.pack("<I", len(ELF))))
    assert (part.packing, part.unpacked_bytes, len(part.data)) == ("zstd", len(ELF), 54)
    assert kernel.unpack(part) is None
    with pytest.raises(kernel.BadKernel, match="no ELF file"):
        kernel.check_unpacked(b"nonsense", part)
    with pytest.raises(kernel.BadKernel, match="its header promised"):
        kernel.check_unpacked(ELF[:-1], part)


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (b"", "no boot header"),
        (bytes(4096), "no boot header"),
        (bz_image(ELF, version=0x207), r"boot protocol 2\.07"),
        (bz_image(ELF)[:-20], "outside of the file"),
        (bz_image(b"what is this?"), "unknown packing"),
    ],
)
def test_what_is_no_kernel_is_refused(image: bytes, problem: str) -> None:
    with pytest.raises(kernel.BadKernel, match=problem):
        kernel.payload(image)


def test_the_initial_ram_disk_is_what_cpio_reads(tmp_path: Path) -> None:
    data = cpio.archive([cpio.folder("bin"), cpio.regular("bin/a", b"abc", 0o755), cpio.regular("empty", b"")])
    assert len(data) % 4 == 0
    assert data == cpio.archive([cpio.folder("bin"), cpio.regular("bin/a", b"abc", 0o755), cpio.regular("empty", b"")])
    done = subprocess.run(["cpio", "-i", "--quiet"], input=data, cwd=tmp_path, capture_output=True, check=True)
    assert done.stderr == b""
    assert (tmp_path / "bin/a").read_bytes() == b"abc"
    assert os.access(tmp_path / "bin/a", os.X_OK)
    assert (tmp_path / "empty").read_bytes() == b""


def test_the_hello_container_is_the_same_bytes_each_time_and_consistent() -> None:
    first = archive.hello(b"\x7fELF busybox")
    assert first == archive.hello(b"\x7fELF busybox")
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:

        def member(name: str) -> bytes:
            file = tar.extractfile(name)
            assert file is not None
            return file.read()

        (manifest,) = json.loads(member("manifest.json"))
        assert manifest["RepoTags"] == [archive.HELLO_IMAGE]
        config = json.loads(member(manifest["Config"]))
        layer = member(manifest["Layers"][0])
        assert config["rootfs"]["diff_ids"] == ["sha256:" + hashlib.sha256(layer).hexdigest()]
        with tarfile.open(fileobj=io.BytesIO(layer)) as files:
            assert files.getmember("bin/busybox").mode == 0o755
            assert files.getmember("bin/httpd").linkname == "busybox"
            assert files.getmember("hello").mode & 0o111


INDEX = [
    "bookworm\tmain\thttp://mirror.example/debian/",
    "bookworm\tcontrib\thttp://other.example/debian/",
    "bookworm-security\tmain\thttp://mirror.example/debian-security/",
    "nodistro\tmain\thttp://vendor.example/",
]


def test_the_mirror_is_that_of_the_machine() -> None:
    found = mirror.parse(INDEX, "bookworm")
    assert found == mirror.Mirrors("http://mirror.example/debian", "http://mirror.example/debian-security")
    assert mirror.sources(found, "trixie", "/keys.gpg") == [
        "deb [signed-by=/keys.gpg] http://mirror.example/debian trixie main",
        "deb [signed-by=/keys.gpg] http://mirror.example/debian trixie-updates main",
        "deb [signed-by=/keys.gpg] http://mirror.example/debian-security trixie-security main",
    ]
    assert len(mirror.sources(mirror.parse(INDEX[:1], "bookworm"), "trixie", "/keys.gpg")) == 2
    with pytest.raises(mirror.NoMirror, match="trixie/main"):
        mirror.parse(INDEX, "trixie")


def test_a_manifest_is_yaml_whatever_a_path_holds() -> None:
    text = build.image_manifest("debian-13", {"source": "file:///a: b #c", "kernel": {"source": "x", "digest": "y"}})
    assert yaml.safe_load(text) == {
        "apiVersion": "casemate/v1",
        "kind": "Image",
        "metadata": {"name": "debian-13"},
        "spec": {"source": "file:///a: b #c", "kernel": {"source": "x", "digest": "y"}},
    }


def test_the_key_changes_with_names_and_contents_alone() -> None:
    one = recipe.key({"a": b"1", "b": b"2"})
    assert one == recipe.key({"b": b"2", "a": b"1"})
    assert len({one, recipe.key({"a": b"12", "b": b""}), recipe.key({"ab": b"12"}), recipe.key({"a": b"1"})}) == 4


def test_what_is_built_already_is_found_at_once(tmp_path: Path) -> None:
    folder = tmp_path / recipe.key(build.inputs())
    folder.mkdir()
    for name in build.ARTEFACTS[:-1]:
        (folder / name).touch()
    assert not build.is_complete(folder)
    (folder / build.ARTEFACTS[-1]).touch()
    said: list[str] = []
    assert build.build(tmp_path, said.append) == folder
    assert said == [f"guest image {folder.name} is built already"]
    assert (tmp_path / "current").resolve() == folder
    assert not list(tmp_path.glob(".*"))
