"""What is to be done about one instance, from what is wanted, seen and remembered. PURE.

What may live here: decisions about a single instance. The host as a whole is in :mod:`casemate_agent.plan.reconcile`.

Theory of operation. Every call looks at the machine anew and returns the whole rest of the way to where the instance
should be, as an ordered list of actions; the record that must be on disk before the first of them; and the state to
report. Executed to any step and planned again, it comes to the same end: each action leaves something that is seen the
next time. The order of making is overlay, seed, guard, domain, start (the overlay beside the other two: :func:`actions.stages`);
the order of ending is the reverse, and the record goes last, so that whatever is left over always has a record, or at least
a file, that names its instance.

States of an instance here, by what is wanted and what its domain does::

    wanted      domain           phase                    next
    started     none, off        Preparing, Starting      prepare, define, start (after a back-off, if it ended by itself)
    started     running          Starting, Running, Ready attach, guard, pods
    stopped     running          Stopping                 ask; after the grace, end
    stopped     none, off        Stopped                  -
    paused      running          Running                  freeze
    paused      frozen           Paused                   -
    paused      none, off        Stopped                  -
    removed     running          Deleting                 ask; after the grace, end
    removed     none, off        Deleting                 undefine, unguard, remove files, forget
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from casemate_agent import actions as act
from casemate_agent.actions import Action
from casemate_agent.domain.limits import memory_limits
from casemate_agent.drivers.ports import DomainPhase
from casemate_agent.gpu.planning import not_clean, unserved
from casemate_agent.gpu.records import GpuEntry
from casemate_agent.gpu.shares import lost, to_take
from casemate_agent.gpu.sharing import not_ready
from casemate_agent.hardware.functions import Grant, grant_of
from casemate_agent.ledger.records import (
    Failure,
    GuestView,
    InstanceRecord,
    Intent,
    Observation,
    Refusal,
    Started,
    bare,
    domain_digest,
    from_metadata,
    pods_revision,
)
from casemate_agent.plan import attaching, moving, orders, partitions
from casemate_agent.plan.admission import Admission
from casemate_agent.plan.backoff import delay_s
from casemate_agent.plan.drafting import ACTIVE, Draft, InstancePlan, Settings
from casemate_agent.plan.giving import drifted, missing, to_give_back
from casemate_agent.plan.pool import Pool
from casemate_agent.realtime.profile import Seen, instance_lines
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.spec.instance import (
    DesiredInstance,
    HostNetwork,
    InstanceState,
    Phase,
    Run,
    Virtualisation,
    bridged,
)
from casemate_core.spec.realtime import Certificate, ProfileLine, void
from casemate_core.spec.secret import lacks_text

#: Between looks at who still may run on the threads of an instance that is to start.
HELD_S = 0.5
#: Between looks at a guest that boots, until its kernel is seen.
KERNEL_S = 2.0

__all__ = ["ACTIVE", "ActionOutcome", "InstancePlan", "Settings", "converge", "remember"]


NO_GPUS: Mapping[str, GpuEntry] = MappingProxyType({})


def converge(
    record: InstanceRecord,
    observed: Observation,
    networks: Mapping[str, HostNetwork],
    admission: Admission | None,
    settings: Settings,
    pool: Pool,
    gpus: Mapping[str, GpuEntry] = NO_GPUS,
) -> InstancePlan:
    """The rest of the way of one instance. ``admission`` answers for its placement where it holds no claim for it yet;
    ``pool`` says which threads belong to whom, ``gpus`` are the ledger's records of GPUs."""
    guest = observed.guests.get(record.uid, GuestView())
    if observed.domains is None:
        # what cannot be seen is not acted upon: an unknown domain may well be running
        why = observed.silent.get("hypervisor", "the hypervisor does not answer")
        draft = Draft(record, None, guest, observed, settings, pool, gpus)
        draft.says(Phase.DELETING if record.removed else Phase.UNKNOWN, "HypervisorUnreachable", why)
        return _finish(record, draft)
    draft = Draft(record, observed.domains.get(record.uid), guest, observed, settings, pool, gpus)
    _settle(draft)
    draft.profile = _profile(draft)
    if record.uid in observed.attached and not draft.active:
        draft.actions.append(act.DetachGuest(record.uid, "its domain does not run"))
    orders.advance(draft)
    moving.close(draft)
    if record.removed:
        _end(draft)
    elif moving.arrives(draft.record):
        held = admission is None or _hold_claim(draft, admission)
        moving.receive(draft, networks, held=held and draft.record.claim is not None)
    elif moving.leaves(draft.record):
        moving.depart(draft)
    elif moving.go_on(draft):
        pass
    elif record.desired.run is not Run.STARTED and not (record.desired.run is Run.PAUSED and draft.active):
        if admission is not None:
            _hold_claim(draft, admission)
        _stop(draft)
    elif draft.active and draft.down:
        _power_off(draft, draft.down)
        draft.says(Phase.STOPPING, "Restarting", draft.down)
    elif any(isinstance(action, act.Reboot | act.Reset) for action in draft.actions):
        draft.says(Phase.RUNNING, "Rebooting")  # and nothing else: the guest goes down
    elif record.desired.run is Run.PAUSED:
        _freeze(draft, networks)
    elif draft.active:
        _keep(draft, networks)
    else:
        _bring_up(draft, networks, admission)
    _gate(draft)
    return _finish(record, draft)


