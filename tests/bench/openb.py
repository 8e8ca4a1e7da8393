"""Replay of the openb GPU trace: Random and BestFit against their recorded means, and our packing beside the best recorded.

Usage: python tests/bench/openb.py [--trace-dir DIR] [--seeds 10] [--workloads a,b] [--strategies ...]

For each workload and ten seeds: unallocated GPU %, when arrived demand is 100 % and 130 % of the GPUs. "FGD" is the recorded
result of the published simulator, "bound" an offline linear program. Random and BestFit on ``default`` must come within 0.5
points of their recorded means, else the replay is not sound and the exit status is 1. The strategy ``scheduler`` is the whole
scheduler, with a claim for each request, where ``pack`` is its score alone: slower, and no other in what it gives. The last
line is JSON.
"""

import argparse
import csv
import gzip
import json
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one core: the figure is per core

from casemate_manager.simulation.cli import NODES_NAME, PODS_NAME, run_openb

WORKLOADS = ("default", "cpu200", "gpushare40", "multigpu20")
#: Offline bound at 130 % demand, without refusing what fits (a linear program over node classes and packing patterns).
BOUND = {"default": 3.54, "cpu200": 3.52, "gpushare40": 4.93, "multigpu20": 3.08}
RECORDED_AS = {"random": "01-Random", "bestfit": "05-BestFit", "fgd": "06-FGD"}
#: Ours: the packing score alone, and the whole scheduler with exact claims.
OURS = ("pack", "scheduler")
GATE_POINTS = 0.5
FIRST_SEED = 42


def recorded(trace_dir: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """(workload, policy) to the recorded mean of unallocated GPU % at 130 and 100 % demand."""
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with gzip.open(trace_dir / "fgd-recorded" / "allo.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            key = (row["workload"].removeprefix("openb_pod_list_"), row["sc_policy"])
            rows.setdefault(key, []).append((100 - float(row["130"]), 100 - float(row["100"])))
    return {k: (statistics.mean(a for a, _ in v), statistics.mean(b for _, b in v)) for k, v in rows.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace-dir", type=Path, default=Path(os.environ.get("CASEMATE_TRACES", "../shared/traces")))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--strategies", default="random,bestfit,pack")
    options = parser.parse_args()
    folder = options.trace_dir / "openb"
    if not (folder / NODES_NAME).exists():
        print(f"no trace in {folder}: give --trace-dir or CASEMATE_TRACES", file=sys.stderr)
        return 2
    known = recorded(options.trace_dir)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    gate, ratios = True, []
    print(
        f"{'workload':12} {'strategy':9} {'130 %':>7} {'100 %':>7} {'recorded':>15} {'ratio':>13} {'bound':>6} {'per s':>8}"
    )
    for workload in options.workloads.split(","):
        pods = folder / PODS_NAME.format(workload)
        for strategy in options.strategies.split(","):
            seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
            results = [run_openb(folder / NODES_NAME, pods, 1.3, seed, strategy) for seed in seeds]
            high = statistics.mean(r.unallocated_pct[130] for r in results)
            full = statistics.mean(r.unallocated_pct[100] for r in results)
            rate = statistics.mean(r.placements_per_s for r in results)
            beside = known.get((workload, RECORDED_AS["fgd" if strategy in OURS else strategy]))
            told, ratio = "", ""
            if beside is not None:
                told = f"{beside[0]:.2f} / {beside[1]:.2f}"
                ratio = f"{high / beside[0]:.3f} / {full / beside[1]:.3f}"
                if strategy in OURS:
                    ratios += [high / beside[0], full / beside[1]]
                elif workload == "default":
                    gate = gate and abs(high - beside[0]) <= GATE_POINTS
            bound = f"{BOUND[workload]:.2f}" if strategy in OURS and workload in BOUND else ""
            print(
                f"{workload:12} {strategy:9} {high:7.2f} {full:7.2f} {told:>15} {ratio:>13} {bound:>6} {rate:8.0f}",
                flush=True,
            )
            figures.setdefault(workload, {})[strategy] = {
                "unallocated_130_pct": round(high, 3),
                "unallocated_100_pct": round(full, 3),
                "placements_per_s": round(rate),
            }
    mean = round(statistics.mean(ratios), 4) if ratios else None
    print(json.dumps({"seeds": options.seeds, "gate": gate, "mean_ratio_to_fgd": mean, "workloads": figures}))
    return 0 if gate else 1


if __name__ == "__main__":
    sys.exit(main())
