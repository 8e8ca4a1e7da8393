"""What is to be done once to an instance: begun once, judged by what is seen. PURE.

What may live here: decisions about the order that an instance's desired record carries. What they share with all others
of an instance is :mod:`casemate_agent.plan.drafting`.

Theory of operation. An order is turned into a level as far as it can be. A restart wants *another process* than the one
that it was begun on, a rebuild a domain made from *another disk*, a stop none: each of them is pursued from what is seen,
and a crash at any step changes nothing. A reboot and a reset want *another boot of the guest*; to bring that about
something is asked once, and that it is about to be asked is on disk before: after a crash it is not asked again, its
effect is waited for. What cannot be told by the deadline ends as Unknown.

An order that names another process or another boot of the guest than there is now was given before that one began: what
it wanted has happened. So an order that comes a second time, to a host that has lost its memory, does nothing.

States of an order, by its verb::

    none         taken (Running), or Done, Failed or Unknown at once; or left, while its guest is not heard yet
    Running      Done when what it wants is seen; Failed where that cannot come any more; at the deadline Failed or Unknown
    Done, …      kept until the manager no longer names it
"""

from dataclasses import replace

from casemate_agent import actions as act
from casemate_agent.drivers.ports import DomainPhase
from casemate_agent.ledger.records import InstanceRecord, OrderRecord, Passage, from_metadata
from casemate_agent.plan import moving
from casemate_agent.plan.drafting import Draft
from casemate_agent.realtime.certificate import Under
from casemate_core.errors import DeadlineExceeded, InternalError
from casemate_core.spec.instance import Run
from casemate_core.spec.operation import Order, OrderPhase, OrderState, Verb
from casemate_core.spec.realtime import Certificate

#: Verbs that end the process that they find.
_DOWN = frozenset({Verb.RESTART, Verb.REBUILD})
#: Verbs that want another boot of the guest in the same process.
_BOOT = frozenset({Verb.REBOOT, Verb.RESET})
#: Verbs that need the guest's helper.
_ASK = frozenset({Verb.REBOOT, Verb.CERTIFY})


def wants_it_down(r: InstanceRecord) -> bool:
    """Whether an order under way ends the process, so that the stop which is under way is not void."""
    return r.order is not None and r.order.phase is OrderPhase.RUNNING and r.order.verb in _DOWN


def state(order: OrderRecord, certificate: Certificate | None = None, passage: Passage | None = None) -> OrderState:
    """What is told of an order; with the instance's last certificate where it is what the order has measured, and where it
    is waited for, where the order is to wait for it."""
    told = OrderState(order.uid, order.phase, order.reason, order.message, order.started_s, order.finished_s)
    if passage is not None and passage.order == order.uid:
        told = replace(told, address=passage.address)
    return replace(told, certificate=certificate) if certificate and certificate.order == order.uid else told


def measured(
    r: InstanceRecord, order: str, at_s: float, certificate: Certificate | None, reason: str, message: str
) -> InstanceRecord:
    """The record after a latency was measured, or could not be."""
    if certificate is not None:
        return replace(r, certificate=certificate)
    known = r.order
    if known is None or known.uid != order or known.phase is not OrderPhase.RUNNING:
        return r
    return replace(r, order=_ended(known, OrderPhase.FAILED, at_s, reason, message))


def acted(r: InstanceRecord, order: str, at_s: float, reason: str, message: str) -> InstanceRecord:
    """The record after a reboot or a reset was asked for. An answer that did not come leaves its effect to be seen."""
    known = r.order
    if known is None or known.uid != order or known.phase is not OrderPhase.RUNNING:
        return r
    if not reason:
        return replace(r, order=replace(known, acted=True))
    if reason == DeadlineExceeded.reason:
        return r
    return replace(r, order=_ended(known, OrderPhase.FAILED, at_s, reason, message))


