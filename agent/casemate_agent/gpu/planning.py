"""What is to be done about each GPU of a host, from what is wanted, seen and remembered. PURE.

What may live here: when a GPU moves; that it may is :mod:`casemate_agent.gpu.lifecycle`, what happens then
:mod:`casemate_agent.execute.gpuwork`.

Theory of operation. A GPU belongs to an instance for as long as the host holds a claim on it for that instance, through stops
and starts of its domain. It comes back when no claim names it for its owner and no domain runs with it. Giving is part of an
instance's way (:mod:`casemate_agent.plan.converge`); everything else is the GPU's own, and goes on without the instance: each
call looks anew and answers with the next act, so that an agent that dies at any step begins where it was,
and a climb from its foot.

Where the hypervisor does not answer nothing comes back, for who runs with what is not known.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from casemate_agent import actions as act
from casemate_agent.gpu.health import GpuHealth, Health
from casemate_agent.gpu.lifecycle import TABLE, Event, State
from casemate_agent.gpu.readings import CardFacts
from casemate_agent.gpu.records import GpuEntry, GpuPolicy, Response, state_of
from casemate_core.claims import Claim
from casemate_core.gpu import GpuOrder, GpuState, GpuVerb

KEY = "gpu:"
"""Stands before a UUID where jobs are named."""

_IN_USE = (State.PREPARED, State.ATTACHED)
_TO_CLEAN = (State.RETURNED, State.SANITISING, State.CHECKED)


@dataclass(frozen=True, slots=True)
class GpuLook:
    """All that the plan stands on. ``wanted`` and ``running``: GPU → (instance, tenant), of the claims that the host holds and
    of the domains that run; ``running`` None: not known."""

    there: tuple[str, ...]
    entries: Mapping[str, GpuEntry]
    cards: Mapping[str, CardFacts] = field(default_factory=dict)
    wanted: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    running: Mapping[str, tuple[str, str]] | None = None
    health: Mapping[str, GpuHealth] = field(default_factory=dict)
    orders: Mapping[str, GpuOrder] = field(default_factory=dict)
    #: GPUs that carry slices: they stay with the host's driver; and those of which claims name some.
    cut: frozenset[str] = frozenset()
    promised: frozenset[str] = frozenset()
    busy: frozenset[str] = frozenset()


def plan_gpus(look: GpuLook, policy: GpuPolicy) -> dict[str, act.GpuAction]:
    """The next act of each GPU that has one, by the name of its job."""
    found: dict[str, act.GpuAction] = {}
    for uuid in look.there:
        if f"{KEY}{uuid}" in look.busy:
            continue
        entry = look.entries.get(uuid)
        action = _enrol(look, uuid) if entry is None else _next(look, entry, policy)
        if action is not None:
            found[f"{KEY}{uuid}"] = action
    for uuid, entry in look.entries.items():
        if uuid not in look.there and f"{KEY}{uuid}" not in look.busy and (entry.record.state, Event.LOSE) in TABLE:
            found[f"{KEY}{uuid}"] = act.LoseGpu(uuid, "it is not there")
    return found


def _enrol(look: GpuLook, uuid: str) -> act.GpuAction | None:
    """A GPU without a record: it is whoever's domain runs with it, or dirty."""
    if look.running is None or uuid in look.cut:
        return None  # who had it before its slices were cut is not known, and it is not reset under them
    owner, tenant = look.running.get(uuid, ("", ""))
    return act.EnrolGpu(uuid, owner, tenant, "a domain runs with it" if owner else "this host has no record of it")


def _next(look: GpuLook, entry: GpuEntry, policy: GpuPolicy) -> act.GpuAction | None:
    record, uuid = entry.record, entry.uuid
    if (ordered := _order(look, entry)) is not None:
        return ordered
    if record.state in _IN_USE:
        if look.running is None or uuid in look.running or record.owner in look.busy:
            return _judged(look, entry, policy)
        if look.wanted.get(uuid, ("", ""))[0] == record.owner:
            return _judged(look, entry, policy)
        if record.state is State.PREPARED:
            return act.UnprepareGpu(uuid, record.generation, "its instance does not want it any more")
        return act.ReturnGpu(uuid, record.generation, "its instance has let go of it")
    if uuid in look.cut:
        return _judged(look, entry, policy, later=True)
    if record.state in _TO_CLEAN:
        if entry.condemned:
            return act.QuarantineGpu(uuid, entry.condemned, "it has come back")
        return act.SanitiseGpu(uuid, record.generation, "between two tenants")
    if record.state is State.QUARANTINED:
        return None
    if entry.condemned:
        return act.QuarantineGpu(uuid, entry.condemned, "the last of its slices is gone")
    if (judged := _judged(look, entry, policy)) is not None:
        return judged
    card = look.cards.get(uuid)
    if card is not None:
        by_host = card.driver not in ("", "vfio-pci")
        if by_host != (record.state is State.HOST_OWNED):
            return act.KeepGpu(uuid, by_host, f"{card.driver or 'no driver'} holds it")
    return None


