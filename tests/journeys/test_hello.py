"""The first walk: one command to a pod in a real VM, its states, logs and end; and a private fleet that leaves nothing.

One boot serves as many claims as it can, because an emulated guest takes its time.
"""

import json
import os
import shlex
import shutil
import signal
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from casemate_agent import sandbox as sandboxes
from support.devfleet import DevFleet
from support.fleet import free_port
from support.realfleet import nft, traces_of, traces_of_scope
from support.terminal import Terminal

pytestmark = pytest.mark.libvirt

HELLO = Path(__file__).resolve().parents[2] / "examples/hello.yaml"
#: Boots take half a minute on a quiet machine without KVM, and minutes on a busy one.
BOOT_S = 420.0


def answer(address: str, port: str = ":8080") -> str:
    """What the pod says over HTTP, from the host over the bridge; empty where it does not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}{port}/", timeout=60) as reply:
            return str(reply.read().decode())
    except (urllib.error.URLError, OSError):
        return ""


@pytest.mark.timeout(2400)
def test_one_command_to_a_pod_in_a_vm_and_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    dev = DevFleet(tmp_path_factory.mktemp("h"))
    try:
        began_s = time.monotonic()
        up = dev.up("--timeout", f"{BOOT_S:.0f}s", timeout_s=BOOT_S + 600)
        first_s = time.monotonic() - began_s
        assert "Hello from hello-0" in up.out
        _adopts(dev, first_s)
        before = _states(dev)
        address = before["spec"]["nics"][0]["address"]
        assert answer(address) == "Hello from hello-0\n"
        _metrics(dev, before)
        _bundle(dev, before)
        _logs(dev)
        _sides(dev)
        _a_second_pod(dev, before)
        _reboots(dev, before)
        _stop_and_start(dev, before)
        _delete(dev, before)
    finally:
        down = dev.down()
    down.ok()
    assert traces_of_scope(dev.scope, dev.root) == []
    assert os.listdir(dev.root.parent) == ["state"], "nothing but the user's own key, which casemate ssh made"


def _adopts(dev: DevFleet, first_s: float) -> None:
    """A second `up` starts nothing."""
    before, qemus = dev.status(), dev.qemus()
    began_s = time.monotonic()
    again = dev.up()
    took_s = time.monotonic() - began_s
    assert "Hello from hello-0" in again.out
    assert dev.status() == before
    assert dev.qemus() == qemus
    assert took_s < min(first_s, 60), f"the second up took {took_s:.0f} s, the first {first_s:.0f} s"


def _states(dev: DevFleet) -> dict[str, Any]:
    """What `get -o json` says of a fleet where all is well, and of what is not there. The instance."""
    environment = dev.get("env", "hello")
    assert environment["status"]["phase"] == "Ready"
    host = dev.get("host", "dev")
    assert host["status"]["phase"] == "Ready" and host["status"]["instances"] == 1
    instance = dev.get("instance", "hello-0")
    status = instance["status"]
    assert status["phase"] == "Ready" and status["pods"] == ["web"] and status["podsReady"] == 1
    assert status["starts"] == 1
    assert {instance["metadata"]["uid"]: int(status["pid"])} == dev.qemus()
    pod = dev.get("pod", "hello-0.web")
    assert (pod["status"]["phase"], pod["status"]["ready"]) == ("Running", True)
    assert [c["state"] for c in pod["status"]["containers"]] == ["running"]
    assert dev.run("wait", "env/hello", "--for", "ready", "--timeout", "30s").code == 0
    assert dev.run("get", "env", "nobody").code == 4
    assert dev.run("diff", "-f", str(HELLO)).code == 0
    assert dev.run("wait", "env/hello", "--for", "phase=Stopped", "--timeout", "1s").code == 6
    story = dev.run("describe", "env/hello").ok().partition("Events:")[2]
    head = next(line for line in story.splitlines() if "request r-" in line)
    cause = head.split()[1].rstrip(":")
    told = json.loads("[" + ",".join(dev.run("events", "--cause", cause, "-o", "json").ok().splitlines()) + "]")
    assert {event["source"] for event in told} == {"manager", "dev"}
    steps = [event["reason"] for event in told]
    for reason in ("Created", "Placed", "ImageFetched", "Started", "GuestUp", "PodsApplied", "AsAsked"):
        assert reason in steps, steps
        assert reason in story
    assert "s after its start" in story and "debian-13 in " in story
    return instance


def _bundle(dev: DevFleet, instance: dict[str, Any]) -> None:
    """One file, with the domain as libvirt runs it and without the pod's manifest that its metadata carries."""
    path = dev.root.parent / "bundle.tar.gz"
    told = dev.run("support-bundle", "-o", str(path), timeout_s=120)
    assert told.ok().strip() == str(path)
    with tarfile.open(path) as archive:
        found = {m.name.partition("/")[2]: archive.extractfile(m).read().decode() for m in archive.getmembers()}  # type: ignore[union-attr]
    path.unlink()
    summary = json.loads(found["summary.json"])
    assert (summary["answered"], summary["silent"]) == (["dev"], {})
    domain = next(text for name, text in found.items() if "/domains/" in name)
    assert f"<uuid>{instance['metadata']['uid']}</uuid>" in domain and "<metadata />" in domain
    doctor = json.loads(found["hosts/dev/doctor.json"])
    assert {f["check"]: f["verdict"] for f in doctor["findings"]}["libvirt"] == "ok"
    assert "libvirt_domain_info_cpu_time_seconds_total" in found["hosts/dev/metrics.txt"]
    assert "FetchImage" in found["hosts/dev/log.txt"]
    # What the pod runs is nobody's business: it is in the spec, in the ledger and in libvirt's metadata.
    assert "serving on port" not in "".join(found.values())


