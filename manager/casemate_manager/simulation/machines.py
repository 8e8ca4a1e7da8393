"""What the hosts of a simulated fleet are made of: a line of text, a folder of machines, or the node list of a trace.

May live here: reading these three. A folder holds machines: JSON files with the key ``topology`` (a picture as
:mod:`casemate_core.topology` writes it) or ``files`` (files of the kernel by path), and folders with copies of ``/sys``
(:mod:`casemate_manager.simulation.recordings`), one of which may also be given alone. A node list is that of
:mod:`casemate_manager.simulation.openb`.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from casemate_core.errors import CallerError, CasemateError
from casemate_core.plain import from_plain
from casemate_core.topology import Topology, check
from casemate_core.topology_loaders import HostFacts, from_line, from_sysfs
from casemate_manager.simulation.openb import read_nodes
from casemate_manager.simulation.recordings import is_recording, read_recording

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
        machines = [("h", _recorded(path))] if is_recording(path) else list(_folder(path))
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
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and is_recording(entry):
            yield entry.name, _recorded(entry)
        elif entry.suffix == ".json" and entry.is_file():
            yield entry.stem, _described(entry)


def _recorded(folder: Path) -> Topology:
    try:
        return read_recording(folder)
    except (OSError, ValueError, CasemateError) as error:
        raise FleetUnreadable(f"{folder}: {error}") from error


def _described(file: Path) -> Topology:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if "topology" in data:
            topology = Topology.from_dict(data["topology"])
        elif "files" in data:
            facts = from_plain(HostFacts, data.get("facts", {}))
            topology = from_sysfs(data["files"], facts)
        else:
            raise FleetUnreadable(f"{file}: has neither the key topology nor the key files")
        if broken := check(topology):
            raise FleetUnreadable(f"{file}: {broken[0]}")
    except FleetUnreadable:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CasemateError) as error:
        raise FleetUnreadable(f"{file}: {error}") from error
    return topology


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
