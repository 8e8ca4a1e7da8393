"""The fleet as columns: what each host and each of its cells still has, in NumPy, kept up claim by claim. PURE.

May live here: the mapping of hosts, cells and claims to rows, bins and amounts. Nothing here chooses or scores.

Theory of operation. A host is a *row*; each of its cells with CPUs is a *bin* of ``FleetColumns.cells``; the host as a whole
is the bin of the same number as its row in ``FleetColumns.hosts``, brought up to date when somebody looks. Both are ``Bins``:
one array per kind of amount (a *dimension*), GPUs as free milli in slots. A claim changes a few numbers of a few bins; their
versions tell every cache what to compute again. The columns say what may fit; what does fit, and with which ids, is said by
``casemate_core.fit`` on the host's topology and claims, which a row keeps beside it.

Dimensions, in order (a bin that is not in use has -1 everywhere, so that nothing fits it):

    cpu_milli    shared CPU of the pool that can still be promised; a dedicated thread counts 1000
    any_milli    the same, with isolated threads
    isolated     free isolated threads
    cores        cores of which every thread is free, pool and isolated
    memory_mib   plain memory that can still be promised (of a host: memory cells too)
    disk_mib     of the host (for its cells the power of two above, so that they seldom change)
    pages:K      free huge pages of K KiB
    vf:NETWORK   free virtual functions that reach the network, of the host

An amount is never below 0, also where more is promised than there is: what asks nothing of it may still come.

GPU slots: 1000 for a GPU that is free, less where slices are taken, 0 where it is held. A bin's *kind* is the set of GPU
models in it and whether they can be sliced; requests that name models are masks over kinds.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from casemate_core.claims import Claim, HostClaims
from casemate_core.errors import InternalError
from casemate_core.spec.fleet import Taint
from casemate_core.topology import CellIndex, Gpu, Topology
from casemate_manager.scheduler.bins import Bins

CPU, ANY_CPU, ISOLATED, CORES, MEMORY, DISK = range(6)
FIXED_DIMENSIONS = ("cpu_milli", "any_milli", "isolated", "cores", "memory_mib", "disk_mib")

#: Networks that have a column; VFs of further ones are left to ``fit``.
MAX_NETWORK_DIMENSIONS = 24
#: Kinds of GPU bins told apart by masks; all further ones share the last number, and ``fit`` tells them apart.
MAX_KINDS = 62

WHOLE_GPU = 1000


class UnknownHost(InternalError):
    """A host that was never upserted, or was removed."""

    reason = "UnknownHost"


@dataclass(frozen=True, slots=True)
class HostView:
    """One host as the scheduler sees it. ``generation`` grows with every change of its claims or of its picture."""

    name: str
    topology: Topology
    claims: HostClaims
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Taint, ...] = ()
    cordoned: bool = False
    #: False for a host that is not heard from or not ready: nothing new is placed there.
    available: bool = True
    generation: int = 0


@dataclass(slots=True, eq=False)
class Row:
    """A host in the columns. ``bins``: numbers of its cells' bins, in the order of ``topology.index.cpu_cells``."""

    number: int
    view: HostView
    bins: tuple[int, ...]
    cells: tuple[CellIndex, ...]
    #: GPU UUID to (position in ``bins``, slot there, slot in the host's own bin).
    slots: Mapping[str, tuple[int, int, int]]
    #: Amounts of each cell as last written, D each; the host's own are their sums.
    amounts: list[list[int]]
    #: Of each PF: MAC, number of its VFs, dimensions of the networks it reaches.
    ports: tuple[tuple[str, int, tuple[int, ...]], ...] = ()
    #: Free VFs as last written: (dimension, how many), of the host.
    vfs: tuple[tuple[int, int], ...] = ()

    @property
    def claims(self) -> HostClaims:
        """The host's claims now."""
        return self.view.claims