def _profile(d: Draft) -> tuple[ProfileLine, ...]:
    """What the kernel says of the running domain's threads and memory."""
    domain, seen = d.domain, d.observed
    applied = from_metadata(domain.record) if domain is not None and d.active and domain.pid else None
    if domain is None or applied is None or d.settings.realtime == "off":
        return ()
    claim = applied.placement.claim
    functions = len(claim.vfs) + len(claim.devices) + len(claim.gpus) + len(claim.shares)
    limits = memory_limits(max(applied.memory_mib, claim.memory_max_mib), functions, locked=claim.realtime)
    isolated = seen.machine.topology.isolated - seen.machine.partitionable
    for partition in seen.partitions.get(domain.pid, ()):
        isolated |= partition.isolated
    read = Seen(seen.affinities.get(domain.pid), seen.processes.get(domain.pid), isolated=isolated)
    return instance_lines(claim, read, d.pool.rest(claim), domain.pid, limits.lock_mib)


def _settle(d: Draft) -> None:
    """Bring the memory up to what is seen: starts, ends, reboots of the host, voided stops."""
    r = d.record
    boot_id = d.observed.machine.boot_id
    if r.failure and r.failure.permanent and r.failure.generation != r.desired.generation:
        r = replace(r, failure=None)
    if d.active:
        if r.started is None or r.started.boot_id != boot_id:
            r = replace(r, started=Started(boot_id, d.now), starts=r.starts + 1, exited_s=0.0)
        voided = not r.removed and r.desired.run is Run.STARTED and r.stop_since_s and not orders.wants_it_down(r)
        if voided and d.now - r.stop_since_s >= d.grace_s:
            r = replace(r, stop_since_s=0.0, stop_asked_s=0.0, stop_heard=False)
    elif (started := r.started) is not None:
        if started.boot_id != boot_id:
            d.note("HostRebooted", "the host was rebooted")
            r = replace(r, exits=0, exited_s=0.0, failure=None)
        elif moving.leaves(r):
            d.note("Left", "the domain has left this host")
        elif not r.stop_since_s and not r.removed and r.desired.run is Run.STARTED:
            ran_s = d.now - started.at_s
            r = replace(r, exits=1 if ran_s >= d.settings.stable_s else r.exits + 1, exited_s=d.now)
            word = "vanished" if d.domain is None else "ended by itself"
            d.note("Exited", f"the domain {word} after {ran_s:.0f} s; {_after_exit(r)}", "Warning")
        else:
            r = replace(r, exits=0, exited_s=0.0)
            d.note("Stopped", "the domain has ended")
        r = replace(r, started=None, stop_since_s=0.0, stop_asked_s=0.0, stop_heard=False)
    elif r.stop_since_s:
        r = replace(r, stop_since_s=0.0, stop_asked_s=0.0, stop_heard=False)
    d.record = r


def _after_exit(r: InstanceRecord) -> str:
    if r.desired.on_crash == "leave":
        return "it is left off"
    return "it is given up" if 0 < r.desired.crash_limit <= r.exits else "it is started again"


