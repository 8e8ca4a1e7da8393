"""Volumes in a guest, by its real helper: mounted by serial before the pods that need them, grown, and never formatted.

``mount`` and ``resize2fs`` are scripts that write down what they were asked; the disks are files.
"""

import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from casemate_agent.guest.casemate_guest.volumes import file_system_is_smaller
from support.guest_bench import RealGuestBench, pod

SERIAL = "0123456789abcdef0123"


def using(name: str = "db", path: str = "/volumes/data") -> dict[str, Any]:
    """A pod that has a folder of the guest."""
    made = pod(name, "sleep", "1000")
    made["spec"]["volumes"] = [{"name": "d", "hostPath": {"path": path, "type": "Directory"}}]
    made["spec"]["containers"][0]["volumeMounts"] = [{"name": "d", "mountPath": "/data"}]
    return made


class VolumeBench(RealGuestBench):
    """A guest whose seed names one volume, with a disk that may come later."""

    def prepare(self, *, read_only: bool = False, mount: str = "") -> None:
        seed = self.root / "run/casemate/seed"
        seed.mkdir(parents=True)
        volumes = [{"name": "data", "serial": SERIAL, "readOnly": read_only}]
        (seed / "meta-data").write_text(json.dumps({"casemate-volumes": volumes}))
        (self.root / "bin").mkdir()
        (self.root / "proc/self").mkdir(parents=True)
        (self.root / "proc/self/mounts").write_text("")
        (self.root / "dev").mkdir()
        ok = f'echo "$3 $4 ext4 rw 0 0" >> {self.root}/proc/self/mounts'
        self._program("mount", f'echo "$@" >> {self.root}/asked; {mount}\n{ok}')
        self._program("resize2fs", f'echo "resize2fs $@" >> {self.root}/asked; cp {self.root}/grown "$1"')

    def plug(self, device: bytes = b"") -> None:
        """The disk is there."""
        (self.root / "dev/vdc").write_bytes(device)
        folder = self.root / "sys/block/vdc"
        folder.mkdir(parents=True)
        (folder / "serial").write_text(SERIAL)

    @property
    def asked(self) -> list[str]:
        path = self.root / "asked"
        return path.read_text().replace(str(self.root), "").splitlines() if path.exists() else []


@asynccontextmanager
async def guest(folder: Path, **how: Any) -> AsyncIterator[VolumeBench]:
    made = VolumeBench(folder)
    made.prepare(**how)
    try:
        yield made
    finally:
        await made.close()


def ext4(blocks: int, size: int) -> bytes:
    """A disk of so many bytes with the superblock of an ext4 of so many blocks of 4 KiB."""
    head = bytearray(1024)
    struct.pack_into("<I", head, 0x04, blocks)
    struct.pack_into("<I", head, 0x18, 2)
    struct.pack_into("<H", head, 0x38, 0xEF53)
    struct.pack_into("<I", head, 0x60, 0x80)
    return (bytes(1024) + bytes(head)).ljust(size, b"\0")


async def test_it_is_mounted_before_the_pod_that_needs_it_runs(tmp_path: Path) -> None:
    async with guest(tmp_path) as bench:
        bench.plug(ext4(16, 65536))
        await bench.boot()
        await bench.start_agent()
        await bench.apply("a", using())
        await bench.ready("db")
        assert bench.asked == ["-o discard /dev/vdc /volumes/data"]
        assert (tmp_path / "volumes/data").is_dir()


async def test_without_its_disk_a_pod_waits_and_others_do_not(tmp_path: Path) -> None:
    async with guest(tmp_path) as bench:
        await bench.boot()
        await bench.start_agent()
        await bench.apply(
            "a", using(), using("parent", "/"), using("beside", "/volumes/database"), pod("web", "sleep", "9")
        )
        await bench.ready("web")
        await bench.ready("beside")
        for name in ("db", "parent"):
            waiting = await bench.until(
                lambda name=name: (p := bench.pod(name)) and p.reason == "VolumeNotMounted" and p
            )  # type: ignore[misc]
            assert waiting and SERIAL in waiting.message and waiting.phase == "Pending"
        await bench.until(lambda: bench.notes("VolumeNotMounted"))
        assert not (tmp_path / "volumes/data").exists(), "nobody writes where the volume is to be"
        bench.plug()
        await bench.ready("db")
        await bench.ready("parent")
        assert len(bench.notes("VolumeNotMounted")) == 1


