"""Capacity of many hosts: sums, what is stranded by cause, and where most of it is. PURE.

May live here: sums over ``capacity``. A host's numbers are made into a ``Summary`` once and kept for as long as its topology
and claims are the same objects; the sums of a fleet are made of summaries.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class Summary:
    """One host's sums. ``stranded``: (dimension, cause) to the amount; ``cells``: kind to (count, amounts)."""

    amounts: Amounts
    stranded: dict[tuple[str, Cause], int]
    cells: dict[str, tuple[int, Amounts]]
    stranded_milli: int
    """What is stranded of each dimension as a part of what there is, in thousandths, summed over the dimensions (``vfs:``
    are left out, for they count VFs again)."""


def summarise(found: HostCapacity) -> Summary:
    """The sums of one host."""
    stranded: dict[tuple[str, Cause], int] = {}
    for entry in found.stranded:
        key = entry.dimension, entry.cause
        stranded[key] = stranded.get(key, 0) + entry.amount
    cells: dict[str, tuple[int, Amounts]] = {}
    for cell in found.cells:
        kind = kind_of(cell)
        count, amounts = cells.get(kind, (0, {}))
        cells[kind] = count + 1, _plus(amounts, amounts_of(cell))
    totals = found.totals()
    parts = [1000 * a.stranded // a.total for name, a in totals.items() if not name.startswith("vfs:")]
    return Summary(totals, stranded, cells, sum(parts))


class Summaries:
    """Summaries by host, made anew where the topology or the claims are other ones. One caller at a time."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Topology, HostClaims, Summary]] = {}

    def of(self, host: str, topology: Topology, claims: HostClaims) -> Summary:
        """The summary of a host. What is the same object as before is not looked at again: both are values."""
        known = self._known.get(host)
        if known is not None and known[0] is topology and (known[1] is claims or known[1] == claims):
            return known[2]
        made = summarise(capacity(topology, claims))
        self._known[host] = topology, claims, made
        return made

    def keep(self, hosts: Iterable[str]) -> None:
        """Forget all other hosts."""
        kept = set(hosts)
        self._known = {host: known for host, known in self._known.items() if host in kept}


class Sums:
    """Amounts that are added up. Lists of numbers while it goes on, since a fleet adds up a hundred thousand of them."""

    __slots__ = ("_sums",)

    def __init__(self) -> None:
        self._sums: dict[str, list[int]] = {}

    def add(self, amounts: Amounts) -> None:
        """One more of each."""
        sums = self._sums
        for name, amount in amounts.items():
            row = sums.get(name)
            if row is None:
                sums[name] = [amount.total, amount.used, amount.free, amount.stranded]
            else:
                row[0] += amount.total
                row[1] += amount.used
                row[2] += amount.free
                row[3] += amount.stranded

    def amounts(self) -> Amounts:
        """The sums so far."""
        return {name: Amount(*row) for name, row in self._sums.items()}


@dataclass(slots=True)
class Group:
    """Sums over hosts. ``on``: (dimension, cause) to the hosts on which it is so; ``cells``: kind to their number."""

    hosts: int = 0
    unknown: int = 0
    closed: int = 0
    sums: Sums = field(default_factory=Sums)
    stranded: dict[tuple[str, Cause], int] = field(default_factory=dict)
    on: dict[tuple[str, Cause], int] = field(default_factory=dict)
    cells: dict[str, int] = field(default_factory=dict)
    cell_sums: dict[str, Sums] = field(default_factory=dict)

    def add(self, summary: Summary | None, *, closed: bool) -> None:
        """One host more; None where it has not told what it is made of."""
        self.hosts += 1
        self.closed += closed
        if summary is None:
            self.unknown += 1
            return
        self.sums.add(summary.amounts)
        for key, amount in summary.stranded.items():
            self.stranded[key] = self.stranded.get(key, 0) + amount
            self.on[key] = self.on.get(key, 0) + 1
        for kind, (count, amounts) in summary.cells.items():
            self.cells[kind] = self.cells.get(kind, 0) + count
            self.cell_sums.setdefault(kind, Sums()).add(amounts)


def _plus(sums: Amounts, more: Amounts) -> Amounts:
    return {**sums, **{name: sums[name] + amount if name in sums else amount for name, amount in more.items()}}