def _power_off(d: Draft, reason: str) -> bool:
    """Actions that end the domain, politely first. True where it is down, or will be after the actions planned."""
    domain, r = d.domain, d.record
    if domain is None or domain.phase is DomainPhase.SHUT_OFF:
        return True
    if domain.phase is DomainPhase.CRASHED:
        d.actions.append(act.Destroy(r.uid, "it crashed"))
        return True
    if moving.arrives(r):
        # Frozen, and still another host's: to be asked to power off it would have to run.
        d.actions.append(act.Destroy(r.uid, reason))
        return True
    since_s = r.stop_since_s or d.now
    ends_s = since_s + d.grace_s
    if d.now >= ends_s or (domain.phase is DomainPhase.PAUSED and not domain.frozen):
        why = "a paused guest cannot power off" if d.now < ends_s else f"no power-off in {d.grace_s:.0f} s"
        d.actions.append(act.Destroy(r.uid, f"{reason}; {why}"))
        d.record = replace(r, stop_since_s=since_s)
        return True
    d.record = replace(r, stop_since_s=since_s)
    if domain.phase is DomainPhase.PAUSED:
        d.actions.append(act.Resume(r.uid, "a frozen guest cannot power off"))
    if domain.phase is DomainPhase.RUNNING and domain.channel_path and r.uid not in d.observed.attached:
        # an agent that has just begun: the helper hears what a guest without ACPI does not
        d.actions.append(act.AttachGuest(r.uid, domain.channel_path, "to ask its helper"))
    # A guest that came up since then is asked at once: it did not hear what it was asked while it booted.
    due = d.now - r.stop_asked_s >= d.settings.stop_ask_again_s or (d.guest.connected and not r.stop_heard)
    if domain.phase is DomainPhase.RUNNING and due:
        d.actions.append(act.Shutdown(r.uid, d.guest.connected, reason))
    d.wake(min(ends_s, max(r.stop_asked_s, d.now) + d.settings.stop_ask_again_s))
    return False


def _end(d: Draft) -> None:
    """The instance is no longer wanted here: end it, take away all that was made for it, then forget it."""
    uid = d.record.uid
    reason = "no longer wanted on this host"
    d.says(Phase.DELETING)
    was_active = d.active
    if not _power_off(d, reason):
        return
    if was_active and uid in d.observed.attached:
        d.actions.append(act.DetachGuest(uid, reason))
    if d.domain is not None:
        d.actions.append(act.Undefine(uid, reason))
    files, networks, functions = d.observed.files, d.observed.networks, d.observed.functions
    if files is None or networks is None or functions is None or d.observed.shares is None:
        # without seeing what is left, the record stays: it is what finds the rest again
        silent = [port for port in ("images", "networks", "functions", "shares") if port in d.observed.silent]
        d.says(Phase.DELETING, "Waiting", f"no answer from {' and '.join(silent) or 'the host'}")
        return
    _give_back(d, None, reason)
    if d.observed.guarded.get(uid):
        d.actions.append(act.Unguard(uid, reason))
    if uid in files.overlays or uid in files.seeds:
        d.actions.append(act.RemoveFiles(uid, reason))
    d.actions.append(act.ForgetClaim(uid, "nothing of it is left"))


def _stop(d: Draft) -> None:
    """The instance should not run; its disk, seed and domain stay."""
    if _power_off(d, "run: stopped") and not d.actions:
        # What a former placement gave is somebody else's by now.
        _give_back(d, grant_of(d.record.desired), "given by a former placement")
        d.says(Phase.STOPPED)
    else:
        d.says(Phase.STOPPING)


def _freeze(d: Draft, networks: Mapping[str, HostNetwork]) -> None:
    """The domain runs and should be frozen where it stands."""
    assert d.domain is not None
    _keep_network(d, networks)
    if d.domain.phase is DomainPhase.PAUSED:
        d.says(Phase.PAUSED)
        return
    d.says(Phase.RUNNING, "Pausing")
    if d.domain.phase is DomainPhase.RUNNING:
        d.actions.append(act.Suspend(d.record.uid, "run: paused"))


def _give_back(d: Draft, keep: Grant | None, reason: str) -> None:
    """Plan to take back what the instance holds beside ``keep``. Its domain must be down, or down before this is done."""
    claim = d.record.desired.placement.claim if keep is not None else None
    if ids := to_take(d.record.uid, claim, d.observed.shares or {}):
        d.actions.append(act.TakeShares(d.record.uid, ids, reason))
    if d.observed.functions is None:
        return
    found = to_give_back(d.record.uid, keep, d.observed.functions)
    if found is not None:
        d.actions.append(act.TakeBack(d.record.uid, *found, reason))


