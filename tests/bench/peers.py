"""One placement by us, by OpenStack (Placement and nova) and by Ganeti's hail: the same fleet, the same requests, one run.

Usage: python tests/bench/peers.py [--hosts 100,1000] [--only ours,openstack,hail]      (or HOSTS=100 in the environment)

The peers are programs of others and no dependencies: OpenStack's packages go into an environment of their own in the cache
folder (${XDG_CACHE_HOME:-~/.cache}/casemate/bench-peers, made at the first run, not counted); hail comes with the Debian
package ganeti-htools. What is missing ends the run with what to install; --only leaves a part out in the open.

A host has 2 cells of 32 cores with 2 threads and 1 TiB with 512 pages of 1 GiB; 70 % of the threads are held, with holes. Requests
are dedicated threads with memory of one cell, some with whole cores, some on 1 GiB pages. Ratios are to ours, in memory.
The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one core: the figure is per core
sys.path.insert(0, str(Path(__file__).parent))

import _peers_hail
from _peers_fleet import FILLED_BY_HAND, MadeFleet, figures

PARTS = ("ours", "openstack", "hail")
HERE = Path(__file__).parent
REQUIREMENTS = HERE / "peers-requirements.txt"
ARRIVALS = 40
#: Seconds for the counted calls of one peer on one fleet; three calls are made in any case.
BUDGET_S = 25.0
#: hail's own checks of restarts: one call took 40 times as long on 100 hosts (22 s of CPU) as on 25.
MOST_CHECKED_HOSTS = 100
#: Seconds after which a peer is given up.
LIMIT_S = 300

DECIDES = """
what one placement decides              ours            OpenStack                      hail
host                                    yes             yes (Placement + nova)         yes
ids of threads                          yes             yes (fitted again by compute)  no: number of CPUs
one NUMA cell, whole cores, 1G pages    yes             yes (nova's fit)               no: amount of memory
refuses only what fits nowhere          yes             of up to 1000 candidates       by amounts only
durable in this run                     row "durable"   no: SQLite in memory           no: Ganeti writes it, not hail
counted                                 decide, apply   candidates, fits, both claims  the process, not its input file
left out                                the network     HTTP, keystone, MQ, databases  Ganeti's master
"""


class Missing(Exception):
    """Something that the bench needs is not installed; the text says what to do."""


def pins() -> dict[str, str]:
    """Versions by package name of the requirements file."""
    lines = [line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def _has_pins(python: Path) -> bool:
    if not python.exists():
        return False
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    found = subprocess.run([str(python), "-c", code, *pins()], capture_output=True, text=True, check=False)
    return found.returncode == 0 and json.loads(found.stdout) == pins()


def environment() -> Path:
    """The interpreter of the peers' environment, made where it is not there yet. Raises Missing where that fails."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "casemate" / "bench-peers"
    python = folder / "bin" / "python"
    if not _has_pins(python):
        print(
            f"installing {', '.join(f'{n} {v}' for n, v in pins().items())} into {folder} (some minutes, once)",
            flush=True,
        )
        steps = (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS)],
        )
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Missing(
                    f"the OpenStack packages of {REQUIREMENTS.name} could not be installed; a Python package index must be "
                    f"reachable by pip, or leave them out with --only ours,hail\n{done.stderr[-2000:]}"
                )
    return python


