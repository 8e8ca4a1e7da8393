"""Ganeti's allocator ``hail`` on the made fleet: one process for each placement, fed as Ganeti's master feeds it.

May live here: the fleet in Ganeti's words, and the timing of the calls. The time is that of the process: it starts, reads the
whole cluster as JSON, decides and prints a node. Writing the file is not counted. hail knows amounts of CPUs, memory and disk;
threads, cells and pages it is not told of.
"""

import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

HAIL = Path("/usr/lib/ganeti/iallocators/hail")
#: As Ganeti calls it, hail also makes sure that all instances of any node could restart elsewhere. Nobody else here does, and
#: it takes most of the time, so that it is measured apart.
UNCHECKED = ("--no-capacity-checks",)
GROUP = "uuid-group-1"


def _bounds(cpu: int, memory_mib: int, disk_mib: int) -> dict[str, int]:
    return {
        "cpu-count": cpu,
        "disk-count": 1,
        "disk-size": disk_mib,
        "memory-size": memory_mib,
        "nic-count": 1,
        "spindle-use": 1,
    }


def _wants(shape: dict[str, Any], disk_mib: int) -> dict[str, Any]:
    """What an instance and a request have in common."""
    return {
        "disk_space_total": disk_mib,
        "disk_template": "plain",
        "disks": [{"mode": "rw", "size": disk_mib, "spindles": 1}],
        "hypervisor": "kvm",
        "memory": shape["memory_mib"],
        "nics": [{"bridge": "br0", "ip": None, "link": "br0", "mac": "02:00:00:00:00:01", "mode": "bridged"}],
        "os": "debian",
        "spindle_use": 1,
        "tags": [],
        "vcpus": shape["vcpus"],
    }


class HailCluster:
    """The document that hail reads, kept up as instances are placed."""

    def __init__(self, fleet: dict[str, Any]) -> None:
        self.shapes, self.disk_mib = fleet["shapes"], fleet["disk_mib"]
        usable = sum(len(core) for cell in fleet["cells"] for core in cell["siblings"])
        memory_mib = sum(cell["memory_mib"] for cell in fleet["cells"])
        limits = {"min": _bounds(1, 128, 128), "max": _bounds(128, 1 << 20, 1 << 20)}
        self.document: dict[str, Any] = {
            "cluster_tags": [],
            "enabled_hypervisors": ["kvm"],
            "instances": {},
            "nodegroups": {
                GROUP: {
                    "alloc_policy": "preferred",
                    "ipolicy": {
                        "disk-templates": ["plain"],
                        "minmax": [limits],
                        "spindle-ratio": 1000.0,
                        "std": _bounds(2, 4096, self.disk_mib),
                        "vcpu-ratio": 1.0,
                    },
                    "name": "default",
                    "networks": [],
                    "tags": [],
                }
            },
            "nodes": {},
        }
        for host in fleet["hosts"]:
            self.document["nodes"][host["name"]] = {
                "drained": False,
                "free_disk": fleet["total_disk_mib"],
                "free_memory": memory_mib,
                "free_spindles": 1000,
                "group": GROUP,
                "i_pri_memory": 0,
                "i_pri_up_memory": 0,
                "master_candidate": True,
                "master_capable": True,
                "ndparams": {"exclusive_storage": False, "oob_program": None, "spindle_count": 1},
                "offline": False,
                "primary_ip": "192.0.2.1",
                "reserved_cpus": fleet["threads"] - usable,
                "reserved_memory": 0,
                "secondary_ip": "192.0.2.2",
                "tags": [],
                "total_cpus": fleet["threads"],
                "total_disk": fleet["total_disk_mib"],
                "total_memory": memory_mib,
                "total_spindles": 1000,
                "vm_capable": True,
            }
            for held in host["held"]:
                self.add(held["uid"], held["shape"], host["name"])

    def add(self, name: str, shape: int, node: str) -> None:
        """An instance runs on a node."""
        wants = _wants(self.shapes[shape], self.disk_mib)
        up = {"admin_state": "up", "admin_state_source": "admin", "nodes": [node]}
        self.document["instances"][name] = wants | up
        at = self.document["nodes"][node]
        at["free_memory"] -= wants["memory"]
        at["free_disk"] -= self.disk_mib
        at["i_pri_memory"] += wants["memory"]
        at["i_pri_up_memory"] += wants["memory"]

    def place(self, name: str, shape: int, folder: Path, options: tuple[str, ...]) -> tuple[str | None, float, float]:
        """(node, or None where it is refused; wall and CPU seconds of the process). Raises RuntimeError when it fails."""
        request = {"type": "allocate", "name": name, "required_nodes": 1}
        path = folder / "request.json"
        path.write_text(json.dumps(self.document | {"request": _wants(self.shapes[shape], self.disk_mib) | request}))
        before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([str(HAIL), *options, str(path)], capture_output=True, text=True, check=False)
        took, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"hail: exit status {done.returncode}: {done.stderr or done.stdout}")
        answer = json.loads(done.stdout)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if not answer["success"]:
            if "No valid allocation solutions" not in answer["info"]:
                raise RuntimeError(f"hail: {answer['info']}")
            return None, took, cpu
        (node,) = answer["result"]
        return node, took, cpu


def measure(
    fleet: dict[str, Any], budget_s: float, least: int, options: tuple[str, ...] = ()
) -> tuple[list[tuple[float, float]], int]:
    """((wall, CPU) seconds of each placement, refusals), until the budget is spent, but for ``least`` requests at least."""
    cluster, times, refused = HailCluster(fleet), [], 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number, shape in enumerate(fleet["arrivals"]):
            if number >= least and time.monotonic() - started > budget_s:
                break
            node, wall, cpu = cluster.place(f"new{number}", shape, Path(folder), options)
            if node is None:
                refused += 1
                continue
            cluster.add(f"new{number}", shape, node)
            times.append((wall, cpu))
    return times, refused
