"""Two instances of one environment in real VMs: who they are, who their peers are, changes one after the other; and what
hangs on one of them while the agent or the manager is killed.

One boot of the pair serves all of it, and the change boots one of them once more.
"""

import json
import os
import re
import signal
import time

import pytest

from support.devfleet import DevFleet
from support.realfleet import traces_of_scope
from support.terminal import Terminal

pytestmark = pytest.mark.libvirt

#: Boots take half a minute on a quiet machine without KVM, and minutes on a busy one.
BOOT_S = 420.0
MEMORY = ("512Mi", "520Mi")
NAMES = ("pair-0", "pair-1")
#: A command that nobody else runs: its argument is found in the guest's list of processes.
LONELY = "86399"


def manifest(memory: str) -> str:
    container = {"name": "hello", "image": "localhost/hello:1", "imagePullPolicy": "Never"}
    spec = {
        "replicas": 2,
        "cpu": {"count": 1},
        "memory": {"size": memory},
        "image": "debian-13",
        "archives": ["hello"],
        "updateStrategy": {"type": "rolling", "maxUnavailable": 1},
        "pods": [
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "web"},
                "spec": {"hostNetwork": True, "containers": [container]},
            }
        ],
    }
    head = {"apiVersion": "casemate/v1", "kind": "Environment", "metadata": {"name": "pair"}, "spec": spec}
    return json.dumps(head)


@pytest.mark.timeout(2400)
def test_two_instances_of_one_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    dev = DevFleet(tmp_path_factory.mktemp("p"))
    try:
        dev.up("--no-example", timeout_s=1200)
        dev.run("apply", "-f", "-", stdin=manifest(MEMORY[0])).ok()
        _boot(dev)
        _know_one_another(dev)
        # Whoever sits at a console before somebody asks for a name there gets no answer.
        dev.until("there is a login", lambda: "login:" in dev.run("console", "pair-0", "--log").ok(), BOOT_S)
        for victim in ("agent", "manager"):
            _cut(dev, victim)
        _change_in_turn(dev)
    finally:
        down = dev.down()
    down.ok()
    assert traces_of_scope(dev.scope, dev.root) == []


def _boot(dev: DevFleet) -> None:
    """How far each has come is told on the way, and what was behind it does not come back."""
    words: dict[str, list[str]] = {name: [] for name in NAMES}
    give_up_s = time.monotonic() + BOOT_S
    while any(seen[-1:] != ["up"] for seen in words.values()):
        assert time.monotonic() < give_up_s, f"{words}\n{dev.tails()}"
        for name, seen in words.items():
            word = dev.get("instance", name).get("status", {}).get("boot", "")
            seen += [word] if word and [word] != seen[-1:] else []
    order = ["off", "firmware", "kernel"]
    for seen in words.values():
        early = [word for word in seen if word in order]
        assert early == sorted(early, key=order.index) and seen[: len(early)] == early, words
    if dev.get("instance", NAMES[0])["status"]["virtualisation"] == "tcg":
        # A boot in emulation takes the kernel far longer than the agent between two looks; on KVM it may be too quick.
        assert any("kernel" in seen for seen in words.values()), words


def _know_one_another(dev: DevFleet) -> None:
    """Ordinal, name and peers in each guest; and each reaches the other's pod by its name."""
    addresses = {name: dev.get("instance", name)["spec"]["nics"][0]["address"] for name in NAMES}
    assert len(set(addresses.values())) == 2
    for ordinal, name in enumerate(NAMES):
        peer = NAMES[1 - ordinal]
        told = dev.run("exec", "--vm", name, "--", "cat", "/run/casemate/instance.env", timeout_s=180).ok()
        assert told.splitlines() == [
            f'CASEMATE_INSTANCE="{name}"',
            'CASEMATE_ENVIRONMENT="pair"',
            f'CASEMATE_ORDINAL="{ordinal}"',
            f'CASEMATE_PEERS="{peer}={addresses[peer]}"',
        ]
        assert dev.run("exec", "--vm", name, "--", "hostname", timeout_s=180).ok() == f"{name}\n"
        hosts = dev.run("exec", "--vm", name, "--", "getent", "hosts", peer, timeout_s=180).ok()
        assert hosts.split() == [addresses[peer], peer]
        ask = ("exec", f"{name}.web", "--", "wget", "-q", "-O", "-", f"http://{addresses[peer]}:8080/")
        assert dev.run(*ask, timeout_s=180).ok() == f"Hello from {peer}\n"


