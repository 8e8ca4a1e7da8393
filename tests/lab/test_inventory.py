"""What the agent finds in a server, against what the kernel says."""

import json

import pytest

from support.hostlab.machine import PORTS
from support.hostlab.server import HOST, Server

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600)]


def test_the_topology_is_exact(server: Server) -> None:
    topology = server.get("host", HOST)["status"]["topology"]
    assert [cell["distances"] for cell in topology["cells"]] == [[10, 21], [21, 10]]
    assert [[(p["page_kib"], p["count"]) for p in cell["pools"]] for cell in topology["cells"]] == [
        [(2048, 64)],
        [(2048, 128)],
    ]
    assert sorted(core["threads"] for core in topology["cores"]) == ["0-1", "2-3", "4-5", "6-7"]
    assert {core["threads"]: core["cell"] for core in topology["cores"]} == {"0-1": 0, "2-3": 0, "4-5": 1, "6-7": 1}
    ports = {port["mac"]: port for port in topology["pfs"]}
    assert set(ports) == set(PORTS)
    assert [ports[mac]["place"]["cell"] for mac in PORTS] == [0, 1]
    assert [len(ports[mac]["vfs"]) for mac in PORTS] == [4, 2]
    assert ports[PORTS[0]]["capabilities"] == ["rate", "spoofchk", "trust", "vlan"]
    groups = [vf["iommu_group"] for port in ports.values() for vf in port["vfs"]]
    assert len(set(groups)) == 6 and min(groups) >= 0
    assert {tuple(map(tuple, (label for label in d["labels"]))) for d in topology["devices"]} == {
        (("type", "card"),),
        (("type", "probe"),),
    }
    assert [d["place"]["cell"] for d in topology["devices"] if d["labels"] == [["type", "card"]]] == [0, 1]


def test_parts_are_shown(server: Server) -> None:
    rows = server.casemate("get", "vfs", "--of", HOST, "-o", "wide").ok().splitlines()
    assert len(rows) == 1 + 6 and "CAN" in rows[0]
    assert len(server.casemate("get", "devices").ok().splitlines()) == 1 + 3
    assert "huge" not in server.casemate("describe", "host", HOST).ok()


def test_a_thread_that_goes_offline_and_a_pool_that_shrinks_are_events(server: Server) -> None:
    pool = "/sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages"
    server.machine.run(f"echo 0 > /sys/devices/system/cpu/cpu7/online; echo 100 > {pool}")
    try:
        server.until("both are told", lambda: {"ThreadsOffline", "PagePoolShrank"} <= events(server))
        server.until("the manager knows", lambda: server.get("host", HOST)["status"]["topology"]["offline"] == "7")
    finally:
        server.machine.run(f"echo 1 > /sys/devices/system/cpu/cpu7/online; echo 128 > {pool}")
    server.until("both are back", lambda: {"ThreadsOnline", "PagePoolGrew"} <= events(server))
    server.until("the manager knows", lambda: not server.get("host", HOST)["status"]["topology"].get("offline"))


def events(server: Server) -> set[str]:
    """Reasons of the events about the host."""
    rows = server.casemate("events", f"host/{HOST}", "-o", "json").ok()
    return {json.loads(row)["reason"] for row in rows.splitlines()}