def advance(d: Draft) -> None:
    """Bring the order of an instance a step on. What it wants done is in ``d.actions`` and ``d.down`` afterwards."""
    order, known = d.record.desired.order, d.record.order
    if order is None:
        d.record = replace(d.record, order=None)
        return
    if order.verb is Verb.MIGRATE:
        moving.advance(d, order)
        return
    if known is None or known.uid != order.uid:
        known = _take(d, order)
        if known is None:
            d.wake(order.deadline_s)
            return
        # somebody acts: what failed before is no reason to wait any longer
        d.record = replace(d.record, order=known, failure=None, exits=0)
    if known.phase is OrderPhase.RUNNING:
        known = _judge(d, order, known)
        if known.phase is OrderPhase.RUNNING:
            known = _pursue(d, known)
            d.wake(order.deadline_s)
        d.record = replace(d.record, order=known)


def _ended(known: OrderRecord, phase: OrderPhase, now_s: float, reason: str, message: str) -> OrderRecord:
    return replace(known, phase=phase, finished_s=now_s, reason=reason, message=message[:1000])


def _take(d: Draft, order: Order) -> OrderRecord | None:
    """Take an order that is new to this host; None while it cannot be begun yet."""
    run, guest = d.record.desired.run, d.guest
    new = OrderRecord(order.uid, order.verb, started_s=d.now, host_boot_id=d.observed.machine.boot_id)

    def ends(phase: OrderPhase, reason: str, message: str) -> OrderRecord:
        return _ended(new, phase, d.now, reason, message)

    pid = d.domain.pid if d.domain is not None and d.active else 0
    if order.begun:
        message = "the host had begun it and has lost its record of it; whether it took effect is not known"
        return ends(OrderPhase.UNKNOWN, "RecordLost", message)
    if d.record.removed:
        return ends(OrderPhase.FAILED, "Removed", "the instance is being ended")
    if d.now >= order.deadline_s:
        silent = order.verb in _ASK and not guest.connected
        message = "the guest's helper was not connected before the deadline"
        message += "; restart or reset need none" if order.verb is Verb.REBOOT else ""
        return ends(OrderPhase.FAILED, "TooLate", message if silent else "its deadline was over before it was begun")
    if order.verb is Verb.STOP and run is not Run.STOPPED:
        return ends(OrderPhase.FAILED, "ShouldRun", f"run: {run.value}; a stop needs run: stopped")
    if order.verb in (Verb.RESTART, Verb.CERTIFY, *_BOOT) and run is not Run.STARTED:
        return ends(OrderPhase.FAILED, "NotStarted", f"run: {run.value}; start the environment instead")
    if order.verb is Verb.RESTART and order.pid and pid and pid != order.pid:
        return ends(OrderPhase.DONE, "Already", f"process {pid} was started since it was asked of {order.pid}")
    if order.verb in _BOOT and order.guest_boot_id and guest.connected and guest.boot_id != order.guest_boot_id:
        return ends(OrderPhase.DONE, "Already", f"the guest has booted since: {guest.boot_id}")
    if order.verb in (Verb.CERTIFY, *_BOOT) and not d.active:
        return ends(OrderPhase.FAILED, "NotRunning", "its domain does not run")
    if (d.active and not pid) or (order.verb in _ASK and not guest.connected):
        return None
    return replace(new, pid=pid, guest_boot_id=guest.boot_id if guest.connected else order.guest_boot_id)


def _judge(d: Draft, order: Order, known: OrderRecord) -> OrderRecord:
    """What came of an order under way, as far as it is seen."""
    if d.record.removed:
        return _ended(known, OrderPhase.FAILED, d.now, "Removed", "the instance is being ended")
    done = _done(d, known)
    if done:
        return _ended(known, OrderPhase.DONE, d.now, "", done)
    run = d.record.desired.run
    if (known.verb is Verb.STOP) != (run is Run.STOPPED) and known.verb is not Verb.REBUILD:
        return _ended(known, OrderPhase.FAILED, d.now, "Overruled", f"run: {run.value} was asked for meanwhile")
    if known.verb is Verb.CERTIFY and (not d.active or not _same_process(d, known)):
        return _ended(known, OrderPhase.FAILED, d.now, "Ended", "its process ended while it was measured")
    if known.verb in _BOOT and (not d.active or not _same_process(d, known)):
        return _ended(known, OrderPhase.FAILED, d.now, "Ended", "its process ended before the guest had booted anew")
    if d.now < order.deadline_s:
        return known
    if known.verb in _BOOT:
        if known.acted and known.verb is Verb.RESET:
            return _ended(known, OrderPhase.DONE, d.now, "GuestSilent", "reset; the guest has not been heard since")
        if not d.guest.connected:
            message = "the guest is not heard, and it cannot be told whether it has booted anew"
            return _ended(known, OrderPhase.UNKNOWN, d.now, "GuestSilent", message)
        return _ended(known, OrderPhase.FAILED, d.now, "NotBooted", f"the guest is still in boot {d.guest.boot_id}")
    message = f"not done before its deadline: {d.record.phase or 'not seen'}"
    return _ended(known, OrderPhase.FAILED, d.now, DeadlineExceeded.reason, message)


