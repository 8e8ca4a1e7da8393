"""Whether this host can carry out a placement. PURE.

What may live here: the agent's own check of claims, and the claims of VMs that are not ours.

Theory of operation. The manager placed an instance with the same arithmetic and the same topology, so every placement
fits; the agent checks it all the same before its ledger holds it. A placement that does not fit is a contradiction
between two ledgers: it is refused with its numbers, and tried again whenever the host's claims change. Fencing by epoch
is done on messages (:mod:`casemate_agent.ledger`), not here: a record placed under an older term stays good.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from casemate_agent.drivers.ports import DomainFacts
from casemate_agent.records import InstanceRecord
from casemate_core.claims import Claim, HostClaims, PlainMemory, SharedCpu, verify_claim
from casemate_core.topology import Topology


@dataclass(frozen=True, slots=True)
class Admission:
    """Answer for one placement: ``problems`` is empty where the host can carry it out."""

    claim: Claim
    problems: tuple[str, ...] = ()


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


def held_claims(records: Iterable[InstanceRecord], foreign: Iterable[Claim] = ()) -> HostClaims:
    """The claims of the ledger and of the foreign VMs, unstamped: resources only."""
    return HostClaims.of([*(replace(r.claim, epoch=0) for r in records if r.claim is not None), *foreign])


def admit(
    records: Mapping[str, InstanceRecord], wanting: Iterable[str], topology: Topology, foreign: Iterable[Claim] = ()
) -> dict[str, Admission]:
    """Check the placements of the instances ``wanting``, oldest first, each on top of those admitted before it.

    None of them runs, so what they held before is let go first: one that shrinks may make room for another.
    """
    admissions: dict[str, Admission] = {}
    held: HostClaims | None = None
    asking = frozenset(wanting)
    order = sorted(
        asking,
        # key: older placements first, so that of two that collide the newer one is refused
        key=lambda uid: (records[uid].desired.placement.epoch, records[uid].desired.placement.generation, uid),
    )
    for uid in order:
        if held is None:
            held = held_claims((r for owner, r in records.items() if owner not in asking), foreign)
        stamped = records[uid].desired.placement.claim
        claim = replace(stamped, epoch=0)
        problems = tuple(map(str, verify_claim(topology, held, claim)))
        if claim.owner != uid:
            problems = (f"claim is of {claim.owner}, not of {uid}", *problems)
        admissions[uid] = Admission(stamped, problems)
        if not problems:
            held = HostClaims.of([*(other for other in held if other.owner != uid), claim])
        elif (old := records[uid].claim) is not None:
            held = HostClaims.of([*held, replace(old, epoch=0)])  # it keeps what it has
    return admissions
