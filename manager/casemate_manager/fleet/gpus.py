"""PURE. GPUs: what hosts say of them, their passports, and what operators ask of them.

Theory of operation. What state a GPU is in says its host, and is kept in memory like everything that hosts say. Durable are its
last passports, which a host has not for ever, and the last order of an operator: a level, sent with the host's desired state
until it is another one, and carried out once, since the host remembers which it took. A GPU that no host has told, that is not
clean, or that an operator wants out of use is held: a claim of nobody's stands on it (`casemate_manager.fleet.holding`), and
the scheduler needs to know nothing else.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from casemate_core.errors import Conflict, InvalidSpec, NotFound, Violation, shown
from casemate_core.gpu import GpuOrder, GpuPhase, GpuState, GpuVerb, Passport, held_because
from casemate_core.plain import from_plain, to_plain
from casemate_core.spec.meta import Meta
from casemate_core.spec.views import GpuSliceView, GpuView, ObjectRef
from casemate_manager.fleet.commands import Batch, GpuAnswer, OrderGpu
from casemate_manager.fleet.draft import Draft, make_uid
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import GpuRecord, RequestRecord
from casemate_manager.fleet.requests import answered, check_key
from casemate_manager.fleet.state import State
from casemate_wire.stream import HostReport

#: Passports of a GPU that are kept.
MOST_PASSPORTS: Final = 16
MAX_REASON: Final = 200
_IN_USE = (GpuPhase.PREPARED, GpuPhase.ATTACHED)


def states(observed: Observed, host: str) -> dict[str, GpuState]:
    """What a host said last of its GPUs."""
    report = observed.host(host).report
    return {state.uuid: state for state in report.gpus} if report is not None else {}


def view(state: State, observed: Observed, uuid: str, *, whole: bool = False) -> GpuView | None:
    """A GPU as it is shown; None where there is none. ``whole``: with all its passports."""
    host, record = state.gpu_hosts.get(uuid, ""), state.gpus.get(uuid)
    inventory = state.inventories.get(host)
    gpu = next((g for g in inventory.topology.gpus if g.uuid == uuid), None) if inventory is not None else None
    if gpu is None:
        return None
    said = states(observed, host).get(uuid)
    connected = observed.host(host).connected
    instance = state.instances.get(said.owner) if said is not None else None
    claimed = state.claims[host].usage.gpus.get(uuid) if host in state.claims else None
    if instance is None and claimed is not None:
        instance = state.instances.get(claimed)
    order = record.order if record is not None else None
    passports = record.passports if record is not None else ()
    return GpuView(
        meta=Meta(
            uuid,
            labels={**(state.hosts[host].host.meta.labels if host in state.hosts else {}), **dict(gpu.labels)},
            uid=uuid,
            resource_version=record.revision if record is not None else 0,
        ),
        host=host,
        model=gpu.model,
        memory_mib=gpu.memory_mib,
        address=(said.address if said is not None else "") or gpu.place.address,
        phase=said.phase if said is not None and connected else GpuPhase.UNKNOWN,
        instance=f"{instance.meta.tenant}/{instance.meta.name}" if instance is not None else "",
        tenant=said.tenant if said is not None else "",
        reason=said.reason if said is not None else "",
        order=str(order.verb) if order is not None and (said is None or said.order != order.uid) else "",
        state=said if connected else None,
        passports=passports if whole else passports[-1:],
        slices=tuple(_slices(state, host, uuid)),
    )


def _slices(state: State, host: str, uuid: str) -> Iterator[GpuSliceView]:
    """Who has a slice of a GPU; a hold has none, and a vGPU that is not ours is its host's word."""
    if host not in state.claims or uuid not in state.claims[host].usage.share_milli:
        return
    for claim in state.claims[host]:
        for share in claim.shares:
            if share.gpu == uuid and not held_because(claim.owner):
                instance = state.instances.get(claim.owner)
                name = f"{instance.meta.tenant}/{instance.meta.name}" if instance is not None else claim.owner
                yield GpuSliceView(name, share.profile or f"{share.milli}m", share.milli)


# --- what operators ask -----------------------------------------------------------------------------------------------


