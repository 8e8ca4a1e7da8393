"""Who may run where: threads that belong to one, and the pool that all others float over. PURE.

What may live here: the sets of threads, and what is to be moved so that they hold. When an instance starts is decided in
:mod:`casemate_agent.plan.converge`, which asks here whether its threads are free of others.

Theory of operation. Four sets, and their algebra::

    OWNED(claim)      threads of its vCPUs, their held siblings, and an emulator thread of its own
    IN_USE            OWNED of every instance that runs or is to run now, and of VMs that are not ours and are pinned one to one
    POOL              of the topology: threads that are neither housekeeping nor isolated
    FLOATING(claim)   POOL within the cells that it is charged to, minus IN_USE; never empty while there is anything else

The pool leaves a thread *before* its owner starts: as soon as an instance with threads of its own should run they are IN_USE,
whoever floats on them is pinned to what is left, and its start waits until the kernel says that nobody else may run there
(:meth:`Pool.hold`). It takes a thread back when its owner has ended: then it is no longer IN_USE. Both follow from what is
seen, so an agent that dies between any two steps goes on where it stood.

A VM that begins to start at the same time is the one that could slip through: it was planned before the threads were IN_USE. What
starts carries the threads that it will float over; the executor lets no start through whose threads are IN_USE by then, and
one that had begun already holds the owner's start back until it is seen.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from casemate_agent.actions import Pin
from casemate_agent.drivers.ports import DomainFacts, QemuThreads
from casemate_agent.ledger.records import Book, InstanceRecord, Note, Observation, from_metadata
from casemate_agent.plan.admission import Admission
from casemate_agent.plan.drafting import ACTIVE, Settings
from casemate_core.claims import Claim
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.spec.instance import Run
from casemate_core.topology import Topology


@dataclass(frozen=True, slots=True)
class Pool:
    """The sets at one moment. ``owners``: thread in use -> uid of whose it is."""

    topology: Topology
    owners: Mapping[int, str] = field(default_factory=dict)
    in_use: CpuSet = EMPTY

    def floating(self, claim: Claim) -> CpuSet:
        """Where threads of this instance run that have no thread of their own."""
        index, free = self.topology.index, ~self.in_use.mask
        cells = {charge.cell for charge in claim.shared}
        near = sum(cell.pool for cell in index.cells if cell.id in cells or cell.mask & claim.owned_mask)
        # What is charged to a pool finds room there; the rest is for hosts on which somebody else has taken it.
        for mask in (near & free, index.pool & free, index.reserved & free, index.online & free):
            if mask:
                return CpuSet(mask)
        return EMPTY

    def rest(self, claim: Claim) -> CpuSet:
        """Where the threads of its QEMU run that are no vCPU's: the emulator's, I/O, workers."""
        return claim.emulator or self.floating(claim)

    def defined(self, claim: Claim) -> CpuSet:
        """``rest`` as it stands in a domain's definition: nothing where it may be anywhere."""
        rest = self.rest(claim)
        return EMPTY if not claim.vcpus and rest.mask == self.topology.index.online else rest

    def vcpus(self, claim: Claim) -> tuple[CpuSet, ...]:
        """Threads of each vCPU; one set for all of them where they float."""
        return tuple(CpuSet.of(thread) for thread in claim.vcpus) or (self.floating(claim),)

    def hold(self, uid: str, claim: Claim, observed: Observation) -> str:
        """Why an instance with threads of its own must not start yet; empty where nobody else may run on them."""
        if not claim.owned_mask:
            return ""
        for other in sorted(observed.unsure - {uid}):
            return f"{other} may be starting"
        for other, domain in sorted((observed.domains or {}).items()):
            if other == uid or domain.phase not in ACTIVE:
                continue
            threads = observed.affinities.get(domain.pid)
            if threads is None:
                return f"it is not known yet where {other} may run"
            if found := threads.all & claim.owned:
                return f"{other} may still run on {found}"
        return ""


@dataclass(frozen=True, slots=True)
class Moves:
    """What is to be pinned again, by uid; what of it is drift, and events of it."""

    pins: Mapping[str, Pin] = field(default_factory=dict)
    drift: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()