async def test_what_cannot_be_mounted_is_told_with_its_reason_and_tried_again(tmp_path: Path) -> None:
    broken = f'test -e {tmp_path}/mended || {{ echo "wrong fs type" >&2; exit 32; }}'
    async with guest(tmp_path, mount=broken) as bench:
        bench.plug(b"a file system of nobody")
        await bench.boot()
        await bench.start_agent()
        await bench.apply("a", using())
        found = await bench.until(
            lambda: (p := bench.pod("db")) and p.reason == "VolumeNotMounted" and "wrong fs" in p.message
        )
        assert found
        assert (tmp_path / "dev/vdc").read_bytes() == b"a file system of nobody", "nothing is ever formatted"
        assert bench.notes("VolumeNotMounted")[0].severity == "Warning"
        (tmp_path / "mended").touch()
        await bench.ready("db")
        assert bench.pod("db").reason == ""  # type: ignore[union-attr]


async def test_a_new_helper_finds_it_mounted(tmp_path: Path) -> None:
    async with guest(tmp_path) as bench:
        bench.plug()
        await bench.boot()
        await bench.start_agent()
        await bench.apply("a", using())
        before = await bench.ready("db")
        asked = bench.asked
        await bench.restart_helper()
        after = await bench.ready("db")
        assert bench.asked == asked
        assert after.containers[0].started_s == before.containers[0].started_s


async def test_its_file_system_grows_to_its_disk_unless_it_is_read_only(tmp_path: Path) -> None:
    for name, read_only in (("rw", False), ("ro", True)):
        folder = tmp_path / name
        folder.mkdir()
        async with guest(folder, read_only=read_only) as bench:
            (folder / "grown").write_bytes(ext4(32, 32 * 4096))
            bench.plug(ext4(16, 32 * 4096))
            await bench.boot()
            await bench.start_agent()
            await bench.apply("a", using())
            await bench.ready("db")
            if read_only:
                assert bench.asked == ["-o ro /dev/vdc /volumes/data"]
            else:
                await bench.until(lambda bench=bench: bench.notes("VolumeGrown"))  # type: ignore[misc]
                assert bench.asked == ["-o discard /dev/vdc /volumes/data", "resize2fs /dev/vdc"]


async def test_one_that_was_not_unmounted_is_read_without_its_journal(tmp_path: Path) -> None:
    async with guest(tmp_path, read_only=True, mount='test "$2" = ro,noload || exit 32') as bench:
        bench.plug()
        await bench.boot()
        await bench.start_agent()
        await bench.apply("a", using())
        await bench.ready("db")
        assert bench.asked == ["-o ro /dev/vdc /volumes/data", "-o ro,noload /dev/vdc /volumes/data"]
        await bench.until(lambda: bench.notes("VolumeUnclean"))


@pytest.mark.parametrize(
    ("content", "smaller"),
    [
        (ext4(16, 16 * 4096), False),
        (ext4(16, 16 * 4096 + 4095), False),
        (ext4(16, 17 * 4096), True),
        (b"", False),
        (bytes(100_000), False),
        (b"\xff" * 100_000, False),
        (b"QFI\xfb" + bytes(100_000), False),
    ],
)
def test_whether_a_file_system_is_smaller_than_its_disk(tmp_path: Path, content: bytes, smaller: bool) -> None:
    (tmp_path / "disk").write_bytes(content)
    assert file_system_is_smaller(str(tmp_path / "disk")) is smaller
    assert not file_system_is_smaller(str(tmp_path / "none"))