class FleetColumns:
    """Columns of all hosts. Not thread-safe: one owner changes it."""

    def __init__(self) -> None:
        self.dimensions: list[str] = list(FIXED_DIMENSIONS)
        self._index: dict[str, int] = {name: i for i, name in enumerate(self.dimensions)}
        self.kinds: list[tuple[tuple[str, ...], bool]] = [((), False)]
        self._kind_of: dict[tuple[tuple[str, ...], bool], int] = {((), False): 0}
        #: Dimension of the free pages of a size in KiB.
        self._pages: dict[int, int] = {}
        self._row_of: dict[str, Row] = {}
        self.rows: list[Row | None] = []
        self._free_rows: list[int] = []
        self._free_bins: list[int] = []
        self._used_bins = 0
        self._slots = (0, 0)
        self._profiles: dict[str, int] = {}
        #: Grows when arrays are made anew (more hosts, a new dimension): every cache by row or bin is void then.
        self.layout = 0
        #: Grows when a host comes, goes, or changes its labels, taints or availability.
        self.meta_version = 0
        self._allocate(64, 64)

    # --- reading ---------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, host: object) -> bool:
        return host in self._row_of

    @property
    def hosts(self) -> Bins:
        """The bins of the hosts as a whole, up to date."""
        if self._dirty:
            self._flush()
        return self._hosts

    def row(self, host: str) -> Row:
        """The row of a host; raises :class:`UnknownHost`."""
        try:
            return self._row_of[host]
        except KeyError:
            raise UnknownHost(f"no host {host!r} in the columns") from None

    def live_rows(self) -> Iterable[Row]:
        """All hosts, in order of their rows."""
        return (row for row in self.rows if row is not None)

    def dimension(self, name: str) -> int | None:
        """Number of a dimension; None where no host has the thing."""
        return self._index.get(name)

    def kinds_of(self, model: str, *, share: bool) -> int:
        """Mask of the kinds of bins with a GPU whose model matches the glob, and that can be sliced where ``share``."""
        mask = 0
        for number, (models, sliced) in enumerate(self.kinds[:MAX_KINDS]):
            if (sliced or not share) and any(fnmatchcase(name, model) for name in models):
                mask |= 1 << number
        return mask | (1 << MAX_KINDS if len(self.kinds) > MAX_KINDS else 0)

    def profile_milli(self, profile: str) -> int:
        """The least that a slice of this profile counts on any GPU of the fleet; 1 where none has it."""
        return self._profiles.get(profile, 1)

    # --- changing --------------------------------------------------------------------------------------------------------

    def upsert(self, view: HostView) -> None:
        """Add a host, or replace everything known of it."""
        old = self._row_of.get(view.name)
        if old is not None and old.view.topology is view.topology:
            meta = ("labels", "taints", "cordoned", "available")
            if any(getattr(old.view, name) != getattr(view, name) for name in meta):
                self.meta_version += 1
            changed = old.view.claims is not view.claims
            old.view = view
            self.available[old.number] = view.available and not view.cordoned
            if changed:
                self._write(old, range(len(old.bins)), old.slots)
            return
        if old is not None:
            self.remove(view.name)
        self._learn(view.topology)
        self._insert(view)
        self.meta_version += 1

    def remove(self, host: str) -> None:
        """Forget a host; raises :class:`UnknownHost`."""
        row = self.row(host)
        del self._row_of[host]
        self.rows[row.number] = None
        self._free_rows.append(row.number)
        self._free_bins.extend(reversed(row.bins))
        self._tick += 1
        self.row_version[row.number] = self._tick
        self._dirty.discard(row.number)
        for bins, numbers in ((self._hosts, (row.number,)), (self.cells, row.bins)):
            for number in numbers:
                bins.free[:, number] = -1
                bins.gpu[:, number] = 0
                bins.model[number] = 0
                bins.touch(number)
        self.cell_row[list(row.bins)] = -1
        self.available[row.number] = self.live[row.number] = False
        self.meta_version += 1

    def apply_claim(self, host: str, claim: Claim) -> None:
        """Add a claim to a host; raises what ``HostClaims.add`` raises where it is not free."""
        row = self.row(host)
        self._became(row, row.view.claims.add(claim), claim)

    def release(self, host: str, owner: str) -> Claim:
        """Remove the claim of ``owner``; raises KeyError where there is none. Returns it."""
        row = self.row(host)
        claim = row.view.claims[owner]
        self._became(row, row.view.claims.remove(owner), claim)
        return claim

    def _became(self, row: Row, claims: HostClaims, changed: Claim) -> None:
        view = row.view
        row.view = HostView(
            view.name,
            view.topology,
            claims,
            view.labels,
            view.taints,
            view.cordoned,
            view.available,
            view.generation + 1,
        )
        owned = changed.owned_mask
        charged = [m.cell for m in changed.memory] + [p.cell for p in changed.pages] + [s.cell for s in changed.shared]
        touched = [i for i, cell in enumerate(row.cells) if owned & cell.mask or cell.id in charged]
        gpus: tuple[str, ...] = ()
        if row.slots and (changed.gpus or changed.shares):
            gpus = (*changed.gpus, *(share.gpu for share in changed.shares))
        self._write(row, touched, gpus, vfs=bool(changed.vfs))

    # --- layout ----------------------------------------------------------------------------------------------------------

    def _allocate(self, rows: int, bins: int) -> None:
        """New arrays, all empty."""
        self.layout += 1
        per_cell, per_host = self._slots
        self._hosts = _empty(len(self.dimensions), per_host, rows)
        self._dirty: set[int] = set()
        self._tick = 0
        #: (N,) int64: grows with every change of a host's claims or picture.
        self.row_version: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)
        self.cells = _empty(len(self.dimensions), per_cell, bins)
        #: (B,) int64: row of each bin of ``cells``, -1 where it is not in use.
        self.cell_row: NDArray[np.int64] = np.full(bins, -1, dtype=np.int64)
        #: (N,) bool: there is a host in the row.
        self.live: NDArray[np.bool_] = np.zeros(rows, dtype=np.bool_)
        #: (N,) bool: the host is there, available and not cordoned.
        self.available: NDArray[np.bool_] = np.zeros(rows, dtype=np.bool_)

    def _learn(self, topology: Topology) -> None:
        """Make room for dimensions, slots and kinds that this topology brings."""
        for gpu in topology.gpus:
            for profile in gpu.share_profiles:
                self._profiles[profile.name] = min(profile.milli, self._profiles.get(profile.name, WHOLE_GPU))
        names = [f"pages:{size}" for size in sorted(topology.index.page_sizes)]
        networks = sorted({network for pf in topology.pfs for network in pf.networks})
        have = sum(name.startswith("vf:") for name in self.dimensions)
        new_networks = [name for n in networks if (name := f"vf:{n}") not in self._index]
        names += new_networks[: MAX_NETWORK_DIMENSIONS - have]
        new = [name for name in names if name not in self._index]
        per_cell = max([0, *(len(gpus) for gpus in _gpus_by_cell(topology))])
        slots = (max(self._slots[0], per_cell), max(self._slots[1], len(topology.gpus)))
        if not new and slots == self._slots:
            return
        for name in new:
            self._index[name] = len(self.dimensions)
            self.dimensions.append(name)
        self._pages = {size: self._index[f"pages:{size}"] for size in topology.index.page_sizes} | self._pages
        self._slots = slots
        self._rebuild(len(self._hosts.model), len(self.cells.model))

    def _rebuild(self, rows: int, bins: int) -> None:
        views = [row.view for row in self.live_rows()]
        self._row_of.clear()
        self.rows.clear()
        self._free_rows.clear()
        self._free_bins.clear()
        self._used_bins = 0
        self._allocate(rows, bins)
        for view in views:
            self._insert(view)

    def _insert(self, view: HostView) -> None:
        topology = view.topology
        cells = topology.index.cpu_cells
        count = len(cells)
        if len(self.rows) - len(self._free_rows) >= len(self._hosts.model):
            self._rebuild(2 * len(self._hosts.model), len(self.cells.model))
        while self._used_bins + count > len(self.cells.model) and len(self._free_bins) < count:
            self._rebuild(len(self._hosts.model), 2 * len(self.cells.model))
        if self._free_rows:
            number = self._free_rows.pop()
        else:
            number = len(self.rows)
            self.rows.append(None)
        if len(self._free_bins) >= count:
            bins = tuple(self._free_bins.pop() for _ in range(count))
        else:
            bins = tuple(range(self._used_bins, self._used_bins + count))
            self._used_bins += count
        slots: dict[str, tuple[int, int, int]] = {}
        for position, gpus in enumerate(_gpus_by_cell(topology)):
            for slot, gpu in enumerate(gpus):
                slots[gpu.uuid] = (position, slot, len(slots))
            self.cells.model[bins[position]] = self._kind(gpus)
        self._hosts.model[number] = self._kind(topology.gpus)
        ports = tuple(
            (pf.mac, len(pf.vfs), tuple(self._index[f"vf:{n}"] for n in pf.networks if f"vf:{n}" in self._index))
            for pf in topology.pfs
        )
        row = Row(number, view, bins, cells, slots, [[0] * len(self.dimensions) for _ in cells], ports)
        self.rows[number] = row
        self._row_of[view.name] = row
        self.cell_row[list(bins)] = number
        self.live[number] = True
        self.available[number] = view.available and not view.cordoned
        self._write(row, range(count), slots)

    def _kind(self, gpus: Iterable[Gpu]) -> int:
        held = tuple(gpus)
        sliced = any(g.share_step_milli or not all(p.bare for p in g.share_profiles) for g in held)
        key = (tuple(sorted({g.model for g in held})), sliced)
        if key not in self._kind_of:
            self._kind_of[key] = len(self.kinds)
            self.kinds.append(key)
        return min(self._kind_of[key], MAX_KINDS)

    # --- amounts ---------------------------------------------------------------------------------------------------------

    def _write(self, row: Row, touched: Sequence[int], gpus: Collection[str], *, vfs: bool = True) -> None:
        """Bring some cells of a host, and some of its GPUs, in line with its claims; of the host only that it changed."""
        usage = row.view.claims.usage
        self._tick += 1
        self.row_version[row.number] = self._tick
        self._dirty.add(row.number)
        # A power of two above: what is shared by all cells would else touch them all with every claim. ``fit`` is exact.
        disk = 1 << max(0, row.view.topology.disk_mib - usage.disk_mib).bit_length()
        everywhere = vfs or not row.amounts or disk != row.amounts[0][DISK]
        if vfs:
            row.vfs = _free_vfs(row)
        free = row.view.topology.index.online & ~usage.owned
        for position in range(len(row.bins)) if everywhere else touched:
            old = row.amounts[position]
            amounts = self._amounts(row, position, free) if position in touched else old[:]
            amounts[DISK] = disk
            for d, amount in row.vfs:
                amounts[d] = amount
            if amounts != old:
                row.amounts[position] = amounts
                self.cells.free[:, row.bins[position]] = amounts
                self.cells.touch(row.bins[position])
        if not gpus:
            return
        counted = set()
        for uuid in gpus:
            position, slot, host_slot = row.slots[uuid]
            milli = 0 if uuid in usage.gpus else WHOLE_GPU - usage.share_milli.get(uuid, 0)
            self.cells.gpu[slot, row.bins[position]] = milli
            self._hosts.gpu[host_slot, row.number] = milli
            counted.add(row.bins[position])
        for bin_ in counted:
            self.cells.count(bin_)
            self.cells.touch(bin_)
        self._hosts.count(row.number)

    def _flush(self) -> None:
        """Write the amounts of hosts that changed since somebody looked at hosts as a whole."""
        for number in self._dirty:
            row = self.rows[number]
            if row is not None:
                self._hosts.free[:, number] = self._of_host(row)
            self._hosts.touch(number)
        self._dirty.clear()

    def _of_host(self, row: Row) -> list[int]:
        usage, index = row.view.claims.usage, row.view.topology.index
        host = [sum(amounts) for amounts in zip(*row.amounts, strict=True)] or [0] * len(self.dimensions)
        for cell in index.cells:
            if not cell.pool | cell.isolated:
                host[MEMORY] += max(0, cell.plain_mib - usage.charged_mib.get(cell.id, 0))
                for page_kib, count in cell.pages.items():
                    left = count - usage.pages.get((cell.id, page_kib), 0)
                    host[self._pages[page_kib]] += max(0, left)
        host[DISK] = max(0, row.view.topology.disk_mib - usage.disk_mib)
        for d, amount in row.vfs:
            host[d] = amount
        return host

    def _amounts(self, row: Row, position: int, free: int) -> list[int]:
        """Amounts of a cell; those that all cells share stay as they were, the caller writes them."""
        cell, usage = row.cells[position], row.view.claims.usage
        amounts = row.amounts[position][:]
        isolated = (cell.isolated & free).bit_count()
        milli = max(0, 1000 * (cell.pool & free).bit_count() - usage.shared_milli.get(cell.id, 0))
        usable = (cell.pool | cell.isolated) & free
        amounts[CPU] = milli
        amounts[ANY_CPU] = milli + 1000 * isolated
        amounts[ISOLATED] = isolated
        cores = 0
        for shape in cell.classes:
            cores += shape.whole(usable).bit_count()
        amounts[CORES] = cores
        amounts[MEMORY] = max(0, cell.plain_mib - usage.charged_mib.get(cell.id, 0))
        for page_kib, count in cell.pages.items():
            amounts[self._pages[page_kib]] = max(0, count - usage.pages.get((cell.id, page_kib), 0))
        return amounts


