"""Whether this host can carry out a placement. PURE.

What may live here: the agent's own check of claims, and the claims of VMs that are not ours.

Theory of operation. The manager placed an instance with the same arithmetic and the same topology, so every placement
fits; the agent checks it all the same before its ledger holds it. A placement that does not fit is a contradiction
between two ledgers: it is refused with its numbers, and tried again whenever the host's claims change. Fencing by epoch
is done on messages (:mod:`casemate_agent.ledger.store`), not here: a record placed under an older term stays good.

Checking claims costs milliseconds each, and a refused placement is looked at in every round. So each answer carries all
that it followed from (:class:`Admission`, :class:`Audit`), and the answers of the round before are handed in: one that
would follow from equal values again is taken as it is. Nothing is invalidated, so nothing can be stale.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from casemate_agent.drivers.ports import DomainFacts
from casemate_agent.ledger.records import InstanceRecord
from casemate_core.claims import Claim, HostClaims, PlainMemory, SharedCpu, verify_claim
from casemate_core.gpu import held_because
from casemate_core.topology import Topology


@dataclass(frozen=True, slots=True)
class Admission:
    """Answer for one placement: ``problems`` is empty where the host can carry it out. ``against`` and ``topology`` are
    what it was held against: the claims by owner, and the machine."""

    claim: Claim
    problems: tuple[str, ...] = ()
    against: Mapping[str, Claim] = field(default_factory=dict)
    topology: Topology | None = None


@dataclass(frozen=True, slots=True)
class Audit:
    """What is wrong with all claims together, and what that was found from."""

    violations: tuple[str, ...] = ()
    claims: Mapping[str, Claim] = field(default_factory=dict)
    topology: Topology | None = None


def foreign_claim(domain: DomainFacts, topology: Topology) -> Claim:
    """What a VM that is not ours takes: threads where it is pinned one to one, else a share of every cell by its size.

    Where its memory lies is not known, so it is charged to the cells in proportion to their memory, rounded up.
    """
    owner = f"foreign:{domain.uuid}"
    pins = [min(pin) for pin in domain.vcpu_pins if len(pin) == 1]
    pinned = len(pins) == domain.vcpus and len(set(pins)) == len(pins) and bool(pins)
    total_mib = topology.memory_mib
    cores_of = {
        cell.id: sum(len(core.threads) for core in topology.cores if core.cell == cell.id) for cell in topology.cells
    }
    threads = sum(cores_of.values())
    memory = tuple(
        PlainMemory(cell.id, share, 0, share)
        for cell in topology.cells
        if (share := _share(domain.memory_mib, cell.memory_mib, total_mib))
    )
    shared = tuple(
        SharedCpu(cell_id, share)
        for cell_id, count in cores_of.items()
        if not pinned and (share := _share(domain.vcpus * 1000, count, threads))
    )
    return Claim(
        owner=owner,
        vcpus=tuple(pins) if pinned else (),
        vcpus_online=domain.vcpus,
        vcpus_max=domain.vcpus,
        shared=shared,
        memory=memory,
    )


def _share(amount: int, part: int, whole: int) -> int:
    return -(-amount * part // whole) if whole and part else 0


def claims_by_owner(records: Iterable[InstanceRecord], foreign: Iterable[Claim] = ()) -> dict[str, Claim]:
    """The claims of the ledger and of the foreign VMs. Of two claims of one owner the second counts."""
    return {claim.owner: claim for claim in (*(r.claim for r in records if r.claim is not None), *foreign)}


def _unstamped(claims: Mapping[str, Claim]) -> HostClaims:
    """The same for the arithmetic: resources only, since terms are fenced elsewhere."""
    return HostClaims.of(replace(claim, epoch=0) for claim in claims.values())


def audit(
    records: Mapping[str, InstanceRecord],
    topology: Topology,
    foreign: Iterable[Claim] = (),
    before: Audit | None = None,
) -> Audit:
    """Check all claims together. ``before``: what an earlier call returned."""
    claims = claims_by_owner(records.values(), foreign)
    if before is not None and _same_machine(before.topology, topology) and before.claims == claims:
        return before
    return Audit(tuple(map(str, _unstamped(claims).check(topology))), claims, topology)


def admit(
    records: Mapping[str, InstanceRecord],
    wanting: Iterable[str],
    topology: Topology,
    foreign: Iterable[Claim] = (),
    before: Mapping[str, Admission] | None = None,
) -> dict[str, Admission]:
    """Check the placements of the instances ``wanting``, oldest first, each on top of those admitted before it.

    None of them runs, so what they held before is let go first: one that shrinks may make room for another.
    ``before``: what an earlier call returned.
    """
    admissions: dict[str, Admission] = {}
    foreign_claims = tuple(foreign)
    asking = frozenset(wanting)
    held = claims_by_owner((r for owner, r in records.items() if owner not in asking), foreign_claims)
    summed: HostClaims | None = None
    order = sorted(
        asking,
        # key: older placements first, so that of two that collide the newer one is refused
        key=lambda uid: (records[uid].desired.placement.epoch, records[uid].desired.placement.generation, uid),
    )
    for uid in order:
        claim = records[uid].desired.placement.claim
        admission = before.get(uid) if before is not None else None
        if (
            admission is None
            or admission.claim != claim
            or not _same_machine(admission.topology, topology)
            or admission.against != held
        ):
            summed = summed or _unstamped(held)
            problems = tuple(map(str, verify_claim(topology, summed, replace(claim, epoch=0))))
            problems = (*_held(claim, foreign_claims), *problems)
            if claim.owner != uid:
                problems = (f"claim is of {claim.owner}, not of {uid}", *problems)
            admission = Admission(claim, problems, held, topology)
        admissions[uid] = admission
        if not admission.problems:
            held, summed = held | {uid: claim}, None
        elif (old := records[uid].claim) is not None:
            held, summed = held | {uid: old}, None  # it keeps what it has
    return admissions


def _held(claim: Claim, others: tuple[Claim, ...]) -> tuple[str, ...]:
    """Why GPUs of a claim are held back, in words, before what the arithmetic says of it."""
    return tuple(
        f"GPU {why}"
        for other in others
        if (why := held_because(other.owner))
        and not set(other.gpus).isdisjoint((*claim.gpus, *(s.gpu for s in claim.shares)))
    )


def _same_machine(one: Topology | None, other: Topology) -> bool:
    return one is other or one == other
