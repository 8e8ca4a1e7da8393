"""A whole fleet in one process on virtual time: the real writer, fleet, scheduler, sessions and store, and played hosts.

May live here: what joins them, the users, the trouble, and what must hold. Theory of operation. Everything between the
user's command and the host's ledger is what runs in production; only the network, the hosts and the clock are played. One
seed decides all: the same seed gives the same digest of the final state. Trouble comes at random points: streams are cut,
slowed down, or given up by one side only, so that what was said before arrives late, in a session that has been superseded;
agents lose their memory and machines reboot; the manager dies before a commit, after it, and before its answer; commits
fail, with and without having been made. Users ask again with the same key until they are answered.

At the end trouble stops, everybody is left to settle, and each host's ledger must be exactly what the manager believes.
"""

import asyncio
import hashlib
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

from casemate_core.audit import AuditRecord
from casemate_core.errors import Unavailable
from casemate_core.spec.environment import Cpu
from casemate_core.spec.fleet import Host, HostSpec, Image, ImageSpec, Network, NetworkSpec
from casemate_core.spec.instance import File
from casemate_core.spec.meta import Meta
from casemate_core.topology import Topology
from casemate_manager.app import make_rules
from casemate_manager.fleet.commands import Answer, ApplyResources, Command, DeleteResource
from casemate_manager.fleet.observed import Tried
from casemate_manager.fleet.records import PlacementRecord, Put
from casemate_manager.fleet.state import State
from casemate_manager.policy.cel import Cel
from casemate_manager.sessions import Sessions
from casemate_manager.simulation.demand import (
    IMAGE,
    TENANT,
    Shape,
    ShapePlacer,
    amounts_of,
    networks_of,
    shapes_for,
)
from casemate_manager.simulation.far_end import Link, PlayedHost
from casemate_manager.simulation.virtual import VirtualLoop
from casemate_manager.store.ports import Logged, Store, Stored, StoreFailed, Transaction
from casemate_manager.writer import Published, Writer

#: Seconds between two rounds of users and trouble; hosts for each command of a round (what goes takes seconds to be gone,
#: so a small fleet is asked less); how long an answer is waited for.
ROUND_S, HOSTS_PER_COMMAND, DEADLINE_S = 0.5, 4, 20.0
#: Part of the fleet's threads that users keep asked for, and how long they wait for a place.
FULL, PATIENCE_ROUNDS = 0.75, 20
#: A manager that died is back within so many seconds.
RESTART_S: Final = 4.0
#: Virtual seconds without any placement, or to settle in, after which something is stuck.
STUCK_S: Final = 1800.0

#: Trouble, and how often in ten thousand commands.
TROUBLE: Final = {
    "cut": 150,
    "half-open": 100,
    "slow": 150,
    "agent restart": 80,
    "reboot": 15,
    "manager killed": 12,
    "commit failed": 12,
}


class Died(BaseException):
    """The manager's process ends here; nobody may catch it."""


class Stuck(RuntimeError):
    """The fleet does nothing any more, or does not come to rest: a defect."""


