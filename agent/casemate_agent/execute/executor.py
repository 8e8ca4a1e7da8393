"""Carries out plans.

What may live here: one call of a driver for each kind of action, deadlines, and the order of durable writes around them.
What to do is decided in :mod:`casemate_agent.plan.reconcile`.

Theory of operation. Each instance has at most one job at a time; jobs of different instances run side by side, within a
bound. A job writes the record with its intent (durable), then runs its actions in order up to the first that fails, then
writes what must be remembered of the outcomes. An action ends as an outcome, never as a lost exception: what a driver
raises becomes a failure with its reason; a driver that neither answers nor raises is given up at its deadline, its effect
unknown, to be seen by the next observation.

Every step is told to ``trace`` before and after it is made: the log hangs there, and whatever else wants to follow an
agent step by step. An exception of ``trace`` is not caught.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from casemate_agent import actions as act
from casemate_agent.actions import Action
from casemate_agent.drivers.passageports import NoPassage, Passages
from casemate_agent.drivers.ports import Drivers
from casemate_agent.execute.fabrickeeper import FabricNotReady
from casemate_agent.execute.gpuwork import GpuWork
from casemate_agent.execute.measure import measure
from casemate_agent.gpu.planning import KEY
from casemate_agent.gpu.readings import GpuFault
from casemate_agent.gpu.records import GpuPolicy
from casemate_agent.hardware.functions import grant_of
from casemate_agent.ledger.store import Ledger
from casemate_agent.plan.converge import ActionOutcome, InstancePlan, remember
from casemate_core.cpuset import EMPTY
from casemate_core.errors import CallerError, CasemateError, DeadlineExceeded
from casemate_core.spec.instance import bridged
from casemate_core.spec.realtime import Certificate
from casemate_core.spec.secret import resolved

log = logging.getLogger("casemate.agent.execute")


class Point(StrEnum):
    """Points of execution, in the order in which a job passes them."""

    BEFORE_INTENT = "before-intent"
    AFTER_INTENT = "after-intent"
    BEFORE_ACTION = "before-action"
    AFTER_ACTION = "after-action"
    #: A step of the ladder that a GPU climbs.
    BEFORE_RUNG = "before-rung"
    AFTER_RUNG = "after-rung"
    BEFORE_OUTCOME = "before-outcome"
    AFTER_OUTCOME = "after-outcome"


@dataclass(frozen=True, slots=True)
class Step:
    """Where a job is. ``action`` is None at the points of the record."""

    point: Point
    uid: str
    action: Action | None = None
    outcome: ActionOutcome | None = None


Trace = Callable[[Step], None]


def log_steps(step: Step) -> None:
    """The default trace: failures as warnings, what was done as info, the rest as debug."""
    outcome, action = step.outcome, step.action
    if action is None:
        log.debug("%s %s", step.point.value, step.uid or "host")
        return
    extra = {"instance": step.uid, "action": act.name(action), "step": step.point.value}
    if outcome is None:
        log.debug("%s %s: %s", act.name(action), step.uid or "host", action.reason, extra=extra)
    elif outcome.interrupted:
        log.info("%s %s interrupted", act.name(action), step.uid, extra=extra)
    elif outcome.ok:
        log.info(
            "%s %s done in %.3f s: %s", act.name(action), step.uid or "host", outcome.took_s, action.reason, extra=extra
        )
    else:
        log.warning(
            "%s %s failed: %s: %s", act.name(action), step.uid or "host", outcome.reason, outcome.message, extra=extra
        )


#: Deadlines by kind of action, in seconds. The default is for calls that only touch this host's memory and small files.
DEADLINES_S: dict[type, float] = {
    act.FetchImage: 3600.0,
    act.ApplyPods: 900.0,
    act.Start: 120.0,
    act.CreateOverlay: 120.0,
    act.RemoveFiles: 120.0,
    act.RemoveStrays: 120.0,
    act.CreateVolume: 120.0,
    act.RemoveVolume: 120.0,
    act.GiveFunctions: 60.0,
    act.TakeBack: 60.0,
    act.PrepareGpus: 300.0,
    act.GiveShares: 120.0,
    act.TakeShares: 120.0,
    # all of its rungs at their own limits, one after the other
    act.SanitiseGpu: 3600.0,
    **dict.fromkeys(
        (act.EnrolGpu, act.UnprepareGpu, act.ReturnGpu, act.QuarantineGpu, act.ClearGpu, act.KeepGpu, act.LoseGpu),
        120.0,
    ),
}
DEADLINE_S = 30.0
#: A job without a record that failed is not begun again before.
BARE_RETRY_S = 5.0

#: What a measurement is called that goes on beside an instance's job.
MEASURE = "measure"
#: And a transfer to another host.
MOVE = "move"

#: Actions that are given up when what is wanted of their instance changes: they can be long, and can be left half done.
INTERRUPTIBLE = (act.FetchImage, act.ApplyPods)


class Executor:
    """Runs jobs for one host. ``now`` is the wall clock; ``done`` is called with the outcomes of each job as it ends."""

    def __init__(
        self,
        drivers: Drivers,
        ledger: Ledger,
        now: Callable[[], float],
        done: Callable[[str, tuple[ActionOutcome, ...]], None],
        trace: Trace = log_steps,
        concurrency: int = 16,
        gpu_policy: GpuPolicy | None = None,
        gpu_faults: Iterable[GpuFault] = (),
        gpu_forget: Callable[[str], None] = lambda uuid: None,
    ) -> None:
        self._drivers = drivers
        self._gpus = GpuWork(drivers, ledger, now, gpu_policy or GpuPolicy(), gpu_faults, self._rung, gpu_forget)
        self._ledger = ledger
        self._now = now
        self._done = done
        self._trace = trace
        self._slots = asyncio.Semaphore(concurrency)
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._running: dict[str, list[Action]] = {}
        self._interrupted: set[str] = set()
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._waiting: dict[str, int] = {}
        self._network_lock = asyncio.Lock()
        self._begun: set[str] = set()
        #: Threads that have an owner, of the plan that is carried out: nothing starts that would float on one of them.
        self.in_use = EMPTY
        #: By uid: what its threads were bound to last.
        self.pinned: dict[str, act.Pin] = {}
        #: Files that the kernel refused to have written.
        self.refused: set[str] = set()
        #: By uid: why it is not started now, by those who prepare what it was promised.
        self.withheld: dict[str, str] = {}

    @property
    def busy(self) -> frozenset[str]:
        """Who has a job."""
        return frozenset(self._jobs)

    def may_have_started(self, uid: str) -> bool:
        """Whether a job that this instance had when somebody looked may have started its domain since: it has ended, or has come
        to the start."""
        return uid not in self._jobs or uid in self._begun

    def running(self, uid: str) -> Action | None:
        """The action that is under way for an instance."""
        return next(iter(self._running.get(uid, ())), None)

    def start(self, group: asyncio.TaskGroup, plan: InstancePlan, boot_id: str) -> None:
        """Begin the job of an instance's plan, unless there is nothing to do or to write."""
        uid = plan.base.uid
        if uid in self._jobs or (not plan.actions and plan.record == plan.base):
            return
        self._begin(group, uid, self._run_plan(plan, boot_id))

    def give_up(self, beside: str, uid: str) -> None:
        """What is done beside the instance's own job is no longer wanted."""
        job = self._jobs.get(f"{beside}/{uid}")
        if job is not None:
            job.cancel()

    def beside(self, what: str) -> frozenset[str]:
        """Instances of which something of this name (MEASURE, MOVE) is done beside their own jobs."""
        return frozenset(key.partition("/")[2] for key in self._jobs if key.startswith(f"{what}/"))

    def start_bare(self, group: asyncio.TaskGroup, uid: str, actions: tuple[Action, ...], beside: str = "") -> None:
        """Begin a job that has no record: leftovers (by the uid that names them), or the host's own (``HOST``). ``beside``
        names one that is done beside the instance's own job."""
        key = f"{beside}/{uid}" if beside else uid
        if key not in self._jobs and actions:
            self._begin(group, key, self._run_bare(key, uid, actions))

    def interrupt(self, uid: str) -> None:
        """What is wanted of the instance changed: give up an action that would hold it up for long."""
        if isinstance(self.running(uid), INTERRUPTIBLE) and uid not in self._interrupted:
            self._interrupted.add(uid)
            self._jobs[uid].cancel()

    def _rung(self, before: bool, uuid: str, action: Action) -> None:
        self._trace(Step(Point.BEFORE_RUNG if before else Point.AFTER_RUNG, f"{KEY}{uuid}", action))

    def _begin(self, group: asyncio.TaskGroup, uid: str, job: Coroutine[Any, Any, None]) -> None:
        self._jobs[uid] = group.create_task(job, name=f"job-{uid or 'host'}")

    async def _run_plan(self, plan: InstancePlan, boot_id: str) -> None:
        uid = plan.base.uid
        outcomes: list[ActionOutcome] = []
        try:
            async with self._slots:
                self._trace(Step(Point.BEFORE_INTENT, uid))
                if not await self._ledger.save(plan.base, plan.record):
                    return  # it was changed since it was planned for
                self._trace(Step(Point.AFTER_INTENT, uid))
                await self._run_actions(uid, plan.actions, outcomes)
                if outcomes:
                    self._trace(Step(Point.BEFORE_OUTCOME, uid))
                    await self._ledger.amend(uid, lambda record: remember(record, tuple(outcomes), boot_id))
                    self._trace(Step(Point.AFTER_OUTCOME, uid))
        except CasemateError as error:
            # the ledger's disk: nothing was acknowledged, the next round tries again
            log.error("%s: %s", uid, error, extra={"instance": uid})
        finally:
            self._jobs.pop(uid, None)
            self._running.pop(uid, None)
            self._begun.discard(uid)
            self._done(uid, tuple(outcomes))

    async def _run_bare(self, key: str, uid: str, actions: tuple[Action, ...]) -> None:
        outcomes: list[ActionOutcome] = []
        # A measurement takes nothing of the host, and may take an hour, as a transfer may: they keep nobody from his turn.
        slot = nullcontext() if key.startswith((f"{MEASURE}/", f"{MOVE}/")) else self._slots
        try:
            async with slot:
                await self._run_actions(uid, actions, outcomes, key)
            for outcome in outcomes:
                if isinstance(outcome.action, act.Certify | act.Transfer):
                    await self._keep(outcome)
            if not all(outcome.ok for outcome in outcomes):
                self._done(uid, tuple(outcomes))
                outcomes = []
                await asyncio.sleep(BARE_RETRY_S)
        finally:
            self._jobs.pop(key, None)
            self._running.pop(key, None)
            self._done(uid, tuple(outcomes))

    async def _keep(self, outcome: ActionOutcome) -> None:
        try:
            await self._ledger.amend(outcome.uid, lambda record: remember(record, (outcome,), ""))
        except CasemateError as error:
            log.error("%s: %s", outcome.uid, error)  # the ledger's disk: it is measured again

    async def _run_actions(
        self, uid: str, actions: tuple[Action, ...], outcomes: list[ActionOutcome], key: str = ""
    ) -> None:
        """Carry actions out until one fails; ``outcomes`` has them in the order of the plan."""
        key = key or uid
        for stage in act.stages(actions):
            lanes: list[list[ActionOutcome]] = [[] for _ in stage]
            if len(stage) == 1:
                await self._run_lane(uid, stage[0], lanes[0], key)
            else:
                async with asyncio.TaskGroup() as group:
                    for lane, ended in zip(stage, lanes, strict=True):
                        group.create_task(self._run_lane(uid, lane, ended, key), name=f"job-{uid}-lane")
            outcomes += [outcome for ended in lanes for outcome in ended]
            if not all(ended and ended[-1].ok and not ended[-1].interrupted for ended in lanes):
                return

    async def _run_lane(self, uid: str, actions: list[Action], outcomes: list[ActionOutcome], key: str) -> None:
        for action in actions:
            self._trace(Step(Point.BEFORE_ACTION, uid, action))
            if isinstance(action, act.Start):
                if action.floats & self.in_use:
                    # Planned before these threads had an owner. What is to be done now follows from the next look.
                    outcomes.append(ActionOutcome(uid, action, self._now(), interrupted=True))
                    return
                self._begun.add(uid)
            self._running.setdefault(key, []).append(action)
            try:
                outcome = await self._attempt(uid, action)
            finally:
                self._running[key].remove(action)
                self._interrupted.discard(key)
            outcomes.append(outcome)
            self._trace(Step(Point.AFTER_ACTION, uid, action, outcome))
            if not outcome.ok or outcome.interrupted:
                return

    async def _attempt(self, uid: str, action: Action) -> ActionOutcome:
        """One action, to its outcome."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline_s = DEADLINES_S.get(type(action), DEADLINE_S)
        if isinstance(action, act.Certify):
            deadline_s += action.duration_s
        elif isinstance(action, act.Transfer) and action.desired.order is not None:
            deadline_s = max(1.0, action.desired.order.deadline_s - self._now())

        def ended(
            reason: str = "", message: str = "", *, permanent: bool = False, interrupted: bool = False
        ) -> ActionOutcome:
            return ActionOutcome(uid, action, self._now(), loop.time() - began, reason, message, permanent, interrupted)

        try:
            # a little longer than the driver's own deadline: this one is for a driver that does not keep it
            async with asyncio.timeout(deadline_s + 2):
                result = await self._act(action, deadline_s)
            return replace(ended(), result=result)
        except TimeoutError:
            return ended(DeadlineExceeded.reason, f"no end after {deadline_s:.0f} s; its effect is unknown")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if uid not in self._interrupted or task is None or task.uncancel() > 0:
                raise  # the agent ends
            return ended(interrupted=True)
        except CallerError as error:
            return ended(error.reason, str(error), permanent=True)
        except CasemateError as error:
            return ended(error.reason, str(error))
        except OSError as error:
            return ended("MachineFailed", f"{type(error).__name__}: {error}")
        except Exception as error:
            # a defect in a driver must not end the agent: it is told, and the action is tried again later
            log.exception("%s %s: defect", act.name(action), uid)
            return ended("Internal", f"{type(error).__name__}: {error}")

    async def _act(self, action: Action, deadline_s: float) -> Certificate | None:
        drivers = self._drivers
        hypervisor, images, networks, guests = drivers.hypervisor, drivers.images, drivers.networks, drivers.guests
        match action:
            case act.FetchImage():
                await self._fetch(action, deadline_s)
            case act.EnsureNetwork(network=network):
                async with self._network_lock:
                    await networks.ensure_network(network, deadline_s)
            case act.CreateOverlay(desired=desired):
                await images.create_overlay(desired.uid, desired.image, desired.disk_mib, deadline_s, desired.disk)
            case act.WriteSeed(desired=desired):
                await images.write_seed(desired, deadline_s)
            case act.Guard(desired=desired):
                async with self._network_lock:
                    await networks.guard(desired.uid, bridged(desired.nics), deadline_s)
            case act.Plug(tap=tap, network=network):
                async with self._network_lock:
                    await networks.plug(tap, network, deadline_s)
            case act.Define(desired=desired):
                # Given already: this asks where its functions are now, and has no other effect.
                grant = grant_of(desired)
                addresses = await drivers.functions.give(grant, deadline_s / 2) if grant else ()
                volumes = tuple(drivers.volumes.path(volume.uid) for volume in desired.volumes)
                gpus = await self._gpus.addresses(desired.placement.claim.gpus, deadline_s / 2)
                shares = await self._gpus.shares(desired, deadline_s / 2)
                given = (*addresses, *gpus, *(share.address for share in shares if share.address))
                mdevs = tuple(share.id for share in shares if not share.address)
                files = replace(images.files(desired), functions=given, mdevs=mdevs, rest=action.rest, volumes=volumes)
                await hypervisor.define(desired, files, deadline_s / 2)
            case act.Pin(uid=uid, vcpus=vcpus, rest=rest):
                await hypervisor.pin(uid, vcpus, rest, deadline_s)
                self.pinned[uid] = action
            case act.GiveFunctions(desired=desired):
                await drivers.functions.give(grant_of(desired), deadline_s)
            case act.TakeBack(stamp=stamp, keys=keys):
                await drivers.functions.take_back(stamp, keys, deadline_s)
            case act.PrepareGpus():
                await self._gpus.prepare(action)
            case act.GiveShares(desired=desired):
                await self._gpus.shares(desired, deadline_s)
            case act.TakeShares(shares=shares):
                for share in shares:
                    await drivers.shares.remove(share, deadline_s / len(shares))
            case act.AttachGpus():
                await self._gpus.attach(action)
            case act.Start(uid=uid):
                if reason := self.withheld.get(uid):
                    raise FabricNotReady(reason)
                await hypervisor.start(uid, deadline_s, frozen=action.frozen)
            case act.Isolate(uid=uid, sets=sets):
                pids = [d.pid for d in await hypervisor.domains(deadline_s / 2) if d.uuid == uid and d.pid]
                if pids:  # else it has ended meanwhile
                    await drivers.partitions.isolate(pids[0], sets, deadline_s / 2)
            case act.Reclaim(cpus=cpus):
                await drivers.partitions.reclaim(cpus, deadline_s)
            case act.AttachGuest(uid=uid, channel_path=path):
                await guests.attach(uid, path)
            case act.ApplyPods(desired=desired, revision=revision):
                # one that is isolated has none
                peers = {peer.name: peer.address for peer in desired.peers if peer.address}
                pods = tuple(resolved(pod, desired.secrets) for pod in desired.pods)
                await guests.apply(desired.uid, pods, len(desired.archives), revision, peers, deadline_s)
            case act.Shutdown():
                await self._shut_down(action, deadline_s)
            case act.Destroy(uid=uid):
                await hypervisor.destroy(uid, deadline_s)
            case act.Suspend(uid=uid):
                await hypervisor.suspend(uid, deadline_s)
            case act.Resume(uid=uid):
                await hypervisor.resume(uid, deadline_s)
            case act.Reboot(uid=uid):
                await guests.reboot(uid, deadline_s)
            case act.Reset(uid=uid):
                await hypervisor.reset(uid, deadline_s)
            case act.RemoveDisks(desired=desired):
                await images.remove_disks(desired.uid, desired.disk, deadline_s)
            case act.CreateVolume(volume=volume):
                await drivers.volumes.create(volume, deadline_s)
            case act.GrowVolume(uid=uid, volume=volume, live=True):
                path = drivers.volumes.path(volume.uid)
                await hypervisor.resize_disk(uid, path, volume.size_mib, deadline_s)
            case act.GrowVolume(volume=volume):
                await drivers.volumes.grow(volume, deadline_s)
            case act.RemoveVolume(uid=uid):
                await drivers.volumes.remove(uid, deadline_s)
            case act.Undefine(uid=uid):
                await hypervisor.undefine(uid, deadline_s)
            case act.DetachGuest(uid=uid):
                await guests.detach(uid)
            case act.Unguard(uid=uid):
                async with self._network_lock:
                    await networks.unguard(uid, deadline_s)
            case act.RemoveFiles(uid=uid):
                await images.remove_instance(uid, deadline_s)
            case act.ForgetClaim(uid=uid):
                await self._ledger.forget(uid)
            case act.RemoveStrays():
                await images.remove_strays(deadline_s)
            case act.RemoveImage(digest=digest):
                await images.remove_image(digest, deadline_s)
            case act.RemoveNetwork(name=name):
                async with self._network_lock:
                    await networks.remove_network(name, deadline_s)
            case act.Tune(path=path, text=text):
                try:
                    await drivers.tuning.write(path, text, deadline_s)
                except CasemateError:
                    self.refused.add(path)
                    raise
            case act.OpenPassage(desired=desired, rest=rest):
                files = replace(images.files(desired), rest=rest)
                await self._passages.open(desired, await hypervisor.expect(desired, files, deadline_s), deadline_s)
            case act.ClosePassage(uid=uid):
                await self._passages.close(uid)
            case act.Transfer(desired=desired):
                await self._passages.send(desired, deadline_s)
            case act.Certify():
                return await measure(guests, action, self._now, deadline_s)
            case _:
                await self._gpus.do(action)
        return None

    @property
    def _passages(self) -> Passages:
        if self._drivers.passages is None:
            raise NoPassage("this host takes part in no migrations: its agent's setting passage names no address")
        return self._drivers.passages

    async def _shut_down(self, action: act.Shutdown, deadline_s: float) -> None:
        if action.helper:
            try:
                await self._drivers.guests.shutdown(action.uid, deadline_s / 2)
                return
            except CasemateError as error:
                log.info("the helper of %s does not power off: %s; the power button is pressed", action.uid, error)
        await self._drivers.hypervisor.shutdown(action.uid, deadline_s / 2)

    async def _fetch(self, action: act.FetchImage, deadline_s: float) -> None:
        """One fetch a digest, however many instances wait for it; it goes on while any of them does."""
        digest = action.image.file.digest
        task = self._fetches.get(digest)
        if task is None:
            task = asyncio.create_task(
                self._drivers.images.fetch(action.image, deadline_s), name=f"fetch-{digest[:19]}"
            )
            self._fetches[digest] = task
            self._waiting[digest] = 0
        self._waiting[digest] += 1
        try:
            await asyncio.shield(task)
        finally:
            self._waiting[digest] -= 1
            if self._waiting[digest] == 0:
                del self._waiting[digest]
                if self._fetches.get(digest) is task:
                    del self._fetches[digest]
                if not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
