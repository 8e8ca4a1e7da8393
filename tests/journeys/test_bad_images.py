"""Images that are not what they say, on a real host: told with the reason and what to do, and nothing half-made."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.instances import digest_of, some_digest
from support.realfleet import RealFleet, empty_environment

pytestmark = pytest.mark.libvirt


def an_image(fleet: RealFleet, name: str, path: Path, **spec: Any) -> None:
    """Make an image known, and an environment of the same name that uses it."""
    whole = {"type": "disk", "source": f"file://{path}", "digest": digest_of(path.read_bytes()), "format": "qcow2"}
    fleet.apply({"apiVersion": "casemate/v1", "kind": "Image", "metadata": {"name": name}, "spec": whole | spec})
    fleet.apply(empty_environment(name, image=name))


@pytest.mark.timeout(600)
def test_an_image_that_is_not_what_it_says_is_refused(real_fleet: RealFleet) -> None:
    fleet = real_fleet
    sources = fleet.folder / "src"
    for name, argv in {
        "plain": ["qemu-img", "create", "-q", "-f", "qcow2", str(sources / "plain"), "1M"],
        "backed": ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", "-u", "backed", "1M"],
    }.items():
        subprocess.run(argv, cwd=sources, check=True, timeout=60)
        assert (sources / name).exists()
    plain = sources / "plain"
    for name, path, more, words in (
        ("backed", sources / "backed", {}, "has the backing file '/etc/shadow'"),
        ("changed", plain, {"digest": some_digest(7)}, "has the digest sha256:"),
        ("raw", plain, {"format": "raw"}, "declared as raw, but the file begins like qcow2"),
        ("elsewhere", Path("/etc/hostname"), {"format": "raw"}, "/etc/hostname"),
    ):
        an_image(fleet, name, path, **more)
        fleet.until(f"{name} is refused", lambda: fleet.instance(name).get("status", {}).get("phase") == "Failed")  # noqa: B023
        assert words in fleet.run("describe", "env", name).ok()
        assert fleet.run("wait", f"env/{name}", "--for", "ready", "--timeout", "1s").code == 6
        # No guest, disk or seed was made of it, and nothing of its content was kept.
        assert fleet.qemus() == {} and fleet.domains() == set()
        fleet.run("delete", "env", name, timeout_s=120).ok()
        assert fleet.traces_of(fleet.uids[name]) == []
    assert [p for p in (fleet.state / "images").rglob("*") if p.is_file() and p.stat().st_size] == []
