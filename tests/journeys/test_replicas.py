"""Two instances of one environment in real VMs: how far they have booted, who they are, and who their peers are."""

import json
import time

import pytest

from support.devfleet import DevFleet
from support.realfleet import traces_of_scope

pytestmark = pytest.mark.libvirt

#: Boots take half a minute on a quiet machine without KVM, and minutes on a busy one.
BOOT_S = 420.0
NAMES = ("pair-0", "pair-1")


def manifest() -> str:
    container = {"name": "hello", "image": "localhost/hello:1", "imagePullPolicy": "Never"}
    spec = {
        "replicas": 2,
        "cpu": {"count": 1},
        "memory": {"size": "512Mi"},
        "image": "debian-13",
        "archives": ["hello"],
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
        dev.run("apply", "-f", "-", stdin=manifest()).ok()
        _boot(dev)
        _know_one_another(dev)
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
