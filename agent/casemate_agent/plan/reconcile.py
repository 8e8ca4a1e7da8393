"""The plan of a host: everything that is to be done now, and why. PURE.

What may live here: decisions about the host as a whole. One instance's way is in :mod:`casemate_agent.plan.converge`.

Theory of operation. ``plan`` is a function of the ledger (what is desired, and what cannot be seen), the observation and
the time. It has no memory: called twice it answers the same, called after a crash it answers what is still to be done.
Only instances that were idle when the observation began are planned for, because an observation made during an action is
older than that action's effect. Foreign domains are counted and never touched. What is merely unknown (files or rules
without a record) is cleaned away only while the ledger is known to be complete.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf

from casemate_agent import actions as act
from casemate_agent.actions import Action, Isolate, Pin, Tune
from casemate_agent.domain.limits import memory_limits
from casemate_agent.drivers.ports import DomainFacts, DomainPhase
from casemate_agent.gpu.lifecycle import State
from casemate_agent.gpu.planning import GpuLook, closes_host, plan_gpus, states
from casemate_agent.gpu.shares import orphans as share_orphans
from casemate_agent.gpu.shares import promised, stranger_claims, strangers
from casemate_agent.gpu.sharing import cut
from casemate_agent.ledger.records import (
    Book,
    InstanceRecord,
    Note,
    Observation,
    Started,
    from_metadata,
)
from casemate_agent.plan.admission import Admission, Audit, admit, audit, foreign_claim
from casemate_agent.plan.attaching import removals
from casemate_agent.plan.conditions import host_conditions
from casemate_agent.plan.converge import ACTIVE, InstancePlan, Settings, converge
from casemate_agent.plan.giving import orphans
from casemate_agent.plan.partitions import in_partitions, isolations, leftover
from casemate_agent.plan.pool import Pool, moves, pool_of
from casemate_agent.plan.tuning import short_pools, tune
from casemate_agent.realtime.profile import host_lines, quiet_threads
from casemate_core.claims import Claim
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.gpu import hold
from casemate_core.spec.instance import DesiredInstance, Run, bridged
from casemate_core.topology import Topology
from casemate_wire.stream import HostReport, VolumeFacts

__all__ = ["InstancePlan", "Plan", "Settings", "plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now: instances side by side, each one's actions in order; ``cleaning`` by the uid that a leftover is
    named by; ``host`` for the host itself. ``adopt`` goes into the ledger before anything else is planned."""

    instances: Mapping[str, InstancePlan]
    host: tuple[Action, ...] = ()
    cleaning: Mapping[str, tuple[Action, ...]] = field(default_factory=dict)
    #: The next act of each GPU that has one, by the name of its job.
    gpus: Mapping[str, act.GpuAction] = field(default_factory=dict)
    adopt: tuple[InstanceRecord, ...] = ()
    notes: tuple[Note, ...] = ()
    report: HostReport = field(default_factory=HostReport)
    wake_s: float = inf
    #: Answers about claims, for the next round: what follows from the same again is not worked out again.
    admissions: Mapping[str, Admission] = field(default_factory=dict)
    audit: Audit | None = None
    #: Running VMs whose threads are to be bound; beside their own jobs, which may take long.
    pins: Mapping[str, Pin] = field(default_factory=dict)
    #: The same, whose vCPUs are to be isolated again.
    isolations: Mapping[str, Isolate] = field(default_factory=dict)
    #: Of threads that somebody moved: the same as long as they are there.
    moved: tuple[Note, ...] = ()
    pool: Pool | None = None
    #: Threads that must be quiet, and what is to be written so that they are.
    quiet: CpuSet = EMPTY
    tune: tuple[Tune, ...] = ()


