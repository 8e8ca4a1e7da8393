"""What changed of a host's parts between two looks at it, as events. PURE.

What may live here: the comparison of two topologies by identity. A PCI address alone is no change: it is a hint. What is done
about a claim on something that is gone is decided in :mod:`casemate_agent.plan.reconcile`.
"""

from collections.abc import Iterator, Mapping

from casemate_agent.ledger.records import HOST, Note
from casemate_core.topology import Topology


def changes(before: Topology, after: Topology) -> tuple[Note, ...]:
    """Events for what appeared and what is gone, threads, cells and page pools included."""
    return tuple(_threads(before, after)) + tuple(_pools(before, after)) + tuple(_functions(before, after))


def _note(reason: str, message: str, *, bad: bool) -> Note:
    return Note(HOST, reason, message, "Warning" if bad else "Normal")


def _threads(before: Topology, after: Topology) -> Iterator[Note]:
    if gone := before.online - after.online:
        yield _note("ThreadsOffline", f"threads {gone} went offline", bad=True)
    if back := after.online - before.online:
        yield _note("ThreadsOnline", f"threads {back} came online", bad=False)
    if before.isolated & after.online != after.isolated & before.online:
        yield _note("IsolationChanged", f"isolated threads are {after.isolated or 'none'} now", bad=True)


def _pools(before: Topology, after: Topology) -> Iterator[Note]:
    def counts(topology: Topology) -> dict[tuple[int, int], int]:
        return {(cell.id, pool.page_kib): pool.count for cell in topology.cells for pool in cell.pools}

    old, new = counts(before), counts(after)
    for cell, page_kib in sorted(old.keys() | new.keys()):
        was, now = old.get((cell, page_kib), 0), new.get((cell, page_kib), 0)
        if was != now:
            message = f"cell {cell} has {now} pages of {page_kib} KiB, it had {was}"
            yield _note("PagePoolShrank" if now < was else "PagePoolGrew", message, bad=now < was)


def _functions(before: Topology, after: Topology) -> Iterator[Note]:
    for what, old, new in (
        ("Gpu", {g.uuid: g.place.address for g in before.gpus}, {g.uuid: g.place.address for g in after.gpus}),
        ("Port", {p.mac: p.place.address for p in before.pfs}, {p.mac: p.place.address for p in after.pfs}),
        ("Vf", _vfs(before), _vfs(after)),
        ("Device", {d.id: d.place.address for d in before.devices}, {d.id: d.place.address for d in after.devices}),
    ):
        yield from _appeared(what, old, new)


def _appeared(what: str, old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[Note]:
    for identity in sorted(old.keys() - new.keys()):
        yield _note(f"{what}Gone", f"{identity}, last seen at {old[identity] or 'no address'}, is gone", bad=True)
    for identity in sorted(new.keys() - old.keys()):
        yield _note(f"{what}Found", f"{identity} is at {new[identity] or 'no address'}", bad=False)


def _vfs(topology: Topology) -> dict[str, str]:
    return {f"{pf.mac}/{vf.index}": vf.address for pf in topology.pfs for vf in pf.vfs}