class _Trouble:
    """A store whose commits fail when asked to, and the points at which the manager dies."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.fail = ""
        self.die = ""

    def trace(self, step: str) -> None:
        """The writer comes by."""
        if step == self.die:
            self.die = ""
            raise Died(step)

    def lead(self) -> Stored:
        """See `Store`."""
        return self._store.lead()

    def load(self) -> Stored:
        """See `Store`."""
        return self._store.load()

    def commit(self, epoch: int, transactions: Sequence[Transaction]) -> None:
        """See `Store`."""
        fail, self.fail = self.fail, ""
        if fail == "before":
            raise StoreFailed("the disk failed before the commit")
        self._store.commit(epoch, transactions)
        if fail == "after":
            raise StoreFailed("the disk failed after the commit")

    def changes(self, after: int, limit: int) -> list[Logged] | None:
        """See `Store`."""
        return self._store.changes(after, limit)

    def audit(self, after: int, limit: int) -> list[AuditRecord]:
        """See `Store`."""
        return self._store.audit(after, limit)

    def close(self) -> None:
        """The store outlives the managers of a simulation."""


class _Defects(logging.Handler):
    """Keeps what the manager logs with a traceback: it never should."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None:
            self.found.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a simulation. ``violations``: broken invariants in words, each of them a defect."""

    hosts: int
    placed: int
    taken: int
    refused_by_scheduler: int
    placements_refused: int
    refusals: tuple[str, ...]
    violations: tuple[str, ...]
    checks: int
    commands: int
    trouble: dict[str, int]
    virtual_s: float
    seconds: float
    digest: str

    @property
    def placements_per_s(self) -> float:
        """Placements for each second of real time, all that belongs to them included."""
        return self.placed / self.seconds if self.seconds > 0 else 0.0

    @property
    def is_good(self) -> bool:
        """No host refused anything, and every invariant held."""
        return not self.placements_refused and not self.violations


@dataclass(slots=True)
class _Tenancy:
    """An environment, as its user knows it."""

    shape: Shape
    replicas: int
    cpu: Cpu
    run: str = "started"
    born: int = 0

    def amounts(self) -> dict[str, int]:
        """What it takes of a fleet."""
        return {what: n * self.replicas for what, n in self.shape.amounts(self.cpu).items()}


@dataclass(slots=True)
class _Manager:
    """One life of the manager."""

    writer: Writer
    sessions: Sessions
    work: "asyncio.Task[None]"
    serving: "dict[asyncio.Task[None], Link]" = field(default_factory=dict)


def simulate_fleet(
    fleet: Sequence[tuple[str, Topology]],
    store: Store,
    *,
    placements: int,
    seed: int = 1,
    trouble: float = 1.0,
    full: float = FULL,
    progress: Callable[[int], None] = lambda placed: None,
    seconds: float = float("inf"),
) -> Result:
    """Run ``fleet`` (name and machine of each host) until so many placements were committed, then let it settle.

    ``trouble`` multiplies how often things go wrong; 0: never. ``progress`` is told how many placements there are.
    ``seconds`` of real time end it before that; where they do, the seed alone does not tell the same story. Raises Stuck.
    """
    loop = VirtualLoop()
    logger = logging.getLogger("casemate")
    defects, propagate = _Defects(), logger.propagate
    logger.addHandler(defects)
    logger.propagate = False
    try:
        run = _Run(loop, fleet, store, seed, trouble, full, progress, defects)
        return loop.run_until_complete(run.run(placements, seconds))
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        logger.removeHandler(defects)
        logger.propagate = propagate


class _Run:
    """One simulation."""

    def __init__(
        self,
        loop: VirtualLoop,
        fleet: Sequence[tuple[str, Topology]],
        store: Store,
        seed: int,
        trouble: float,
        full: float,
        progress: Callable[[int], None],
        defects: _Defects,
    ) -> None:
        self._loop = loop
        self._rng = random.Random(f"{seed}/users")
        self._chance = random.Random(f"{seed}/trouble")
        self._word = random.Random(f"{seed}/seeds")
        self._store = _Trouble(store)
        self._trouble, self._full, self._progress, self._defects = trouble, full, progress, defects
        machines = [machine for _, machine in fleet]
        self._networks = networks_of(machines)
        self._shapes = shapes_for(machines, self._networks)
        if not self._shapes:
            raise Stuck("no shape of environment fits on any of these hosts")
        self._capacity = amounts_of(machines)
        self._hosts = [PlayedHost(name, machine, random.Random(f"{seed}/host/{name}"), self) for name, machine in fleet]
        self._manager: _Manager | None = None
        self._up = asyncio.Event()
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._turns: dict[str, asyncio.Task[Any]] = {}
        self._tenancies: dict[str, _Tenancy] = {}
        self._names: list[str] = []
        self._number = self._commands = self._round = 0
        self._asked: Counter[str] = Counter()
        self._cordoned: dict[str, None] = {}
        self._unplaced: set[str] = set()
        self._placed = 0
        self._checks = 0
        self._violations: list[str] = []
        self._happened: Counter[str] = Counter()
        self._settling = self._stopping = False

    # --- World --------------------------------------------------------------------------------------------------------

    def later(self, seconds: float, call: Callable[..., None], *args: object) -> None:
        """Call after so many virtual seconds."""
        self._loop.call_later(seconds, call, *args)

    def dial(self, link: Link) -> None:
        """A stream goes to the manager, or breaks."""
        manager = self._manager
        if manager is None:
            link.host.lose_stream()
            return
        task = self._loop.create_task(manager.sessions.serve(link))
        manager.serving[task] = link
        task.add_done_callback(lambda done: self._served(manager, done))

    def _served(self, manager: _Manager, task: "asyncio.Task[None]") -> None:
        link = manager.serving.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._violations.append(f"a session failed: {error!r}")
        self.later(0.05, link.host.broken, link)

    def _cut(self, link: Link | None) -> None:
        """The manager learns that a stream is broken."""
        if link is None or self._manager is None:
            return
        for task, served in self._manager.serving.items():
            if served is link:
                task.cancel()
                return

    # --- the manager --------------------------------------------------------------------------------------------------

    def _seed(self) -> str:
        return f"{self._word.getrandbits(128):032x}"

    async def _start_manager(self) -> None:
        placer = ShapePlacer(Cel())
        placer.networks = self._networks
        writer = Writer(self._store, make_rules(placer), self._loop.wall, self._seed, trace=self._store.trace)
        await writer.open()
        writer.subscribe(self._published)
        sessions = Sessions(writer, self._seed)
        work = self._loop.create_task(writer.run())
        self._manager = _Manager(writer, sessions, work)
        work.add_done_callback(self._died)
        self._up.set()

    def _died(self, work: "asyncio.Task[None]") -> None:
        manager, self._manager = self._manager, None
        self._up.clear()
        error = None if work.cancelled() else work.exception()
        if error is not None and not isinstance(error, Died):
            self._violations.append(f"the writer ended: {error!r}")
        if manager is not None:
            for task in list(manager.serving):
                task.cancel()
        if not self._stopping:
            self._spawn(self._come_back())

    async def _come_back(self) -> None:
        await asyncio.sleep(self._chance.uniform(0.2, RESTART_S))
        await self._start_manager()

    def _published(self, published: Published) -> None:
        for batch in published.batches:
            for change in batch.records:
                self._placed += isinstance(change, Put) and isinstance(change.record, PlacementRecord)
            for sighting in batch.sightings:
                if isinstance(sighting, Tried) and sighting.attempt is not None:
                    self._unplaced.add(sighting.uid)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._violations.append(f"a command failed: {error!r}")

    # --- users --------------------------------------------------------------------------------------------------------

    def _ask(self, about: str, command: Command) -> None:
        """Ask for something, after what was asked before about the same object was answered."""
        self._commands += 1
        before = self._turns.get(about)
        task = self._spawn(self._in_turn(before, command))
        self._turns[about] = task
        task.add_done_callback(lambda done: self._turns.pop(about) if self._turns.get(about) is done else None)

    async def _in_turn(self, before: "asyncio.Task[Any] | None", command: Command) -> None:
        if before is not None:
            await asyncio.wait([before])
        await self._insist(command)

    async def _insist(self, command: Command) -> Answer:
        """Ask, and ask again with the same key, until there is an answer."""
        while True:
            await self._up.wait()
            manager = self._manager
            if manager is not None:
                with suppress(Unavailable, TimeoutError):
                    async with asyncio.timeout(DEADLINE_S):
                        return await manager.writer.submit(command)
            await asyncio.sleep(0.5)

    def _key(self) -> str:
        self._number += 1
        return f"key-{self._number}"

    def _apply(self, name: str) -> None:
        tenancy = self._tenancies[name]
        wanted = tenancy.shape.environment(name, tenancy.replicas, run=tenancy.run, cpu=tenancy.cpu)
        self._ask(name, ApplyResources(self._key(), (wanted,), self._seed()))

    def _arrive(self) -> bool:
        """Somebody new, unless that would ask for more than users may of anything."""
        shape = self._rng.choices(self._shapes, [s.weight for s in self._shapes])[0]
        tenancy = _Tenancy(shape, self._rng.choice(shape.replicas), shape.cpu, born=self._round)
        asked = tenancy.amounts()
        if self._tenancies and any(
            self._asked[what] + n > self._full * self._capacity[what] for what, n in asked.items()
        ):
            return False
        name = f"e{self._number}"
        self._tenancies[name] = tenancy
        self._names.append(name)
        self._asked.update(asked)
        self._apply(name)
        return True

    def _depart(self, name: str) -> None:
        self._asked.subtract(self._tenancies.pop(name).amounts())
        self._ask(name, DeleteResource(self._key(), "Environment", TENANT, name))

    def _pick(self) -> str:
        """A live environment; names of those that went are thrown away as they are met."""
        while True:
            at = self._rng.randrange(len(self._names))
            name = self._names[at]
            if name in self._tenancies:
                return name
            self._names[at] = self._names[-1]
            self._names.pop()

    def _change(self) -> None:
        """Scale, stop, start, or give a stopped one another size."""
        name = self._pick()
        tenancy = self._tenancies[name]
        before = tenancy.amounts()
        match self._rng.randrange(5):
            case 0 if not tenancy.shape.gang:
                tenancy.replicas = max(1, tenancy.replicas + self._rng.choice((-1, 1)))
            case 1:
                tenancy.run = "stopped"
            case 2:
                tenancy.run = "started"
            case 3 if not tenancy.cpu.max and tenancy.run == "stopped":
                # started, and soon after it stopped again for another size: word of either may still be on its way
                tenancy.run = "started"
                self._apply(name)
                self.later(self._rng.uniform(0.5, 4.0), self._resize, name)
                return
            case 3 | 4 if not tenancy.cpu.max:
                # one smaller and back, in whole cores; what was stopped for it may be started in the same breath
                count = tenancy.shape.cpu.count
                tenancy.run = self._rng.choice(("stopped", "stopped", "started"))
                tenancy.cpu = replace(tenancy.cpu, count=max(count - 2, 1) if tenancy.cpu.count == count else count)
            case _:
                return
        self._asked.subtract(before)
        self._asked.update(tenancy.amounts())
        self._apply(name)

    def _resize(self, name: str) -> None:
        """Stop one for another size."""
        tenancy = self._tenancies.get(name)
        if tenancy is None or self._settling:
            return
        before = tenancy.amounts()
        count = tenancy.shape.cpu.count
        tenancy.run = "stopped"
        tenancy.cpu = replace(tenancy.cpu, count=max(count - 2, 1) if tenancy.cpu.count == count else count)
        self._asked.subtract(before)
        self._asked.update(tenancy.amounts())
        self._apply(name)

    def _cordon(self) -> None:
        if self._cordoned and (self._rng.random() < 0.5 or len(self._cordoned) * 10 > len(self._hosts)):
            name = next(iter(self._cordoned))
            del self._cordoned[name]
        else:
            name = self._rng.choice(self._hosts).name
            self._cordoned[name] = None
        host = Host(Meta(name), HostSpec(cordoned=name in self._cordoned))
        self._ask(name, ApplyResources(self._key(), (host,), self._seed()))

    def _give_up(self) -> None:
        """Users take back what found no place for long."""
        if self._manager is None:
            return
        state = self._manager.writer.state
        for uid in list(state.pending):
            name = state.instances[uid].environment
            tenancy = self._tenancies.get(name)
            if tenancy is not None and self._round - tenancy.born > PATIENCE_ROUNDS:
                self._depart(name)

    def _users(self) -> None:
        for _ in range(max(1, len(self._hosts) // HOSTS_PER_COMMAND)):
            chance = self._rng.random()
            if chance < 0.03:
                self._cordon()
            elif chance < 0.15 and self._tenancies:
                self._change()
            elif not self._arrive():
                self._depart(self._pick())
            for what, often in TROUBLE.items():
                if self._chance.random() * 10_000 < often * self._trouble:
                    self._happened[what] += 1
                    self._make_trouble(what)
        if self._round % 8 == 0:
            self._give_up()

    # --- trouble ------------------------------------------------------------------------------------------------------

    def _make_trouble(self, what: str) -> None:
        chance = self._chance
        host = chance.choice(self._hosts)
        match what:
            case "cut":
                self._cut(host.lose_stream())
            case "half-open":
                link = host.link
                if link is not None:
                    # What was said on it arrives late, when the host has another stream; the end of it later still.
                    link.extra_s = chance.uniform(1.0, 20.0)
                    host.restart_agent() if chance.random() < 0.2 else self.later(1.0, host.broken, link)
                    self.later(chance.uniform(30.0, 90.0), self._cut, link)
            case "slow":
                link = host.link
                if link is not None:
                    link.extra_s = chance.uniform(0.5, 10.0)
                    self.later(chance.uniform(1.0, 30.0), setattr, link, "extra_s", 0.0)
            case "agent restart":
                link = host.link
                host.restart_agent()
                self._cut(link)
            case "reboot":
                link = host.link
                host.reboot()
                if chance.random() < 0.5:
                    self._cut(link)
                elif link is not None:
                    self.later(chance.uniform(5.0, 60.0), self._cut, link)
            case "manager killed":
                self._store.die = chance.choice(("before-commit", "after-commit", "before-reply"))
            case "commit failed":
                self._store.fail = chance.choice(("before", "after"))

    # --- what must hold -----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Each ledger is consistent, and no host holds what the manager did not give it."""
        self._checks += 1
        for host in self._hosts:
            self._violations += [f"ledger of {host.name}: {v}" for v in host.claims.check(host.topology)]
        if self._manager is None:
            return
        state = self._manager.writer.state
        self._violations += state.check()
        for host in self._hosts:
            given = {p.instance_uid: p for p in state.host_placements.get(host.name, {}).values()}
            for claim in host.claims:
                if claim.owner not in given:
                    self._violations.append(f"{host.name} holds a claim of {claim.owner}, which was given away")

    def _unsettled(self) -> str:
        """What is not at rest yet; empty where everything is."""
        if self._manager is None or self._tasks:
            return "the manager or its users"
        state = self._manager.writer.state
        for host in self._hosts:
            if not host.settled:
                return f"host {host.name}"
            believed = {c.owner: c for c in state.claims.get(host.name, ())}
            if believed != {c.owner: c for c in host.claims}:
                return f"host {host.name}: the manager's ledger and its own differ"
            gone = [p.instance_uid for p in state.host_placements.get(host.name, {}).values()]
            if any(state.is_ending(state.instances[uid]) for uid in gone):
                return f"host {host.name}: instances that end"
        return ""

    def _digest(self, state: State) -> str:
        """SHA-256 over who holds what, and where."""
        digest = hashlib.sha256()
        for key in sorted(state.placements):
            record = state.placements[key]
            told = [key, record.host, record.epoch, record.generation, record.claim.to_dict()]
            digest.update(json.dumps(told, sort_keys=True).encode())
        counters = [[host.name, host.counter, host.epoch, host.taken] for host in self._hosts]
        digest.update(json.dumps([counters, state.epoch, sorted(state.instances)]).encode())
        return digest.hexdigest()

    # --- the run ------------------------------------------------------------------------------------------------------

    async def run(self, placements: int, seconds: float) -> Result:
        """See `simulate_fleet`."""
        began = time.perf_counter()
        await self._start_manager()
        image = Image(Meta(IMAGE), ImageSpec(File("file:///images/x.qcow2", "sha256:" + "0" * 64), "qcow2"))
        network = Network(Meta("default"), NetworkSpec("nat", "10.0.0.0/8"))
        await self._insist(ApplyResources("start", (image, network), self._seed()))
        for host in self._hosts:
            self.later(host.rng.uniform(0.0, 2.0), host.dial, host.life)
        await asyncio.sleep(4.0)
        every = max(placements // 20, 1)
        last, last_s, checked = -1, 0.0, 0
        while self._placed < placements and time.perf_counter() - began < seconds:
            self._round += 1
            self._users()
            await asyncio.sleep(ROUND_S)
            if self._placed != last:
                last, last_s = self._placed, self._loop.time()
                self._progress(min(last, placements))
            elif self._loop.time() - last_s > STUCK_S:
                raise Stuck(f"nothing is placed any more after {last} placements")
            if self._placed - checked >= every:
                checked = self._placed
                self._check()
        await self._settle()
        assert self._manager is not None
        state = self._manager.writer.state
        self._check()
        stored = self._store.load()
        loaded = State.of(stored.epoch, stored.revision, stored.records)
        digest = self._digest(state)
        if self._digest(loaded) != digest:
            self._violations.append("what is stored is not what is in memory")
        self._violations += [f"logged: {text}" for text in self._defects.found]
        for host in self._hosts:
            self._violations += host.protocol_errors
        refusals = [text for host in self._hosts for text in host.refusals]
        self._stopping = True
        self._manager.work.cancel()
        turned = Counter[str]()
        for host in self._hosts:
            turned.update({f"turned away: {word}": n for word, n in host.turned_away.items()})
        return Result(
            len(self._hosts),
            self._placed,
            sum(host.taken for host in self._hosts),
            len(self._unplaced),
            len(refusals),
            tuple(refusals[:20]),
            tuple(self._violations),
            self._checks,
            self._commands,
            dict(sorted((self._happened + turned).items())),
            self._loop.time(),
            time.perf_counter() - began,
            digest,
        )

    async def _settle(self) -> None:
        """No more trouble, no more commands: everybody comes to rest."""
        self._settling = True
        self._store.die = self._store.fail = ""
        for host in self._hosts:
            if host.link is not None:
                host.link.extra_s = 0.0
        until_s = self._loop.time() + STUCK_S
        while left := self._unsettled():
            if self._loop.time() > until_s:
                raise Stuck(f"the fleet does not come to rest: {left}; {self._violations[:5]}")
            await asyncio.sleep(1.0)
