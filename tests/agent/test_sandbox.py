"""The private libvirtd: several side by side, ended without a trace, and nothing of the machine's touched."""

import os
import signal
import subprocess
from pathlib import Path

import libvirt
import pytest

from casemate_agent import sandbox as sandboxes
from casemate_core.errors import CallerError

pytestmark = pytest.mark.libvirt

MACHINES_OWN = ("/run/libvirt", "/var/lib/libvirt", "/etc/libvirt", "/var/log/libvirt")


def listing() -> dict[str, list[str]]:
    return {folder: sorted(os.listdir(folder)) for folder in MACHINES_OWN if os.path.isdir(folder)}


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("b")


def test_two_sandboxes_side_by_side_leave_nothing(folder: Path) -> None:
    before = listing()
    mounts = Path("/proc/self/mounts").read_text()
    one, two = sandboxes.up(folder / "1"), sandboxes.up(folder / "2", hostname="second")
    try:
        assert sandboxes.up(folder / "1") == one, "a second up finds the first"
        assert one.scope != two.scope and one.host_uuid != two.host_uuid
        connection = libvirt.open(two.uri)
        try:
            assert connection.getHostname() == "second"
        finally:
            connection.close()
        assert sandboxes.status(folder / "2") == two
        assert Path("/proc/self/mounts").read_text() == mounts
    finally:
        sandboxes.down(folder / "1")
        sandboxes.down(folder / "2")
    assert os.listdir(folder) == []
    assert listing() == before
    assert sandboxes.status(folder / "1") is None
    sandboxes.down(folder / "1")


def test_down_ends_guests_of_a_libvirtd_that_is_dead(folder: Path) -> None:
    sandbox = sandboxes.up(folder / "1")
    connection = libvirt.open(sandbox.uri)
    connection.createXML(
        "<domain type='qemu'><name>guest</name><memory unit='MiB'>32</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"
    )
    connection.close()
    qemu = [pid for pid in sandboxes._members(sandbox) if b"guest=guest" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(qemu) == 1
    os.kill(sandbox.pid, signal.SIGKILL)
    sandboxes.down(folder / "1")
    assert sandboxes._members(sandbox) == [] and not (folder / "1").exists()


def test_down_removes_nothing_that_is_no_sandbox(folder: Path) -> None:
    (folder / "precious").write_text("x")
    with pytest.raises(CallerError, match="no sandbox"):
        sandboxes.down(folder)
    assert (folder / "precious").exists()


def test_a_folder_too_deep_for_sockets_is_refused(folder: Path) -> None:
    with pytest.raises(CallerError, match="shorter path"):
        sandboxes.up(folder / ("x" * 100))


def test_the_command_line_speaks_json(folder: Path) -> None:
    import json
    import sys

    argv = [sys.executable, "-m", "casemate_agent.sandbox"]
    status = subprocess.run([*argv, "status", "--dir", str(folder / "c")], capture_output=True, text=True, check=False)
    assert (status.returncode, status.stdout, status.stderr) == (1, "", "not running\n")
    try:
        done = subprocess.run([*argv, "up", "--dir", str(folder / "c")], capture_output=True, text=True, check=True)
        facts = json.loads(done.stdout)
        assert facts["uri"].endswith("/c/sock/libvirt-sock") and facts["scope"]
    finally:
        subprocess.run([*argv, "down", "--dir", str(folder / "c")], check=True)
    assert os.listdir(folder) == []