def _cut(dev: DevFleet, victim: str) -> None:
    """A command on a terminal and a console, while one of ours is killed: both end with a word, and nothing stays behind."""
    pid = dev.get("instance", "pair-0")["status"]["pid"]
    command = Terminal(dev, "exec", "-it", "pair-0.web", "--", "sh")
    command.until(b"# ")
    command.type(f"sleep {LONELY}\r".encode())
    dev.until("it runs in the guest", lambda: _runs(dev, LONELY), 120)
    console = Terminal(dev, "console", "pair-0")
    console.until(b"Ctrl-] leaves")
    console.type(b"\r")
    console.until(b"login:")
    mine = dev.status()[f"{victim}Pid"]
    os.kill(mine, signal.SIGKILL)
    for sitting in (command, console):
        assert sitting.end() == 8, sitting.screen
        assert sitting.screen.count(b"error: ") == 1 and b"Traceback" not in sitting.screen, sitting.screen
        # By what was noticed first: the agent's end, the stream's, or that the command's exit code will not come.
        says = b"agent was stopped" if victim == "agent" else b"no manager answers"
        assert says in sitting.screen or b"exit code" in sitting.screen, sitting.screen
    dev.up("--no-example", timeout_s=BOOT_S)
    assert dev.status()[f"{victim}Pid"] != mine
    dev.run("wait", "env/pair", "--for", "ready", "--timeout", "120s", timeout_s=180).ok()
    assert dev.get("instance", "pair-0")["status"]["pid"] == pid, "the VM noticed"
    dev.until("nothing is left of the command", lambda: not _runs(dev, LONELY), 120)
    # Both begin anew.
    again = Terminal(dev, "exec", "-it", "pair-0.web", "--", "sh")
    again.until(b"# ")
    again.type(b"echo back-$((40 + 2)); exit 3\r")
    again.until(b"back-42")
    assert again.end() == 3
    console = Terminal(dev, "console", "pair-0")
    console.until(b"Ctrl-] leaves")
    console.type(b"\r")
    console.until(b"login:")
    console.type(b"\x1d")
    assert console.end() == 0


def _runs(dev: DevFleet, word: str) -> bool:
    """Whether a process of the guest has this argument."""
    listed = dev.run(
        "exec", "--vm", "pair-0", "--", "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '", timeout_s=180
    )
    return re.search(rf"\bsleep {word}\b", listed.ok()) is not None


def _change_in_turn(dev: DevFleet) -> None:
    """A change that needs a restart: the second is not touched until the first is up again, with all that was its own."""
    before = {name: dev.get("instance", name) for name in NAMES}
    dev.run("apply", "-f", "-", stdin=manifest(MEMORY[1])).ok()

    def story() -> list[tuple[str, str]]:
        told = []
        for line in dev.run("events", "env/pair", "-o", "json").ok().splitlines():
            event = json.loads(line)  # the same words are one event, counted
            told += [(event["reason"], event["regarding"]["name"])] * int(event.get("count", 1))
        return told if sum(reason == "Updating" for reason, _ in told) == 2 else []

    told = dev.until("it is the second's turn", story, BOOT_S)
    turns = [name for reason, name in told if reason == "Updating"]
    assert sorted(turns) == list(NAMES)
    second = told.index(("Updating", turns[1]))
    assert told[:second].count(("GuestUp", turns[0])) == 2, told
    after = dev.get("instance", turns[0])
    assert (after["spec"]["memory"], after["status"]["starts"]) == (MEMORY[1], 2)
    for part in (("metadata", "uid"), ("spec", "nics")):
        assert after[part[0]][part[1]] == before[turns[0]][part[0]][part[1]]
