"""A volume in a real VM: its data outlives rebuild and environment, grows while it is in use, and ends when it is deleted."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.devfleet import DevFleet
from support.realfleet import traces_of_scope

pytestmark = pytest.mark.libvirt

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/volume.yaml"
#: Boots take half a minute on a quiet machine without KVM, and minutes on a busy one.
BOOT_S = 600.0
GIB = 1 << 30


def told(dev: DevFleet) -> dict[str, Any]:
    """What is said of the volume."""
    status: dict[str, Any] = dev.get("volume", "notes").get("status", {})
    return status


def inside(dev: DevFleet, command: str) -> str:
    """What a command in the pod prints."""
    return dev.run("exec", "notes", "--", "sh", "-c", command, timeout_s=240).ok()


def in_guest(dev: DevFleet, *argv: str) -> str:
    """What a command in the VM prints."""
    return dev.run("exec", "--vm", "notes-0", "--", *argv, timeout_s=240).ok()


def holds(path: Path, text: bytes) -> bool:
    """Whether a large file has these bytes at the start of a block."""
    with path.open("rb") as file:
        while chunk := file.read(8 << 20):
            if any(chunk.startswith(text, at) for at in range(0, len(chunk), 4096)):
                return True
    return False


def ready(dev: DevFleet) -> None:
    done = dev.run("wait", "env/notes", "--for", "ready", "--timeout", f"{BOOT_S:.0f}s", timeout_s=BOOT_S + 60)
    assert done.code == 0, f"{done.out}{done.err}\n{dev.run('describe', 'env/notes').out}\n{dev.tails()}"


@pytest.mark.timeout(2400)
def test_data_outlives_a_rebuild_and_the_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    dev = DevFleet(tmp_path_factory.mktemp("v"))
    try:
        dev.up("--no-example", timeout_s=900)
        dev.run("apply", "-f", str(EXAMPLE)).ok()
        ready(dev)
        inside(dev, "echo precious > /data/note && sync")
        volume = dev.get("volume", "notes")
        uid, status = volume["metadata"]["uid"], volume["status"]
        assert (status["phase"], status["host"], status["instance"]) == ("Bound", "dev", "notes-0")
        disk = dev.root / f"agent/volumes/{uid}.raw"
        assert disk.stat().st_size == GIB and disk.stat().st_blocks * 512 < GIB // 4, "sparse"
        mounted = in_guest(dev, "findmnt", "-no", "FSTYPE,TARGET", "/volumes/notes").split()
        assert mounted == ["ext4", "/volumes/notes"]
        # What udev makes its link from; the link itself comes later in the boot.
        serial = status["device"].removeprefix("/dev/disk/by-id/virtio-")
        assert serial in in_guest(dev, "sh", "-c", "cat /sys/block/vd*/serial")

        refused = dev.run("delete", "volume", "notes")
        assert refused.code != 0 and "is used by instance notes-0 of environment notes" in refused.err
        _grows(dev, uid)
        pid = dev.qemus()[dev.get("instance", "notes-0")["metadata"]["uid"]]
        dev.run("rebuild", "notes", "--yes", "--timeout", f"{BOOT_S:.0f}s", timeout_s=BOOT_S + 120).ok()
        ready(dev)
        assert dev.qemus()[dev.get("instance", "notes-0")["metadata"]["uid"]] != pid
        assert inside(dev, "cat /data/note") == "precious\n"

        dev.run("delete", "env", "notes", timeout_s=240).ok()
        assert disk.exists() and told(dev)["phase"] == "Available"
        # what was written is on the disk, and not in the VM that is gone
        assert holds(disk, b"precious\n")
        dev.run("delete", "volume", "notes", timeout_s=120).ok()
        dev.until("its data is gone", lambda: not dev.get("volume", "notes") and not disk.exists())
    finally:
        down = dev.down()
    down.ok()
    assert traces_of_scope(dev.scope, dev.root) == []
    assert os.listdir(dev.root.parent) in ([], ["state"])


def _grows(dev: DevFleet, uid: str) -> None:
    """Twice as large, in the guest too, and nothing is restarted for it."""
    before = dev.qemus()
    larger = {
        "apiVersion": "casemate/v1",
        "kind": "Volume",
        "metadata": {"name": "notes"},
        "spec": {"size": "2Gi"},
    }
    dev.run("apply", "-f", "-", stdin=json.dumps(larger)).ok()

    def grown() -> bool:
        blocks, size = in_guest(dev, "stat", "-fc", "%b %S", "/volumes/notes").split()
        return int(blocks) * int(size) > GIB * 3 // 2

    dev.until("the file system in the guest has grown", grown, 240)
    assert told(dev)["capacity"] == "2Gi"
    assert dev.qemus() == before
    smaller = dev.run("apply", "-f", "-", stdin=json.dumps(larger | {"spec": {"size": "1Gi"}}))
    assert smaller.code != 0 and "does not shrink" in smaller.err
