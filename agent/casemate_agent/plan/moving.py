"""An instance that is moved to another host, as its two hosts see it. PURE.

What may live here: decisions about the order of a migration, at the host that it leaves and at the one that it goes to (the
same order, told apart by the role of the placement). The order of the whole is the manager's (docs/adr/025).

Theory of operation. The *target* has everything ready that a start needs but the domain, and then waits for it (a passage).
What arrives is frozen, and nothing here lets it go on: that follows when the placement is active, and is then what every
frozen domain that should run gets. In stage ``settle`` it says, once and for all, whether the domain is here.

The *source*, once it may, sends the domain, which is told on its disk before: from then on it does nothing else to it. What
came of it is judged by what is seen. A domain that is still here was not moved, whatever anybody believes: where it was
halted for the move it goes on. One that is off, and was sent, has left: that word is on disk before it is told, and the
instance is not started here again while the order is there. When the order is gone and the instance is not, the manager has
seen to it that it is nowhere else.

States of the order at the source::

    Running, not asked    stage transfer: asked, from now on (on disk); stage cancel: Failed
    Running, asked        sent while it runs here and the stage is transfer; then Done where it is off, Failed where it is not
    Done                  nothing is done to it
    Failed                goes on as ever
"""

from collections.abc import Mapping
from dataclasses import replace

from casemate_agent import actions as act
from casemate_agent.drivers.ports import DomainPhase
from casemate_agent.ledger.records import InstanceRecord, OrderRecord
from casemate_agent.plan.drafting import ACTIVE, Draft
from casemate_core.errors import DeadlineExceeded
from casemate_core.spec.instance import HostNetwork, Phase, Run, bridged
from casemate_core.spec.operation import ENDED, Order, OrderPhase, Stage, Verb

INCOMING = "incoming"
#: Until a host asks again whether threads that it has promised are free.
HELD_S = 0.5


def arrives(r: InstanceRecord) -> bool:
    """Whether the instance is expected here, and is another host's still."""
    return r.desired.placement.role == INCOMING


def leaves(r: InstanceRecord) -> bool:
    """Whether it is on its way, or has left: nothing else is done to it here."""
    order = r.order
    if order is None or order.verb is not Verb.MIGRATE or arrives(r):
        return False
    return order.phase is OrderPhase.DONE or (order.phase is OrderPhase.RUNNING and order.asked_s > 0)


def advance(d: Draft, order: Order) -> None:
    """Bring the order a step on."""
    known = d.record.order
    if known is None or known.uid != order.uid:
        known = OrderRecord(order.uid, Verb.MIGRATE, started_s=d.now, host_boot_id=d.observed.machine.boot_id)
        if order.begun and not arrives(d.record):
            known = replace(known, asked_s=d.now)  # lost from this disk: what is here now tells what came of it
        d.record = replace(d.record, order=known)
    if known.phase in ENDED or order.move is None:
        return
    known = _at_target(d, order, known) if arrives(d.record) else _at_source(d, order, known)
    d.record = replace(d.record, order=known)
    d.wake(order.deadline_s)


def sent(r: InstanceRecord, order: str, at_s: float, reason: str, message: str) -> InstanceRecord:
    """The record after an instance was sent, or could not be."""
    known = r.order
    if known is None or known.uid != order or known.phase is not OrderPhase.RUNNING:
        return r
    if not reason:
        return replace(r, order=replace(known, acted=True))
    # Not the end yet: whether it is still here is seen, not believed.
    return replace(r, order=replace(known, reason=reason, message=message[:1000]))


def _end(d: Draft, known: OrderRecord, phase: OrderPhase, reason: str, message: str) -> OrderRecord:
    return replace(known, phase=phase, finished_s=d.now, reason=reason, message=message[:1000])


# --- the host that it leaves ------------------------------------------------------------------------------------------


def _at_source(d: Draft, order: Order, known: OrderRecord) -> OrderRecord:
    assert order.move is not None
    stage, under_way = order.move.stage, d.record.uid in d.observed.moving
    if d.record.removed:
        return _end(d, known, OrderPhase.FAILED, "Removed", "the instance is being ended")
    if not known.asked_s:
        if stage is Stage.PREPARE:
            return known
        if stage is Stage.CANCEL:
            return _end(d, known, OrderPhase.FAILED, "Cancelled", "given up before it was sent")
        if d.domain is None or d.domain.phase is not DomainPhase.RUNNING or d.record.desired.run is not Run.STARTED:
            return _end(d, known, OrderPhase.FAILED, "NotRunning", "its domain does not run")
        return replace(known, asked_s=d.now)  # sent by the next plan: this is on disk then
    if under_way:
        # Whoever carries it out gives up where it is not wanted any more.
        if stage is Stage.TRANSFER:
            d.move = act.Transfer(d.record.desired, f"it moves to {order.move.target}")
        return known
    if d.active:
        assert d.domain is not None
        untried = not known.reason and not known.acted and d.domain.phase is DomainPhase.RUNNING
        if stage is Stage.TRANSFER and untried and d.now < order.deadline_s:
            d.move = act.Transfer(d.record.desired, f"it moves to {order.move.target}")
            return known
        reason, message = known.reason or "NotSent", known.message or "it was not sent, and is still here"
        if stage is Stage.CANCEL:
            reason, message = "Cancelled", "given up while it was sent; it is still here"
        elif d.now >= order.deadline_s and not known.reason:
            reason, message = DeadlineExceeded.reason, "not sent before its deadline"
        return _end(d, known, OrderPhase.FAILED, reason, message)
    if known.acted or (d.domain is not None and d.domain.left) or (order.begun and not known.reason):
        return _end(d, known, OrderPhase.DONE, "", f"it has left for {order.move.target}")
    return _end(d, known, OrderPhase.FAILED, known.reason or "Ended", known.message or "its domain ended meanwhile")