def _keep_functions(d: Draft, applied: DesiredInstance) -> None:
    """Virtual functions of a running instance that somebody changed: drift, and made again as they were given. A slice that
    is gone is said only: its guest has lost a device, which comes again with its next start."""
    if d.observed.shares is not None:
        d.drift += [
            f"{line} ({d.record.uid})" for line in lost(d.record.uid, applied.placement.claim, d.observed.shares)
        ]
    grant = grant_of(applied)
    if not grant or d.observed.functions is None:
        return
    if told := drifted(grant, d.observed.functions):
        d.drift += [f"{line} ({d.record.uid})" for line in told]
        for line in told:
            # Put right within the second: the event is what stays of it.
            reason, _, what = line.partition(": ")
            d.note(reason, what, "Warning")
        if not missing(grant, d.observed.functions):
            d.actions.append(act.GiveFunctions(applied, "somebody changed them"))


def _keep(d: Draft, networks: Mapping[str, HostNetwork]) -> None:
    """The domain runs and should: keep its connection, its guard and its pods as they should be."""
    domain, r, guest = d.domain, d.record, d.guest
    assert domain is not None
    desired = r.desired
    if domain.phase is DomainPhase.SHUTTING_DOWN:
        d.says(Phase.STOPPING, "GuestPowersOff", "the guest is powering off; it is started again when it has")
        return
    _keep_network(d, networks)
    if domain.channel_path and r.uid not in d.observed.attached:
        d.actions.append(act.AttachGuest(r.uid, domain.channel_path, "its domain runs"))
    applied = from_metadata(domain.record)
    if applied is None:
        d.drift.append(f"MetadataUnreadable: domain {domain.name}: its record cannot be read; it is left as it is")
    else:
        _keep_functions(d, applied)
        attaching.keep(d, applied)
    wanted = pods_revision(desired)
    if r.adopted:
        wanted = guest.revision  # rebuilt from a domain, which does not say which pods: the guest knows, and goes on
    elif lacks_text(tuple(desired.pods), desired.secrets):
        wanted = guest.revision  # the manager is asked for them; meanwhile the guest goes on with what it has
        d.drift.append(f"SecretsMissing: texts of secrets of {desired.name} are not on this host")
    if guest.connected and guest.revision != wanted:
        d.actions.append(act.ApplyPods(desired, wanted, "the guest works on another pod set"))
    if domain.phase is DomainPhase.PAUSED and domain.frozen:
        sets = partitions.wanted_of(domain, d.observed)
        if sets and partitions.lost(sets, d.observed.partitions.get(domain.pid, ())):
            d.actions.append(act.Isolate(r.uid, sets, "before its guest runs"))
        d.actions.append(act.Resume(r.uid, "run: started"))
        d.says(Phase.STARTING if sets and not guest.boot_id else Phase.RUNNING, "Resuming")
    elif domain.phase is DomainPhase.PAUSED:
        d.says(Phase.FAILED, "Paused", "the hypervisor has paused the guest, as it does when a disk is full or fails")
    elif (
        not guest.connected
        and not guest.boot_id
        and Phase(r.phase or Phase.UNKNOWN) not in (Phase.RUNNING, Phase.READY)
    ):
        d.says(Phase.STARTING, "GuestBooting")
        if domain.pid not in d.observed.kernels:
            d.wake(d.now + KERNEL_S)  # until it is seen at work: then the helper tells the rest by itself
    elif not guest.connected:
        d.says(Phase.RUNNING, "GuestSilent", "the guest's helper is not connected")
    elif guest.revision != wanted:
        d.says(Phase.RUNNING, "ApplyingPods")
    else:
        waiting = [pod.name for pod in guest.pods if not pod.ready]
        missing = 0 if r.adopted else len(desired.pods) - len(guest.pods)
        if waiting or missing > 0:
            d.says(Phase.RUNNING, "PodsNotReady", f"waiting for {', '.join(waiting[:5]) or f'{missing} pods'}")
        else:
            d.says(Phase.READY)
    if applied is not None and not r.adopted and domain_digest(applied) != domain_digest(desired) and not d.reason:
        d.reason, d.message = "RestartPending", "changes wait for the next stop and start"


