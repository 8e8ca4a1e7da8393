"""A request in the units of the columns: what a bin must have at the very least. PURE.

May live here: the translation of ``casemate_core.fit.Request`` into shapes, and nothing that depends on who holds what.

Theory of operation. A shape is a lower bound: where it does not fit, ``fit`` refuses too; where it fits, ``fit`` has the
last word. There are two of them. ``whole`` bounds what the host must have altogether, and is sound: the filter uses it.
``aligned`` asks that one cell has CPUs, memory, pages and GPUs side by side, with dedicated threads out of the pool: that is
where instances should lie, so those bins are tried first, and being without one costs nothing but the second look.
"""

from dataclasses import dataclass

from casemate_core.fit import CellPolicy, CpuPolicy, EmulatorPolicy, Overcommit, Request, ThreadPolicy
from casemate_manager.columns import ANY_CPU, CORES, CPU, DISK, ISOLATED, MAX_KINDS, MEMORY, FleetColumns
from casemate_manager.scheduler.mix import Shape
from casemate_manager.scheduler.value import WHOLE_MILLI

#: A kind that no bin has: a request that names a model nobody has fits nowhere.
NO_KIND = 1 << MAX_KINDS

#: Threads of a core assumed where a host's width is not known to the shape: the most there are (POWER).
MOST_THREADS_PER_CORE = 8


@dataclass(frozen=True, slots=True)
class Shapes:
    """A request as the columns see it. ``aligned`` is None where one cell is not what is asked for (spread)."""

    whole: Shape
    aligned: Shape | None
    #: Names a thing that no host has (a page size, a network): nothing fits, and this says what.
    missing: str = ""


def shapes_of(request: Request, overcommit: Overcommit, columns: FleetColumns) -> Shapes:
    """Both bounds of a request, for columns with their dimensions and kinds as they are now."""
    cpu, memory = request.cpu, request.memory
    need = [0] * len(columns.dimensions)
    missing = ""
    vcpus = cpu.reserved_count
    dedicated = cpu.policy is CpuPolicy.DEDICATED or cpu.realtime
    threads = vcpus + (dedicated and cpu.emulator is EmulatorPolicy.ISOLATE)
    aligned_cpu = 0
    if cpu.realtime:
        need[ISOLATED] = vcpus
        need[ANY_CPU] = WHOLE_MILLI * threads
    elif dedicated:
        need[ANY_CPU] = aligned_cpu = WHOLE_MILLI * threads
    else:
        need[CPU] = need[ANY_CPU] = aligned_cpu = overcommit.cpu_charge(vcpus * cpu.milli_each)
    if dedicated:
        if cpu.threads is ThreadPolicy.ISOLATE:
            need[CORES] = vcpus
        elif cpu.threads is ThreadPolicy.REQUIRE:
            need[CORES] = -(-vcpus // MOST_THREADS_PER_CORE)
    need[MEMORY] = memory.overhead_mib
    if memory.page_kib:
        at = columns.dimension(f"pages:{memory.page_kib}")
        if at is None:
            missing = f"pages of {memory.page_kib} KiB"
        else:
            need[at] = -(-memory.reserved_mib * 1024 // memory.page_kib)
    else:
        need[MEMORY] += overcommit.memory_charge(memory.reserved_mib)
    need[DISK] = request.room_mib
    for nic in request.nics:
        at = columns.dimension(f"vf:{nic.network}")
        if at is not None:
            need[at] += 1
    gpus, milli, kinds = _gpus(request, columns)
    if kinds == NO_KIND:
        missing = f"GPU of model {request.gpus[0].model}"
    whole = Shape(tuple(need), gpus, milli, kinds)
    if memory.cells is CellPolicy.SPREAD and memory.cell_count != 1:
        return Shapes(whole, None, missing)
    need[CPU] = max(need[CPU], aligned_cpu)
    return Shapes(whole, Shape(tuple(need), gpus, milli, kinds), missing)


def _gpus(request: Request, columns: FleetColumns) -> tuple[int, int, int]:
    """(number, milli of each, mask of kinds or 0 for any) over all GPU requests together.

    Whole GPUs and slices in one request: counted as slices, which is the lower of the two bounds.
    """
    if not request.gpus:
        return 0, WHOLE_MILLI, 0
    whole = [g for g in request.gpus if not g.is_share]
    slices = [g for g in request.gpus if g.is_share]
    # Slices of different requests may lie on one GPU, so only the largest request is a bound on distinct GPUs.
    if whole:
        count, milli = sum(g.count for g in whole), WHOLE_MILLI
    else:
        largest = max(slices, key=lambda g: g.count)
        count, milli = largest.count, largest.share_milli or columns.profile_milli(largest.share_profile)
    kinds = -1
    for g in request.gpus:
        kinds &= columns.kinds_of(g.model, share=g.is_share)
    every = columns.kinds_of("*", share=bool(slices and not whole))
    if not kinds:
        return count, milli, NO_KIND
    return count, milli, 0 if kinds == every and whole else kinds