def depart(d: Draft) -> None:
    """Nothing is done to an instance that is on its way, or has left."""
    order = d.record.order
    asked = d.record.desired.order
    to = asked.move.target if asked is not None and asked.move is not None else "another host"
    if order is not None and order.phase is OrderPhase.DONE:
        d.says(Phase.STOPPING, "Moved", f"it has left for {to}")
    else:
        d.says(Phase.RUNNING, "Moving", f"it moves to {to}")


def go_on(d: Draft) -> bool:
    """A domain that was halted for a move which did not come about goes on. True where that is planned."""
    if d.domain is None or not d.domain.halted or d.record.removed or arrives(d.record):
        return False
    if d.record.desired.run is not Run.STARTED or leaves(d.record):
        return False
    d.actions.append(act.Resume(d.record.uid, "it has not moved, and goes on here"))
    d.says(Phase.RUNNING, "Resuming")
    return True


# --- the host that it goes to -----------------------------------------------------------------------------------------


def _at_target(d: Draft, order: Order, known: OrderRecord) -> OrderRecord:
    assert order.move is not None
    if d.record.removed:
        return _end(d, known, OrderPhase.FAILED, "Removed", "the instance is being ended")
    if d.record.refusal is not None:
        return _end(d, known, OrderPhase.FAILED, "PlacementRefused", d.record.refusal.message)
    failure = d.record.failure
    if failure is not None and (failure.permanent or failure.count >= d.settings.failed_after):
        return _end(d, known, OrderPhase.FAILED, failure.reason, f"{failure.action}: {failure.message}")
    if order.move.stage is not Stage.SETTLE:
        return known
    domain = d.domain
    if domain is not None and domain.phase is DomainPhase.PAUSED and domain.frozen:
        return _end(d, known, OrderPhase.DONE, "", "it has arrived")
    seen = "there is no domain" if domain is None else f"its domain is {domain.phase.value}"
    return _end(d, known, OrderPhase.FAILED, "NotArrived", f"it has not arrived: {seen}")


def waits(d: Draft) -> bool:
    """Whether a passage for the instance is to be open."""
    asked, known = d.record.desired.order, d.record.order
    if d.record.removed or not arrives(d.record) or asked is None or asked.move is None or known is None:
        return False
    return known.phase is OrderPhase.RUNNING and asked.move.stage in (Stage.PREPARE, Stage.TRANSFER)


def close(d: Draft) -> None:
    """Wait no longer where nobody is to come."""
    opened = d.observed.passages.get(d.record.uid)
    asked = d.record.desired.order
    if opened is not None and (not waits(d) or asked is None or opened.order != asked.uid):
        d.actions.append(act.ClosePassage(d.record.uid, "nobody comes through it any more"))


def receive(d: Draft, networks: Mapping[str, HostNetwork], *, held: bool) -> None:
    """Have all that the instance needs here but its domain, and wait for that. ``held``: its claim is accepted."""
    r, desired, seen = d.record, d.record.desired, d.observed
    if d.domain is not None and d.domain.phase in ACTIVE:
        d.says(Phase.PREPARING, "Arrived", "it is here, frozen, until it is switched over")
        return
    if not held or not waits(d):
        if d.phase is Phase.UNKNOWN:
            d.says(Phase.PREPARING, "Waiting", "it is not expected at the moment")
        return
    d.says(Phase.PREPARING, "Incoming")
    files, nets = seen.files, seen.networks
    if files is None or nets is None:
        port = "images" if files is None else "networks"
        d.says(Phase.PREPARING, "Waiting", f"{port}: {seen.silent.get(port, 'no answer')}")
        return
    nics = bridged(desired.nics)
    if unknown := sorted({nic.network for nic in nics} - set(nets.bridges) - set(networks)):
        d.says(Phase.PREPARING, "NetworkUnknown", f"network {unknown[0]} is not yet described to this host")
        return
    ready: list[act.Action] = [
        act.FetchImage(image, "not in the store")
        for image in (desired.image, *desired.archives)
        if image.file.digest not in files.images
    ]
    missing = sorted({nic.network for nic in nics} - set(nets.bridges))
    ready += [act.EnsureNetwork(networks[name], "its bridge is not there") for name in missing]
    if desired.disk not in files.disks_of(r.uid):
        ready.append(act.CreateOverlay(desired, "its disk is copied into it"))
    if r.uid not in files.seeds:
        ready.append(act.WriteSeed(desired, "not there"))
    if len(seen.guarded.get(r.uid, ())) < len(nics):
        ready.append(act.Guard(desired, "before its taps exist"))
    d.actions += ready
    if held_by := d.pool.hold(r.uid, desired.placement.claim, seen):
        d.says(Phase.PREPARING, "ThreadsInUse", held_by)
        d.wake(d.now + HELD_S)
        return
    if r.uid in seen.passages and not any(isinstance(a, act.ClosePassage) for a in d.actions):
        d.says(Phase.PREPARING, "Incoming", "all is ready; it is waited for")
        return
    d.actions.append(act.OpenPassage(desired, d.pool.defined(desired.placement.claim), "all is ready"))