def openstack(python: Path, path: Path) -> dict[str, Any]:
    """Figures of Placement and nova on the fleet described in a file."""
    # -P: this folder has a placement.py of its own, which is not the service.
    command = [str(python), "-P", str(HERE / "_peers_openstack.py"), str(path), str(BUDGET_S)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"OpenStack's part failed:\n{done.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures([(w, c) for w, c in told.pop("times")], told.pop("refused")) | told


def ratio(figure: float | None, ours: float | None) -> str:
    """How many times ours; nothing where one of them was not measured."""
    return f"{figure / ours:,.1f}" if figure and ours else "-"


def show(name: str, told: dict[str, Any], ours: dict[str, Any] | None) -> None:
    """One row of the table."""
    base = ours or {}
    if not told["placed"]:
        print(f"  {name:34} no placement: {told['refused']} refused")
        return
    print(
        f"  {name:34} {told['wall_ms']:>10.3f} {told['cpu_ms']:>10.3f} {ratio(told['wall_ms'], base.get('wall_ms')):>11}"
        f" {ratio(told['cpu_ms'], base.get('cpu_ms')):>11} {told['placed']:>7} {told['refused']:>7}",
        flush=True,
    )


def run(hosts: int, only: list[str], python: Path | None) -> dict[str, Any]:
    """Measure the parts on one size of fleet, one after another."""
    fleet = MadeFleet(hosts, ARRIVALS)
    described = fleet.describe()
    instances = sum(len(host["held"]) for host in described["hosts"])
    print(f"\n{hosts} hosts, {instances} instances, {fleet.full():.0%} of the threads held")
    head = ("wall ms", "CPU ms", "wall/ours", "CPU/ours", "placed", "refused")
    print(f"  {'one placement':34} {head[0]:>10} {head[1]:>10} {head[2]:>11} {head[3]:>11} {head[4]:>7} {head[5]:>7}")
    results: dict[str, Any] = {"hosts": hosts, "instances": instances}
    ours = None
    if "ours" in only:
        ours = results["ours"] = fleet.measure()
        show("ours", ours, ours)
        results["ours_durable"] = fleet.measure_durable(os.environ.get("BENCH_DIR"))
        show("ours, durable (fsync each)", results["ours_durable"], ours)
        results["ours_unseen"] = fleet.measure_unseen()
        show("ours, each shape asked first time", results["ours_unseen"], ours)
    if python is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "fleet.json"
            path.write_text(json.dumps(described))
            told = results["openstack"] = openstack(python, path)
        show("Placement + nova, all candidates", told, ours)
        if told["placed"]:
            first = told["first_fit_cpu_ms"]
            print(
                f"  {'  had it stopped at the first fit':34} {'':>10} {first:>10.3f} {'':>11} {ratio(first, (ours or {}).get('cpu_ms')):>11}"
            )
            print(
                f"  {'':34} candidates {told['candidates_cpu_ms']:.1f} ms, fit {told['fit_cpu_ms_per_host']:.3f} ms x "
                f"{told['candidates']:.0f} hosts, claims {told['claim_cpu_ms']:.1f} ms (CPU)"
            )
    if "hail" in only:
        results["hail"] = figures(*_peers_hail.measure(described, BUDGET_S, 3, _peers_hail.UNCHECKED))
        show("hail, no restart checks", results["hail"], ours)
        if hosts <= MOST_CHECKED_HOSTS:
            results["hail_checked"] = figures(*_peers_hail.measure(described, 0, 1))
            show("hail, as by default", results["hail_checked"], ours)
        else:
            print(
                f"  {'hail, as by default':34} not run: it does not end in time on more than {MOST_CHECKED_HOSTS} hosts"
            )
    for name, told in results.items():
        if isinstance(told, dict) and ours is not None and told["placed"]:
            told["cpu_ratio"] = told["cpu_ms"] / ours["cpu_ms"]
            told["wall_ratio"] = told["wall_ms"] / ours["wall_ms"]
            results[name] = {k: round(v, 3) if isinstance(v, float) else v for k, v in told.items()}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default=os.environ.get("HOSTS", "100,1000"), help="Sizes, separated by commas.")
    parser.add_argument(
        "--only", default=",".join(PARTS), help="Parts to run, separated by commas: ours, openstack, hail."
    )
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := set(only) - set(PARTS):
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    try:
        if "hail" in only and not _peers_hail.HAIL.exists():
            raise Missing(
                "hail is not there: install the Debian package ganeti-htools, or leave it out with --only ours,openstack"
            )
        python = environment() if "openstack" in only else None
    except Missing as missing:
        print(f"peers: {missing}", file=sys.stderr)
        return 2
    started = time.monotonic()
    sizes = [run(int(hosts), only, python) for hosts in options.hosts.split(",")]
    print(DECIDES)
    broken = sum(size["ours"]["claims_broken"] for size in sizes if "ours" in size)
    print(
        f"took {time.monotonic() - started:.0f} s; larger fleets are copies of {FILLED_BY_HAND} hosts; claims of ours broken: {broken}"
    )
    print(json.dumps({"sizes": sizes, "claims_broken": broken}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
