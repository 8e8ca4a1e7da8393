"""The server itself, and our agent in it as a service."""

import pytest

from support.hostlab.server import HOST, Server

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


def test_the_server_behaves_like_one(server: Server) -> None:
    """Two cells, an IOMMU with groups, ports that can be cut into virtual functions, huge pages on both cells."""
    run = server.machine.run
    assert run("cat /sys/devices/system/node/online").strip() == "0-1"
    assert int(run("ls /sys/kernel/iommu_groups | wc -l")) > 4
    assert run("cat /sys/bus/pci/devices/*/sriov_totalvfs").split() == ["7", "7"]
    assert run("cat /sys/devices/system/node/node*/hugepages/hugepages-2048kB/nr_hugepages").split() == ["64", "128"]


def test_the_agent_is_a_service_that_joined(server: Server) -> None:
    assert server.machine.run("systemctl is-active casemate-agent").strip() == "active"
    host = server.get("host", HOST)
    assert host["status"]["phase"] == "Ready", host["status"]
    assert host["status"]["cells"] == 2
    assert host["status"]["bootId"] == server.machine.read("/proc/sys/kernel/random/boot_id")
    asked = f"{server.profile()}casemate get hosts -o name"
    assert server.machine.run(asked).strip() == f"host/{HOST}"


def test_a_killed_agent_comes_back_to_the_same_host(server: Server) -> None:
    before = server.machine.run("systemctl show -P MainPID casemate-agent").strip()
    server.kill_agent()
    server.until(
        "systemd has started another agent",
        lambda: server.machine.run("systemctl show -P MainPID casemate-agent").strip() not in ("0", before),
    )
    server.until("it has joined again", server.joined)
    assert server.get("host", HOST)["status"]["bootId"] == server.machine.read("/proc/sys/kernel/random/boot_id")
