"""PURE. The work that follows from the records: instances are made, ended, changed while stopped, and placed.

Theory of operation. A batch is bounded, so what one environment asks for may take many; each `advance` does a part and
says whether there is more. Ends come before beginnings: what a host gave back can be given again in the same batch.
Interrupted after any batch, the records are consistent and the rest of the work is found again from them.

A gang is placed whole or not at all. One that is too large for a batch is reserved first, batch by batch, each time only
where all that is left of it fits; its hosts are told when its last member has a place, by one record (`gang_told`). Where
somebody was faster meanwhile, what was reserved is given back.

A waiting instance is tried again only when the fleet's capacity changed since it was tried (a host joined or was
uncordoned, an instance ended); highest priority first, then the oldest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from casemate_core.claims import Claim
from casemate_core.spec.environment import Environment
from casemate_core.spec.instance import Nic, Phase
from casemate_core.spec.meta import Meta
from casemate_core.spec.views import ObjectRef
from casemate_core.spec.volume import Attached, attached
from casemate_manager.fleet import operations, rollout, volumes
from casemate_manager.fleet.commands import Advanced, Batch
from casemate_manager.fleet.draft import MAX_RECORDS, AddressesExhausted, Draft, instance_ref, make_uid
from casemate_manager.fleet.observed import Attempt, CapacityChanged, ForgetInstance, Observed, Tried
from casemate_manager.fleet.placing import Overlay, Placed, Placer, Stamp, Unplaced, stamp_for
from casemate_manager.fleet.quotas import Devices
from casemate_manager.fleet.records import EnvironmentRecord, InstanceRecord, PlacementRecord, tenant_key
from casemate_manager.fleet.state import State

#: Records that one instance's step may write: itself, a placement dropped and made, an event.
STEP: Final = 6
#: Instances tried in one batch that did not fit: bounds the time of a batch on a full fleet.
MAX_REFUSALS: Final = 8


def advance(state: State, observed: Observed, now_s: float, placer: Placer) -> Batch:
    """One bounded batch of work."""
    draft = Draft(state, observed, now_s)
    overlay = Overlay(state, observed)
    for key in list(state.work):
        if _environment_work(draft, overlay, state.environments[key], placer):
            draft.done.append(key)
        elif len(draft) + STEP > MAX_RECORDS:
            break
    refused = _place_waiting(draft, overlay, placer)
    # What one batch does may open the way for more; an empty batch is the end of it.
    return draft.batch(Advanced(again=len(draft) > 0 or refused >= MAX_REFUSALS))


def _environment_work(draft: Draft, overlay: Overlay, record: EnvironmentRecord, placer: Placer) -> bool:
    """Make, end and change instances of one environment. True where nothing is left to do now."""
    state = draft.state
    environment = record.environment
    ending = bool(environment.meta.deleting_s)
    step = STEP + len(environment.spec.volumes)
    for instance in list(state.instances_of(environment.meta.uid)):
        if len(draft) + step > MAX_RECORDS:
            return False
        if ending or instance.meta.deleting_s or instance.ordinal >= environment.spec.replicas:
            _end(draft, instance, ending)
        elif instance.held and not rollout.is_behind(record, instance):
            draft.put(rollout.held(draft, instance, ""))  # what it was held for is no longer asked for
        elif rollout.is_behind(record, instance):
            _adopt(draft, overlay, record, instance, placer)
    if ending:
        if any(not draft.is_dropped("Instance", i.meta.uid) for i in state.instances_of(environment.meta.uid)):
            return True  # the hosts' confirmations wake it
        return _end_environment(draft, environment)
    rollout.take_turns(draft, record)
    return _make_missing(draft, record)


def _end(draft: Draft, instance: InstanceRecord, with_environment: bool) -> None:
    uid = instance.meta.uid
    if uid not in draft.state.instance_placements:
        operations.forget(draft, instance)
        volumes.release(draft, instance)
        draft.drop("Instance", uid)
        draft.sightings += [ForgetInstance(uid), CapacityChanged()]
        draft.event(instance_ref(instance), "Deleted", "the instance is gone")
    elif not instance.meta.deleting_s and not with_environment:
        draft.put(
            replace(instance, meta=replace(instance.meta, deleting_s=draft.now_s, resource_version=draft.revision))
        )


def _end_environment(draft: Draft, environment: Environment) -> bool:
    prefix = f"{environment.meta.uid}/"
    for key in [k for k in draft.state.specs if k.startswith(prefix)]:
        if len(draft) + STEP > MAX_RECORDS:
            return False
        draft.drop("Revision", key)
    draft.drop("Environment", tenant_key(environment.meta.tenant, environment.meta.name))
    draft.event(_ref(environment), "Deleted", "the environment and all that it held are gone")
    return True


def _make_missing(draft: Draft, record: EnvironmentRecord) -> bool:
    state, environment = draft.state, record.environment
    row = state.environment_instances.get(environment.meta.uid, {})
    for ordinal in range(environment.spec.replicas):
        if ordinal in row:
            continue
        if len(draft) + STEP > MAX_RECORDS:
            return False
        name = f"{environment.meta.name}-{ordinal}"
        uid = make_uid("instance", environment.meta.uid, str(ordinal), str(draft.revision))
        try:
            nics = tuple(
                draft.nic(uid, i, state.networks[nic.network], nic) for i, nic in enumerate(environment.spec.nics)
            )
        except AddressesExhausted as error:
            draft.event(_ref(environment), error.reason, str(error), warning=True)
            return True
        draft.put(
            InstanceRecord(
                Meta(
                    name,
                    environment.meta.tenant,
                    environment.meta.labels,
                    uid=uid,
                    generation=1,
                    resource_version=draft.revision,
                    created_s=draft.now_s,
                ),
                environment.meta.name,
                environment.meta.uid,
                ordinal,
                nics,
                environment.meta.generation,
                environment.meta.generation,
                volumes=attached(environment.spec.volumes, ordinal, environment.spec.replicas),
            )
        )
    return True


# --- changes that wait for a stop -------------------------------------------------------------------------------------


def _adopt(draft: Draft, overlay: Overlay, record: EnvironmentRecord, instance: InstanceRecord, placer: Placer) -> None:
    """Give an instance the fields that changed: all of them before it is placed, those for a restart while it is off."""
    state = draft.state
    generation = record.environment.meta.generation
    placement = state.placement_of(instance.meta.uid)
    if placement is None:
        changed = replace(instance, restart_generation=generation, replace_generation=generation)
        _put_with_nics(draft, record, changed)
        return
    seen = draft.observed.instances.get(instance.meta.uid)
    # Off, and said of what is asked now: word that it was off before it was started again may still be the last heard,
    # and what it runs on must not be given to another.
    stopped = (
        seen is not None
        and seen.state is not None
        and seen.state.phase is Phase.STOPPED
        and seen.state.generation == generation
    )
    spec = record.environment.spec
    off = bool(instance.held) or spec.run == "stopped"
    if not off or not stopped or not draft.observed.host(placement.host).connected:
        return
    # A new root disk takes away what is on the old one: only where somebody has said so, by a strategy.
    new_disk = instance.replace_generation < record.replace_generation and (
        bool(instance.held) or spec.update_strategy is not None
    )
    if instance.restart_generation >= record.restart_generation and not new_disk:
        return
    changed = replace(
        instance,
        restart_generation=generation,
        replace_generation=generation if new_disk else instance.replace_generation,
        disks=instance.disks + new_disk,
        placements=instance.placements + 1,
        held="",
    )
    spec = state.spec_of(changed)
    stamp = stamp_for(state, instance, _uses(record, instance))
    without = overlay.fork()
    without.remove(placement.host, instance.meta.uid)
    found = placer.refit(without, placement.host, record.environment, spec, stamp)
    if isinstance(found, Unplaced):
        draft.event(
            instance_ref(instance),
            "RestartPending",
            f"the changed size does not fit on its host {placement.host}: {found.message}",
            warning=True,
        )
        if instance.held:
            draft.put(rollout.held(draft, replace(instance, refused_generation=generation), ""))
        return
    overlay.remove(placement.host, instance.meta.uid)
    overlay.add(placement.host, found.claim)
    volumes.count(overlay, placement.host, stamp.volumes, stamp.epoch)
    volumes.bind(draft, placement.host, stamp.volumes, instance)
    draft.drop("Placement", f"{placement.instance_uid}/{placement.generation}")
    _put_placement(draft, instance.meta.uid, found, stamp)
    _put_with_nics(draft, record, changed)
    draft.sightings.append(CapacityChanged())
    draft.event(instance_ref(instance), "Changed", "fields that have changed are in force")


def _uses(record: EnvironmentRecord, instance: InstanceRecord) -> tuple[Attached, ...]:
    """The volumes that an instance has by its environment's present spec."""
    spec = record.environment.spec
    return attached(spec.volumes, instance.ordinal, spec.replicas)


