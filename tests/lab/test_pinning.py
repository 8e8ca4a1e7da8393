"""Dedicated vCPUs on a server's threads, as its kernel says it."""

import json

import pytest

from support.hostlab.server import Server

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


def test_dedicated_vcpus_have_their_threads_pages_and_cell_and_are_put_back(server: Server) -> None:
    server.make_fleet()
    server.apply(
        "pin",
        "  nics: [{network: fronthaul, type: sriov}]\n",
        cpu="{count: 2, policy: dedicated}",
        memory="{size: 64Mi, hugepages: 2Mi, cells: one}",
    )
    try:
        started = server.started("pin")
        pid, uid = started["status"]["pid"], started["metadata"]["uid"]
        placements = server.casemate("get", "placements", "-o", "json").ok()
        claim = next(p["spec"]["claim"] for p in json.loads(placements)["items"] if p["spec"]["instanceUid"] == uid)
        threads = [str(int(thread)) for thread in claim["vcpus"]]
        assert affinity(server, pid) == threads
        cell = int(claim["pages"][0]["cell"])
        maps = server.machine.run(f"grep -h huge /proc/{pid}/numa_maps")
        assert f"bind:{cell}" in maps
        # taskset alone does not reach beyond the thread's cgroup, which libvirt confines too: it is moved by libvirt.
        server.machine.run(f"virsh vcpupin {uid} 0 {7 if threads[0] != '7' else 6} --live")
        server.until("it is told", lambda: "AffinityChanged" in server.log(200), 60)
        server.until("it is bound again", lambda: affinity(server, pid) == threads, 30)
    finally:
        server.deleted("pin")
    pools = server.machine.run("cat /sys/devices/system/node/node*/hugepages/hugepages-2048kB/free_hugepages").split()
    assert pools == ["64", "128"]


def affinity(server: Server, pid: int) -> list[str]:
    """Threads that the kernel allows each vCPU, in order."""
    script = (
        f"cd /proc/{pid}/task; for t in *; do echo $(cat $t/comm | tr ' ' _) $(grep Cpus_allowed_list $t/status); done"
    )
    rows = [line.split() for line in server.machine.run(script).splitlines()]
    return [allowed for _, allowed in sorted((row[0], row[2]) for row in rows if row[0].startswith("CPU_"))]