def _keep_network(d: Draft, networks: Mapping[str, HostNetwork]) -> None:
    """Bridges and guards of a running instance; where they are gone someone else took them: drift, and made again."""
    seen = d.observed.networks
    nics = bridged(d.record.desired.nics)
    if seen is None or not nics:
        return
    for name in sorted({nic.network for nic in nics} - set(seen.bridges)):
        if name in networks:
            d.drift.append(f"NetworkMissing: bridge of network {name} is gone while instances run on it")
            d.actions.append(act.EnsureNetwork(networks[name], "its bridge is gone"))
    guarded = len(d.observed.guarded.get(d.record.uid, ()))
    if guarded < len(nics):
        d.drift.append(f"GuardMissing: {d.record.uid}: {guarded} of {len(nics)} taps have their rules")
        d.actions.append(act.Guard(d.record.desired, "rules of its taps are gone"))
        return
    for tap, nic in zip(d.observed.guarded[d.record.uid], nics, strict=True):
        bridge, found = seen.bridges.get(nic.network, ""), seen.plugged.get(tap)
        if found is not None and bridge and found != bridge:
            told = f"{tap} is on {found or 'no bridge'}, should be on {bridge}"
            d.drift.append(f"TapMoved: {told} ({d.record.uid})")
            d.note("TapMoved", told, "Warning")
            d.actions.append(act.Plug(d.record.uid, tap, nic.network, "somebody took it off its bridge"))


def _bring_up(d: Draft, networks: Mapping[str, HostNetwork], admission: Admission | None) -> None:
    """The instance should run and does not: check its claim, prepare, define, start."""
    r, desired, seen = d.record, d.record.desired, d.observed
    d.says(Phase.PREPARING)
    if not _hold_claim(d, admission):
        return
    r = d.record
    if desired.virtualisation is Virtualisation.REQUIRE and seen.virtualisation == "tcg":
        d.says(
            Phase.FAILED, "VirtualisationUnavailable", "virtualisation: require, and KVM runs no guests on this host"
        )
        return
    if r.exits and desired.on_crash == "leave":
        d.says(Phase.FAILED, "Left", "it ended by itself, and onCrash: leave; restart starts it again")
        return
    if r.exits and 0 < desired.crash_limit <= r.exits:
        d.says(Phase.FAILED, "GivenUp", f"it ended by itself {r.exits} times in a row; restart starts it again")
        return
    if r.exits:
        again_s = r.exited_s + delay_s(r.exits, r.uid, d.settings.backoff_base_s, d.settings.backoff_cap_s)
        if d.now < again_s:
            d.wake(again_s)
            worn = r.exits >= d.settings.failed_after
            message = f"ended by itself {r.exits} times in a row; started again in {again_s - d.now:.0f} s"
            d.says(Phase.FAILED if worn else Phase.STARTING, "BackOff", message)
            return
    files, nets, grant = seen.files, seen.networks, grant_of(desired)
    if files is None or nets is None or (grant and seen.functions is None):
        port = "images" if files is None else "networks" if nets is None else "functions"
        d.says(Phase.PREPARING, "Waiting", f"{port}: {seen.silent.get(port, 'no answer')}")
        return
    if seen.functions is not None and (gone := missing(grant, seen.functions)):
        known = "; ".join(seen.machine.problems) or "the agent's settings name its port or device"
        d.says(Phase.FAILED, "FunctionMissing", f"{', '.join(gone)}: not on this host now ({known})")
        return
    gpus = desired.placement.claim.gpus
    if why := unserved(desired.placement.claim, seen.switches):
        d.says(Phase.FAILED, "GpuUnserved", why)
        return
    slices = desired.placement.claim.shares
    if slices and seen.shares is None:
        d.says(Phase.PREPARING, "Waiting", f"shares: {seen.silent.get('shares', 'no answer')}")
        return
    waiting = not_clean(r.uid, gpus, d.gpus)
    if waiting := (*waiting, *not_ready(r.uid, desired.placement.claim, d.gpus, seen.shares or {})):
        d.says(Phase.PREPARING, "GpuNotClean", "; ".join(waiting[:4]))
        return
    nics = bridged(desired.nics)
    unknown = sorted({nic.network for nic in nics} - set(nets.bridges) - set(networks))
    if unknown:
        d.says(Phase.PREPARING, "NetworkUnknown", f"network {unknown[0]} is not yet described to this host")
        return
    if not attaching.prepare(d):
        return
    for image in (desired.image, *desired.archives):
        if image.file.digest not in files.images:
            d.actions.append(act.FetchImage(image, "not in the store"))
    for name in sorted({nic.network for nic in nics} - set(nets.bridges)):
        d.actions.append(act.EnsureNetwork(networks[name], "its bridge is not there"))
    domain = d.domain
    if domain is not None and domain.phase is DomainPhase.CRASHED:
        d.actions.append(act.Destroy(r.uid, "it crashed"))
    claim = desired.placement.claim
    rest = d.pool.defined(claim)
    current = domain is not None and from_metadata(domain.record) == bare(desired)
    pinned = domain is not None and domain.emulator_pin == rest
    disks = files.disks_of(r.uid)
    if desired.disk not in disks:
        d.actions.append(act.CreateOverlay(desired, "a new disk was asked for" if disks else "not there"))
    if r.uid not in files.seeds or not current:
        d.actions.append(
            act.WriteSeed(desired, "not there" if r.uid not in files.seeds else "the instance was changed")
        )
    if len(seen.guarded.get(r.uid, ())) < len(nics) or (nics and not current):
        d.actions.append(act.Guard(desired, "before its taps exist"))
    _give_back(d, grant, "given by a former placement")
    if grant:
        d.actions.append(act.GiveFunctions(desired, "before its domain starts"))
    if gpus:
        d.actions.append(act.PrepareGpus(desired, "before its domain starts"))
    if slices:
        d.actions.append(act.GiveShares(desired, "before its domain starts"))
    # Functions may be at other addresses than when the domain was defined: it is defined anew at each start.
    if not current or not pinned or grant or gpus or slices:
        d.actions.append(act.Define(desired, _why_defined(d, rest), rest))
    elif not d.actions:
        d.says(Phase.STARTING)
    if set(disks) - {desired.disk}:
        # After the domain names the new one, and before it writes to it.
        d.actions.append(act.RemoveDisks(desired, "another disk has taken its place"))
    if held := d.pool.hold(r.uid, claim, seen):
        # Everything but the start: its threads must be its own before.
        d.says(Phase.PREPARING, "ThreadsInUse", held)
        d.wake(d.now + HELD_S)
        return
    if gpus:
        # The last thing before: from here on they are dirty.
        d.actions.append(act.AttachGpus(r.uid, gpus, "its domain starts"))
    sets = partitions.wanted(claim, seen.machine.topology, seen.machine.partitionable)
    floats = EMPTY if claim.emulator else d.pool.floating(claim)
    d.actions.append(act.Start(r.uid, "run: started", floats, frozen=bool(sets)))
    if sets:
        d.actions.append(act.Isolate(r.uid, sets, "before its guest runs"))
        d.actions.append(act.Resume(r.uid, "its vCPUs are isolated"))