def _put_with_nics(draft: Draft, record: EnvironmentRecord, instance: InstanceRecord) -> None:
    """Write an instance with the interfaces and volumes that its environment has now; an interface that stays on its
    network keeps its address."""
    state = draft.state
    nics: list[Nic] = []
    try:
        for index, wanted in enumerate(record.environment.spec.nics):
            network = state.networks[wanted.network]
            if index < len(instance.nics) and instance.nics[index].network == wanted.network:
                kept = instance.nics[index]
                nics.append(
                    replace(
                        kept,
                        dns=network.spec.dns,
                        mtu=network.spec.mtu,
                        type=wanted.type,
                        vlan=wanted.vlan,
                        trust=wanted.trust,
                        min_rate_mbps=wanted.min_rate_mbps,
                        max_rate_mbps=wanted.max_rate_mbps,
                        pod=wanted.pod,
                    )
                )
            else:
                nics.append(draft.nic(instance.meta.uid, index, network, wanted))
    except AddressesExhausted as error:
        draft.event(instance_ref(instance), error.reason, str(error), warning=True)
        nics = list(instance.nics)
    meta = replace(
        instance.meta,
        labels=record.environment.meta.labels,
        generation=instance.meta.generation + 1,
        resource_version=draft.revision,
    )
    draft.put(replace(instance, nics=tuple(nics), meta=meta, volumes=_uses(record, instance)))


