"""restart, reboot, reset, rebuild, pause, resume, stop --force, protection and lifetime on a fleet of simulated hosts."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from support.fleet import Fleet

MANIFEST = """\
apiVersion: casemate/v1
kind: Environment
metadata: {{name: {name}}}
spec:
  cpu: {{count: 1}}
  memory: {{size: {memory}}}
  image: debian-13
  archives: [hello]
  {more}
"""


def manifest(name: str, more: str = "", memory: str = "256Mi") -> str:
    return MANIFEST.format(name=name, more=more, memory=memory)


@pytest.fixture
def name(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[str]:
    own = f"o-{abs(hash(request.node.name)) % 10**8}"
    yield own
    fleet.run("delete", "env", own, "--ignore-not-found").ok()


def make(fleet: Fleet, name: str, more: str = "", memory: str = "256Mi") -> None:
    fleet.run("apply", "-f", "-", stdin=manifest(name, more, memory)).ok()
    fleet.run("wait", f"env/{name}", "--for", "ready", "--timeout", "60s").ok()


def status(fleet: Fleet, instance: str) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(fleet.run("get", "inst", instance, "-o", "json").ok())["status"]
    return shown


def test_restart_reboot_reset_and_rebuild(fleet: Fleet, name: str) -> None:
    make(fleet, name)
    vm = f"{name}-0"
    fresh = json.loads(fleet.run("get", "inst", vm, "-o", "json").ok())
    before = fresh["status"]
    for verb, same_process in (("restart", False), ("reboot", True), ("reset", True), ("rebuild", False)):
        words = ("--yes",) if verb == "rebuild" else ()
        told = fleet.run(verb, f"inst/{vm}", *words, "--timeout", "60s").ok()
        assert told.startswith(f"instance/{vm}: {verb} done: "), told
        fleet.run("wait", f"inst/{vm}", "--for", "ready", "--timeout", "60s").ok()
        after = status(fleet, vm)
        assert (after["pid"] == before["pid"]) is same_process, verb
        assert after["guestBootId"] != before["guestBootId"], verb
        before = after
    now = json.loads(fleet.run("get", "inst", vm, "-o", "json").ok())
    assert now["metadata"]["uid"] == fresh["metadata"]["uid"]
    assert now["spec"]["nics"] == fresh["spec"]["nics"]
    table = fleet.run("get", "operations", "-o", "json").ok()
    mine = [o for o in json.loads(table)["items"] if o["spec"]["target"]["name"] == vm]
    assert sorted(o["spec"]["verb"] for o in mine) == ["reboot", "rebuild", "reset", "restart"]
    assert {o["status"]["phase"] for o in mine} == {"Done"}
    story = fleet.run("describe", "operation", mine[0]["metadata"]["name"]).ok()
    assert vm in story and "Done" in story
    events = fleet.run("events", f"inst/{vm}").ok()
    assert "RebootAsked" in events and "RebootDone" in events


def test_pause_resume_and_stop_by_force(fleet: Fleet, name: str) -> None:
    make(fleet, name)
    pid = status(fleet, f"{name}-0")["pid"]
    fleet.run("pause", name, "--wait", "--timeout", "60s").ok()
    assert status(fleet, f"{name}-0")["phase"] == "Paused"
    refused = fleet.run("restart", name)
    assert refused.code == 7 and "run: paused" in refused.err
    fleet.run("resume", name, "--wait", "--timeout", "60s").ok()
    assert status(fleet, f"{name}-0")["pid"] == pid
    assert fleet.run("stop", name, "--force", "--grace", "3s").code == 1
    fleet.run("stop", name, "--force", "--wait", "--timeout", "60s").ok()
    operations = json.loads(fleet.run("get", "ops", "-o", "json").ok())["items"]
    (stop,) = [o for o in operations if o["spec"]["target"]["name"] == f"{name}-0"]
    assert (stop["spec"]["verb"], stop["spec"]["parameters"]) == ("stop", {"graceS": 0})


def test_no_wait_answers_at_once_and_one_operation_excludes_another(fleet: Fleet, name: str) -> None:
    make(fleet, name)
    told = fleet.run("restart", name, "--no-wait").ok()
    assert "was asked for" in told and f"operation/{name}-0.restart-" in told
    other = fleet.run("reset", name, "--no-wait")
    assert other.code in (0, 7)
    operation = told.split("operation/")[1].split()[0]
    fleet.run("wait", f"operation/{operation}", "--for", "phase=Done", "--timeout", "60s").ok()


def test_a_rebuild_asks_first(fleet: Fleet, name: str) -> None:
    done = fleet.run("rebuild", name)
    assert done.code == 1 and "--yes" in done.err
    assert fleet.run("rebuild", name, "--yes").code == 4


def test_protected_and_too_short_a_life_are_refused(fleet: Fleet, name: str) -> None:
    make(fleet, name, "protected: true")
    refused = fleet.run("delete", "env", name)
    assert refused.code == 7 and "protected" in refused.err
    make(fleet, name, "lifetime: 72h")
    assert fleet.run("get", "env", name, "-o", "jsonpath={.spec.lifetime}").ok() == "3d\n"
    bad = fleet.run("apply", "-f", "-", stdin=manifest(name, "lifetime: 5s"))
    assert bad.code == 1 and "spec.lifetime" in bad.err and "72h" in bad.err


def test_a_rolling_update_is_carried_out(fleet: Fleet, name: str) -> None:
    strategy = "replicas: 3\n  updateStrategy: {type: rolling, maxUnavailable: 1}"
    make(fleet, name, strategy)
    before = [status(fleet, f"{name}-{n}")["pid"] for n in range(3)]
    fleet.run("apply", "-f", "-", stdin=manifest(name, strategy, memory="384Mi")).ok()
    for n in range(3):
        where = f"inst/{name}-{n}"
        fleet.run("wait", where, "--for", "jsonpath={.spec.memory}=384Mi", "--timeout", "90s", timeout_s=100).ok()
        fleet.run("wait", where, "--for", "ready", "--timeout", "90s", timeout_s=100).ok()
    assert not set(before) & {status(fleet, f"{name}-{n}")["pid"] for n in range(3)}


def test_migrate_moves_a_running_instance(fleet: Fleet, name: str) -> None:
    make(fleet, name)
    vm = f"{name}-0"
    fresh = json.loads(fleet.run("get", "inst", vm, "-o", "json").ok())
    here = fresh["spec"]["host"]
    told = fleet.run("migrate", f"inst/{vm}").ok()
    assert told.startswith(f"instance/{vm}: migrate done: moved from {here} to "), told
    fleet.run("wait", f"inst/{vm}", "--for", "ready", "--timeout", "60s").ok()
    now = json.loads(fleet.run("get", "inst", vm, "-o", "json").ok())
    assert now["spec"]["host"] != here and now["status"]["guestBootId"] == fresh["status"]["guestBootId"]
    assert now["metadata"]["uid"] == fresh["metadata"]["uid"] and now["spec"]["nics"] == fresh["spec"]["nics"]
    operations = json.loads(fleet.run("get", "operations", "-o", "json").ok())["items"]
    (mine,) = [o for o in operations if o["spec"]["target"]["name"] == vm]
    assert (mine["status"]["host"], mine["status"]["toHost"]) == (here, now["spec"]["host"])
    events = fleet.run("events", f"inst/{vm}").ok()
    assert "MigrateAsked" in events and "MigrateDone" in events
    there = now["spec"]["host"]
    refused = fleet.run("migrate", f"inst/{vm}", "--to", there)
    assert refused.code != 0 and f"cannot move to {there}: it is there already" in refused.err
    fleet.run("migrate", f"inst/{vm}", "--to", here).ok()
    fleet.run("stop", name).ok()
    refused = fleet.run("migrate", f"inst/{vm}")
    assert refused.code != 0 and "should not run" in refused.err