def _why_defined(d: Draft, rest: CpuSet) -> str:
    if d.domain is None:
        return "not defined"
    return "the instance was changed" if d.domain.emulator_pin == rest else "the pool of shared threads has changed"


def _hold_claim(d: Draft, admission: Admission | None) -> bool:
    """Put the placement's claim in the record, if the host can carry it out. False where it is refused."""
    r, placement = d.record, d.record.desired.placement
    if admission is None:
        return r.claim is not None
    if not admission.problems:
        d.record = replace(
            r,
            claim=admission.claim,
            claim_epoch=placement.epoch,
            claim_generation=placement.generation,
            refusal=None,
        )
        return True
    message = "; ".join(admission.problems[:8])
    d.drift.append(f"PlacementRefused: {r.uid}: {message}")
    refusal = Refusal(placement.epoch, placement.generation, message)
    if r.refusal != refusal:
        d.note("PlacementRefused", message, "Warning")
    d.record = replace(r, refusal=refusal)
    d.says(Phase.FAILED, "PlacementRefused", message)
    return False


def _gate(d: Draft) -> None:
    """Hold back the action that failed last, and all after it, until its back-off is over."""
    failure = d.record.failure
    if failure is None:
        return
    names = [act.name(a) for a in d.actions]
    if failure.action not in names:
        if d.now - failure.at_s >= d.settings.backoff_cap_s:
            d.record = replace(d.record, failure=None)
        return
    worn = failure.permanent or failure.count >= d.settings.failed_after
    base_s = d.settings.backoff_cap_s / 4 if failure.permanent else d.settings.backoff_base_s
    again_s = failure.at_s + delay_s(failure.count, d.record.uid, base_s, d.settings.backoff_cap_s)
    if d.now < again_s:
        del d.actions[names.index(failure.action) :]
        d.wake(again_s)
    coming_up = d.phase in (Phase.PREPARING, Phase.STARTING) and not d.active
    d.says(Phase.FAILED if worn and coming_up else d.phase, failure.reason, f"{failure.action}: {failure.message}")


