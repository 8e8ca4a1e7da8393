"""The agent of one host: observe → reconcile → execute → report, in one TaskGroup.

What may live here: the loop, what wakes it, and the feed of what it reports. No decisions, no gRPC.

Theory of operation. A round observes the machine, plans, and starts jobs; it does not wait for them. What ends a job, what
the hypervisor or a guest says, a change of what is desired, and a timer all wake the next round; wakes that come during a
round make one more round. While a driver hangs, its part of the machine is unknown and the rest goes on: the stream to
the manager is another task. What is to be reported is kept merged in a :class:`Feed`, so a manager that is away costs no
memory beyond one state for each instance.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, TypeVar

from casemate_agent import actions as act
from casemate_agent.causes import Causes, step_told
from casemate_agent.drivers.gpuports import GpuParts
from casemate_agent.drivers.ports import Drivers, GuestGone, GuestHello, GuestNote, GuestPods, MachineFacts
from casemate_agent.execute.executor import MEASURE, MOVE, Executor, Trace, log_steps
from casemate_agent.execute.fabrickeeper import withheld
from casemate_agent.execute.guestrun import gpus_in_guest
from casemate_agent.gpu.checks import FATAL_XIDS
from casemate_agent.gpu.guestside import GivenGpu
from casemate_agent.gpu.health import GpuHealth, Health, judge, with_figures
from casemate_agent.gpu.lifecycle import State
from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.readings import GpuFault, GpuReading
from casemate_agent.ledger.records import HOST, GuestView, Note, Observation
from casemate_agent.ledger.store import Ledger
from casemate_agent.metrics import families as metrics
from casemate_agent.observe import Observer
from casemate_agent.plan.changes import changes
from casemate_agent.plan.converge import ActionOutcome, Settings
from casemate_agent.plan.reconcile import Plan, plan
from casemate_agent.realtime.profile import patterns
from casemate_core.cpuset import EMPTY
from casemate_core.errors import CasemateError
from casemate_core.metrics import Meter
from casemate_core.spec.instance import InstanceState
from casemate_core.spec.views import Condition
from casemate_wire.session import Outbox
from casemate_wire.stream import Desired, HostEvent, HostReport, Outcome

log = logging.getLogger("casemate.agent")

T = TypeVar("T")

MAX_GPU_FAULTS = 256
"""XIDs that are kept for the judgement of health."""


POOL_DEADLINE_S = 60.0
GPU_READ_S = 10.0
GPU_FIGURES_S = 60.0
"""Between two tellings of a GPU's figures, unless its judgement is another one."""
GUEST_GPUS_S = 20.0
"""So long a guest has to say how its GPUs are: nvidia-smi takes seconds where nothing keeps its driver loaded."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often the loop looks without being woken, in seconds."""

    resync_s: float = 30.0
    #: Time between rounds on average, at the least, so that a talkative guest cannot keep the hypervisor busy.
    least_s: float = 0.05
    #: Rounds that may follow one another at once before that: what is asked of a quiet host does not wait.
    burst: int = 5
    retry_s: float = 5.0
    #: How exactly it is known when a guest wrote something to its console.
    serial_s: float = 5.0
    #: Between looks at the machine's own facts: what is plugged in or goes offline is named within five seconds.
    machine_s: float = 4.0
    #: Until GPUs that could not be heard are listened to again.
    gpus_s: float = 60.0
    #: Between looks at how GPUs are.
    gpu_health_s: float = 15.0


