"""Which threads of a VM the kernel is to keep everybody else off, and whether it does. PURE.

What may live here: the cpuset partitions that instances need, what of them is missing, and what is left over. The kernel's files
are :mod:`casemate_agent.drivers.partitions`'s.

Theory of operation. Threads that ``isolcpus=`` isolates need nothing. Those that the host's settings let a partition isolate
(`MachineFacts.partitionable`) are isolated while a dedicated VM has them, and are the host's as any other before and after:
each of its vCPUs has a cgroup of libvirt's, which becomes a partition ``isolated`` of its own, with the vCPU's thread and the
siblings that are held idle beside it. A VM is started frozen, its partitions are made and read back, and only then its guest
runs. They end with it: the kernel takes the threads back as soon as libvirt removes the cgroups. What stays is the permission
to take them (``cpuset.cpus.exclusive``) in the slice above, which is taken back once nobody has them (`leftover`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from casemate_agent.actions import Isolate
from casemate_agent.drivers.ports import DomainFacts, DomainPhase, Partition
from casemate_agent.ledger.records import Note, Observation, from_metadata
from casemate_agent.plan.drafting import ACTIVE, Settings
from casemate_core.claims import Claim
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.topology import Topology


def wanted(claim: Claim, topology: Topology, partitionable: CpuSet) -> tuple[CpuSet, ...]:
    """The partition of each vCPU that runs; an empty set for one that needs none; nothing where no vCPU needs one."""
    sets = []
    for thread in claim.vcpus[: claim.vcpus_online]:
        idle = CpuSet(topology.index.siblings.get(thread, 0)) & claim.held & partitionable
        sets.append(CpuSet.of(thread) | idle if thread in partitionable else EMPTY)
    return tuple(sets) if any(sets) else ()


def wanted_of(domain: DomainFacts, observed: Observation) -> tuple[CpuSet, ...]:
    """The same of a domain that runs, by what it was made from."""
    partitionable = observed.machine.partitionable
    applied = from_metadata(domain.record) if partitionable else None
    return wanted(applied.placement.claim, observed.machine.topology, partitionable) if applied is not None else ()


def lost(sets: tuple[CpuSet, ...], found: tuple[Partition, ...]) -> list[str]:
    """What of the wanted partitions is not so, in words."""
    told = []
    for vcpu, cpus in enumerate(sets):
        is_so = found[vcpu] if vcpu < len(found) else Partition("not there")
        if cpus - is_so.isolated:
            told.append(f"vCPU {vcpu} should have {cpus} for itself; its cpuset is {is_so.words}")
    return told


@dataclass(frozen=True, slots=True)
class Isolations:
    """Running VMs whose partitions are to be made again, by uid; what of it is drift, and events of it."""

    again: Mapping[str, Isolate] = field(default_factory=dict)
    drift: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()


def isolations(observed: Observation, settings: Settings) -> Isolations:
    """What somebody has undone of VMs that run. Of those that wait frozen for their first partition it is no drift."""
    again: dict[str, Isolate] = {}
    drift: list[str] = []
    notes: list[Note] = []
    for uid, domain in sorted((observed.domains or {}).items()):
        found = observed.partitions.get(domain.pid)
        if domain.phase not in ACTIVE or domain.phase is DomainPhase.PAUSED or found is None:
            continue
        sets = wanted_of(domain, observed)
        for line in lost(sets, found):
            drift.append(f"IsolationLost: {line} ({uid})")
            notes.append(Note(uid, "IsolationLost", line, "Warning"))
            if settings.repair_affinities:
                again[uid] = Isolate(uid, sets, "somebody has undone it")
    return Isolations(again, tuple(drift), tuple(notes))


def in_partitions(observed: Observation) -> CpuSet:
    """Threads that are in partitions of VMs that run, if all is as it should be."""
    found = EMPTY
    for cpus in _due(observed):
        found |= cpus
    return found


def _due(observed: Observation) -> Iterator[CpuSet]:
    for domain in (observed.domains or {}).values():
        if domain.phase in ACTIVE:
            yield from wanted_of(domain, observed)


def leftover(observed: Observation) -> CpuSet:
    """Threads that a slice may still take for itself, though no VM of it has them."""
    return observed.set_aside & observed.machine.partitionable
