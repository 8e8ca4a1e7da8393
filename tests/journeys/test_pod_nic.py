"""An interface of a real VM in a pod's network: there at the pod's first command, gone from the guest, and back when the pod ends.

One VM with Debian's kernel and podman; the interface is a virtio NIC on a bridge, since this machine may have no virtual functions.
"""

import json
from typing import Any

import pytest

from support.devfleet import DevFleet
from support.realfleet import free_subnet

from .test_hello import BOOT_S, answer

pytestmark = pytest.mark.libvirt

POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "du"},
    "spec": {
        "containers": [
            {
                "name": "app",
                "image": "localhost/hello:1",
                "imagePullPolicy": "Never",
                # what the first process sees when it begins, and then an answer for who asks on either interface
                "command": [
                    "/bin/sh",
                    "-c",
                    "busybox ip -o -4 addr show dev net1; mkdir -p /w; echo over net1 > /w/index.html;"
                    " exec busybox httpd -f -p 8080 -h /w",
                ],
            }
        ]
    },
}


def environment(*, inside: bool) -> str:
    nics: list[dict[str, Any]] = [{"network": "default"}, {"network": "second"} | ({"pod": "du"} if inside else {})]
    spec = {
        "cpu": {"count": 2},
        "memory": {"size": "1Gi"},
        "image": "debian-13",
        "archives": ["hello"],
        "nics": nics,
        "pods": [POD] if inside else [],
    }
    made = {"apiVersion": "casemate/v1", "kind": "Environment", "metadata": {"name": "nic"}, "spec": spec}
    return json.dumps(made)


def links(dev: DevFleet) -> dict[str, dict[str, Any]]:
    """The guest's own interfaces, by permanent address."""
    told = dev.run("exec", "--vm", "nic-0", "--", "ip", "-j", "-d", "addr", timeout_s=180).ok()
    return {each.get("permaddr") or each["address"]: each for each in json.loads(told) if each.get("address")}


@pytest.mark.timeout(2400)
def test_an_interface_goes_into_a_pod_and_comes_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    dev = DevFleet(tmp_path_factory.mktemp("i"))
    try:
        dev.up("--no-example", timeout_s=BOOT_S + 600)
        second = free_subnet(dev.port + 1).replace(".0.0/16", ".0.0/24")
        network = {"apiVersion": "casemate/v1", "kind": "Network", "metadata": {"name": "second"}}
        dev.run("apply", "-f", "-", stdin=json.dumps({**network, "spec": {"type": "nat", "subnet": second}})).ok()
        dev.run("apply", "-f", "-", stdin=environment(inside=True)).ok()
        dev.until("the pod runs", lambda: dev.get("pod", "nic-0.du").get("status", {}).get("ready"), BOOT_S)
        instance = dev.get("instance", "nic-0")
        own, given = instance["spec"]["nics"]

        first = dev.run("logs", "nic-0.du").ok()
        assert f" {given['address']}/24 " in first and "net1" in first, "it was there before the first command"
        assert answer(given["address"]) == "over net1\n", "from outside, over the bridge, to the pod"
        there = links(dev)
        assert own["mac"] in there and given["mac"] not in there, there
        shown = dev.run("exec", "nic-0.du", "--", "busybox", "ip", "-o", "link", timeout_s=180).ok()
        assert "net1" in shown and "eth0" in shown and given["mac"] in shown

        dev.run("apply", "-f", "-", stdin=environment(inside=False)).ok()
        dev.until("the pod is gone", lambda: not dev.get("pod", "nic-0.du"), 300)
        dev.until("the guest has it again", lambda: given["mac"] in links(dev), 120)

        def named() -> dict[str, Any]:
            found = links(dev).get(given["mac"], {})
            return found if found.get("operstate") == "DOWN" and not found["ifname"].startswith("net") else {}

        back = dev.until("its helper gave it its name again, and it is down", named, 120)
        assert not [a for a in back["addr_info"] if a["family"] == "inet"], "its address was the pod's"
        assert dev.get("instance", "nic-0")["status"]["pid"] == instance["status"]["pid"], "all of it in one process"
    finally:
        down = dev.down()
    down.ok()