def order(state: State, observed: Observed, command: OrderGpu, now_s: float) -> Batch:
    """Ask something of a GPU. Raises InvalidSpec, NotFound, Conflict, KeyReused."""
    check_key(command.request_key)
    digest = hashlib.sha256(json.dumps([command.gpu, command.verb, command.reason]).encode()).hexdigest()
    if (known := state.requests.get(command.request_key)) is not None:
        return Batch(answer=from_plain(GpuAnswer, answered(known, digest)))
    verb = _checked(command)
    host = state.gpu_hosts.get(command.gpu)
    if host is None:
        raise NotFound("GPU", command.gpu)
    draft = Draft(state, observed, now_s)
    answer = GpuAnswer("", host)
    if _is_needed(state, observed, command.gpu, host, verb, command.reason):
        asked = GpuOrder(command.gpu, make_uid("gpu-order", command.gpu, command.seed), verb, command.reason)
        record = state.gpus.get(command.gpu) or GpuRecord(command.gpu, host)
        draft.put(replace(record, host=host, order=asked, revision=draft.revision))
        draft.event(_ref(command.gpu), "GpuOrdered", f"{verb}{f': {command.reason}' if command.reason else ''}")
        answer = GpuAnswer(asked.uid, host)
    draft.put(RequestRecord(command.request_key, digest, now_s, to_plain(answer)))
    return draft.batch(answer)


def _checked(command: OrderGpu) -> GpuVerb:
    found = []
    try:
        verb = GpuVerb(command.verb)
    except ValueError:
        words = ", ".join(v.value for v in GpuVerb)
        raise InvalidSpec((Violation("verb", shown(command.verb), "is not known", f"write one of {words}"),)) from None
    if len(command.reason) > MAX_REASON or not command.reason.isprintable():
        found.append(Violation("reason", "", "is too long or not text", f"write at most {MAX_REASON} characters"))
    elif command.reason and verb is not GpuVerb.QUARANTINE:
        found.append(Violation("reason", shown(command.reason), f"means nothing to {verb}", "leave it out"))
    if found:
        raise InvalidSpec(tuple(found))
    return verb


def _is_needed(state: State, observed: Observed, uuid: str, host: str, verb: GpuVerb, reason: str) -> bool:
    """Whether an order changes anything. Raises Conflict where it cannot be."""
    said, record = states(observed, host).get(uuid), state.gpus.get(uuid)
    last = record.order if record is not None else None
    waits = last is not None and (said is None or said.order != last.uid)
    if verb is GpuVerb.SANITISE and said is not None and said.phase in _IN_USE:
        raise Conflict(f"GPU {uuid} is {said.phase}: it is sanitised when its instance lets go of it")
    if verb is GpuVerb.SANITISE and host in state.claims and (n := sum(1 for _ in _slices(state, host, uuid))):
        raise Conflict(f"GPU {uuid} carries {n} slices: it is sanitised once nobody has one")
    if waits and last is not None and last.verb is verb and (last.reason == reason or verb is not GpuVerb.QUARANTINE):
        return False  # asked for already
    if said is None or waits:
        return True
    if verb is GpuVerb.QUARANTINE:
        return not (said.phase is GpuPhase.QUARANTINED and said.reason == (reason or said.reason))
    if verb is GpuVerb.RELEASE:
        return said.phase is GpuPhase.QUARANTINED or bool(last is not None and last.verb is GpuVerb.QUARANTINE)
    return said.phase not in (GpuPhase.RETURNED, GpuPhase.SANITISING)


# --- what hosts say ---------------------------------------------------------------------------------------------------


def told(draft: Draft, host: str, before: HostReport | None, report: HostReport) -> bool:
    """Keep what is new of a host's GPUs; whether what may be given changed."""
    known = {state.uuid: state for state in before.gpus} if before is not None else {}
    ours = draft.state.inventories.get(host)
    there = {gpu.uuid for gpu in ours.topology.gpus} if ours is not None else set()
    changed = False
    for said in report.gpus:
        old = known.get(said.uuid)
        if old is said or old == said:
            continue
        changed |= old is None or old.held != said.held
        if said.uuid not in there:
            continue  # of another host, or not in its inventory: it is held as not told, and nothing is kept of it
        if said.passport is not None:
            _keep(draft, host, said.passport)
        if said.phase is GpuPhase.QUARANTINED and (old is None or old.phase is not said.phase):
            draft.event(_ref(said.uuid), "GpuQuarantined", said.reason, warning=True, source=host)
    return changed


def _keep(draft: Draft, host: str, passport: Passport) -> None:
    record = draft.state.gpus.get(passport.uuid) or GpuRecord(passport.uuid, host)
    if any((p.generation, p.climb) == (passport.generation, passport.climb) for p in record.passports):
        return
    kept = (*record.passports, passport)[-MOST_PASSPORTS:]
    draft.put(replace(record, host=host, passports=kept, revision=draft.revision))
    words = "sanitised" if passport.clean else f"not clean: {passport.reason}"
    draft.event(_ref(passport.uuid), "GpuPassport", words, warning=not passport.clean, source=host)


def orders(state: State, host: str) -> Iterator[GpuOrder]:
    """The last that operators asked of each GPU of a host."""
    yield from state.gpu_orders.get(host, {}).values()


def _ref(uuid: str) -> ObjectRef:
    return ObjectRef("GPU", uuid, "", uuid)
