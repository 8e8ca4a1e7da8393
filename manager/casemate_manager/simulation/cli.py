"""``casemate-manager simulate``: what a strategy makes of a trace, or a whole fleet in one process.

May live here: the command's options and its output. The replay of a trace is pure (:mod:`casemate_manager.simulation.replay`);
a fleet is the real manager with played hosts (:mod:`casemate_manager.simulation.fleet`).
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from casemate_manager.simulation.openb import TraceUnreadable, read_nodes, read_pods
from casemate_manager.simulation.replay import STRATEGIES, Result, arrivals, replay
from casemate_manager.simulation.whole import WholeScheduler

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    from casemate_manager.simulation.fleet import Result as FleetResult

#: Demands at which the curve is told where it reaches them.
POINTS = (100, 130)

#: The strategy that is the whole scheduler, claims and all; the others know bins alone.
WHOLE = "scheduler"

NODES_NAME = "openb_node_list_gpu_node.csv.gz"
PODS_NAME = "openb_pod_list_{}.csv.gz"


def run_openb(
    nodes: Path,
    pods: Path,
    demand: float,
    seed: int,
    strategy: str,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Replay one pod list on one node list; raises TraceUnreadable."""
    fleet = read_nodes(nodes)
    rng = np.random.default_rng(seed)
    order = arrivals(read_pods(pods, fleet.models), fleet.gpu_milli, demand, rng)
    bins = fleet.bins()
    chosen = WholeScheduler(fleet) if strategy == WHOLE else STRATEGIES[strategy](bins, rng)
    return replay(bins, order, chosen, time.perf_counter, round(demand * 100), progress)


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
@click.option("--trace", type=click.Choice(["openb"]), help="Replay a trace of this format, without a fleet.")
@click.option(
    "--trace-dir",
    type=click.Path(path_type=Path),
    help="Folder with the trace's files by their own names, or one above it.",
)
@click.option("--nodes", type=click.Path(path_type=Path), help="Node list (.csv or .csv.gz).")
@click.option("--pods", type=click.Path(path_type=Path), help="Pod list (.csv or .csv.gz).")
@click.option("--workload", default="default", show_default=True, help="Pod list to take from --trace-dir.")
@click.option(
    "--demand", type=click.FloatRange(0.01, 10.0), default=1.3, show_default=True, help="GPU demand over capacity."
)
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="Of the order of arrivals.")
@click.option("--strategy", type=click.Choice([*STRATEGIES, WHOLE]), default="pack", show_default=True)
@click.option("--fleet", metavar="LINE|FOLDER|FILE", help="Run a whole fleet of hosts that are described so.")
@click.option("--hosts", type=click.IntRange(0), default=0, help="Hosts of the fleet.  [default: one of each machine]")
@click.option(
    "--placements",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    help="Placements after which a fleet rests.",
)
@click.option(
    "--trouble",
    type=click.FloatRange(0.0, 20.0),
    default=1.0,
    show_default=True,
    help="How often things go wrong in a fleet, over the usual; 0: never.",
)
@click.option(
    "--full",
    type=click.FloatRange(0.05, 1.0),
    default=0.75,
    show_default=True,
    help="Part of a fleet that is asked for.",
)
@click.option(
    "--store",
    type=click.Choice(["memory", "sqlite"]),
    default="memory",
    show_default=True,
    help="Where a fleet's records are.",
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def simulate(
    trace: str | None,
    trace_dir: Path | None,
    nodes: Path | None,
    pods: Path | None,
    workload: str,
    demand: float,
    seed: int,
    strategy: str,
    fleet: str | None,
    hosts: int,
    placements: int,
    trouble: float,
    full: float,
    store: str,
    output: str,
) -> None:
    """Replay a trace (--trace): how much GPU is left that nobody gets. Or run a whole fleet (--fleet) on virtual time.

    Of the strategies of a replay "pack" is the packing score alone, "scheduler" the whole scheduler with exact claims.

    A fleet is the real manager with played hosts, churn and trouble: cut streams, late and doubled messages, restarts. Every
    host checks each placement before it takes it. The machines are one line of text ("2s 16k/c 2t 256G gpu=8xH200@fabric
    vf=4x8"), a folder of machines as JSON or as copies of their /sys, or the node list of a trace. Exit code 1 where a host
    refused a placement or an invariant was broken.
    """
    if (trace is None) == (fleet is None):
        raise click.UsageError("say what to simulate: --trace FORMAT or --fleet LINE|FOLDER|FILE")
    if fleet is not None:
        _run_fleet(fleet, hosts, placements, seed, trouble, full, store, output)
        return
    if trace_dir is not None:
        if trace is not None and (trace_dir / trace).is_dir():
            trace_dir = trace_dir / trace  # the folder of all traces was given
        nodes = nodes or trace_dir / NODES_NAME
        pods = pods or trace_dir / PODS_NAME.format(workload)
    if nodes is None or pods is None:
        raise click.UsageError(f"trace {trace} needs --nodes and --pods, or --trace-dir")
    with _bar("arrivals", 1) as bar:

        def progress(done: int, of: int) -> None:
            bar.length = of
            bar.update(done - bar.pos)

        try:
            result = run_openb(nodes, pods, demand, seed, strategy, progress)
        except TraceUnreadable as error:
            raise click.ClickException(str(error)) from error
    values = to_json(result)
    if output == "json":
        click.echo(json.dumps(values))
        return
    for name, value in values.items():
        shown = ", ".join(f"{k} %: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name:22} {shown}")


def _bar(label: str, length: int) -> "ProgressBar[int]":
    """How far it is; hidden where stderr is no terminal."""
    return click.progressbar(length=length, label=label, file=sys.stderr, hidden=not sys.stderr.isatty(), show_pos=True)


def _run_fleet(
    source: str, hosts: int, placements: int, seed: int, trouble: float, full: float, store_kind: str, output: str
) -> None:
    """Run a fleet, show how far it is, print what came of it, and exit 1 where something must not have happened."""
    from casemate_core.errors import CasemateError
    from casemate_manager.simulation.fleet import Stuck, simulate_fleet
    from casemate_manager.simulation.machines import read_fleet
    from casemate_manager.simulation.memory import MemoryStore
    from casemate_manager.store.ports import Store
    from casemate_manager.store.sqlite import SqliteStore

    try:
        machines = read_fleet(source, hosts)
    except CasemateError as error:
        raise click.ClickException(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="casemate-simulate-") as folder:
        store: Store = SqliteStore(Path(folder) / "fleet.db") if store_kind == "sqlite" else MemoryStore()
        with _bar("placements", placements) as bar:
            try:
                result = simulate_fleet(
                    machines,
                    store,
                    placements=placements,
                    seed=seed,
                    trouble=trouble,
                    full=full,
                    progress=lambda placed: bar.update(placed - bar.pos),
                )
            except Stuck as error:
                raise click.ClickException(str(error)) from error
            finally:
                store.close()
    values = fleet_to_json(result)
    if output == "json":
        click.echo(json.dumps(values))
    else:
        for name, value in values.items():
            shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
            click.echo(f"{name:28} {shown}")
    for text in (*result.refusals, *result.violations[:20]):
        click.echo(text, err=True)
    if not result.is_good:
        raise SystemExit(1)


def fleet_to_json(result: "FleetResult") -> dict[str, object]:
    """The documented form of what came of a fleet."""
    return {
        "hosts": result.hosts,
        "placed": result.placed,
        "taken_by_hosts": result.taken,
        "refused_by_scheduler": result.refused_by_scheduler,
        "placements_refused_by_hosts": result.placements_refused,
        "invariants_broken": len(result.violations),
        "invariants_checked": result.checks,
        "commands": result.commands,
        "trouble": result.trouble,
        "virtual_s": round(result.virtual_s, 1),
        "seconds": round(result.seconds, 2),
        "placements_per_s": round(result.placements_per_s, 1),
        "digest": result.digest,
    }