def plan(book: Book, observed: Observation, settings: Settings | None = None, before: Plan | None = None) -> Plan:
    """All that is to be done on this host now. ``before``, an earlier plan, changes nothing but the time it takes."""
    settings = settings or Settings()
    drift = [f"LedgerDamaged: {problem}" for problem in book.damage]
    foreign = tuple(
        foreign_claim(domain, observed.machine.topology)
        for domain in observed.foreign
        if domain.phase is not DomainPhase.SHUT_OFF  # defined, and using nothing
    ) + stranger_claims(observed.shares or {}, observed.machine.topology)
    adopted, unreadable = _adopt(book, observed)
    drift += unreadable
    networks = {network.name: network for network in book.host.networks}
    topology = observed.machine.topology
    admissions = admit(
        book.instances,
        _wanting(book, observed),
        topology,
        (*foreign, *_held_gpus(book, topology)),
        before.admissions if before is not None else None,
    )
    audited = audit(book.instances, topology, foreign, before.audit if before is not None else None)
    pool = pool_of(book, observed, admissions, foreign)
    moved = moves(pool, observed, settings)
    isolated = isolations(observed, settings)
    drift += [*moved.drift, *isolated.drift]
    if left := leftover(observed):
        drift.append(f"PartitionLeft: threads {left} may be taken by a slice of VMs, of which none has them")
    held = {uid: r.claim for uid, r in book.instances.items() if r.claim is not None}
    quiet = quiet_threads(topology, held) if settings.realtime != "off" else EMPTY
    profile = host_lines(
        observed.tuning, topology, quiet, _dma_entries(held), observed.machine.partitionable, in_partitions(observed)
    )
    if loud := observed.agent_threads & quiet:
        drift.append(f"AgentOnQuiet: threads of this agent may run on {loud}")
    drift += short_pools(topology, held)
    plans = {
        uid: converge(record, observed, networks, admissions.get(uid), settings, pool, book.gpus)
        for uid, record in sorted(book.instances.items())
        if uid not in observed.busy
    }
    for each in plans.values():
        drift += each.drift
    drift += _audit(book, observed, audited)
    look = _gpu_look(book, observed)
    closed = closes_host(observed.gpu_health, settings.gpu)
    cleaning = _leftovers(book, observed) if not adopted else {}
    drift += [
        f"ShareUnknown: vGPU {s.id} ({s.profile} of {s.gpu}) was made by somebody else; it is left alone"
        for s in strangers(observed.shares or {})
    ]
    if observed.functions is not None:
        drift += [f"VfLeak: {leak}" for leak in observed.functions.leaks()]
    drift += [f"Leftover: {uid}: {', '.join(map(act.name, actions))}" for uid, actions in cleaning.items()]
    if not adopted:
        cleaning |= removals(book, observed)
    return Plan(
        instances=plans,
        host=_host_actions(book, observed, settings, plans) if not adopted else (),
        cleaning=cleaning,
        adopt=adopted,
        notes=tuple(Note(r.uid, "Adopted", "rebuilt from the domain's metadata", "Warning") for r in adopted),
        moved=(*moved.notes, *isolated.notes),
        pins=moved.pins if not adopted else {},
        isolations=isolated.again if not adopted else {},
        pool=pool,
        quiet=quiet,
        tune=tune(settings, profile, topology, held, observed.refused),
        report=HostReport(
            foreign=len(observed.foreign),
            drift=tuple(drift),
            conditions=host_conditions(book.host, book.damage, observed, settings.low_disk_fraction, closed),
            foreign_claims=foreign,
            disk_free_mib=observed.files.free_mib if observed.files is not None else 0,
            profile=tuple(each.line for each in profile),
            volumes=_volumes(observed),
            gpus=states(look),
        ),
        gpus=plan_gpus(look, settings.gpu) if not adopted else {},
        wake_s=min((each.wake_s for each in plans.values()), default=inf),
        admissions=admissions,
        audit=audited,
    )


def _dma_entries(claims: Mapping[str, Claim]) -> int:
    """Mappings that the most demanding VM of this host needs."""
    needs = (len(c.vfs) + len(c.devices) + len(c.gpus) + len(c.shares) for c in claims.values())
    return memory_limits(0, max(needs, default=0), locked=False).dma_entries


