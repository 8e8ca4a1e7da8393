"""`casemate dev` on real libvirt after crashes: `up` mends, `down` leaves nothing, whatever died in between."""

import os
import signal

import pytest

from casemate_agent import sandbox as sandboxes
from support.devfleet import DevFleet
from support.realfleet import traces_of_scope

pytestmark = pytest.mark.libvirt


def kill(pid: int) -> None:
    """As the machine would. The processes are not ours: whoever adopted them waits for them."""
    os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(1500)
def test_up_mends_what_died_and_down_ends_what_is_left(tmp_path_factory: pytest.TempPathFactory) -> None:
    dev = DevFleet(tmp_path_factory.mktemp("d"))
    try:
        dev.up("--no-example", timeout_s=1200)
        first, libvirtd = dev.status(), sandboxes.status(dev.root / "virt")
        assert libvirtd is not None and first["hostsReady"] == 1
        for name in ("agentPid", "managerPid"):
            kill(first[name])
        dev.up("--no-example")
        second = dev.status()
        assert {second[n] for n in ("agentPid", "managerPid")}.isdisjoint(
            {first[n] for n in ("agentPid", "managerPid")}
        )
        assert sandboxes.status(dev.root / "virt") == libvirtd
        assert dev.get("host", "dev")["status"]["phase"] == "Ready"
        assert dev.get("image", "debian-13") != {}, "what was acknowledged is lost"
        # Both that would end it in good order are dead, and a record of a process is torn.
        kill(second["agentPid"])
        kill(libvirtd.pid)
        (dev.root / "pids/manager.json").write_text("{")
    finally:
        down = dev.down()
    down.ok()
    assert traces_of_scope(dev.scope, dev.root) == []
    assert os.listdir(dev.root.parent) == []
    assert dev.down().code == 0, "what is not there needs no end"