@dataclass(slots=True)
class Feed:
    """What is to be reported, merged: the last state of each instance, and who changed since someone listened last."""

    outbox: Outbox = field(default_factory=Outbox)
    states: dict[str, InstanceState] = field(default_factory=dict)
    report: HostReport = field(default_factory=HostReport)
    #: Changed since the listener took them.
    changed: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    report_changed: bool = False
    #: Everything that this host has is in ``states``. While it is not, the agent does not connect: what it said would be
    #: taken for all there is.
    whole: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def state(self, state: InstanceState) -> None:
        if self.states.get(state.uid) != state:
            self.states[state.uid] = state
            self.changed.add(state.uid)
            self.gone.discard(state.uid)
            self.news.set()

    def forget(self, uid: str) -> None:
        """The instance is gone from this host without a trace."""
        self.states.pop(uid, None)
        self.changed.discard(uid)
        self.gone.add(uid)
        self.news.set()

    def tell(self, report: HostReport) -> None:
        if self.report != report:
            self.report = report
            self.report_changed = True
            self.news.set()

    def note(self, note: HostEvent | Outcome) -> None:
        self.outbox.add(note)
        self.news.set()

    def take(self) -> tuple[list[InstanceState], list[str], HostReport | None]:
        """What changed since the last call."""
        states = [self.states[uid] for uid in sorted(self.changed) if uid in self.states]
        gone = sorted(self.gone)
        report = self.report if self.report_changed else None
        self.changed.clear()
        self.gone.clear()
        self.report_changed = False
        return states, gone, report