def _same_process(d: Draft, known: OrderRecord) -> bool:
    assert d.domain is not None
    # a pid that cannot be read at the moment tells nothing
    return known.host_boot_id == d.observed.machine.boot_id and d.domain.pid in (0, known.pid)


def _done(d: Draft, known: OrderRecord) -> str:
    """What is there of what the order wants, in words; empty where it is not."""
    domain, desired = d.domain, d.record.desired
    match known.verb:
        case Verb.STOP:
            return "" if d.active else "its process has ended"
        case Verb.RESTART:
            if not d.active or _same_process(d, known) or not domain or not domain.pid:
                return ""
            return f"process {domain.pid} follows {known.pid}" if known.pid else f"process {domain.pid} was started"
        case Verb.REBUILD:
            if not d.active:
                return "a new disk is made at the next start" if desired.run is not Run.STARTED else ""
            return "it runs from a new disk" if _runs_from(d, desired.disk) else ""
        case Verb.CERTIFY:
            return _measured(d, known)
        case Verb.REBOOT | Verb.RESET:
            guest = d.guest
            if not d.active or not _same_process(d, known) or not known.asked_s or not guest.connected:
                return ""
            if guest.boot_id == known.guest_boot_id:
                return ""
            if not known.guest_boot_id:
                return f"the guest has booted: {guest.boot_id}" if known.acted else ""
            return f"boot {guest.boot_id} follows {known.guest_boot_id}, process {known.pid} as before"
        case Verb.MIGRATE:
            raise InternalError("a migration is judged by casemate_agent.moving")


def _measured(d: Draft, known: OrderRecord) -> str:
    found = d.record.certificate
    if found is None or found.order != known.uid:
        return ""
    told = (
        f"min {found.min_us}, avg {found.avg_us}, p99 {found.p99_us}, max {found.max_us} µs in {found.samples} samples"
    )
    return f"{told}; MEANINGLESS: {found.meaningless}" if found.meaningless else told


def _runs_from(d: Draft, disk: int) -> bool:
    applied = from_metadata(d.domain.record) if d.domain is not None else None
    return applied is not None and applied.disk == disk


def _pursue(d: Draft, known: OrderRecord) -> OrderRecord:
    """What is to be done now for an order under way."""
    if known.verb is Verb.CERTIFY:
        placement, machine = d.record.desired.placement, d.observed.machine
        asked = d.record.desired.order
        under = Under(placement.epoch, placement.generation, machine.kernel, d.observed.virtualisation, d.profile)
        # Measuring again is no harm: an agent that died meanwhile begins anew.
        duration_s = asked.duration_s if asked is not None else 0.0
        d.measure = act.Certify(d.record.uid, known.uid, duration_s, under, "a certificate was asked for")
        return known
    if known.verb in _DOWN and d.active:
        d.down = f"a {known.verb.value} was asked for"
    elif known.verb in _BOOT and not known.asked_s and d.domain is not None:
        if known.verb is Verb.REBOOT and d.domain.phase is DomainPhase.RUNNING and d.guest.connected:
            d.actions.append(act.Reboot(d.record.uid, known.uid, "a reboot was asked for"))
        elif known.verb is Verb.RESET:
            d.actions.append(act.Reset(d.record.uid, known.uid, "a reset was asked for"))
        else:
            return known
        # on disk before the act, because the plan's record is: after a crash it is not asked again
        return replace(known, asked_s=d.now)
    return known