# --- placing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    """Instances that are placed together: one, or all waiting ones of a gang."""

    environment: Environment
    instances: tuple[InstanceRecord, ...]


def _waiting(draft: Draft) -> Iterator[_Group]:
    """Waiting instances that are worth a try, in order."""
    state, observed = draft.state, draft.observed
    candidates: list[tuple[tuple[object, ...], InstanceRecord, Environment]] = []
    for uid in state.pending:
        attempt = observed.attempts.get(uid)
        if attempt is not None and attempt.capacity == observed.capacity:
            continue
        instance = state.instances[uid]
        environment = state.environment_of(instance).environment
        if environment.meta.deleting_s or instance.meta.deleting_s or instance.ordinal >= environment.spec.replicas:
            continue
        # (priority, highest first; age of the environment; its name; ordinal)
        key = (
            -environment.spec.priority,
            environment.meta.created_s,
            environment.meta.tenant,
            environment.meta.name,
            instance.ordinal,
        )
        candidates.append((key, instance, environment))
    candidates.sort(key=lambda c: c[0])
    gangs: set[str] = set()
    for _, instance, environment in candidates:
        if not environment.spec.gang:
            yield _Group(environment, (instance,))
        elif environment.meta.uid not in gangs:
            gangs.add(environment.meta.uid)
            row = state.environment_instances[environment.meta.uid]
            if len(row) >= environment.spec.replicas:
                members = [state.instances[row[o]] for o in sorted(row)]
                yield _Group(environment, tuple(i for i in members if i.meta.uid in state.pending))


def _place_waiting(draft: Draft, overlay: Overlay, placer: Placer) -> int:
    """Place what fits. Returns how many groups did not."""
    refused = 0
    devices = Devices(draft.state)
    for group in _waiting(draft):
        step = STEP + volumes.cost(group.instances)
        if refused >= MAX_REFUSALS or (len(draft) and len(draft) + step * len(group.instances) > MAX_RECORDS):
            break
        if any((("Instance", i.meta.uid) in draft.changed) for i in group.instances):
            continue  # changed in this batch: its turn is the next one
        if group.environment.spec.gang and ("Environment", _key(group.environment)) in draft.changed:
            continue
        if not _place_group(draft, overlay, group, placer, devices):
            refused += 1
    return refused


