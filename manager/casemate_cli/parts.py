"""Parts of hosts as tables: virtual functions, other devices, and the summary of one host.

What may live here: rows made from a host's topology and the claims of its placements, as the manager tells both. They are no
objects: nobody applies or deletes one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from casemate_cli import output, term
from casemate_cli.columns import NONE, Table
from casemate_cli.failure import Exit, Failure

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_core.topology import Topology

#: Every word that names a kind of part.
WORDS: Mapping[str, str] = {"vf": "vfs", "vfs": "vfs", "dev": "devices", "device": "devices", "devices": "devices"}


@dataclass(frozen=True, slots=True)
class Row:
    """One part. ``wide`` cells are shown with ``-o wide``; ``plain`` is its form in JSON and YAML."""

    cells: tuple[str, ...]
    wide: tuple[str, ...]
    plain: Mapping[str, Any]


_HEADINGS = {
    "vfs": (("HOST", "PORT", "VF", "NETWORKS", "CELL", "HOLDER"), ("CAN", "GROUP", "ADDRESS")),
    "devices": (("HOST", "DEVICE", "LABELS", "CELL", "HOLDER"), ("GROUP", "ADDRESS")),
}


def show(client: "Client", what: str, host: str, form: str, *, with_headings: bool) -> int:
    """All parts of a kind, of one host where it is named."""
    if form == "name" or form.startswith("jsonpath="):
        raise Failure(f"{what} are no objects", remedy="write -o json or -o yaml, and pick from that")
    names = [host] if host else [r.host.metadata.name for r in client.listed("Host", tenant="")]
    holders = _holders(client)
    rows = [row for name in names for row in _rows(what, name, topology_of(client, name), holders)]
    if form in ("json", "yaml"):
        items = [dict(row.plain) for row in rows]
        text = output.to_json({"items": items}) + "\n" if form == "json" else output.to_yaml({"items": items})
        term.out(text, end="")
        return Exit.OK
    if not rows:
        term.say(f"there are no {what}" + (f" on host {host}" if host else ""))
        return Exit.OK
    shown, more = _HEADINGS[what]
    table = Table((*shown, *more) if form == "wide" else shown, with_headings=with_headings)
    table.write([(*row.cells, *row.wide) if form == "wide" else row.cells for row in rows])
    return Exit.OK


def topology_of(client: "Client", host: str) -> "Topology | None":
    """What a host said that it is made of; None where it has not said it yet. Raises Failure for an unknown host."""
    from casemate_core.topology import Topology

    plain = output.plain(client.get("Host", host, "")).get("status", {}).get("topology")
    return Topology.from_dict(_whole(plain)) if plain else None


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: integers come back as such."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _holders(client: "Client") -> dict[tuple[str, str], str]:
    """(host, identity of a part) -> the instance that its placement gave it to."""
    found: dict[tuple[str, str], str] = {}
    for resource in client.listed("Placement", tenant=""):
        spec = output.plain(resource).get("spec", {})
        claim = _whole(spec.get("claim", {}))
        held = [f"{vf['pf']}/{vf['index']}" for vf in claim.get("vfs", [])] + list(claim.get("devices", []))
        found |= {(spec.get("host", ""), part): spec.get("instance", "") for part in held}
    return found


def _rows(what: str, host: str, topology: "Topology | None", holders: Mapping[tuple[str, str], str]) -> Iterator[Row]:
    if topology is None:
        return
    if what == "devices":
        for device in topology.devices:
            holder, place = holders.get((host, device.id), ""), device.place
            labels = ",".join(f"{key}={value}" for key, value in device.labels)
            yield Row(
                (host, device.id, labels, _number(place.cell), holder or NONE),
                (_number(place.iommu_group), place.address or NONE),
                {
                    "host": host,
                    "id": device.id,
                    "labels": dict(device.labels),
                    "cell": place.cell,
                    "iommuGroup": place.iommu_group,
                    "address": place.address,
                    "holder": holder,
                },
            )
        return
    for pf in topology.pfs:
        for vf in pf.vfs:
            holder = holders.get((host, f"{pf.mac}/{vf.index}"), "")
            yield Row(
                (host, pf.mac, str(vf.index), ",".join(pf.networks), _number(pf.place.cell), holder or NONE),
                (",".join(pf.capabilities) or NONE, _number(vf.iommu_group), vf.address or NONE),
                {
                    "host": host,
                    "port": pf.mac,
                    "index": vf.index,
                    "networks": list(pf.networks),
                    "capabilities": list(pf.capabilities),
                    "cell": pf.place.cell,
                    "iommuGroup": vf.iommu_group,
                    "address": vf.address,
                    "holder": holder,
                },
            )


def _number(number: int) -> str:
    return str(number) if number >= 0 else NONE


def summary(topology: "Topology") -> Iterator[str]:
    """One host in lines, for ``describe``: its cells with their threads, memory and pages, then what is plugged in where."""
    from casemate_core.cpuset import EMPTY
    from casemate_core.quantity import format_mib

    for cell in topology.cells:
        threads = EMPTY
        for core in topology.cores:
            if core.cell == cell.id:
                threads |= core.threads
        cores = sum(core.cell == cell.id for core in topology.cores)
        pools = "".join(f", {pool.count} pages of {format_mib(pool.page_kib // 1024)}" for pool in cell.pools)
        distances = f", distances {' '.join(map(str, cell.distances))}" if cell.distances else ""
        has = f"{cores} cores (threads {threads})" if cores else "no CPU"
        yield f"cell {cell.id}: {has}, {format_mib(cell.memory_mib)}{pools}{distances}"
    for what, cpus in (
        ("housekeeping", topology.reserved),
        ("isolated", topology.isolated),
        ("offline", topology.offline),
    ):
        if cpus:
            yield f"{what} threads: {cpus}"
    for gpu in topology.gpus:
        yield f"GPU {gpu.uuid}: {gpu.model}, {format_mib(gpu.memory_mib)}{_where(gpu.place)}"
    for pf in topology.pfs:
        yield f"port {pf.mac}: {len(pf.vfs)} VFs on {','.join(pf.networks)}, can {','.join(pf.capabilities)}{_where(pf.place)}"
    for device in topology.devices:
        yield f"device {device.id}: {','.join(f'{k}={v}' for k, v in device.labels)}{_where(device.place)}"


def _where(place: Any) -> str:
    group = f", IOMMU group {place.iommu_group}" if place.iommu_group >= 0 else ""
    return (
        f", cell {_number(place.cell)}, at {place.address or 'no address'} under {'/'.join(place.path) or NONE}{group}"
    )