def _metrics(dev: DevFleet, instance: dict[str, Any]) -> None:
    """What the agent and the manager measure of a VM that has booted and answered."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    told = json.loads(dev.run("dev", "status", "-o", "json", "--dir", str(dev.root)).ok())
    seen: dict[str, float] = {}
    for name in ("manager", "agent"):
        with opener.open(told[f"{name}Metrics"], timeout=60) as reply:
            for line in reply.read().decode().splitlines():
                if not line.startswith("#"):
                    key, _, value = line.rpartition(" ")
                    seen[key] = float(value)

    def of(name: str, *labels: str) -> float:
        found = [
            value for key, value in seen.items() if key.split("{")[0] == name and all(label in key for label in labels)
        ]
        assert len(found) == 1, (name, labels, found)
        return found[0]

    domain = next(key.split('domain="')[1].split('"')[0] for key in seen if key.startswith("casemate_domain_info"))
    assert domain.endswith(instance["metadata"]["uid"][:8])
    assert of("libvirt_up") == 1
    assert of("libvirt_domain_info_virtual_cpus", domain) == 2
    assert of("libvirt_domain_info_maximum_memory_bytes", domain) == 2**30
    assert of("libvirt_domain_info_cpu_time_seconds_total", domain) > 1
    assert of("libvirt_domain_block_stats_read_bytes_total", domain, 'target_device="vda"') > 2**20
    assert of("libvirt_domain_interface_stats_receive_bytes_total", domain, 'source_bridge="cmbr-') > 0
    assert of("casemate_actions_total", 'action="Start"', 'outcome="done"') == 1
    assert of("casemate_ledger_sync_duration_seconds_count") > 0
    assert of("casemate_libvirt_call_duration_seconds_count", 'call="define domain"') > 0
    assert of("casemate_placements_total") == 1
    assert [value for key, value in seen.items() if key == "casemate_placements_refused_total"] == [0]


def _logs(dev: DevFleet) -> None:
    assert "hello: serving on port 8080 as hello-0" in dev.run("logs", "hello", timeout_s=180).ok()


def _sides(dev: DevFleet) -> None:
    """Commands, terminals, files, ports, SSH and the console of a real VM: what simulated guests only play."""
    listed = dev.run(*documented("casemate exec --vm hello-0 -- podman ps"), timeout_s=180).ok()
    assert listed.count("localhost/hello:1") >= 1
    terminal = Terminal(dev, *documented("casemate exec -it hello-0.web -- sh"))
    terminal.resize(31, 97)
    terminal.until(b"# ")
    terminal.type(b"stty size; exit 7\r")
    terminal.until(b"31 97")
    assert terminal.end() == 7
    site = dev.root.parent / "site"
    (site / "sub").mkdir(parents=True)
    (site / "sub/run").write_bytes(os.urandom(300_000))
    (site / "sub/run").chmod(0o750)
    try:
        dev.run("cp", str(site), "hello:/tmp", timeout_s=180).ok()
        assert "-rwxr-x---" in dev.run("exec", "hello", "--", "ls", "-l", "/tmp/site/sub", timeout_s=180).ok()
        dev.run("cp", "hello-0.web:/tmp/site/sub/run", str(site / "back"), timeout_s=180).ok()
        assert (site / "back").read_bytes() == (site / "sub/run").read_bytes()
        assert (site / "back").stat().st_mode & 0o777 == 0o750
    finally:
        shutil.rmtree(site)
    for name in ("hello", "hello-0.web"):
        forward = dev.start("port-forward", name, "0:8080")
        try:
            assert forward.stdout
            assert answer(forward.stdout.readline().split()[0], "") == "Hello from hello-0\n"
        finally:
            forward.terminate()
            assert forward.wait(60) == 0
            assert forward.stdout
            forward.stdout.close()
    told = dev.run("ssh", "hello-0", "--", "-o", "BatchMode=yes", "uname -n; exit 5", timeout_s=180)
    assert (told.code, told.out) == (5, "hello-0\n"), told.err
    _documented_logins(dev)
    first, second = Terminal(dev, "console", "hello"), Terminal(dev, "console", "hello-0")
    for sitting in (first, second):
        sitting.until(b"Ctrl-] leaves")
    first.type(b"\r")
    for sitting in (first, second):
        sitting.until(b"login:")
        sitting.type(b"\x1d")
        assert sitting.end() == 0


def documented(command: str) -> list[str]:
    """The words of a command as a document has it, which `test_docs_commands` finds here."""
    return shlex.split(command)[1:]


def _documented_logins(dev: DevFleet) -> None:
    """The commands of the documents that need an sshd."""
    told = dev.run(*documented("casemate ssh hello-0 -- uname -a"), timeout_s=180).ok()
    assert told.startswith("Linux hello-0 ")
    sitting = Terminal(dev, *documented("casemate ssh hello"))
    sitting.until(b"# ")
    sitting.type(b"echo on-$((40 + 2)); exit 4\r")
    sitting.until(b"on-42")
    assert sitting.end() == 4
    port = free_port()
    words = documented("casemate ssh hello -- -L 8080:127.0.0.1:8080 -N")
    led = dev.start(*(word.replace("8080:127", f"{port}:127") for word in words))
    try:
        dev.until("the port is led through", lambda: answer("127.0.0.1", f":{port}"), 120)
        assert answer("127.0.0.1", f":{port}") == "Hello from hello-0\n"
    finally:
        led.terminate()
        led.wait(60)
        assert led.stdout
        led.stdout.close()


def _hello(*pods: dict[str, Any]) -> str:
    """The example with other pods beside its own."""
    import yaml

    manifest = yaml.safe_load(HELLO.read_text())
    manifest["spec"]["pods"] += pods
    return json.dumps(manifest)


def _a_second_pod(dev: DevFleet, before: dict[str, Any]) -> None:
    """A pod added while its VM runs: it fails as it should, and the first pod does not notice."""
    web = dev.get("pod", "hello-0.web")["status"]["containers"]
    container = {
        "name": "main",
        "image": "localhost/hello:1",
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", "echo about to fail; exit 3"],
    }
    job = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "job"},
        "spec": {"restartPolicy": "Never", "hostNetwork": True, "containers": [container]},
    }
    assert dev.run("diff", "-f", "-", stdin=_hello(job)).code == 3
    dev.run("apply", "-f", "-", stdin=_hello(job)).ok()

    def failed() -> dict[str, Any]:
        pod = dev.get("pod", "hello-0.job")
        return pod if pod.get("status", {}).get("phase") == "Failed" else {}

    pod = dev.until("the pod that exits 3 is Failed", failed, 300)
    assert [(c["state"], c["exitCode"]) for c in pod["status"]["containers"]] == [("terminated", 3)]
    events = [json.loads(line) for line in dev.run("events", "-o", "json").ok().splitlines()]
    assert any(e["reason"] == "ContainerExited" and "exit code 3" in e["message"] for e in events), events
    assert "about to fail" in dev.run("logs", "hello-0.job", timeout_s=180).ok()
    instance = dev.get("instance", "hello-0")
    assert instance["status"]["pid"] == before["status"]["pid"], "the VM was restarted for a pod"
    assert dev.get("pod", "hello-0.web")["status"]["containers"] == web, "the other pod was touched"
    assert answer(before["spec"]["nics"][0]["address"]) == "Hello from hello-0\n"
    dev.run("apply", "-f", "-", stdin=_hello()).ok()
    dev.until("the pod is gone", lambda: not dev.get("pod", "hello-0.job"), 120)
    dev.run("wait", "env/hello", "--for", "ready", "--timeout", "120s", timeout_s=150).ok()


def _reboots(dev: DevFleet, before: dict[str, Any]) -> None:
    """The guest boots anew in the same process, though the agent is killed meanwhile; and what is told of its boot."""
    status = before["status"]
    told = dev.run("reboot", "inst/hello-0", "--timeout", f"{BOOT_S:.0f}s", "--no-wait").ok()
    operation = told.split("operation/")[1].split()[0]
    dev.until("it was asked", lambda: dev.get("operation", operation)["status"].get("started"), 60)
    agent = dev.status()["agentPid"]
    os.kill(agent, signal.SIGKILL)
    dev.until("the agent is dead", lambda: dev.status()["agentPid"] is None, 30)
    dev.up(timeout_s=BOOT_S + 300)
    assert dev.status()["agentPid"] != agent
    ended = dev.until("the reboot has ended", lambda: _ended(dev.get("operation", operation)["status"]), BOOT_S)
    assert ended["phase"] == "Done", ended
    after = dev.until("it is Ready again", lambda: _phase(dev, "Ready"), BOOT_S)["status"]
    assert after["guestBootId"] != status["guestBootId"]
    assert (after["pid"], after["starts"]) == (status["pid"], status["starts"])
    assert f"boot {after['guestBootId']} follows {status['guestBootId']}" in ended["message"]
    assert after["boot"] == "up"
    log = dev.run("console", "hello", "--log").ok()
    assert "hello-0 login:" in log and "reboot: Restarting system" in log, log
    assert dev.until("it answers again", lambda: answer(before["spec"]["nics"][0]["address"]), 60)


def _ended(status: dict[str, Any]) -> dict[str, Any]:
    return status if status["phase"] in ("Done", "Failed", "Unknown") else {}


def _stop_and_start(dev: DevFleet, before: dict[str, Any]) -> None:
    """Off and on again it is the same: uid, MAC, address."""
    address = before["spec"]["nics"][0]["address"]
    dev.run("stop", "hello", timeout_s=300).ok()
    stopped = dev.until("it is Stopped", lambda: _phase(dev, "Stopped"), 180)
    assert not int(stopped["status"].get("pid", 0)) and dev.qemus() == {}
    events = [json.loads(line) for line in dev.run("events", "-o", "json").ok().splitlines()]
    assert not [e for e in events if e["reason"] == "Destroyed"], (
        f"the guest did not power off when it was asked\n{dev.tails()}"
    )
    assert answer(address) == ""
    assert dev.run("start", "hello", timeout_s=300).code == 0
    started = dev.until("it is Ready again", lambda: _phase(dev, "Ready"), BOOT_S)
    assert started["metadata"]["uid"] == before["metadata"]["uid"]
    assert started["spec"]["nics"] == before["spec"]["nics"]
    assert started["status"]["starts"] == 2
    assert started["status"]["guestBootId"] != before["status"]["guestBootId"]
    assert dev.until("it answers again", lambda: answer(address), 60) == "Hello from hello-0\n"


def _phase(dev: DevFleet, phase: str) -> dict[str, Any]:
    instance = dev.get("instance", "hello-0")
    return instance if instance["status"]["phase"] == phase else {}


def _delete(dev: DevFleet, before: dict[str, Any]) -> None:
    uid = before["metadata"]["uid"]
    sandbox = sandboxes.status(dev.root / "virt")
    assert sandbox is not None
    assert traces_of(uid, sandbox.scope, dev.root, {uid}, set(dev.qemus())) != [], "nothing is found of what runs"
    assert before["spec"]["nics"][0]["address"] in nft("list", "ruleset")
    dev.run("delete", "-f", str(HELLO), "--timeout", "3m", timeout_s=240).ok()
    assert dev.run("get", "env", "hello").code == 4
    assert dev.get("instance", "hello-0") == {} and dev.get("pod", "hello-0.web") == {}
    assert traces_of(uid, sandbox.scope, dev.root, set(), set(dev.qemus())) == []
    assert dev.get("network", "default")["status"].get("addressesUsed", 0) == 0
    assert dev.get("host", "dev")["status"].get("instances", 0) == 0
