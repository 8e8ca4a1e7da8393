"""NVSwitch fabric partitions: what a fabric manager tells, what of it a host may give away, and what is to be done. PURE.

What may live here: the frozen types of the port ``drivers.fabricports.Fabric``, the translation of module ids, the comparison of
what is active with what is wanted.

Theory of operation. On a board with NVSwitches GPUs that were given to a guest reach each other by NVLink only while the fabric
manager has *activated* the partition of exactly these GPUs, and while it is active they reach nobody else: a partition is a unit
of allocation, and a matter of isolation between tenants. The manager names GPUs by module id, their place on the board, which
does not follow PCI order; a topology names them by UUID. It talks to one version of the driver only: where the two differ nothing
it says of partitions is used.

Activation is a level, not an act: a partition is to be active exactly while the claim of an instance that should run holds it. So
each round compares, and both acts may be repeated: an agent that was killed between any two steps comes to the same end. What is
nobody's is ended first, for partitions that overlap cannot both be active; one that cannot be ended keeps those that overlap it
from being begun.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from casemate_core.topology import FabricPartition, Gpu
from casemate_core.topology_loaders import GpuFacts


@dataclass(frozen=True, slots=True)
class PartitionState:
    """A partition as the fabric manager tells it. ``modules``: module ids, ascending."""

    id: int
    modules: tuple[int, ...]
    active: bool = False


@dataclass(frozen=True, slots=True)
class FabricFacts:
    """All partitions, and the versions of the fabric manager and of the driver that it found."""

    version: str
    driver: str
    partitions: tuple[PartitionState, ...] = ()


@dataclass(frozen=True, slots=True)
class FabricSight:
    """What goes into a host's topology, and what is held back, each as ``Reason: what, and why``."""

    partitions: tuple[FabricPartition, ...] = ()
    problems: tuple[str, ...] = ()


def sight(facts: FabricFacts, gpus: Iterable[Gpu | GpuFacts]) -> FabricSight:
    """Partitions of GPUs that this host has, by UUID. One with a module that nobody has told is held back."""
    if facts.version != facts.driver:
        told = f"FabricVersion: fabric manager {facts.version} beside driver {facts.driver}: install the same version of both"
        return FabricSight((), (told,))
    uuid_of: dict[int, str] = {}
    problems = []
    for gpu in gpus:
        if gpu.module_id >= 0 and gpu.module_id in uuid_of:
            problems.append(f"FabricModule: module {gpu.module_id} is {uuid_of[gpu.module_id]} and {gpu.uuid}")
        uuid_of[gpu.module_id] = gpu.uuid
    if problems:
        return FabricSight((), tuple(problems))
    found = []
    for partition in sorted(facts.partitions, key=lambda p: p.id):
        absent = [module for module in partition.modules if module < 0 or module not in uuid_of]
        if absent or not partition.modules:
            problems.append(f"FabricModule: partition {partition.id}: no GPU is told for modules {absent}")
            continue
        found.append(FabricPartition(partition.id, tuple(sorted(uuid_of[m] for m in partition.modules))))
    return FabricSight(tuple(found), tuple(problems))


@dataclass(frozen=True, slots=True)
class FabricPlan:
    """What to end, then what to begin, and what cannot be begun yet: partition to the reason."""

    end: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()
    waits: Mapping[int, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.end or self.begin)


def plan(facts: FabricFacts, wanted: Collection[int], held: Collection[int] = ()) -> FabricPlan:
    """What is to be done so that exactly ``wanted`` is active.

    ``held``: partitions that a guest may still use although nobody wants them any more (it has not ended yet). They are left as
    they are: their GPUs are not cut off under a guest, nor given a second owner.
    """
    known = {p.id: p for p in facts.partitions}
    wanted, held = set(wanted), set(held)
    if facts.version != facts.driver:
        return FabricPlan(waits=dict.fromkeys(sorted(wanted), f"fabric manager {facts.version}, driver {facts.driver}"))
    end = tuple(p.id for p in facts.partitions if p.active and p.id not in wanted and p.id not in held)
    staying = [p for p in facts.partitions if p.active and p.id not in end]
    begin, waits = [], {}
    for number in sorted(wanted):
        partition = known.get(number)
        if partition is None:
            waits[number] = f"the fabric manager has no partition {number}"
            continue
        if partition.active:
            continue
        overlap = [p.id for p in staying if set(p.modules) & set(partition.modules)]
        if overlap:
            waits[number] = f"partition {overlap[0]} is active and has GPUs of it"
            continue
        begin.append(number)
        staying.append(partition)
    return FabricPlan(end, tuple(begin), waits)