def _finish(base: InstanceRecord, d: Draft) -> InstancePlan:
    r = d.record
    if r.phase != d.phase.value:
        r = replace(r, phase=d.phase.value, phase_since_s=d.now)
    intent = Intent(tuple(map(act.name, d.actions)), d.now) if d.actions else None
    if intent is None or r.intent is None or intent.actions != r.intent.actions:
        r = replace(r, intent=intent)
    domain, guest, placement = d.domain, d.guest, r.desired.placement
    state = InstanceState(
        uid=r.uid,
        generation=r.desired.generation,
        phase=d.phase,
        reason=d.reason,
        message=d.message,
        virtualisation=d.observed.virtualisation,
        guest_boot_id=guest.boot_id,
        pid=domain.pid if domain is not None and d.active else 0,
        starts=r.starts,
        since_s=r.phase_since_s,
        guest_ready=guest.connected,
        cloud_init=guest.cloud_init,
        pods=guest.pods if d.active else (),
        placement_epoch=placement.epoch,
        placement_generation=placement.generation,
        claim=r.claim,
        order=orders.state(r.order, r.certificate, d.observed.passages.get(r.uid)) if r.order is not None else None,
        cloud_init_message=guest.cloud_init_message,
        kernel=domain is not None and domain.pid in d.observed.kernels,
        profile=d.profile,
        certificate=_certificate(d),
    )
    return InstancePlan(base, r, state, tuple(d.actions), d.wake_s, tuple(d.notes), tuple(d.drift), d.measure, d.move)


def _certificate(d: Draft) -> Certificate | None:
    """The last certificate, with what has made it void since; a domain that is off is another one when it runs again."""
    r = d.record
    if r.certificate is None:
        return None
    placement, kernel = r.desired.placement, d.observed.machine.kernel
    why = void(r.certificate, placement.epoch, placement.generation, kernel, d.profile) if d.active else ""
    return replace(r.certificate, void=why)


@dataclass(frozen=True, slots=True)
class ActionOutcome:
    """How one action ended: ``reason`` is empty where it was done."""

    uid: str
    action: Action
    at_s: float
    took_s: float = 0.0
    reason: str = ""
    message: str = ""
    #: Asking the same again will fail again.
    permanent: bool = False
    #: Given up because what is wanted changed; neither done nor failed.
    interrupted: bool = False
    #: What a measurement has measured.
    result: Certificate | None = None

    @property
    def ok(self) -> bool:
        return not self.reason


def remember(record: InstanceRecord, outcomes: tuple[ActionOutcome, ...], boot_id: str) -> InstanceRecord:
    """The record after actions ended. Only what a later look at the machine cannot tell is kept; of what failed side by side
    the first in the plan, for that holds the others back."""
    r, failed = replace(record, intent=None), False
    for outcome in outcomes:
        kind = act.name(outcome.action)
        if outcome.interrupted:
            continue
        if isinstance(outcome.action, act.Reboot | act.Reset):
            r = orders.acted(r, outcome.action.order, outcome.at_s, outcome.reason, outcome.message)
        elif isinstance(outcome.action, act.Transfer):
            asked = outcome.action.desired.order
            if asked is not None:
                r = moving.sent(r, asked.uid, outcome.at_s, outcome.reason, outcome.message)
        elif isinstance(outcome.action, act.Certify):
            r = orders.measured(r, outcome.action.order, outcome.at_s, outcome.result, outcome.reason, outcome.message)
        elif outcome.ok:
            if r.failure is not None and r.failure.action == kind:
                r = replace(r, failure=None)
            if isinstance(outcome.action, act.Shutdown):
                r = replace(r, stop_asked_s=outcome.at_s, stop_heard=outcome.action.helper)
            elif isinstance(outcome.action, act.Start):
                r = replace(
                    r,
                    started=Started(boot_id, outcome.at_s),
                    starts=r.starts + 1,
                    stop_since_s=0.0,
                    stop_asked_s=0.0,
                    stop_heard=False,
                )
        elif not failed:
            failed = True
            count = r.failure.count + 1 if r.failure is not None and r.failure.action == kind else 1
            failure = Failure(
                kind, count, outcome.at_s, outcome.reason, outcome.message, outcome.permanent, r.desired.generation
            )
            r = replace(r, failure=failure)
    return r