def pool_of(
    book: Book, observed: Observation, admissions: Mapping[str, Admission], foreign: Iterable[Claim] = ()
) -> Pool:
    """The pool as it is to be now."""
    owners: dict[int, str] = {}
    mask = 0
    claims = [*_claims(book, observed, admissions), *((claim.owner, claim) for claim in foreign)]
    for uid, claim in claims:
        mask |= claim.owned_mask
        if claim.owned_mask:
            owners |= dict.fromkeys(claim.owned, uid)
    return Pool(observed.machine.topology, owners, CpuSet(mask))


def _claims(book: Book, observed: Observation, admissions: Mapping[str, Admission]) -> Iterator[tuple[str, Claim]]:
    """Claims of what runs, of what is to run, and of what may be either."""
    domains = observed.domains or {}
    for uid, domain in domains.items():
        if domain.phase in ACTIVE and (applied := from_metadata(domain.record)) is not None:
            yield uid, applied.placement.claim
    for uid, r in book.instances.items():
        admission = admissions.get(uid)
        if admission is not None and not admission.problems and _to_run(r):
            yield uid, admission.claim
        elif r.claim is not None and (_to_run(r) or uid in observed.busy or observed.domains is None):
            yield uid, r.claim


def _to_run(r: InstanceRecord) -> bool:
    return not r.removed and r.desired.run is Run.STARTED


def moves(pool: Pool, observed: Observation, settings: Settings) -> Moves:
    """What of the running VMs is where it should not be, or not yet where it may be again."""
    pins: dict[str, Pin] = {}
    drift: list[str] = []
    notes: list[Note] = []
    running = {uid for uid, domain in (observed.domains or {}).items() if domain.phase in ACTIVE}
    for uid, domain in (observed.domains or {}).items():
        threads = observed.affinities.get(domain.pid)
        applied = from_metadata(domain.record) if threads is not None and uid in running else None
        if threads is None or applied is None:
            continue
        claim = applied.placement.claim
        pin = _pin(pool, uid, domain, claim, threads)
        told = _drifted(pool, uid, claim, threads, running)
        drift += [f"AffinityChanged: {line} ({uid})" for line in told]
        notes += [Note(uid, "AffinityChanged", line, "Warning") for line in told]
        if pin is None or (told and not settings.repair_affinities):
            continue
        # What the kernel keeps within less than was asked for (a cgroup of the host's) was asked for once.
        if told or observed.pinned.get(domain.pid) != (pin.vcpus, pin.rest):
            pins[uid] = pin
    return Moves(pins, tuple(drift), tuple(notes))


def _pin(pool: Pool, uid: str, domain: DomainFacts, claim: Claim, threads: QemuThreads) -> Pin | None:
    """Where its threads belong, where they may run elsewhere now."""
    vcpus, rest = pool.vcpus(claim), pool.rest(claim)
    if not all(vcpus) or not rest:
        return None  # there is no other place: whoever waits for this one says so
    wanted = vcpus if claim.vcpus else vcpus * max(1, len(threads.vcpus))
    right = all(not found or found == want for want, found in zip(wanted, threads.vcpus, strict=False))
    if right and threads.rest in (EMPTY, rest):
        return None
    return Pin(uid, vcpus, rest, "its threads may run elsewhere than they should")


def _drifted(pool: Pool, uid: str, claim: Claim, threads: QemuThreads, running: set[str]) -> list[str]:
    """What somebody else than this agent must have moved. That the pool is larger or smaller than a moment ago is none."""
    told = [
        f"vCPU {vcpu} may run on {found}, should be on {thread}"
        for vcpu, (thread, found) in enumerate(zip(claim.vcpus, threads.vcpus, strict=False))
        if found and found != CpuSet.of(thread)
    ]
    if claim.emulator and threads.rest - claim.emulator:
        told.append(f"threads of its emulator may run on {threads.rest}, should be on {claim.emulator}")
    elif not claim.vcpus or not claim.emulator:
        floats = threads.rest if claim.vcpus else threads.all
        taken = CpuSet.from_ids(t for t in floats & pool.in_use if pool.owners[t] != uid and pool.owners[t] in running)
        if taken:
            whose = ", ".join(sorted({pool.owners[t] for t in taken}))
            told.append(f"it may run on {taken}, of {whose}")
    return told
