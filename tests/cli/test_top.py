"""`casemate top` on a fleet of simulated hosts."""

import json
import time
from collections.abc import Iterator

import pytest
import yaml

from support.fleet import HOSTS, Fleet

MANIFEST = """\
apiVersion: casemate/v1
kind: Environment
metadata: {name: top-test}
spec:
  cpu: {count: 1, policy: dedicated}
  memory: {size: 256Mi}
  image: debian-13
"""


@pytest.fixture
def placed(fleet: Fleet) -> Iterator[str]:
    """The host of an instance with one dedicated CPU."""
    fleet.run("apply", "-f", "-", stdin=MANIFEST).ok()
    try:
        deadline_s = time.monotonic() + 20
        while True:
            host = fleet.run("get", "inst/top-test-0", "-o", "jsonpath={.spec.host}").out.strip()
            if host:
                break
            assert time.monotonic() < deadline_s, "not placed in time"
            time.sleep(0.2)
        yield host
    finally:
        fleet.run("delete", "env", "top-test", "--ignore-not-found").ok()


def test_the_fleet_in_text_and_in_other_forms(fleet: Fleet, placed: str) -> None:
    text = fleet.run("top", "fleet").ok()
    assert text.splitlines()[0] == f"fleet  {HOSTS} hosts"
    assert "threads" in text
    table = [line.split() for line in text.splitlines() if line.startswith(("HOST", "sim-"))]
    assert table[0][:3] == ["HOST", "STATE", "INSTANCES"]
    assert len(table) == HOSTS + 1
    plain = json.loads(fleet.run("top", "fleet", "-o", "json").ok())
    assert plain["groups"][0]["hosts"] == HOSTS
    threads = next(a for a in plain["groups"][0]["amounts"] if a["name"] == "threads")["amount"]
    assert threads["used"] + threads["free"] == threads["total"]
    assert yaml.safe_load(fleet.run("top", "fleet", "-o", "yaml").ok()) == plain
    wide = fleet.run("top", "fleet", "-o", "wide", "--hosts", "1").ok()
    assert "cells with CPUs" in wide
    assert sum(line.split()[1:2] == ["open"] for line in wide.splitlines()) == 1


def test_the_fleet_by_a_label(fleet: Fleet) -> None:
    fleet.run("label", "host", "sim-1", "top-rack=r1").ok()
    try:
        text = fleet.run("top", "fleet", "--by", "top-rack").ok()
        assert "\ntop-rack=r1  1 host\n" in text
        assert f"\nno top-rack  {HOSTS - 1} hosts\n" in text
        assert fleet.run("top", "fleet", "-l", "top-rack=r1").ok().startswith("fleet  1 host\n")
    finally:
        fleet.run("label", "host", "sim-1", "top-rack-").ok()
    assert fleet.run("top", "fleet", "-l", "a in (").code == 1


def test_a_host_and_who_holds_what(fleet: Fleet, placed: str) -> None:
    text = fleet.run("top", "host", placed).ok()
    assert text.startswith(f"{placed}  ")
    assert "A default/top-test-0  threads " in text
    assert "\x1b" not in text
    plain = json.loads(fleet.run("top", "host", f"host/{placed}", "-o", "json").ok())
    claim = json.loads(fleet.run("get", "placement", "top-test-0", "-o", "json").ok())["spec"]["claim"]
    held = [
        t.get("number", 0)
        for cell in plain["cells"]
        for cache in cell["caches"]
        for core in cache["cores"]
        for t in core["threads"]
        if t["state"] == "held"
    ]
    assert held[0] in claim["vcpus"], "the picture shows what the placement says"
    plain_text = fleet.run("top", "host", placed, PYTHONIOENCODING="ascii").ok()
    assert plain_text.isascii()
    rich = fleet.run("top", "host", placed, PYTHONIOENCODING="utf-8").ok()
    assert "█" in rich


def test_a_cordoned_host_takes_nothing_new(fleet: Fleet) -> None:
    fleet.run("cordon", "sim-2").ok()
    try:
        assert "takes nothing new: cordoned" in fleet.run("top", "host", "sim-2").ok()
        assert f"fleet  {HOSTS} hosts, 1 take nothing new" in fleet.run("top", "fleet").ok()
    finally:
        fleet.run("uncordon", "sim-2").ok()


def test_a_host_that_is_not_there(fleet: Fleet) -> None:
    missing = fleet.run("top", "host", "nobody")
    assert missing.code == 4
    assert "nobody" in missing.err
