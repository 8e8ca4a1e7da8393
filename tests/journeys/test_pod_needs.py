"""From spec to container on a real VM: a device by CDI, a volume of huge pages, CPUs of its own, and refusals at apply.

One boot serves all: an emulated guest takes its time. The device is a made one, declared by a recipe that cloud-init
writes; that the pod waits for it and then runs is part of the claim.
"""

import json
from typing import Any

import pytest

from support.devfleet import DevFleet

pytestmark = pytest.mark.libvirt

BOOT_S = 420.0
RECIPE = {
    "kind": "example.com/npu",
    "nodes": [{"path": "/dev/npu{n}", "from": "/dev/null"}],
    "mounts": ["/etc/debian_versio?"],
    "env": ["NPU=made"],
}
OWN = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "own"},
    "spec": {
        "containers": [
            {
                "name": "app",
                "image": "localhost/hello:1",
                "imagePullPolicy": "Never",
                # what the process sees when it begins, before anything could be set on it
                "command": ["/bin/sh", "-c", "busybox grep Cpus_allowed_list /proc/self/status; exec sleep 100000"],
                "resources": {
                    "limits": {"cpu": 1, "memory": "64Mi", "hugepages-2Mi": "8Mi", "example.com/npu": 1},
                },
                "volumeMounts": [{"name": "pages", "mountPath": "/pages"}],
            }
        ],
        "volumes": [{"name": "pages", "emptyDir": {"medium": "HugePages-2Mi", "sizeLimit": "4Mi"}}],
    },
}
OTHER = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "other"},
    "spec": {
        "hostNetwork": True,
        "containers": [
            {
                "name": "app",
                "image": "localhost/hello:1",
                "imagePullPolicy": "Never",
                "command": ["/bin/sleep", "100000"],
            }
        ],
    },
}


def environment(*pods: dict[str, Any]) -> str:
    spec = {
        "cpu": {"count": 2},
        "memory": {"size": "1Gi"},
        "image": "debian-13",
        "archives": ["hello"],
        "pods": list(pods),
        "userData": "#cloud-config\n"
        + json.dumps({"write_files": [{"path": "/etc/casemate/devices.d/npu.json", "content": json.dumps(RECIPE)}]}),
    }
    made = {"apiVersion": "casemate/v1", "kind": "Environment", "metadata": {"name": "needs"}, "spec": spec}
    return json.dumps(made)


@pytest.mark.timeout(2400)
def test_devices_pages_and_cpus_reach_the_container(tmp_path_factory: pytest.TempPathFactory) -> None:
    dev = DevFleet(tmp_path_factory.mktemp("n"))
    try:
        dev.up("--no-example", timeout_s=BOOT_S + 600)
        _refused_at_apply(dev)
        dev.run("apply", "-f", "-", stdin=environment(OWN, OTHER)).ok()
        for name in ("own", "other"):
            dev.until(
                f"{name} runs", lambda n=name: dev.get("pod", f"needs-0.{n}").get("status", {}).get("ready"), BOOT_S
            )
        _device(dev)
        _pages(dev)
        _cpus(dev)
    finally:
        down = dev.down()
    down.ok()


def _refused_at_apply(dev: DevFleet) -> None:
    greedy = json.loads(json.dumps(OWN))
    greedy["spec"]["containers"][0]["resources"]["limits"] |= {"cpu": 2, "nvidia.com/gpu": 1}
    told = dev.run("apply", "-f", "-", stdin=environment(greedy))
    assert told.code
    words = " ".join(told.err.split())
    assert "field: spec.pods[0].spec.containers[0].resources.limits.nvidia.com/gpu value: 1" in words
    assert (
        "asks for GPU 1 of a VM that has 0" in words and "brings the CPUs that containers have for themselves" in words
    )


def inside(dev: DevFleet, *command: str, pod: str = "own") -> str:
    return dev.run("exec", f"needs-0.{pod}", "--", *command, timeout_s=180).ok()


def guest(dev: DevFleet, *command: str) -> str:
    return dev.run("exec", "--vm", "needs-0", "--", *command, timeout_s=180).ok()


def _device(dev: DevFleet) -> None:
    assert inside(dev, "/bin/sh", "-c", "echo $NPU; echo gone > /dev/npu0; cat /dev/npu0; cat /etc/debian_version") == (
        "made\n" + guest(dev, "cat", "/etc/debian_version")
    )
    other = dev.run("exec", "needs-0.other", "--", "/bin/ls", "/dev/npu0", timeout_s=180)
    assert other.code, "who did not ask has none"


def _pages(dev: DevFleet) -> None:
    pool = "/sys/kernel/mm/hugepages/hugepages-2048kB"
    assert guest(dev, "cat", f"{pool}/nr_hugepages") == "4\n"
    assert "hugetlbfs" in inside(dev, "busybox", "grep", " /pages ", "/proc/mounts")
    inside(dev, "busybox", "fallocate", "-l", "4194304", "/pages/all")
    assert guest(dev, "cat", f"{pool}/free_hugepages") == "2\n"
    more = dev.run("exec", "needs-0.own", "--", "busybox", "fallocate", "-l", "2097152", "/pages/more", timeout_s=180)
    assert more.code, "the volume ends at its size"


def _cpus(dev: DevFleet) -> None:
    assert dev.run("logs", "needs-0.own").ok().split() == ["Cpus_allowed_list:", "1"]
    for where in (guest(dev, "cat", "/proc/1/status"), inside(dev, "cat", "/proc/1/status", pod="other")):
        (line,) = [line for line in where.splitlines() if line.startswith("Cpus_allowed_list")]
        assert line.split()[1] == "0", "everybody else is kept off it"
    assert "CpusNotExclusive" not in dev.run("events").ok()
