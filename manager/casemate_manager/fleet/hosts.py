"""PURE. What hosts tell: they join, say what they are made of and what they observe, let go of instances, and leave.

Facts change only what is observed, in memory. Durable is: that a host exists and its session counter (so that a cloned
identity is known also after a restart of the manager), its inventory, its events, and that it let go of an instance.
A message of a session that is no longer the host's current one changes nothing.
"""

from dataclasses import replace
from functools import partial

from casemate_core.claims import Claim
from casemate_core.spec.fleet import Host, HostSpec
from casemate_core.spec.instance import Phase
from casemate_core.spec.meta import Meta, check_name
from casemate_core.spec.views import ObjectRef
from casemate_manager.fleet import gpus, moves, operations, volumes
from casemate_manager.fleet.commands import (
    Batch,
    EndSession,
    HostFacts,
    HostGone,
    HostHello,
    HostInventory,
    HostNote,
    Turned,
    Welcomed,
)
from casemate_manager.fleet.draft import Draft, instance_ref, make_uid
from casemate_manager.fleet.enrolment import beyond, refused
from casemate_manager.fleet.observed import (
    CapacityChanged,
    ForgetInstance,
    HeardEvent,
    HostSeen,
    InstanceSeen,
    Observed,
)
from casemate_manager.fleet.placing import says_not_ready
from casemate_manager.fleet.records import HostRecord, InstanceRecord, InventoryRecord
from casemate_manager.fleet.state import State
from casemate_wire.session import Admission, admit, resumable
from casemate_wire.stream import HostEvent, Outcome

CLONE = "two machines dialled with one identity and one session counter"
#: How far a host's clock may be from the manager's before the manager's time is taken for its events.
CLOCK_AHEAD_S = 60.0
CLOCK_BEHIND_S = 86400.0


def hello(state: State, observed: Observed, command: HostHello, now_s: float) -> Batch:
    """A host dialled: welcome it, or turn it away."""
    message = command.hello
    if tuple(check_name("host", message.host)):
        return Batch(answer=Turned("BadName", "a host's name is an RFC 1123 label", -1.0))
    draft = Draft(state, observed, now_s)
    known = state.hosts.get(message.host)
    seen = observed.host(message.host)
    ref = _host_ref(known, message.host)
    if command.key is not None:
        # On plain text (loopback, by an explicit flag) nobody has a key; there whoever dials is on this machine.
        enrolment = state.enrolments.get(message.host)
        if why := refused(enrolment, command.key):
            return Batch(answer=Turned("NotEnrolled", why, -1.0))
    if known is not None and known.held:
        return Batch(answer=Turned("Held", f"the host is held: {known.held}", -1.0))
    verdict = admit(known.session if known else 0, seen.connected, message.session)
    if verdict is Admission.STALE:
        assert known is not None
        return Batch(
            answer=Turned(
                "StaleSession", f"session {message.session} is older than {known.session}, which was taken before", -1.0
            )
        )
    if verdict is Admission.CLONE:
        assert known is not None
        draft.put(replace(known, held=CLONE))
        draft.event(ref, "HostHeld", CLONE, warning=True)
        draft.sightings.append(observed.see_host(message.host, replace(seen, connected=False, whole=False)))
        if seen.connected:
            draft.effects.append(EndSession(message.host, seen.session, "Held", CLONE, -1.0))
        return draft.batch(Turned("Held", CLONE, -1.0))
    record = _joined(draft, command, known)
    draft.put(record)
    if verdict is Admission.SUPERSEDE:
        draft.effects.append(
            EndSession(message.host, seen.session, "Superseded", "a newer session of the host is there", 0.0)
        )
    ref = _host_ref(record, message.host)
    if known is None:
        draft.event(ref, "HostJoined", "the host joined the fleet")
    elif known.boot_id and known.boot_id != message.boot_id:
        draft.event(ref, "HostRebooted", "the host has a new boot id")
    elif not seen.connected:
        draft.event(ref, "HostConnected", "the host's stream is up")
    draft.sightings.append(
        observed.see_host(message.host, HostSeen(True, message.session, False, now_s, seen.report)),
    )
    inventory = state.inventories.get(message.host)
    return draft.batch(
        Welcomed(
            resume=resumable(message, state.epoch, state.revision),
            send_inventory=inventory is None or inventory.digest != message.inventory_digest,
        )
    )


