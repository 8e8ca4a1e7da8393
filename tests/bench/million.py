"""A million placements through the whole manager, with churn and trouble: how many of them a host refuses (goal: none).

Usage: python tests/bench/million.py [--count N] [--hosts H] [--seed S] [--trouble T] [--minutes M] [--store memory|sqlite]
       (or N=…, HOSTS=…, SEED=… in the environment)

The real writer, fleet, scheduler, sessions and store on virtual time, and hosts played from core at the far end of each
session. Every host checks every placement (``verify_claim``) against its own ledger before it takes it. Users make, scale,
stop, resize and delete environments of eighteen shapes and cordon hosts; streams are cut, slowed and half-closed so that what
was said arrives late or twice, agents and machines restart, the manager dies around commits, commits fail. At the end all
comes to rest, and each ledger must be what the manager believes. One core. The default is 100,000; ``N=1000000`` is the
whole of it. The last line is JSON; exit code 1 where a host refused or an invariant was broken.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one core: the figure is per core

from casemate_manager.simulation.fleet import simulate_fleet
from casemate_manager.simulation.machines import read_fleet
from casemate_manager.simulation.memory import MemoryStore
from casemate_manager.store.ports import Store
from casemate_manager.store.sqlite import SqliteStore

LINE = "2s 16k/c 2t 256G 1G=64 2M=8192 hk=1 iso=4 gpu=8xH200:141G@fabric/10m vf=4x8@fronthaul+mgmt dev=2xfec disk=8T"
#: Seconds between two lines about how far it is.
TELL_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=int(os.environ.get("N", "100000")))
    parser.add_argument("--hosts", type=int, default=int(os.environ.get("HOSTS", "60")))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED", "1")))
    parser.add_argument("--trouble", type=float, default=0.1, help="1: something every 20 commands")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop earlier, after so long, and settle")
    parser.add_argument("--store", choices=["memory", "sqlite"], default="memory")
    args = parser.parse_args()
    began = told = time.monotonic()

    def progress(placed: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > TELL_S:
            told = now
            print(f"{placed:>9,} placed after {now - began:,.0f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="casemate-million-") as folder:
        store: Store = SqliteStore(Path(folder) / "fleet.db") if args.store == "sqlite" else MemoryStore()
        cpu_s = time.process_time()
        result = simulate_fleet(
            read_fleet(LINE, args.hosts),
            store,
            placements=args.count,
            seed=args.seed,
            trouble=args.trouble,
            progress=progress,
            seconds=args.minutes * 60,
        )
        cpu_s = time.process_time() - cpu_s
        store.close()
    for name, value in (
        ("placements", f"{result.placed:,}"),
        ("taken by hosts", f"{result.taken:,}"),
        ("refused by hosts", result.placements_refused),
        ("instances that waited for a place", f"{result.refused_by_scheduler:,}"),
        ("users' commands", f"{result.commands:,}"),
        ("hosts", result.hosts),
        ("trouble", ", ".join(f"{n} × {what}" for what, n in result.trouble.items())),
        ("checks of everything", result.checks),
        ("broken invariants", len(result.violations)),
        ("virtual time", f"{result.virtual_s:,.0f} s"),
        ("real time, of it on the core", f"{result.seconds:,.1f} s, {cpu_s:,.1f} s"),
        ("placements a second of the core", f"{result.placed / cpu_s:,.0f}"),
        ("digest", result.digest),
    ):
        print(f"{name:34} {value}")
    for text in (*result.refusals, *result.violations[:20]):
        print(text, file=sys.stderr)
    figures = {
        "placements": result.placed,
        "refused_by_hosts": result.placements_refused,
        "invariants_broken": len(result.violations),
        "unschedulable": result.refused_by_scheduler,
        "hosts": result.hosts,
        "commands": result.commands,
        "trouble": sum(result.trouble.values()),
        "seconds": round(result.seconds, 1),
        "cpu_seconds": round(cpu_s, 1),
        "placements_per_cpu_s": round(result.placed / cpu_s, 1),
        "digest": result.digest,
    }
    print(json.dumps(figures))
    return 0 if result.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
