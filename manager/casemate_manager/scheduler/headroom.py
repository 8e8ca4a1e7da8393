"""Capacity of many hosts: sums, what is stranded by cause, and where most of it is. PURE.

May live here: sums over ``capacity``. A host's numbers are made into a ``Summary`` once and kept for as long as its topology
and claims are the same objects; the sums of a fleet are made of summaries.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from casemate_core.claims import HostClaims
from casemate_core.topology import Topology
from casemate_manager.scheduler.capacity import Amount, Cause, CellCapacity, HostCapacity, capacity

CELL_KINDS = ("cpu", "gpu", "memory")
"""Cells with CPUs that may be given away, those of them with GPUs beside, and those without such CPUs."""

Amounts = dict[str, Amount]


def kind_of(cell: CellCapacity) -> str:
    """Word of ``CELL_KINDS``."""
    return "memory" if not cell.has_cpus else "gpu" if cell.has_gpus else "cpu"


def amounts_of(cell: CellCapacity) -> Amounts:
    """A cell's amounts by name; what it has none of is left out."""
    named = {
        "threads": cell.threads,
        "cores": cell.cores,
        "shared_milli": cell.shared_milli,
        "memory_mib": cell.memory_mib,
        **{f"pages:{page_kib}": amount for page_kib, amount in cell.pages},
    }
    return {name: amount for name, amount in named.items() if amount.total}


Layout = tuple[tuple[str, str], ...]
"""What a row of numbers stands for: (kind of cell, or empty for the host; name of the amount)."""
#: Name under which cells of a kind are counted, in the place of the total.
COUNT = "cells"


@dataclass(frozen=True, slots=True)
class Summary:
    """One host's sums: (len(layout), 4) of total, used, free, stranded. One array and no tree of objects: ten thousand
    summaries are kept, and everything that is kept is walked by each full garbage collection. ``stranded``: (dimension,
    cause, amount). ``stranded_milli``: what is stranded of each dimension as a part of what there is, in thousandths,
    summed over the dimensions (``vfs:`` are left out, for they count VFs again)."""

    layout: Layout
    numbers: NDArray[np.int64]
    stranded: tuple[tuple[str, Cause, int], ...]
    stranded_milli: int

    def amounts(self) -> Amounts:
        """The host's own amounts, by name."""
        return _by_kind(self.layout, self.numbers).get("", {})


def summarise(found: HostCapacity) -> Summary:
    """The sums of one host."""
    stranded: dict[tuple[str, Cause], int] = {}
    for entry in found.stranded:
        key = entry.dimension, entry.cause
        stranded[key] = stranded.get(key, 0) + entry.amount
    totals = found.totals()
    rows = {("", name): amount for name, amount in totals.items()}
    for cell in found.cells:
        kind = kind_of(cell)
        for name, amount in {COUNT: Amount(1), **amounts_of(cell)}.items():
            rows[kind, name] = rows.get((kind, name), Amount()) + amount
    numbers = np.array([(a.total, a.used, a.free, a.stranded) for a in rows.values()], dtype=np.int64).reshape(-1, 4)
    parts = [1000 * a.stranded // a.total for name, a in totals.items() if not name.startswith("vfs:")]
    return Summary(tuple(rows), numbers, tuple((*key, amount) for key, amount in stranded.items()), sum(parts))


class Summaries:
    """Summaries by host, made anew where the topology or the claims are other ones. One caller at a time."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Topology, HostClaims, Summary]] = {}
        #: Hosts of one kind share their layout.
        self._layouts: dict[Layout, Layout] = {}

    def of(self, host: str, topology: Topology, claims: HostClaims) -> Summary:
        """The summary of a host. What is the same object as before is not looked at again: both are values."""
        known = self._known.get(host)
        if known is not None and known[0] is topology and (known[1] is claims or known[1] == claims):
            return known[2]
        made = summarise(capacity(topology, claims))
        made = replace(made, layout=self._layouts.setdefault(made.layout, made.layout))
        self._known[host] = topology, claims, made
        return made

    def keep(self, hosts: Iterable[str]) -> None:
        """Forget all other hosts."""
        kept = set(hosts)
        if not self._known.keys() <= kept:
            self._known = {host: known for host, known in self._known.items() if host in kept}
            self._layouts = {known[2].layout: known[2].layout for known in self._known.values()}


class Group:
    """Sums over hosts. ``stranded``: (dimension, cause) to (amount, hosts on which it is so)."""

    def __init__(self) -> None:
        self.hosts = 0
        self.unknown = 0
        self.closed = 0
        self.stranded: dict[tuple[str, Cause], tuple[int, int]] = {}
        self._sums: dict[Layout, NDArray[np.int64]] = {}

    def add(self, summary: Summary | None, *, closed: bool) -> None:
        """One host more; None where it has not told what it is made of."""
        self.hosts += 1
        self.closed += closed
        if summary is None:
            self.unknown += 1
            return
        sums = self._sums.get(summary.layout)
        if sums is None:
            self._sums[summary.layout] = summary.numbers.copy()
        else:
            sums += summary.numbers
        for name, cause, amount in summary.stranded:
            before, hosts = self.stranded.get((name, cause), (0, 0))
            self.stranded[name, cause] = before + amount, hosts + 1

    def amounts(self) -> dict[str, Amounts]:
        """The sums: of hosts under the empty word, of their cells by kind, with their number as the total of ``COUNT``."""
        found: dict[str, Amounts] = {}
        for layout, numbers in self._sums.items():
            for kind, amounts in _by_kind(layout, numbers).items():
                sums = found.setdefault(kind, {})
                for name, amount in amounts.items():
                    sums[name] = sums.get(name, Amount()) + amount
        return found


def _by_kind(layout: Layout, numbers: NDArray[np.int64]) -> dict[str, Amounts]:
    found: dict[str, Amounts] = {}
    for (kind, name), row in zip(layout, numbers.tolist(), strict=True):
        found.setdefault(kind, {})[name] = Amount(*row)
    return found