def _joined(draft: Draft, command: HostHello, known: HostRecord | None) -> HostRecord:
    message = command.hello
    host = known.host if known else None
    if host is None or not host.meta.uid:
        host = Host(
            Meta(
                message.host,
                uid=make_uid("Host", message.host, command.seed),
                generation=1,
                created_s=draft.now_s,
                resource_version=draft.revision,
            ),
            HostSpec(),
        )
    return HostRecord(
        host, message.session, message.boot_id, message.agent_version, message.kernel, message.virtualisation
    )


def inventory(state: State, observed: Observed, command: HostInventory, now_s: float) -> Batch:
    """A host told what it is made of."""
    if not _is_current(observed, command.host, command.session):
        return Batch()
    draft = Draft(state, observed, now_s)
    told = command.inventory
    enrolment = state.enrolments.get(command.host)
    if enrolment is not None and (more := beyond(enrolment.limits, told.topology)):
        message = f"the host tells of {more}: its inventory is not taken"
        draft.event(_host_ref(state.hosts[command.host], command.host), "BeyondEnrolment", message, warning=True)
        draft.effects.append(EndSession(command.host, command.session, "BeyondEnrolment", message, -1.0))
        return draft.batch()
    known = state.inventories.get(command.host)
    if known is None or known.digest != told.digest or known.topology != told.topology:
        draft.put(InventoryRecord(command.host, told.digest, told.topology))
        if known is not None:
            draft.event(
                _host_ref(state.hosts[command.host], command.host), "InventoryChanged", "the host's parts changed"
            )
    draft.sightings += [
        observed.see_host(command.host, replace(observed.host(command.host), heard_s=now_s)),
        CapacityChanged(),
    ]
    return draft.batch()


def facts(state: State, observed: Observed, command: HostFacts, now_s: float) -> Batch:
    """A host told what it observes."""
    name, told = command.host, command.facts
    if not _is_current(observed, name, command.session):
        return Batch()
    draft = Draft(state, observed, now_s)
    seen = observed.host(name)
    report = told.host or seen.report
    after = HostSeen(True, seen.session, seen.whole or told.snapshot, now_s, report)
    foreign = seen.report.foreign_claims if seen.report else ()
    changed = report is not None and report.foreign_claims != foreign
    if told.host is not None and told.host is not seen.report:
        changed |= gpus.told(draft, name, seen.report, told.host)
    if (told.snapshot and not seen.whole) or changed or says_not_ready(seen) != says_not_ready(after):
        draft.sightings.append(CapacityChanged())
    draft.sightings.append(observed.see_host(name, after))
    if told.host is not None:
        volumes.told(draft, name, seen.report, told.host)
    here = {p.instance_uid for p in state.host_placements.get(name, {}).values()}
    told_of = set()
    wake = []
    for instance in told.instances:
        if instance.uid not in here:
            continue  # not ours to speak of: the desired state already tells the host to end it
        told_of.add(instance.uid)
        if _is_active(state, name, instance.uid):
            draft.sightings.append(observed.see_instance(instance.uid, InstanceSeen(name, now_s, instance)))
        if instance.claim is not None:
            _compare_claims(draft, name, instance.uid, instance.claim)
        record = state.instances[instance.uid]
        if instance.order is not None:
            operations.told(draft, name, record, instance.order)
        if instance.phase is Phase.STOPPED or _moves(state, record):
            wake.append(state.environment_keys[record.environment_uid])
    if told.snapshot:
        for uid in filter(partial(_is_active, state, name), here - told_of - set(told.gone)):
            draft.sightings.append(observed.see_instance(uid, InstanceSeen(name, now_s, None)))
    for uid in told.gone:
        if uid in here:
            _gone(draft, name, uid)
    return replace(draft.batch(), wake=tuple(dict.fromkeys(wake)))


def _is_active(state: State, host: str, uid: str) -> bool:
    """Whether this host speaks for the instance: another that it comes from, or goes to, speaks of its order alone."""
    placement = state.placement_of(uid)
    return placement is None or placement.host == host


def _moves(state: State, record: InstanceRecord) -> bool:
    """Whether others of the instance's environment wait for it to come up."""
    return state.environment_of(record).environment.spec.update_strategy is not None


