"""Dedicated vCPUs on a server's threads, and the pool around them, as its kernel says it."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from casemate_core.cpuset import CpuSet
from support.hostlab import mortal
from support.hostlab.server import Server

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600)]

SPEC = "  isolated: true\n"
MEMORY = "{size: 64Mi, hugepages: 2Mi, cells: one}"

PIN, START = (
    "casemate_agent.drivers.libvirt:LibvirtHypervisor.pin",
    "casemate_agent.drivers.libvirt:LibvirtHypervisor.start",
)
#: Where the agent dies on the way up, and where on the way down.
PIN_STEPS = ((f"before {PIN}", f"before {PIN}"), (f"after {PIN}", f"after {PIN}"), (f"before {START}", f"during {PIN}"))

#: Run in the server: looks at every thread of every QEMU, over and over, until the file STOP is there; prints all places where
#: each of them was allowed to run, by uuid.
WATCH = """
import json, os, pathlib
found = {}
while not os.path.exists("/tmp/watch.stop"):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = pathlib.Path("/proc", pid, "cmdline").read_bytes().split(b"\\0")
            if b"-uuid" not in words:
                continue
            uuid = words[words.index(b"-uuid") + 1].decode()
            for task in os.listdir(f"/proc/{pid}/task"):
                name = pathlib.Path("/proc", pid, "task", task, "comm").read_text().strip()
                kind = "vcpu" if name.startswith("CPU ") else "rest"
                places = found.setdefault(uuid, {}).setdefault(kind, [])
                cpus = sorted(os.sched_getaffinity(int(task)))
                if cpus not in places:
                    places.append(cpus)
        except (OSError, ValueError):
            continue
    pathlib.Path("/tmp/watch.new").write_text(json.dumps(found))
    os.rename("/tmp/watch.new", "/tmp/watch.json")
