"""What is free on a host, and what a request needs of it, as the numbers that the choices work on.

What may live here: ``View`` (topology minus claims) and ``Need`` (a request in the units of the host). Both are made at the
start of a fit and thrown away at its end.

The pool of a cell is what the dedicated leave of it. So a dedicated claim may take from a cell's pool only so many threads
that the charges of the shared ones still fit on what remains: that is the cell's ``limit``. On a host without housekeeping
threads emulators float over the pools, and one thread must remain somewhere: ``floor``.
"""

from dataclasses import dataclass
from typing import Self

from casemate_core.claims import HostClaims, Usage
from casemate_core.fit.cores import Mode
from casemate_core.fit.request import (
    CoreChoice,
    CpuPolicy,
    EmulatorPolicy,
    Overcommit,
    Request,
    ThreadPolicy,
)
from casemate_core.topology import CellIndex, CoreKind, Topology, TopologyIndex

_MODES = {
    ThreadPolicy.REQUIRE: Mode.REQUIRE,
    ThreadPolicy.ISOLATE: Mode.ISOLATE,
    ThreadPolicy.PREFER: Mode.PREFER,
    ThreadPolicy.ANY: Mode.ANY,
}


@dataclass(slots=True)
class Need:
    """A request in the host's units. ``vcpus`` and memory count growth room."""

    vcpus: int
    dedicated: bool
    realtime: bool
    mode: Mode
    emulator_thread: bool
    shared_milli: int
    """Charge on the pool, all vCPUs together; 0 for dedicated."""
    size_mib: int
    """Plain memory of the guest, before overcommit; 0 with huge pages."""
    overhead_mib: int
    page_kib: int
    pages: int
    overcommit: Overcommit

    @classmethod
    def of(cls, request: Request, overcommit: Overcommit) -> Self:
        """Apply the ratios and round up to whole pages."""
        cpu, memory = request.cpu, request.memory
        dedicated = cpu.policy is CpuPolicy.DEDICATED or cpu.realtime
        mode = _MODES[cpu.threads]
        if cpu.realtime and not mode.takes_whole_cores:
            mode = Mode.WHOLE
        vcpus = cpu.reserved_count
        reserved_mib = memory.reserved_mib
        huge = memory.page_kib > 0
        return cls(
            vcpus=vcpus,
            dedicated=dedicated,
            realtime=cpu.realtime,
            mode=mode,
            emulator_thread=dedicated and cpu.emulator is EmulatorPolicy.ISOLATE,
            shared_milli=0 if dedicated else overcommit.cpu_charge(vcpus * cpu.milli_each),
            size_mib=0 if huge else reserved_mib,
            overhead_mib=memory.overhead_mib,
            page_kib=memory.page_kib,
            pages=-(-reserved_mib * 1024 // memory.page_kib) if huge else 0,
            overcommit=overcommit,
        )


class View:
    """Free resources of one host. Masks of threads, amounts by cell position."""

    __slots__ = ("claims", "floor", "free", "gpus_held", "index", "kind", "pool_left", "topology", "usage")

    topology: Topology
    index: TopologyIndex
    claims: HostClaims
    usage: Usage
    free: int
    """Threads that nobody owns."""
    gpus_held: int
    """GPUs that somebody holds whole."""
    kind: int
    """Threads of the kind of core asked for; all of them where any will do."""
    pool_left: int
    """Pool threads that nobody owns, on the whole host."""
    floor: bool
    """True where taking the last pool thread would leave emulators without a place."""

    def __init__(self, topology: Topology, claims: HostClaims, request: Request) -> None:
        index = topology.index
        self.topology = topology
        self.index = index
        self.claims = claims
        self.usage = claims.usage
        self.free = index.online & ~claims.usage.owned
        self.kind = -1 if request.cpu.cores is CoreChoice.ANY else index.kinds[_CORE_KINDS[request.cpu.cores]]
        self.pool_left = (index.pool & self.free).bit_count()
        self.floor = not index.reserved
        held = 0
        if claims.usage.gpus:
            mask_of = topology.functions.gpu_mask
            for uuid in claims.usage.gpus:
                held |= mask_of.get(uuid, 0)
        self.gpus_held = held

    def limit(self, cell: CellIndex) -> int:
        """How many pool threads of the cell a dedicated claim may take."""
        left = (cell.pool & self.free).bit_count()
        limit = left - -(-self.usage.shared_milli.get(cell.id, 0) // 1000)
        if self.floor and limit == self.pool_left:
            limit -= 1
        return limit

    def shared_free(self, cell: CellIndex) -> int:
        """Thousandths of a thread that the cell's pool can still promise."""
        return 1000 * (cell.pool & self.free).bit_count() - self.usage.shared_milli.get(cell.id, 0)

    def plain_free(self, cell: CellIndex) -> int:
        """MiB of plain memory that the cell can still promise."""
        return cell.plain_mib - self.usage.charged_mib.get(cell.id, 0)

    def pages_free(self, cell: CellIndex, page_kib: int) -> int:
        """Huge pages of that size left in the cell's pool."""
        return cell.pages.get(page_kib, 0) - self.usage.pages.get((cell.id, page_kib), 0)


_CORE_KINDS = {CoreChoice.PERFORMANCE: CoreKind.PERFORMANCE, CoreChoice.EFFICIENCY: CoreKind.EFFICIENCY}
