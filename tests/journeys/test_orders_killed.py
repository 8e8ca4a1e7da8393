"""An agent that is SIGKILLed at each step of a restart and of a rebuild, on real QEMU, and started again.

What was asked for is done once: one new process follows the old one, the new disk is the only one, and the operation
says so. Nothing boots: the steps are the same for a guest that does.
"""

import json
import signal
from dataclasses import replace
from typing import Any

import pytest

import support.mortal_agent
from support.realfleet import RealFleet, catches, empty_environment

pytestmark = pytest.mark.libvirt

RESTART = (
    "after-intent",
    "after-action Shutdown",
    "during-action Destroy",
    "after-action Destroy",
    "after-outcome 2",
    "during-action Start",
    "after-action Start",
)
REBUILD = (
    "after-action Destroy",
    "during-action CreateOverlay",
    "after-action CreateOverlay",
    "during-action Define",
    "after-action Define",
    "after-action RemoveDisks",
    "after-action Start",
)


def revive(fleet: RealFleet, usual: Any, step: str) -> None:
    """Start an agent that dies at ``step`` once it is told; the usual one where that is empty."""
    if not step:
        fleet.agent = usual
    else:
        argv = [usual.argv[0], str(support.mortal_agent.__file__), *usual.argv[3:]]
        mark = {"CASEMATE_TEST_DIE_AT": step, "CASEMATE_TEST_SPARED": ""}
        fleet.agent = replace(usual, argv=argv, environ=usual.environ | mark, process=None)
    since = fleet.agent.log.stat().st_size
    fleet.agent.start()
    log = fleet.agent.log
    fleet.until("its session is open", lambda: b"session open" in log.read_bytes()[since:], 60, every_s=0.1)


def operation(fleet: RealFleet, name: str) -> dict[str, Any]:
    """The status of an operation."""
    found: dict[str, Any] = fleet.get("operation", name)["status"]
    return found


@pytest.mark.timeout(1500)
def test_killed_at_each_step_it_is_done_once(real_fleet: RealFleet) -> None:
    fleet, usual = real_fleet, real_fleet.agent
    fleet.apply(empty_environment("calm"))
    fleet.apply(empty_environment("victim"))
    uids = {name: fleet.until_running(name)["metadata"]["uid"] for name in ("calm", "victim")}
    uid = uids["victim"]
    nics = fleet.instance("victim")["spec"]["nics"]
    calm = fleet.qemus()[uids["calm"]]
    fleet.agent.end()
    folder = fleet.state / "instances" / uid
    rebuilt = 0
    for verb, steps in (("restart", RESTART), ("rebuild", REBUILD)):
        for step in steps:
            where = f"{verb}, {step}"
            revive(fleet, usual, step)
            before = fleet.qemus()[uid]
            process = fleet.agent.process
            assert process is not None
            fleet.until("the agent hears", lambda pid=process.pid: catches(pid, signal.SIGUSR1), 60, every_s=0.02)  # type: ignore[misc]
            process.send_signal(signal.SIGUSR1)
            words = ("--yes",) if verb == "rebuild" else ()
            told = fleet.run(verb, "inst/victim-0", "--grace", "1s", "--no-wait", *words).ok()
            name = told.split("operation/")[1].split()[0]
            fleet.until(f"the agent dies: {where}", lambda: not fleet.agent.alive, 60, every_s=0.05)
            assert fleet.agent.end() == -signal.SIGKILL, f"{where}\n{fleet.tails()}"
            revive(fleet, usual, "")
            fleet.until(f"it has ended: {where}", lambda n=name: operation(fleet, n)["phase"] == "Done", 90)
            after = fleet.qemus()
            assert after[uid] != before, where
            assert after[uids["calm"]] == calm, f"{where}: another VM was touched"
            fleet.until(f"it is told: {where}", lambda p=after[uid]: fleet.instance("victim")["status"]["pid"] == p, 60)
            assert fleet.qemus()[uid] == after[uid], f"{where}: it was started twice"
            rebuilt += verb == "rebuild"
            disks = sorted(path.name for path in folder.glob("root*.qcow2"))
            assert disks == [f"root-{rebuilt}.qcow2" if rebuilt else "root.qcow2"], where
            fleet.agent.end()
    found = fleet.get("instance", "victim-0")
    assert (found["metadata"]["uid"], found["spec"]["nics"]) == (uid, nics)
    operations = json.loads(fleet.run("get", "operations", "-o", "json").ok())["items"]
    assert {o["status"]["phase"] for o in operations} == {"Done"}
    assert len(operations) == len(RESTART) + len(REBUILD)
    fleet.agent = usual
    fleet.agent.start()
    fleet.until_host_ready()
    fleet.run("pause", "victim", "--wait").ok()
    assert "paused" in fleet.virsh("domstate", uid)
    assert fleet.instance("victim")["status"]["phase"] == "Paused"
    fleet.run("resume", "victim").ok()
    fleet.until("it goes on", lambda: "running" in fleet.virsh("domstate", uid), 60)
    pid = fleet.qemus()[uid]
    fleet.run("reset", "inst/victim-0", "--timeout", "10s").ok()  # nothing boots, and that is told
    assert fleet.qemus()[uid] == pid
