"""That the comparison with other placers starts all of them from one true fleet, and says what it lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _peers_fleet import SHAPES, MadeFleet
from _peers_hail import HailCluster

HERE = Path(__file__).parent


def test_described_fleet_is_what_is_held() -> None:
    fleet = MadeFleet(4, 10)
    told = json.loads(json.dumps(fleet.describe()))
    cell_of = {t: cell["id"] for cell in told["cells"] for core in cell["siblings"] for t in core}
    for host in told["hosts"]:
        threads = [t for held in host["held"] for t in held["threads"]]
        assert len(threads) == len(set(threads))
        for held in host["held"]:
            assert len(held["threads"]) == SHAPES[held["shape"]].vcpus
            assert {cell_of[t] for t in held["threads"]} == {held["cell"]}
    taken = sum(len(held["threads"]) for host in told["hosts"] for held in host["held"])
    assert taken / len(cell_of) / 4 == fleet.full()
    assert len(told["arrivals"]) == 10


def test_hail_is_told_of_every_instance_and_what_it_takes() -> None:
    told = MadeFleet(4, 1).describe()
    document = HailCluster(told).document
    for name, node in document["nodes"].items():
        here = [i for i in document["instances"].values() if i["nodes"] == [name]]
        assert here
        assert node["total_memory"] - node["free_memory"] == sum(i["memory"] for i in here) == node["i_pri_memory"]
        assert node["total_disk"] - node["free_disk"] == sum(i["disk_space_total"] for i in here)
        assert sum(i["vcpus"] for i in here) <= node["total_cpus"] - node["reserved_cpus"]


def test_ours_alone_prints_figures(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "peers.py"), "--hosts", "3", "--only", "ours"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"BENCH_DIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    ours = last["sizes"][0]["ours"]
    assert last["claims_broken"] == 0
    assert ours["placed"] > 0
    assert ours["cpu_ms"] > 0


def test_a_missing_environment_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "peers.py"), "--only", "openstack"]
    (tmp_path / "casemate").write_text("a file where the folder of the cache should be")
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    )
    assert done.returncode == 2
    assert "--only ours,hail" in done.stderr


def test_an_unknown_part_is_refused() -> None:
    command = [sys.executable, str(HERE / "peers.py"), "--only", "ours,swarm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no part swarm" in done.stderr