class Agent:
    """One host's agent. ``run`` it in a task; hand desired state to ``accept``; read ``feed``."""

    def __init__(
        self,
        name: str,
        drivers: Drivers,
        ledger: Ledger,
        now: Callable[[], float],
        settings: Settings | None = None,
        pace: Pace | None = None,
        trace: Trace = log_steps,
        concurrency: int = 16,
        meter: Meter | None = None,
    ) -> None:
        self.name = name
        self.drivers = drivers
        self.ledger = ledger
        self.feed = Feed()
        self.now = now
        #: What was counted since this process began.
        self.meter = meter or Meter.of(metrics.FAMILIES)
        #: Names of our domains on this host by uid, as they were last seen.
        self.domain_names: dict[str, str] = {}
        self._settings = settings or Settings()
        self._pace = pace or Pace()
        self._observer = Observer(drivers)
        #: What GPUs told of themselves; a board in trouble does so by the thousand.
        self.gpu_faults: deque[GpuFault] = deque(maxlen=MAX_GPU_FAULTS)
        #: How each GPU was judged last.
        self.gpu_health: dict[str, GpuHealth] = {}
        self._gpu_links: dict[str, tuple[LinkReading | None, float]] = {}
        #: What guests told of their GPUs last: the instance, its words, and when.
        self._guest_gpus: dict[str, tuple[str, GpuReading, float]] = {}
        self._executor = Executor(
            drivers,
            ledger,
            now,
            self._job_done,
            trace,
            concurrency,
            gpu_policy=self._settings.gpu,
            gpu_faults=self.gpu_faults,
            gpu_forget=self._forget_gpu,
        )
        self._guests: dict[str, GuestView] = {}
        #: Rounds that were done: whether the agent makes progress.
        self.rounds = 0
        self._wake = asyncio.Event()
        #: Rounds that may be made at once, and when that was worked out.
        self._rounds_left, self._counted_s = float(self._pace.burst), 0.0
        self._events = 0
        self._refused: dict[str, tuple[int, int]] = {}
        self._boot_id = ""
        self._pool_problem = ""
        self._plan: Plan | None = None
        self._moved: tuple[Note, ...] = ()
        #: Threads that must be quiet, processes with threads of their own; and a sign that they are others.
        self._quiet = EMPTY
        self._dedicated: tuple[int, ...] = ()
        self._tune = asyncio.Event()
        self.machine: MachineFacts | None = None
        self.virtualisation = ""
        #: What is doubtful about the manager's audit chain; empty where nothing is.
        self.doubt = ""
        self._causes = Causes(now)
        #: When the cleaning of what has no record failed last, by the uid that names it.
        self._failed_s: dict[str, float] = {}
        #: Set when the ledger lost something while a session was up: the manager must tell the whole state again.
        self.resync = asyncio.Event()

    async def accept(self, desired: Desired) -> None:
        """Make desired state durable, then act on it. Raises StaleEpoch, LedgerFailed."""
        changed = await self.ledger.accept(desired)
        self._causes.asked(desired.instances)
        for uid in desired.removed:
            if self.ledger.get(uid) is None:
                self.feed.forget(uid)  # it never was here, or is gone already: say so again
        for uid in changed:
            self._executor.interrupt(uid)
        self.wake()

    def wake(self) -> None:
        """Look again soon."""
        self._wake.set()

    def note(self, note: Note) -> None:
        """Report an event."""
        self._events += 1
        now_s = self.now()
        severity = logging.WARNING if note.severity == "Warning" else logging.INFO
        log.log(severity, "%s %s: %s", note.uid, note.reason, note.message, extra={"instance": note.uid})
        self.feed.note(
            HostEvent(
                id=f"{self.name}-{int(now_s * 1e6):x}-{self._events}",
                instance=note.uid,
                pod=note.pod,
                reason=note.reason,
                message=note.message[:1000],
                severity=note.severity,
                time_s=now_s,
                cause=self._causes.of(note.uid),
            )
        )

    async def run(self) -> None:
        """Until cancelled."""
        await self._cut_ports()
        await self._identify()
        async with asyncio.TaskGroup() as group:
            group.create_task(
                self._watch("hypervisor", self.drivers.hypervisor.events, self._domain_event), name="domains"
            )
            group.create_task(self._watch_machine(), name="machine")
            group.create_task(self._watch_tuning(), name="tuning")
            group.create_task(self._keep_serial_logs(), name="serial-logs")
            group.create_task(self._watch("guests", self.drivers.guests.events, self._guest_event), name="guests")
            group.create_task(self._watch_gpus(), name="gpus")
            group.create_task(self._judge_gpus(), name="gpu-health")
            group.create_task(self._ask_guests_of_gpus(), name="guest-gpus")
            while True:
                self._wake.clear()
                wake_s = await self._round(group)
                self.rounds += 1
                await self._pause(wake_s)

    async def _keep_serial_logs(self) -> None:
        """Hold what guests write to their consoles within bounds, and mark when they wrote it."""
        while True:
            try:
                await self.drivers.serials.keep(self._pace.resync_s)
            except (CasemateError, OSError) as error:
                log.warning("the logs of serial consoles are not kept: %s", error)
            except Exception:
                log.exception("the logs of serial consoles are not kept: defect")
            await asyncio.sleep(self._pace.serial_s)

    async def _identify(self) -> None:
        while True:
            try:
                self.machine = await self._observer.machine()
                self._boot_id = self.machine.boot_id
                return
            except (CasemateError, TimeoutError, OSError) as error:
                log.warning("the host's facts cannot be read, trying again: %s", error)
            except Exception:
                log.exception("the host's facts cannot be read, trying again: defect")
            await asyncio.sleep(self._pace.retry_s)

    async def _round(self, group: asyncio.TaskGroup) -> float:
        """One look and what follows from it; the time to look again at the latest (seconds since the epoch)."""
        busy, moving = self._executor.busy, self._executor.beside(MOVE)
        observed = await self._observer.observe(
            self.now(), self.ledger.book.instances, self._guests, busy, self.gpu_health
        )
        self.meter.add(metrics.ROUNDS)
        if observed.domains is not None:
            self.domain_names = {uid: domain.name for uid, domain in observed.domains.items()}
        self.virtualisation = observed.virtualisation
        self._compare(observed.machine)
        # Asked after the look and in one breath with the plan: what starts from here on knows whose threads are whose.
        jobs = {uid for uid in busy if uid != HOST and "/" not in uid}
        unsure = frozenset(filter(self._executor.may_have_started, jobs))
        pinned = {
            domain.pid: (pin.vcpus, pin.rest)
            for uid, domain in (observed.domains or {}).items()
            if (pin := self._executor.pinned.get(uid)) is not None
        }
        observed = replace(
            observed,
            switches=self.drivers.fabric is not None,
            moving=moving,
            passages=self.drivers.passages.opened() if self.drivers.passages is not None else {},
            unsure=unsure,
            pinned=pinned,
            refused=frozenset(self._executor.refused),
        )
        decided = plan(self.ledger.book, observed, self._settings, self._plan)
        self._plan = decided
        if decided.pool is not None:
            self._executor.in_use = decided.pool.in_use
            # Where nobody has threads of its own it does not matter where the others float; it is looked at once, for what an
            # agent before this one has left.
            self._observer.floating = bool(decided.pool.in_use or decided.pins)
        if decided.adopt:
            await self._adopt(decided)
            return 0.0
        self._report(decided, observed)
        if self.drivers.fabric is not None and observed.domains is not None:
            records = self.ledger.book.instances.values()
            self._executor.withheld = await withheld(self.drivers.fabric, records, observed.domains)
        for each in decided.instances.values():
            self._executor.start(group, each, self._boot_id)
        now_s = self.now()
        for uid, actions in decided.cleaning.items():
            # What failed is left alone for a while: a plan has no memory, and its end wakes the next round.
            if not 0 <= now_s - self._failed_s.get(uid, -inf) < self._pace.retry_s:
                self._executor.start_bare(group, uid, actions)
        self._failed_s = {uid: at_s for uid, at_s in self._failed_s.items() if uid in decided.cleaning}
        for uid, pin in decided.pins.items():
            self._executor.start_bare(group, uid, (pin,), "pin")
        for uid, isolate in decided.isolations.items():
            self._executor.start_bare(group, uid, (isolate,), "isolate")
        for tune in decided.tune:
            self._executor.start_bare(group, HOST, (tune,), tune.path)
        self._measure(group, decided)
        self._note_processes(decided, observed)
        for job, action in decided.gpus.items():
            self._executor.start_bare(group, job, (action,))
        self._executor.start_bare(group, HOST, decided.host)
        return decided.wake_s

    def _measure(self, group: asyncio.TaskGroup, decided: Plan) -> None:
        """Begin the measurements and transfers that are wanted, and give those up that no longer are."""
        for beside, wanted in (
            (MEASURE, {uid: each.measure for uid, each in decided.instances.items() if each.measure is not None}),
            (MOVE, {uid: each.move for uid, each in decided.instances.items() if each.move is not None}),
        ):
            for uid, action in wanted.items():
                self._executor.start_bare(group, uid, (action,), beside)
            for uid in self._executor.beside(beside):
                if uid in decided.instances and uid not in wanted:
                    self._executor.give_up(beside, uid)

    def _note_processes(self, decided: Plan, observed: Observation) -> None:
        """Whose process is looked into for the profile: that of each VM with threads of its own."""
        domains = (observed.domains or {}).values()
        pids = tuple(d.pid for d in domains if d.pid and any(len(pin) == 1 for pin in d.vcpu_pins))
        if (decided.quiet, pids) != (self._quiet, self._dedicated):
            self._quiet, self._dedicated = decided.quiet, pids
            self._tune.set()

    async def _watch_tuning(self) -> None:
        """Read what the real-time profile is judged from, where there is one; at once when it becomes another."""
        while True:
            self._tune.clear()
            if (self._quiet or self._dedicated) and await self._observer.tuned(
                self._quiet, patterns(self._quiet), self._dedicated
            ):
                self.wake()
            try:
                async with asyncio.timeout(self._pace.machine_s if self._quiet or self._dedicated else None):
                    await self._tune.wait()
            except TimeoutError:
                continue

    async def _watch_machine(self) -> None:
        """Look at the machine's facts by themselves: they are read often, and cause a round only where they changed."""
        while True:
            await asyncio.sleep(self._pace.machine_s)
            if self._observer.uncut:
                await self._cut_ports()
            if await self._observer.changed():
                self.wake()

    async def _watch_gpus(self) -> None:
        """Tell what GPUs tell of themselves. A host may have none, and a driver may come and go: it is asked again, rarely."""
        while True:
            try:
                async for fault in self.drivers.gpus.faults():
                    self.gpu_faults.append(fault)
                    words = FATAL_XIDS.get(fault.xid, "an error of a program on it, or one not known here")
                    severe = "Warning" if fault.xid in FATAL_XIDS else "Normal"
                    self.note(Note(HOST, "GpuFault", f"{fault.uuid}: XID {fault.xid}: {words}", severe))
            except (CasemateError, OSError) as error:
                log.debug("GPUs are not heard: %s", error)
            except Exception:
                log.exception("GPUs are not heard: defect")
            await asyncio.sleep(self._pace.gpus_s)

    async def _judge_gpus(self) -> None:
        """Look at how GPUs are, whoever has them, and tell what changed of the judgement."""
        while True:
            if self.machine is not None and self.machine.topology.gpus:
                try:
                    await self._judge()
                except (CasemateError, OSError) as error:
                    log.info("GPUs are not judged: %s", error)
            await asyncio.sleep(self._pace.gpu_health_s)

    def judged(self, gpu: GpuParts, first: LinkReading | None, since_s: float) -> GpuHealth:
        """The one record of a GPU. ``first``: its link, ``since_s`` seconds ago."""
        guest, hot_c = self.told_by_guest(gpu.uuid), self._settings.gpu.hot_c
        entry = self.ledger.gpu(gpu.uuid)
        given = entry is not None and entry.record.state is State.ATTACHED
        return judge(gpu.uuid, gpu.reading, gpu.link, self.gpu_faults, first, since_s, guest, hot_c, given=given)

    async def _ask_guests_of_gpus(self) -> None:
        """Ask the guests that have GPUs how these are, for their hosts cannot see it. A real-time guest is left in peace."""
        every_s = self._settings.gpu.guest_health_s
        while every_s:
            await asyncio.sleep(every_s)
            given = self._given_gpus()
            await asyncio.gather(*(self._ask_guest(uid, gpus) for uid, gpus in given.items()))
            owned = {uuid for gpus in given.values() for uuid in gpus}
            self._guest_gpus = {u: told for u, told in self._guest_gpus.items() if u in owned}

    def _given_gpus(self) -> dict[str, dict[str, GivenGpu]]:
        """By instance, of those whose helper is there."""
        found: dict[str, dict[str, GivenGpu]] = {}
        for gpu in self.machine.topology.gpus if self.machine is not None else ():
            entry = self.ledger.gpu(gpu.uuid)
            owner = entry.record.owner if entry is not None and entry.record.state is State.ATTACHED else ""
            record = self.ledger.get(owner) if owner else None
            view = self._guests.get(owner)
            if record is None or view is None or not view.connected or record.desired.placement.claim.realtime:
                continue
            found.setdefault(owner, {})[gpu.uuid] = GivenGpu(gpu.uuid, gpu.place.address, gpu.model)
        return found

    async def _ask_guest(self, uid: str, gpus: Mapping[str, GivenGpu]) -> None:
        try:
            told = await gpus_in_guest(self.drivers.guests, uid, gpus, GUEST_GPUS_S)
        except (CasemateError, TimeoutError, OSError) as error:
            log.info("%s does not tell how its GPUs are: %s", uid, error or type(error).__name__)
            return
        except Exception:
            log.exception("%s: what it tells of its GPUs is not read: defect", uid)
            return
        for reading in told:
            self._guest_gpus[reading.uuid] = uid, reading, self.now()

    def told_by_guest(self, uuid: str) -> GpuReading | None:
        """What the guest that has a GPU told of it last, while that is new and the GPU still its own."""
        uid, reading, at_s = self._guest_gpus.get(uuid, ("", None, 0.0))
        entry = self.ledger.gpu(uuid)
        if reading is None or entry is None or entry.record.owner != uid or entry.record.state is not State.ATTACHED:
            return None
        age_s = self.now() - at_s
        return reading if 0 <= age_s < self._settings.gpu.guest_health_s * 3 else None

    def _forget_gpu(self, uuid: str) -> None:
        """What a GPU told and counted until now is dealt with."""
        kept = [fault for fault in self.gpu_faults if fault.uuid != uuid]
        self.gpu_faults.clear()
        self.gpu_faults.extend(kept)
        self._gpu_links.pop(uuid, None)
        self.gpu_health.pop(uuid, None)

    async def _judge(self) -> None:
        now_s = self.now()
        for gpu in await self.drivers.gpus.read(GPU_READ_S):
            first, since_s = self._gpu_links.setdefault(gpu.uuid, (gpu.link, now_s))
            judged = self.judged(gpu, first, now_s - since_s)
            before = self.gpu_health.get(gpu.uuid)
            judged = with_figures(judged, before, now_s, GPU_FIGURES_S)
            self.gpu_health[gpu.uuid] = judged
            if before is None or (before.health, before.reasons) == (judged.health, judged.reasons):
                continue
            words = f"{gpu.uuid} is {judged.health}" + (f": {'; '.join(judged.reasons[:4])}" if judged.reasons else "")
            bad = judged.health in (Health.BROKEN, Health.SUSPECT)
            self.note(Note(HOST, "GpuHealth", words, "Warning" if bad else "Normal"))
            self.wake()

    async def _cut_ports(self) -> None:
        """Have the virtual functions of the ports that are to be cut. What fails is told once, and tried again."""
        try:
            await self.drivers.functions.make_pools(POOL_DEADLINE_S)
            self._pool_problem = ""
        except CasemateError as error:
            self._pools_failed(error.reason, str(error))
        except Exception as error:
            log.exception("the pools of virtual functions are not made: defect")
            self._pools_failed("Defect", f"a defect of the agent: {type(error).__name__}: {error}")

    def _pools_failed(self, reason: str, why: str) -> None:
        if why != self._pool_problem:
            self._pool_problem = why
            self.note(Note(HOST, reason, why, "Warning"))

    def _compare(self, machine: MachineFacts) -> None:
        """Tell what changed of the host's parts since the last look; the link sends the new inventory."""
        before, self.machine = self.machine, machine
        if before is None or before.topology == machine.topology:
            return
        for note in changes(before.topology, machine.topology):
            self.note(note)
        self.feed.news.set()

    async def _adopt(self, decided: Plan) -> None:
        try:
            await self.ledger.adopt(decided.adopt)
        except CasemateError as error:
            log.error("domains of ours cannot be taken back into the ledger: %s", error)
            await asyncio.sleep(self._pace.retry_s)
            return
        for note in decided.notes:
            self.note(note)
        self.resync.set()

    def _report(self, decided: Plan, observed: Observation) -> None:
        for uid, each in decided.instances.items():
            state = each.state
            running = self._executor.running(uid)
            if running is not None:
                state = replace(state, reason=act.name(running))
            self.feed.state(state)
            for note in each.notes:
                self.note(note)
            self._report_refusal(each.record.uid, each.record.refusal)
            if (took_s := self._causes.seen(each.record.desired, state, idle=not each.actions)) is not None:
                self.note(
                    Note(uid, "AsAsked", f"{state.phase.value} as asked, {took_s:.1f} s after this host was told")
                )
                self._causes.settle(each.record.desired)
        for note in decided.moved:
            if note not in self._moved:
                self.note(note)
        self._moved = decided.moved
        self.feed.tell(self._with_doubt(self._with_passage(decided.report)))
        if not self.feed.whole and (observed.domains is not None or self.ledger.host.complete):
            self.feed.whole = True
            self.feed.news.set()

    def _with_passage(self, report: HostReport) -> HostReport:
        """The report, with where other hosts reach this one."""
        passages = self.drivers.passages
        return report if passages is None else replace(report, passage=passages.where, cpu=passages.cpu)

    def _with_doubt(self, report: HostReport) -> HostReport:
        """The report, and that this host does not believe the audit chain where it does not."""
        if not self.doubt:
            return report
        doubt = Condition("AuditChain", "False", "ChainBroken", self.doubt[:1000])
        return replace(report, conditions=(*report.conditions, doubt))

    def _report_refusal(self, uid: str, refusal: Any) -> None:
        if refusal is None:
            self._refused.pop(uid, None)
        elif self._refused.get(uid) != (refusal.epoch, refusal.generation):
            self._refused[uid] = (refusal.epoch, refusal.generation)
            self.meter.add(metrics.REFUSALS)
            self.feed.note(
                Outcome("", uid, "Failed", "PlacementRefused", refusal.message[:1000], placement_refused=True)
            )

    async def _pause(self, wake_s: float) -> None:
        """Until woken, the time comes, or the next look is due. Rounds are paid for: one comes back every ``least_s``, up to
        ``burst``, and without any left the next one is waited for."""
        loop, pace = asyncio.get_running_loop(), self._pace
        earned = (loop.time() - self._counted_s) / pace.least_s
        self._rounds_left = min(float(pace.burst), self._rounds_left + earned) - 1.0
        self._counted_s = loop.time()
        if self._rounds_left < 1.0:
            await asyncio.sleep((1.0 - self._rounds_left) * pace.least_s)
        timeout_s = max(0.0, min(self._pace.resync_s, wake_s - self.now() if wake_s < inf else inf))
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return

    def _job_done(self, uid: str, outcomes: tuple[ActionOutcome, ...]) -> None:
        for outcome in outcomes:
            metrics.count_outcome(self.meter, outcome)
            if not outcome.ok:
                self._failed_s[uid] = self.now()
                message = f"{act.name(outcome.action)}: {outcome.message}"
                self.note(Note(uid, outcome.reason, message, "Warning"))
            elif isinstance(outcome.action, act.Start):
                self._causes.started(uid)
                self.note(Note(uid, "Started", "the domain was started"))
            elif (told := step_told(outcome)) is not None and self._causes.of(uid):
                self.note(Note(uid, *told))
            elif isinstance(outcome.action, act.Destroy):
                self.note(Note(uid, "Destroyed", outcome.action.reason, "Warning"))
            elif isinstance(outcome.action, act.Suspend):
                self.note(Note(uid, "Paused", "the guest was frozen"))
            elif isinstance(outcome.action, act.Resume):
                self.note(Note(uid, "Resumed", "the guest goes on"))
            elif isinstance(outcome.action, act.Reboot | act.Reset):
                self.note(Note(uid, act.name(outcome.action), outcome.action.reason))
            elif isinstance(outcome.action, act.ForgetClaim) and self.ledger.get(uid) is None:
                self._guests.pop(uid, None)
                self._refused.pop(uid, None)
                self._causes.forget(uid)
                self.feed.forget(uid)
                self._executor.pinned.pop(uid, None)
            elif isinstance(outcome.action, act.DetachGuest):
                self._guests.pop(uid, None)
        self.wake()

    async def _watch(self, what: str, events: Callable[[], AsyncIterator[T]], take: Callable[[T], None]) -> None:
        """Follow a driver's events for ever; where they break off, look for ourselves and listen again."""
        while True:
            try:
                async for event in events():
                    take(event)
            except (CasemateError, OSError) as error:
                log.warning("events of the %s broke off: %s", what, error)
            except Exception:
                # Looking for ourselves, every round, tells what the events would have told.
                log.exception("events of the %s broke off: defect", what)
            self.wake()
            await asyncio.sleep(self._pace.retry_s)

    def _domain_event(self, event: Any) -> None:
        log.debug("domain %s: %s", event.name or "(connection)", event.reason)
        self.wake()

    def _guest_event(self, event: Any) -> None:
        uid = event.uid
        view = self._guests.get(uid, GuestView())
        match event:
            case GuestHello(boot_id=boot_id, cloud_init=cloud_init, cloud_init_message=why):
                if view.boot_id and view.boot_id != boot_id:
                    self.note(Note(uid, "GuestRebooted", "the guest was rebooted"))
                    view = GuestView()
                if view.boot_id != boot_id and (took_s := self._causes.booted(uid)) is not None:
                    self.note(Note(uid, "GuestUp", f"the guest answered {took_s:.1f} s after its start"))
                view = replace(view, connected=True, boot_id=boot_id, cloud_init=cloud_init, cloud_init_message=why)
            case GuestPods(pods=pods, revision=revision):
                view = replace(view, connected=True, pods=pods, revision=revision)
            case GuestGone():
                view = replace(view, connected=False)
            case GuestNote():
                self.note(Note(uid, event.reason, event.message, event.severity, event.pod))
        if uid in self.drivers.guests.attached() or view.connected is False:
            self._guests[uid] = view
        self.wake()