def with_claims(view: HostView, claims: HostClaims) -> HostView:
    """The same host with other claims, one generation on."""
    return replace(view, claims=claims, generation=view.generation + 1)


def _free_vfs(row: Row) -> tuple[tuple[int, int], ...]:
    taken = row.view.claims.usage.vfs
    counts: dict[int, int] = {}
    for mac, number, dimensions in row.ports:
        free = number - taken.get(mac, 0).bit_count()
        for d in dimensions:
            counts[d] = counts.get(d, 0) + free
    return tuple(counts.items())


def _empty(dimensions: int, slots: int, size: int) -> Bins:
    return Bins(
        np.full((dimensions, size), -1, dtype=np.int64),
        np.zeros((max(slots, 1), size), dtype=np.int64),
        np.zeros(size, dtype=np.int64),
    )


def _gpus_by_cell(topology: Topology) -> list[list[Gpu]]:
    """GPUs of each CPU cell; those of no CPU cell go to the nearest one."""
    index = topology.index
    position_of = {cell.id: i for i, cell in enumerate(index.cpu_cells)}
    out: list[list[Gpu]] = [[] for _ in index.cpu_cells]
    for gpu in topology.gpus:
        at = position_of.get(gpu.place.cell)
        if at is None and out:
            home = index.cell_by_id.get(gpu.place.cell)
            distance = index.distance[home.position] if home else None
            at = min(range(len(out)), key=lambda i: distance[index.cpu_cells[i].position] if distance else i)
        if at is not None:
            out[at].append(gpu)
    return out
