"""A latency certificate of a real guest: cyclictest of Debian's rt-tests in it, through its helper, read, kept and marked as what it is."""

import pytest

from support.devfleet import DevFleet

from .test_hello import BOOT_S

pytestmark = pytest.mark.libvirt


@pytest.mark.timeout(2400)
def test_a_real_guest_is_certified_and_an_emulated_one_meaningless(tmp_path_factory: pytest.TempPathFactory) -> None:
    dev = DevFleet(tmp_path_factory.mktemp("c"))
    try:
        dev.up("--timeout", f"{BOOT_S:.0f}s", timeout_s=BOOT_S + 600)
        before = dev.get("instance", "hello-0")["status"]
        done = dev.run("certify", "env/hello", "--duration", "5s", "--timeout", "300s", timeout_s=400)
        told = done.ok()
        assert "instance/hello-0: certify done" in told, told
        status = dev.get("instance", "hello-0")["status"]
        found = status["certificate"]
        assert len(found["cpus"]) == 2 and int(found["samples"]) > 0, found
        for each in (found, *found["cpus"]):
            assert each.get("minUs", 0) <= each.get("avgUs", 0) <= each["maxUs"], each
        assert "cyclictest" in found["tool"] and found["guestKernel"] and found["hostKernel"], found
        if status["virtualisation"] != "kvm":
            assert "MEANINGLESS" in told and "EMULATED" in found["meaningless"]
        assert status["pid"] == before["pid"], "nothing of the instance changed by it"
    finally:
        down = dev.down()
    down.ok()
