"""The server itself, and our agent in it as a service."""

import json

import pytest

from support.hostlab.server import HOST, Server
from support.hosts import FOLDER

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600)]


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


def test_the_server_reads_as_it_was_recorded(server: Server) -> None:
    """tests/hosts/recorded/lab.json is this server: what the loaders read of processors, cells and PCI is the same today."""
    script = "import json; from pathlib import Path; from casemate_agent.drivers.hostfiles import collect; "
    found = json.loads(
        server.machine.run(f"python3 -c '{script}print(json.dumps(collect(Path(\"/\"))))'", timeout_s=60)
    )
    recorded = json.loads((FOLDER / "recorded" / "lab.json").read_text())["files"]
    # Memory moves by what the kernel keeps; the port that is cut has other functions only if the settings say so.
    names = {name for name in recorded if not name.endswith("meminfo")}
    assert {name: found.get(name, "").strip() for name in names} == {name: recorded[name].strip() for name in names}