def _volumes(observed: Observation) -> tuple[VolumeFacts, ...] | None:
    """What there is of volumes, as the manager is told."""
    if observed.volumes is None:
        return None
    return tuple(VolumeFacts(uid, v.size_mib, v.allocated_mib) for uid, v in sorted(observed.volumes.items()))


def _held_gpus(book: Book, topology: Topology) -> tuple[Claim, ...]:
    """GPUs in quarantine: a placement that names one is refused. One that is only not clean yet is waited for."""
    there = {gpu.uuid for gpu in topology.gpus}
    return tuple(
        hold(uuid, f"{entry.record.state}: {entry.record.reason}")
        for uuid, entry in sorted(book.gpus.items())
        if entry.record.state is State.QUARANTINED and uuid in there
    )


def _gpu_look(book: Book, observed: Observation) -> GpuLook:
    """What the plan of GPUs stands on."""
    wanted = {
        uuid: (uid, record.desired.tenant)
        for uid, record in book.instances.items()
        if not record.removed and record.claim is not None
        for uuid in record.claim.gpus
    }
    running: dict[str, tuple[str, str]] | None = None
    if observed.domains is not None:
        running = {}
        for uid, domain in observed.domains.items():
            # an instance with an action under way may start at any moment
            if domain.phase not in ACTIVE and uid not in observed.busy:
                continue
            if (applied := from_metadata(domain.record)) is not None:
                running |= dict.fromkeys(applied.placement.claim.gpus, (uid, applied.tenant))
    under_way = [
        claim
        for uid, record in book.instances.items()
        if uid in observed.busy
        for claim in (record.claim, record.desired.placement.claim)
        if claim is not None
    ]
    return GpuLook(
        there=tuple(gpu.uuid for gpu in observed.machine.topology.gpus),
        entries=book.gpus,
        cards=observed.cards or {},
        wanted=wanted,
        running=running,
        health=observed.gpu_health,
        orders={order.uuid: order for order in book.host.gpu_orders},
        cut=cut(observed.machine.topology, under_way, observed.shares, book.gpus),
        promised=promised(r.claim for r in book.instances.values() if r.claim is not None and not r.removed),
        busy=observed.busy,
    )


def _wanting(book: Book, observed: Observation) -> list[str]:
    """Instances that do not run and hold no claim for the placement that they have now.

    One that should not run needs none yet; but where it holds that of a former placement, which the manager may have given
    to another meanwhile, it exchanges it.
    """
    if observed.domains is None:
        return []
    found = []
    for uid, r in book.instances.items():
        domain = observed.domains.get(uid)
        placement = r.desired.placement
        holds = r.claim == placement.claim and (r.claim_epoch, r.claim_generation) == (
            placement.epoch,
            placement.generation,
        )
        if r.removed or holds or (domain is not None and domain.phase in ACTIVE):
            continue
        if r.desired.run is not Run.STARTED and r.claim is None:
            continue
        found.append(uid)
    return found


def _adopt(book: Book, observed: Observation) -> tuple[tuple[InstanceRecord, ...], list[str]]:
    """Records for our domains that the ledger does not know; and the drift of those whose metadata cannot be read."""
    adopted, drift = [], []
    for uid, domain in sorted((observed.domains or {}).items()):
        if uid in book.instances or uid in observed.busy:
            continue
        desired = from_metadata(domain.record)
        if desired is None or desired.uid != uid:
            drift.append(f"UnknownDomain: {domain.name}: carries our mark and no readable record; it is left alone")
            continue
        adopted.append(_record_of(desired, domain, observed))
    return tuple(adopted), drift


def _record_of(desired: DesiredInstance, domain: DomainFacts, observed: Observation) -> InstanceRecord:
    """A record as good as a domain can give it. Whether a domain that is off should run is not known until the manager
    says so; the metadata is as old as the definition, so it stays off."""
    running = domain.phase in ACTIVE
    return InstanceRecord(
        desired=replace(desired, run=Run.STARTED if running else Run.STOPPED),
        claim=desired.placement.claim,
        claim_epoch=desired.placement.epoch,
        claim_generation=desired.placement.generation,
        started=Started(observed.machine.boot_id, observed.time_s) if running else None,
        starts=1 if running else 0,
        adopted=True,
    )