"""


def test_dedicated_vcpus_have_their_threads_pages_and_cell_and_are_put_back(server: Server) -> None:
    server.make_fleet()
    server.apply("pin", SPEC, cpu="{count: 2, policy: dedicated}", memory=MEMORY)
    try:
        started = server.started("pin")
        pid, uid = started["status"]["pid"], started["metadata"]["uid"]
        claim = claim_of(server, uid)
        threads = [str(int(thread)) for thread in claim["vcpus"]]
        assert affinity(server, pid) == threads
        cell = int(claim["pages"][0]["cell"])
        maps = server.machine.run(f"grep -h huge /proc/{pid}/numa_maps")
        assert f"bind:{cell}" in maps
        # taskset alone does not reach beyond the thread's cgroup, which libvirt confines too: it is moved by libvirt.
        server.machine.run(f"virsh vcpupin {uid} 0 {7 if threads[0] != '7' else 6} --live")
        server.until("it is told", lambda: "AffinityChanged" in server.log(200))
        server.until("it is bound again", lambda: affinity(server, pid) == threads)
    finally:
        server.deleted("pin")
    pools = server.machine.run("cat /sys/devices/system/node/node*/hugepages/hugepages-2048kB/free_hugepages").split()
    assert pools == ["64", "128"]


def test_the_pool_leaves_before_a_start_and_nobody_is_on_threads_of_another_for_a_moment(server: Server) -> None:
    server.make_fleet()
    try:
        server.apply("float", SPEC)
        floating = server.started("float")
        before = everywhere(server, floating["status"]["pid"])
        with watched(server) as seen:
            server.apply("one", SPEC, cpu="{count: 2, policy: dedicated}", memory=MEMORY)
            one = server.started("one")
            server.apply("two", SPEC, cpu="{count: 1, policy: dedicated}", memory=MEMORY)
            two = server.started("two")
            owned = {uid: owned_by(server, uid) for uid in (one["metadata"]["uid"], two["metadata"]["uid"])}
            left = everywhere(server, floating["status"]["pid"])
            assert left and not any(left & threads for threads in owned.values()), (left, owned)
        # Each QEMU was looked at from its first moment on: also before its vCPUs were bound it was on nobody else's threads.
        assert set(owned) <= set(seen)
        for uid, kinds in seen.items():
            for other, threads in owned.items():
                if uid == floating["metadata"]["uid"]:
                    continue  # it was there before they had owners
                places = [CpuSet.from_ids(cpus) for cpus in (*kinds.get("vcpu", ()), *kinds.get("rest", ()))]
                assert uid == other or not any(place & threads for place in places), (uid, other, threads, places)
        # A start is no drift, however long it takes: nobody has moved anything yet.
        said = server.machine.run("journalctl -u casemate-agent --no-pager -o cat").splitlines()
        assert not [line for line in said if "AffinityChanged" in line and any(uid in line for uid in owned)]
        server.deleted("one")
        server.deleted("two")
        pid = floating["status"]["pid"]
        server.until("the pool has them back", lambda: everywhere(server, pid) == before)
        assert server.get("instance", "float-0")["status"]["pid"] == pid
    finally:
        for name in ("float", "one", "two"):
            server.deleted(name)


@pytest.mark.lab_faults
def test_killed_at_each_step_of_moving_the_pool_each_thread_has_one_owner(server: Server, mortal_agent: None) -> None:
    """The agent dies as it takes the pool off threads, binds an owner, starts it, and gives the pool its threads back."""
    server.make_fleet()
    try:
        server.apply("float", SPEC)
        floating = server.started("float")
        pid = floating["status"]["pid"]
        before = everywhere(server, pid)
        for way_up, way_down in PIN_STEPS:
            agent = mortal.arm(server, way_up)
            server.apply("one", SPEC, cpu="{count: 2, policy: dedicated}", memory=MEMORY)
            mortal.until_dead(server, agent)
            one = server.started("one")
            owned = owned_by(server, one["metadata"]["uid"])
            claim = claim_of(server, one["metadata"]["uid"])
            left = everywhere(server, pid)
            assert left and not left & owned, (way_up, left, owned)
            assert affinity(server, one["status"]["pid"]) == [str(int(thread)) for thread in claim["vcpus"]], way_up
            server.until("it has joined again", server.joined)
            agent = mortal.arm(server, way_down)
            server.casemate("delete", "env", "one", "--no-wait").ok()
            mortal.until_dead(server, agent)
            server.until("it is gone", lambda: not server.get("env", "one"))
            server.until("the pool has its threads back", lambda: everywhere(server, pid) == before)
        assert server.get("instance", "float-0")["status"]["pid"] == pid
    finally:
        for name in ("float", "one"):
            server.deleted(name)


def claim_of(server: Server, uid: str) -> dict[str, Any]:
    placements = json.loads(server.casemate("get", "placements", "-o", "json").ok())["items"]
    found: dict[str, Any] = next(p["spec"]["claim"] for p in placements if p["spec"]["instanceUid"] == uid)
    return found


def owned_by(server: Server, uid: str) -> CpuSet:
    claim = claim_of(server, uid)
    return CpuSet.from_ids(int(thread) for thread in claim["vcpus"]) | CpuSet.parse(claim.get("held", ""))


def rows(server: Server, pid: int) -> list[tuple[str, str]]:
    """Name and allowed threads of each thread of a process."""
    script = (
        f"cd /proc/{pid}/task; for t in *; do echo $(cat $t/comm | tr ' ' _) $(grep Cpus_allowed_list $t/status); done"
    )
    found = [line.split() for line in server.machine.run(script).splitlines()]
    return sorted((row[0], row[2]) for row in found)


def affinity(server: Server, pid: int) -> list[str]:
    """Threads that the kernel allows each vCPU, in order."""
    return [allowed for name, allowed in rows(server, pid) if name.startswith("CPU_")]


def everywhere(server: Server, pid: int) -> CpuSet:
    """Wherever any thread of a process may run."""
    mask = 0
    for _, allowed in rows(server, pid):
        mask |= CpuSet.parse(allowed).mask
    return CpuSet(mask)


@contextmanager
def watched(server: Server) -> Iterator[dict[str, dict[str, list[list[int]]]]]:
    """Where threads of QEMUs may run, looked at all the while; filled in at the end."""
    seen: dict[str, dict[str, list[list[int]]]] = {}
    server.machine.run("rm -f /tmp/watch.*")
    server.machine.write("/tmp/watch.py", WATCH.encode())
    server.machine.run("nohup python3 /tmp/watch.py > /dev/null 2>&1 < /dev/null &")
    server.until("it is watched", lambda: server.machine.run("ls /tmp/watch.json", check=False))
    try:
        yield seen
        time.sleep(0.5)  # one more look; what it has seen so far counts in any case
        seen.update(json.loads(server.machine.run("cat /tmp/watch.json")))
    finally:
        server.machine.run("touch /tmp/watch.stop")
