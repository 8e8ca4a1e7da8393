"""``casemate-manager simulate``: what a strategy makes of a trace, without a fleet.

May live here: the command's options and its output. The replay itself is pure (:mod:`casemate_manager.simulation.replay`).
"""

import json
import time
from pathlib import Path

import click
import numpy as np

from casemate_manager.simulation.openb import TraceUnreadable, read_nodes, read_pods
from casemate_manager.simulation.replay import STRATEGIES, Result, arrivals, replay

#: Demands at which the curve is told where it reaches them.
POINTS = (100, 130)

NODES_NAME = "openb_node_list_gpu_node.csv.gz"
PODS_NAME = "openb_pod_list_{}.csv.gz"


def run_openb(nodes: Path, pods: Path, demand: float, seed: int, strategy: str) -> Result:
    """Replay one pod list on one node list; raises TraceUnreadable."""
    fleet = read_nodes(nodes)
    rng = np.random.default_rng(seed)
    order = arrivals(read_pods(pods, fleet.models), fleet.gpu_milli, demand, rng)
    bins = fleet.bins()
    return replay(bins, order, STRATEGIES[strategy](bins, rng), time.perf_counter, round(demand * 100))


def to_json(result: Result) -> dict[str, object]:
    """The documented form; per cent to three places."""
    curve = result.unallocated_pct
    return {
        "gpu_allocated_pct": round(result.gpu_allocated_pct, 3),
        "gpu_unallocated_pct": round(100.0 - result.gpu_allocated_pct, 3),
        "curve": {str(point): round(curve[point], 3) for point in POINTS if point < len(curve)},
        "placed": result.placed,
        "refused": result.refused,
        "placements_per_s": round(result.placements_per_s, 1),
    }


@click.command()
@click.option("--trace", type=click.Choice(["openb"]), required=True, help="Format of the trace.")
@click.option("--trace-dir", type=click.Path(path_type=Path), help="Folder with the trace's files by their own names.")
@click.option("--nodes", type=click.Path(path_type=Path), help="Node list (.csv or .csv.gz).")
@click.option("--pods", type=click.Path(path_type=Path), help="Pod list (.csv or .csv.gz).")
@click.option("--workload", default="default", show_default=True, help="Pod list to take from --trace-dir.")
@click.option(
    "--demand", type=click.FloatRange(0.01, 10.0), default=1.3, show_default=True, help="GPU demand over capacity."
)
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="Of the order of arrivals.")
@click.option("--strategy", type=click.Choice(list(STRATEGIES)), default="pack", show_default=True)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def simulate(
    trace: str,
    trace_dir: Path | None,
    nodes: Path | None,
    pods: Path | None,
    workload: str,
    demand: float,
    seed: int,
    strategy: str,
    output: str,
) -> None:
    """Replay a trace: how much GPU is left that nobody gets."""
    if trace_dir is not None:
        nodes = nodes or trace_dir / NODES_NAME
        pods = pods or trace_dir / PODS_NAME.format(workload)
    if nodes is None or pods is None:
        raise click.UsageError(f"trace {trace} needs --nodes and --pods, or --trace-dir")
    try:
        result = run_openb(nodes, pods, demand, seed, strategy)
    except TraceUnreadable as error:
        raise click.ClickException(str(error)) from error
    values = to_json(result)
    if output == "json":
        click.echo(json.dumps(values))
        return
    for name, value in values.items():
        shown = ", ".join(f"{k} %: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name:22} {shown}")