def _compare_claims(draft: Draft, host: str, uid: str, told: Claim) -> None:
    """The host's ledger and ours must agree on what an instance holds; a difference is drift, and it is named."""
    for placement in draft.state.instance_placements[uid].values():
        ours = replace(placement.claim, epoch=told.epoch, generation=told.generation)
        if placement.host == host and told.generation == placement.generation and told != ours:
            draft.event(
                instance_ref(draft.state.instances[uid]),
                "ClaimDiffers",
                f"host {host} holds other resources for the instance than the manager gave it",
                warning=True,
                source=host,
            )


def _gone(draft: Draft, host: str, uid: str) -> None:
    """A host says that it has no trace of an instance."""
    state = draft.state
    record = state.instances[uid]
    if not state.is_ending(record) and moves.gone(draft, host, record):
        return
    if not state.is_ending(record):
        draft.sightings.append(draft.observed.see_instance(uid, InstanceSeen(host, draft.now_s, None)))
        return
    for key, placement in state.instance_placements[uid].items():
        if placement.host == host:
            draft.drop("Placement", key)
    if all(p.host == host for p in state.instance_placements[uid].values()):
        operations.forget(draft, record)
        volumes.release(draft, record)
        draft.drop("Instance", uid)
        draft.sightings.append(ForgetInstance(uid))
        draft.event(
            instance_ref(record),
            "Deleted",
            f"host {host} let go of the instance",
            source=host,
            cause=draft.cause_of(instance_ref(record)),
        )
    draft.sightings.append(CapacityChanged())


def note(state: State, observed: Observed, command: HostNote, now_s: float) -> Batch:
    """A host told of an event, or how something ended."""
    name = command.host
    if not _is_current(observed, name, command.session):
        return Batch()
    draft = Draft(state, observed, now_s)
    match command.note:
        case HostEvent() as event:
            if observed.heard_event(name, event.id):
                return Batch()
            time_s = event.time_s if now_s - CLOCK_BEHIND_S < event.time_s < now_s + CLOCK_AHEAD_S else now_s
            draft.event(
                _regarding(state, name, event.instance, event.pod),
                event.reason,
                event.message,
                warning=event.severity == "Warning",
                cause=event.cause,
                source=name,
                time_s=time_s,
                name=event.id,
            )
            draft.sightings.append(HeardEvent(name, event.id))
        case Outcome() as outcome if outcome.placement_refused:
            draft.event(
                _regarding(state, name, outcome.instance, ""),
                "PlacementRefused",
                outcome.message,
                warning=True,
                source=name,
            )
        case Outcome() as outcome:
            draft.event(
                _regarding(state, name, outcome.instance, ""),
                outcome.reason or outcome.phase,
                outcome.message,
                warning=outcome.phase == "Failed",
                cause=outcome.operation,
                source=name,
            )
    return draft.batch()


def gone(state: State, observed: Observed, command: HostGone, now_s: float) -> Batch:
    """A host's stream ended: it is Unknown from now on, and nothing on it is replaced elsewhere."""
    if not _is_current(observed, command.host, command.session):
        return Batch()
    draft = Draft(state, observed, now_s)
    seen = observed.host(command.host)
    draft.sightings.append(observed.see_host(command.host, replace(seen, connected=False, whole=False)))
    draft.event(
        _host_ref(state.hosts.get(command.host), command.host),
        "HostLost",
        command.reason or "the host's stream ended",
        warning=True,
    )
    return draft.batch()


def _is_current(observed: Observed, host: str, session: int) -> bool:
    seen = observed.host(host)
    return seen.connected and seen.session == session


def _host_ref(record: HostRecord | None, name: str) -> ObjectRef:
    return ObjectRef("Host", name, "", record.host.meta.uid if record else "")


def _regarding(state: State, host: str, uid: str, pod: str) -> ObjectRef:
    """The instance or pod that a host speaks of; the host itself where it is none of its instances."""
    record = state.instances.get(uid)
    if record is None or not any(p.host == host for p in state.instance_placements.get(uid, {}).values()):
        return _host_ref(state.hosts.get(host), host)
    if pod:
        return ObjectRef("Pod", f"{record.meta.name}.{pod}", record.meta.tenant)
    return instance_ref(record)
