"""Parts of hosts as tables: virtual functions and devices with their holders, and the summary of `describe host`."""

import json

from casemate_cli.parts import _rows, summary
from casemate_core.topology_loaders import from_line
from support.fleet import Fleet

HOST = from_line("2s 2k/c 2t 8G 2M=256 hk=1 off=7 vf=1x2@fronthaul!vlan+trust dev=1xfec name=edge")
PORT = HOST.pfs[0].mac


def test_each_virtual_function_is_a_row_with_its_holder() -> None:
    rows = list(_rows("vfs", "edge", HOST, {("edge", f"{PORT}/1"): "du-0"}))
    assert [row.cells for row in rows] == [
        ("edge", PORT, "0", "fronthaul", "0", "-"),
        ("edge", PORT, "1", "fronthaul", "0", "du-0"),
    ]
    assert rows[0].wide[0] == "trust,vlan"
    assert rows[1].plain["holder"] == "du-0" and rows[1].plain["iommuGroup"] > 0


def test_each_device_is_a_row_with_its_labels() -> None:
    (row,) = _rows("devices", "edge", HOST, {})
    assert row.cells == ("edge", HOST.devices[0].id, "type=fec", "0", "-")


def test_a_host_in_lines() -> None:
    lines = list(summary(HOST))
    assert lines[0].startswith("cell 0: 2 cores (threads 0-1,4-5), 4Gi, 128 pages of 2Mi")
    assert "offline threads: 7" in lines
    assert any(line.startswith(f"port {PORT}: 2 VFs on fronthaul, can trust,vlan, cell 0") for line in lines)
    assert any("type=fec" in line and "IOMMU group" in line for line in lines)


def test_the_verbs(fleet: Fleet) -> None:
    assert fleet.run("get", "vfs", "--of", "nobody").code == 4
    assert fleet.run("get", "devices", "x").code == 1
    assert fleet.run("get", "vfs", "-o", "name").code == 1
    assert isinstance(json.loads(fleet.run("get", "vfs", "-o", "json").ok())["items"], list)
    host = fleet.run("get", "hosts", "-o", "name").ok().split()[0]
    assert "Parts:\n  cell 0:" in fleet.run("describe", host).ok()
