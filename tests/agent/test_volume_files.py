"""Volumes as files: whole or not there, never looked into, and a guest's bytes never more than bytes to QEMU."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from casemate_agent.domain.names import check_uid
from casemate_agent.drivers import volumes as module
from casemate_agent.drivers.ports import DomainPhase
from casemate_agent.drivers.volumes import VolumeFailed, VolumeFiles
from casemate_core.errors import InternalError, MachineError
from casemate_core.spec.instance import VolumeRef
from support.instances import UID
from support.real_host import RealHost

V = VolumeRef(check_uid("33333333-3333-8333-8333-333333333333"), "data", 64)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VolumeFiles]:
    made = VolumeFiles(tmp_path)
    yield made
    made.close()


def tool(*argv: str) -> str:
    """What a tool of e2fsprogs prints; it looks at files that we made ourselves."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


async def test_a_new_volume_is_sparse_and_holds_an_empty_ext4_that_is_its_own(store: VolumeFiles) -> None:
    await store.create(V, 20)
    path = store.path(V.uid)
    tool("e2fsck", "-fn", path)
    told = dict(line.split(":", 1) for line in tool("dumpe2fs", "-h", path).splitlines() if ":" in line)
    assert told["Filesystem UUID"].strip() == V.uid and told["Filesystem volume name"].strip() == "data"
    assert told["Inode size"].strip() == "256" and told["Reserved block count"].strip() == "0"
    new = {"orphan_file", "metadata_csum_seed", "casefold", "verity"}
    assert not new & set(told["Filesystem features"].split()), "what an older kernel cannot mount"
    facts = os.stat(path)
    assert facts.st_size == 64 << 20 and facts.st_blocks * 512 < 8 << 20
    assert facts.st_mode & 0o777 == 0o600
    assert os.listdir(Path(path).parent) == [f"{V.uid}.raw"]


async def test_the_settings_of_the_host_for_file_systems_do_not_count(
    store: VolumeFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mke2fs.conf").write_text("[defaults]\n\tbase_features = broken\n\tblocksize = 1024\n")
    monkeypatch.setenv("MKE2FS_CONFIG", str(tmp_path / "mke2fs.conf"))
    await store.create(V, 20)
    assert "Block size:               4096" in tool("dumpe2fs", "-h", store.path(V.uid))


async def test_what_is_there_is_never_written_whatever_it_holds(store: VolumeFiles) -> None:
    path = Path(store.path(V.uid))
    for content in (b"", b"QFI\xfb" + bytes(100), b"\0" * 4096, b"precious"):
        path.write_bytes(content)
        await store.create(V, 20)
        assert path.read_bytes() == content
        await store.grow(replace(V, size_mib=1), 20)
        assert path.read_bytes()[: len(content)] == content and path.stat().st_size == 1 << 20


async def test_one_that_dies_while_it_makes_a_volume_leaves_none(tmp_path: Path) -> None:
    """Killed within mkfs, in a process of its own: nothing has the volume's name, and the next one makes it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "mkfs.ext4").write_text("#!/bin/sh\nkill -9 $PPID\n")
    (programs / "mkfs.ext4").chmod(0o755)
    script = (
        "import asyncio, pathlib, sys\n"
        "from casemate_agent.drivers import volumes\n"
        "from casemate_core.spec.instance import VolumeRef\n"
        "volumes.TOOLS = sys.argv[2]\n"
        f"volume = VolumeRef({V.uid!r}, 'data', 64)\n"
        "asyncio.run(volumes.VolumeFiles(pathlib.Path(sys.argv[1])).create(volume, 20))\n"
    )
    died = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(tmp_path), str(programs))
    async with asyncio.timeout(60):
        assert await died.wait() == -9
    (left,) = (tmp_path / "volumes").iterdir()
    assert left.name.startswith(f".{V.uid}.") and left.name.endswith(".part")
    store = VolumeFiles(tmp_path)
    try:
        assert not list((tmp_path / "volumes").iterdir())
        await store.create(V, 20)
        tool("e2fsck", "-fn", store.path(V.uid))
    finally:
        store.close()


async def test_a_tool_that_fails_is_an_error_with_its_words_and_leaves_nothing(
    store: VolumeFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VolumeFailed, match="mkfs"):
        await store.create(replace(V, size_mib=0), 20)
    monkeypatch.setattr(module, "TOOLS", str(tmp_path / "nowhere"))
    with pytest.raises(VolumeFailed, match="package e2fsprogs"):
        await store.create(V, 20)
    assert not os.listdir(tmp_path / "volumes")


async def test_no_room_is_told_as_the_machines_fault(
    store: VolumeFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int, __: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(MachineError, match="No space left"):
        await store.create(V, 20)
    assert not os.listdir(tmp_path / "volumes")


@pytest.mark.parametrize("uid", ["../x", "", "A" * 36, "33333333-3333-8333-8333-33333333333/"])
async def test_a_uid_that_is_none_names_no_file(store: VolumeFiles, uid: str) -> None:
    with pytest.raises(InternalError):
        store.path(uid)


async def test_only_files_of_volumes_count(store: VolumeFiles, tmp_path: Path) -> None:
    folder = tmp_path / "volumes"
    await store.create(V, 20)
    (folder / "note.txt").write_text("x")
    (folder / "55555555-5555-8555-8555-555555555555.raw").mkdir()
    (folder / "66666666-6666-8666-8666-666666666666.raw").symlink_to("/etc/passwd")
    assert set(await store.observe(20)) == {V.uid}


def forged(path: Path, secret: Path, kind: str) -> bytes:
    """The first MiB of a qcow2 that has a file of the host behind it."""
    more = ["-b", str(secret), "-F", "raw"] if kind == "backing" else ["-o", f"data_file={secret},data_file_raw=on"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *more, str(path), "1G"], check=True, timeout=60)
    return path.read_bytes()[: 1 << 20]


@pytest.mark.libvirt
@pytest.mark.parametrize("kind", ["backing", "data-file"])
async def test_a_header_that_a_guest_writes_is_data_of_its_disk(real_host: RealHost, kind: str) -> None:
    """A guest that makes its raw volume look like a qcow2 with a file of the host behind it gets nothing of that file."""
    secret = real_host.folder / "secret"
    secret.write_bytes(b"of the host " * 100_000)
    header = forged(real_host.folder / "forged.qcow2", secret, kind)
    desired = await real_host.prepared(real_host.small(UID, volumes=(V,)))
    path = Path(real_host.volumes.path(V.uid))
    path.write_bytes(header + path.read_bytes()[len(header) :])
    try:
        for size_mib in (64, 128):
            await real_host.hypervisor.start(desired.uid, 60)
            facts = next(d for d in await real_host.hypervisor.domains(20) if d.uuid == desired.uid)
            assert facts.phase is DomainPhase.RUNNING and facts.pid
            opened = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{facts.pid}/fd")}
            assert str(path) in opened and str(secret) not in opened
            assert str(secret) not in facts.files
            await real_host.hypervisor.resize_disk(desired.uid, str(path), size_mib, 20)
            assert path.stat().st_size == size_mib << 20, "its size is the file's, and not what the header says"
            assert path.read_bytes()[:4] == b"QFI\xfb", "its bytes stay its own"
            await real_host.hypervisor.destroy(desired.uid, 20)
    finally:
        await real_host.end(desired.uid)