def _order(look: GpuLook, entry: GpuEntry) -> act.GpuAction | None:
    """What an operator asked last, if it was not taken yet."""
    order, uuid, state = look.orders.get(entry.uuid), entry.uuid, entry.record.state
    if order is None or order.uid == entry.order:
        return None
    said = f"an operator said {order.verb}"
    if order.verb is GpuVerb.QUARANTINE:
        return act.QuarantineGpu(uuid, order.reason or said, said, order.uid, later=uuid in look.cut)
    if state is State.QUARANTINED:
        return act.ClearGpu(uuid, said, order.uid)
    if order.verb is GpuVerb.SANITISE and uuid in look.cut | look.promised:
        return None  # when the last of its slices is gone: it is not reset under those who have them, or are to
    if order.verb is GpuVerb.SANITISE and state not in _IN_USE:
        return act.SanitiseGpu(uuid, entry.record.generation, said, order.uid)
    return act.ClearGpu(uuid, said, order.uid)  # nothing to let out of: it is noted as taken


def _judged(look: GpuLook, entry: GpuEntry, policy: GpuPolicy, *, later: bool = False) -> act.GpuAction | None:
    """What the policy says of a GPU that is not well."""
    health = look.health.get(entry.uuid)
    if health is None or entry.condemned:
        return None
    response = response_to(health, policy)
    if response is Response.TELL:
        return None
    if entry.record.state is State.QUARANTINED:
        return None
    return act.QuarantineGpu(entry.uuid, "; ".join(health.reasons[:4]), f"it is {health.health}", later=later)


def response_to(health: GpuHealth, policy: GpuPolicy) -> Response:
    """What is done about a judgement: of the host's own, what the policy says; of what a guest adds to it, no more than the
    policy allows to a guest's word."""
    own = _response(health.own, policy)
    if own is not Response.TELL or health.health is health.own:
        return own
    return min(_response(health.health, policy), policy.guest, key=list(Response).index)


def _response(health: Health, policy: GpuPolicy) -> Response:
    match health:
        case Health.BROKEN:
            return policy.broken
        case Health.SUSPECT:
            return policy.suspect
        case _:
            return Response.TELL


def closes_host(health: Mapping[str, GpuHealth], policy: GpuPolicy) -> tuple[str, ...]:
    """GPUs for which the host takes nothing new, each with why."""
    return tuple(
        f"{uuid} is {gpu.health}: {'; '.join(gpu.reasons[:2])}"
        for uuid, gpu in sorted(health.items())
        if response_to(gpu, policy) is Response.CORDON
    )


def not_clean(uid: str, gpus: tuple[str, ...], entries: Mapping[str, GpuEntry]) -> tuple[str, ...]:
    """GPUs of a claim that the instance cannot be given yet, each with why. Those it has already are its own."""
    found = []
    for uuid in gpus:
        entry = entries.get(uuid)
        if entry is None:
            found.append(f"GPU {uuid}: this host has not looked at it yet")
        elif not entry.record.assignable and not (entry.record.owner == uid and entry.record.state in _IN_USE):
            found.append(f"GPU {uuid} is {entry.record.state}, and is given to nobody until it is clean")
    return tuple(found)


def unserved(claim: Claim, switches: bool) -> str:
    """What of a claim's GPUs this host cannot give yet; empty where it can give all of it. ``switches``: it has a fabric
    manager."""
    if claim.partition is not None and not switches:
        return f"nobody on this host switches fabric partition {claim.partition}"
    return ""


def states(look: GpuLook) -> tuple[GpuState, ...]:
    """What the manager is told."""
    found = []
    for uuid in look.there:
        entry, card, health = look.entries.get(uuid), look.cards.get(uuid), look.health.get(uuid)
        if entry is not None:
            found.append(
                state_of(
                    entry,
                    card.address if card else "",
                    card.driver if card else "",
                    health.health if health else Health.UNKNOWN,
                    health.reasons if health else (),
                    health.figures if health else None,
                )
            )
    return tuple(found)