def _place_group(draft: Draft, overlay: Overlay, group: _Group, placer: Placer, devices: Devices) -> bool:
    state = draft.state
    trial = overlay.fork()
    decided: list[tuple[InstanceRecord, Placed, Stamp]] = []
    for instance in group.instances:
        stamp = stamp_for(state, instance)
        found = placer.place(trial, group.environment, state.spec_of(instance), stamp)
        if isinstance(found, Unplaced):
            _refused(draft, group, found)
            _give_back(draft, group)
            return False
        trial.add(found.host, found.claim)
        volumes.count(trial, found.host, stamp.volumes, stamp.epoch)
        decided.append((instance, found, stamp))
    if over := devices.exceeded(group.environment.meta.tenant, ((f.host, f.claim) for _, f, _ in decided)):
        hosts = len(state.hosts)
        _refused(draft, group, Unplaced(hosts, (("QuotaExceeded", hosts, over),)))
        _give_back(draft, group)
        return False
    if group.environment.spec.gang:
        room = max(1, (MAX_RECORDS - len(draft) - 1) // (STEP + volumes.cost(group.instances)))
        if len(decided) > room:
            decided = decided[:room]  # reserved; the others are next
        else:
            record = state.environments[_key(group.environment)]
            told = group.environment.spec.replicas
            draft.put(replace(record, gang_told=told, told_revision=draft.revision))
    for instance, found, stamp in decided:
        overlay.add(found.host, found.claim)
        volumes.count(overlay, found.host, stamp.volumes, stamp.epoch)
        volumes.bind(draft, found.host, stamp.volumes, instance)
        _put_placement(draft, instance.meta.uid, found, stamp)
        meta = replace(instance.meta, resource_version=draft.revision)
        draft.put(replace(instance, meta=meta, placements=stamp.generation))
        draft.sightings.append(Tried(instance.meta.uid, None))
        draft.event(instance_ref(instance), "Placed", f"placed on host {found.host}: {_held(found.claim)}")
    return True


def _give_back(draft: Draft, group: _Group) -> None:
    """Let go of what is reserved for a gang that does not fit any more; of one that is large, a part in each batch."""
    state = draft.state
    if not group.environment.spec.gang:
        return
    record = state.environments[_key(group.environment)]
    given = 0
    for instance in state.instances_of(group.environment.meta.uid):
        placement = state.placement_of(instance.meta.uid)
        if placement is None or record.is_told(instance) or instance.meta.deleting_s:
            continue
        if len(draft) + STEP + volumes.cost((instance,)) > MAX_RECORDS:
            break
        volumes.unbind(draft, instance)
        draft.drop("Placement", f"{placement.instance_uid}/{placement.generation}")
        draft.put(replace(instance, meta=replace(instance.meta, resource_version=draft.revision)))
        given += 1
    if given:
        draft.sightings.append(CapacityChanged())
        draft.event(
            _ref(group.environment), "GangGivenBack", f"what was reserved for {given} of its instances is free again"
        )


def _held(claim: Claim) -> str:
    """What was given, in words."""
    words = []
    if owned := claim.owned:
        words.append(f"threads {owned}")
    if milli := sum(shared.milli for shared in claim.shared):
        words.append(f"{milli / 1000:g} shared CPUs")
    words.append(f"{claim.memory_mib} MiB")
    return ", ".join(words)


def _refused(draft: Draft, group: _Group, found: Unplaced) -> None:
    observed = draft.observed
    attempt = Attempt(draft.now_s, observed.capacity, found.message)
    told: dict[ObjectRef, None] = {}
    for instance in group.instances:
        last = observed.attempts.get(instance.meta.uid)
        draft.sightings.append(Tried(instance.meta.uid, attempt))
        if last is None or last.message != found.message:
            # Of a gang it is said once: it is the gang that has no place, and it may have a thousand members.
            ref = _ref(group.environment) if group.environment.spec.gang else instance_ref(instance)
            told.setdefault(ref)
    for ref in told:
        draft.event(ref, "Unschedulable", found.message, warning=True)


def _put_placement(draft: Draft, uid: str, found: Placed, stamp: Stamp) -> None:
    draft.put(
        PlacementRecord(
            uid,
            found.host,
            found.claim,
            stamp.epoch,
            stamp.generation,
            created_s=draft.now_s,
            revision=draft.revision,
        )
    )


def _key(environment: Environment) -> str:
    return tenant_key(environment.meta.tenant, environment.meta.name)


def _ref(environment: Environment) -> ObjectRef:
    return ObjectRef("Environment", environment.meta.name, environment.meta.tenant, environment.meta.uid)
