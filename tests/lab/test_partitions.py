"""cpuset partitions of dedicated vCPUs, by the kernel, libvirt and systemd of a server without isolcpus."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from support.hostlab.server import HARDWARE, Server

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

TOP = "/sys/fs/cgroup"
SPEC = "  isolated: true\n"
REALTIME = "{count: 2, policy: dedicated, realtime: true}"
MEMORY = "{size: 64Mi, hugepages: 2Mi, cells: one}"
#: The core of the first cell that is not the host's own, on which emulators run.
THREADS = "2-3"


@pytest.fixture
def isolating(server: Server) -> Iterator[Server]:
    """The server, whose agent may isolate a core by partitions."""
    server.stop_agent()
    server.configure(f'isolate = "{THREADS}"\n{HARDWARE}')
    server.start_agent()
    try:
        server.until("it says so", lambda: topology(server).get("isolated") == THREADS, 120)
        server.make_fleet()
        yield server
    finally:
        server.deleted("rt")
        server.stop_agent()
        server.configure()
        server.start_agent()
        server.until("it says so no more", lambda: not topology(server).get("isolated"), 120)


def topology(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.get("host", "lab").get("status", {}).get("topology", {})
    return found


def cgroup(server: Server, name: str) -> str:
    return server.machine.run(f"cat '{TOP}/{name}'", check=False).strip()


def cpuset_of(server: Server, pid: int, vcpu: int) -> str:
    """The cgroup of a vCPU."""
    own = server.machine.read(f"/proc/{pid}/cgroup").removeprefix("0::/").rpartition("/")[0]
    return f"{own}/vcpu{vcpu}"


def line(server: Server, name: str) -> dict[str, Any]:
    profile = server.get("instance", "rt-0").get("status", {}).get("profile", [])
    return next((each for each in profile if each["name"] == name), {})


def test_vcpus_are_isolated_before_the_guest_runs_and_again_when_somebody_undoes_it(isolating: Server) -> None:
    server = isolating
    assert cgroup(server, "cpuset.cpus.isolated") == ""
    server.apply("rt", SPEC, cpu=REALTIME, memory=MEMORY)
    started = server.started("rt")
    pid = started["status"]["pid"]
    server.until("it is isolated", lambda: cgroup(server, "cpuset.cpus.isolated") == THREADS, 60)
    cpusets = [cpuset_of(server, pid, vcpu) for vcpu in (0, 1)]
    assert [cgroup(server, f"{name}/cpuset.cpus.partition") for name in cpusets] == ["isolated", "isolated"]
    assert [cgroup(server, f"{name}/cpuset.cpus.effective") for name in cpusets] == ["2", "3"]
    # Nobody else may run there: not the host's services, not the guest's own emulator. A kernel's thread, which has no program,
    # is bound to its own CPU, or is kept off by the partition itself.
    others = server.machine.run(
        "for p in /proc/[0-9]*; do readlink -q $p/exe >/dev/null && grep -hs Cpus_allowed_list $p/status; done | sort -u"
    ).split()
    assert not {"2", "3", "2-3", "0-3", "0-7"} & set(others), others
    assert server.machine.run(f"virsh domstate {started['metadata']['uid']}").strip() == "running"
    server.until("the profile says so", lambda: line(server, "isolated").get("found") == THREADS, 60)
    assert line(server, "isolated")["state"].lower().endswith("held"), line(server, "isolated")
    host = json.dumps(server.get("host", "lab")["status"]["profile"])
    assert f"none since boot, {THREADS} by partitions" in host

    server.machine.run(f"echo member > '{TOP}/{cpusets[1]}/cpuset.cpus.partition'")
    server.until("it is told", lambda: "IsolationLost" in server.log(200), 30)
    server.until("it is isolated again", lambda: cgroup(server, "cpuset.cpus.isolated") == THREADS, 30)
    # libvirt writes the cpuset of a vCPU whenever somebody pins it: the partition stays.
    server.machine.run(f"virsh vcpupin {started['metadata']['uid']} 0 2 --live")
    assert cgroup(server, f"{cpusets[0]}/cpuset.cpus.partition") == "isolated"
    server.kill_agent()
    server.until("the next agent has it", lambda: server.get("instance", "rt-0")["status"]["pid"] == pid, 120)
    assert cgroup(server, "cpuset.cpus.isolated") == THREADS

    server.deleted("rt")
    assert cgroup(server, "cpuset.cpus.isolated") == "", "the kernel took them back"
    server.until("nothing is left", lambda: cgroup(server, "machine.slice/cpuset.cpus.exclusive") == "", 60)


def test_a_partition_that_the_kernel_refuses_keeps_the_guest_from_running_and_is_named(isolating: Server) -> None:
    server = isolating
    server.machine.run(
        f"echo +cpuset > {TOP}/cgroup.subtree_control && mkdir {TOP}/blocker && echo 3 > {TOP}/blocker/cpuset.cpus.exclusive"
    )
    try:
        server.apply("rt", SPEC, cpu=REALTIME, memory=MEMORY)
        server.until("it says why", lambda: "PartitionRefused" in str(server.get("instance", "rt-0").get("status", {})))
        status = str(server.get("instance", "rt-0")["status"])
        assert "cpuset.cpus.exclusive: Invalid argument" in status, status
        uid = server.uid("rt-0")
        assert server.machine.run(f"virsh domstate {uid}").strip() == "paused"
    finally:
        server.machine.run(f"rmdir {TOP}/blocker")
    server.until("it runs", lambda: server.machine.run(f"virsh domstate {uid}").strip() == "running", 120)
    assert cgroup(server, "cpuset.cpus.isolated") == THREADS