def _leftovers(book: Book, observed: Observation) -> dict[str, tuple[Action, ...]]:
    """Files and rules named by an instance that has neither record nor domain."""
    if not book.host.complete or observed.domains is None:
        return {}
    if observed.files is None or observed.networks is None or observed.functions is None:
        return {}
    known = set(book.instances) | set(observed.domains) | observed.busy | {domain.uuid for domain in observed.foreign}
    reason = "no instance of this host"
    found: dict[str, tuple[Action, ...]] = {}
    held = orphans(known, observed.functions)
    slices = share_orphans(known, observed.shares or {})
    named = set(observed.files.overlays) | set(observed.files.seeds) | set(observed.guarded)
    for uid in sorted((named - known) | held.keys() | slices.keys()):
        actions: list[Action] = []
        if uid in slices:
            actions.append(act.TakeShares(uid, slices[uid], reason))
        if uid in held:
            stamp, keys = held[uid]
            actions.append(act.TakeBack(uid, stamp, keys, reason))
        if observed.guarded.get(uid):
            actions.append(act.Unguard(uid, reason))
        if uid in observed.files.overlays or uid in observed.files.seeds:
            actions.append(act.RemoveFiles(uid, reason))
        found[uid] = tuple(actions)
    return found


def _host_actions(
    book: Book, observed: Observation, settings: Settings, plans: Mapping[str, InstancePlan]
) -> tuple[Action, ...]:
    """Housekeeping, done only while nothing else is under way or about to be."""
    files, networks = observed.files, observed.networks
    if observed.busy or not book.host.complete or any(each.actions for each in plans.values()):
        return ()
    actions: list[Action] = []
    if left := leftover(observed):
        actions.append(act.Reclaim(left, "no VM has them"))
    if files is not None and files.strays:
        actions.append(act.RemoveStrays(f"{len(files.strays)} stray files"))
    if (
        files is not None
        and observed.domains is not None
        and files.free_mib < settings.low_disk_fraction * files.total_mib
    ):
        used = _images_used(book, observed)
        actions += [act.RemoveImage(d, "unused, and the disk is filling up") for d in sorted(set(files.images) - used)]
    if networks is not None:
        wanted = {network.name for network in book.host.networks}
        wanted |= {nic.network for r in book.instances.values() for nic in bridged(r.desired.nics)}
        actions += [
            act.RemoveNetwork(n, "no longer a network of this host") for n in sorted(set(networks.bridges) - wanted)
        ]
    return tuple(actions)


def _images_used(book: Book, observed: Observation) -> set[str]:
    desired = [r.desired for r in book.instances.values()]
    desired += [d for domain in (observed.domains or {}).values() if (d := from_metadata(domain.record)) is not None]
    files = [f for d in desired for i in (d.image, *d.archives) for f in (i.file, i.kernel, i.initrd) if f is not None]
    return {f.digest for f in files}


def _audit(book: Book, observed: Observation, audited: Audit) -> list[str]:
    """Broken invariants between ledger and machine, numbered.

    A1 no resource is in two claims, and all claims fit the machine. A2 a running domain has the claim that the ledger
    holds for it. A3 no record was placed under a later term than the ledger has seen.
    """
    found = [f"A1 ClaimsOverlap: {violation}" for violation in audited.violations]
    for uid, domain in (observed.domains or {}).items():
        record = book.instances.get(uid)
        applied = from_metadata(domain.record)
        if record is None or applied is None or domain.phase not in ACTIVE:
            continue
        if record.claim != applied.placement.claim:
            found.append(f"A2 ClaimMismatch: {uid}: its domain was made from another claim than the ledger holds")
    for uid, record in book.instances.items():
        if record.claim_epoch > book.host.epoch:
            found.append(
                f"A3 EpochLost: {uid}: placed under term {record.claim_epoch}, the host knows {book.host.epoch}"
            )
    return found
