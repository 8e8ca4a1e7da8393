"""What the hosts of a simulated fleet are made of: a line of text, a folder of machines, or the node list of a trace.

May live here: reading these three. A folder holds one JSON file a machine, with the key ``topology``, as recorded by the
loaders of :mod:`casemate_core.topology_loaders`; a node list is that of :mod:`casemate_manager.simulation.openb`.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from casemate_core.errors import CallerError, CasemateError
from casemate_core.topology import Topology
from casemate_core.topology_loaders import from_line
from casemate_manager.simulation.openb import read_nodes

#: Hosts are this many at most: a mistyped number must not fill the memory.
MAX_HOSTS = 100_000


class FleetUnreadable(CallerError):
    """What was given as a fleet describes no hosts."""

    reason = "FleetUnreadable"


def read_fleet(source: str, hosts: int) -> list[tuple[str, Topology]]:
    """(name, machine) of each host. ``hosts`` 0: one for a line, one of each machine of a folder, each node of a trace.

    Raises FleetUnreadable, TraceUnreadable. Hosts of one machine share the value, so its index is made once.
    """
    if hosts > MAX_HOSTS:
        raise FleetUnreadable(f"{hosts} hosts, at most {MAX_HOSTS} are simulated")
    path = Path(source)
    if path.is_dir():
        machines = list(_folder(path))
    elif path.is_file():
        machines = list(_nodes(path))
    elif source.endswith((".csv", ".csv.gz", "/")):
        raise FleetUnreadable(f"{source}: there is no such file or folder")
    else:
        try:
            machines = [("h", from_line(source))]
        except CasemateError as error:
            raise FleetUnreadable(f"no folder, no node list, and as a line: {error}") from error
    if not machines:
        raise FleetUnreadable(f"{source}: no machines in it")
    hosts = hosts or len(machines)
    dealt = (machines[i % len(machines)] for i in range(hosts))
    return [(f"{name}-{i}", machine) for i, (name, machine) in enumerate(dealt)]


def _folder(path: Path) -> Iterator[tuple[str, Topology]]:
    for file in sorted(path.glob("*.json")):
        try:
            yield file.stem, Topology.from_dict(json.loads(file.read_text(encoding="utf-8"))["topology"])
        except (OSError, ValueError, KeyError, TypeError, CasemateError) as error:
            raise FleetUnreadable(f"{file}: {error}") from error


def _nodes(path: Path) -> Iterator[tuple[str, Topology]]:
    """Nodes of a trace: one cell, each CPU a core, GPUs that can be cut into hundredths."""
    nodes = read_nodes(path)
    kinds: dict[tuple[int, int, int, int], Topology] = {}
    number: Counter[str] = Counter()
    for i in range(len(nodes.gpus)):
        cpu, memory, gpus, model = (int(v) for v in (*nodes.capacity[:, i], nodes.gpus[i], nodes.model[i]))
        kind = (cpu, memory, gpus, model)
        if kind not in kinds:
            cards = f" gpu={gpus}x{nodes.models[model] or 'any'}/10m" if gpus else ""
            try:
                kinds[kind] = from_line(f"{cpu // 1000}k/c 1t {memory}M disk=10T{cards}")
            except CasemateError as error:
                raise FleetUnreadable(f"{path}: node {i}: {error}") from error
        number[nodes.models[model]] += 1
        yield "node", kinds[kind]
