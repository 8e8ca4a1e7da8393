"""The one writer: queue → fleet.apply → commit (grouped) → answer, publish, wake sessions.

Theory of operation. Commands wait in one bounded queue. The writer takes what is there (at most `GROUP`), applies each to
the *working* state, lets the fleet do the work that follows (`Advance`), and commits all of it in one transaction on the
store's own thread. Then, and in this order: the *committed* state is folded, listeners (watchers, sessions) are called,
answers leave. What is refused is answered after the commit too, for the refusal may rest on what is not committed yet.

A commit that fails ends this term: the outcome may be unknown, so every caller of the group is told to try again with the
same key, listeners are told that everything may have changed, and the state is loaded anew under a new epoch. While the
store cannot be led (a full disk), what can be read is served and commands are refused; the writer tries again.

`trace` is called at each step with its name, so that an incident can be told and a test can stop the process there.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

from casemate_core.audit import AuditRecord
from casemate_core.errors import CasemateError, InternalError, Unavailable
from casemate_core.metrics import Meter
from casemate_manager import metrics
from casemate_manager.fleet import desired
from casemate_manager.fleet.acts import By
from casemate_manager.fleet.births import Born, born
from casemate_manager.fleet.commands import Advance, Advanced, Answer, Batch, Command, Due, EndSession, Expire
from casemate_manager.fleet.machine import Rules, apply, is_crowded
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.state import State
from casemate_manager.store.ports import Fenced, Store, Stored, StoreFailed, Transaction

log = logging.getLogger("casemate.writer")
T = TypeVar("T")

#: Commands that may wait; more are refused at once.
QUEUE: Final = 10_000
#: Commands of one commit: bounds the time that the first of them waits.
GROUP: Final = 256
#: Batches of following work in one commit.
ADVANCES: Final = 4
#: Batches that forget old records in one commit: together as many records as a group may bring.
EXPIRES: Final = 4
#: How often waiting work is looked at without an occasion, and old records are forgotten.
IDLE_S: Final = 5.0
EXPIRE_S: Final = 60.0
#: How often the clock is looked at: lifetimes, deadlines.
DUE_S: Final = 5.0
#: Between two tries to lead the store again.
RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Published:
    """What was committed. ``state`` is the committed state after it (folded further by later commits: use it at once).

    ``batches`` in their order, folded; ``born``: the objects that they made; ``hosts``: uids of instances whose record
    changed, by host. ``reset``: the state was loaded anew, and whatever was held of the former one is void.
    """

    state: State
    observed: Observed
    revision: int
    batches: tuple[Batch, ...] = ()
    born: frozenset[Born] = frozenset()
    hosts: tuple[tuple[str, frozenset[str]], ...] = ()
    effects: tuple[EndSession, ...] = ()
    reset: bool = False


Listener = Callable[[Published], None]


@dataclass(slots=True)
class _Waiting:
    command: Command | By
    future: "asyncio.Future[Answer]"
    answer: Answer = None
    error: CasemateError | None = None


class Writer:
    """See the module. ``clock`` gives seconds since the epoch, ``seed`` a fresh random word; both are injected."""

    def __init__(
        self,
        store: Store,
        rules: Rules,
        clock: Callable[[], float],
        seed: Callable[[], str],
        *,
        trace: Callable[[str], None] = lambda step: None,
        idle_s: float = IDLE_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self._store = store
        self._rules = rules
        self._clock = clock
        self._seed = seed
        self._trace = trace
        self._idle_s = idle_s
        self._retry_s = retry_s
        self._thread = ThreadPoolExecutor(1, "casemate-store")
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(QUEUE)
        self._listeners: list[Listener] = []
        #: What was counted since this process began.
        self.meter = Meter.of(metrics.FAMILIES)
        self._working = State(0)
        self._leading = False
        self._closed = False
        self._expired_s = 0.0
        self._looked_s = 0.0
        self._more = True
        #: Groups that were done, empty ones included: whether the writer makes progress.
        self.rounds = 0
        #: The committed state: what is on disk, all that readers may see. Exchanged for another when the state is loaded anew.
        self.state = State(0)
        self.observed = Observed()

    @property
    def epoch(self) -> int:
        """The term that this manager leads."""
        return self.state.epoch

    @property
    def leading(self) -> bool:
        """Whether commands are taken."""
        return self._leading

    @property
    def waiting(self) -> int:
        """Commands that wait for their turn."""
        return self._queue.qsize()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` after each commit, before its answers leave. Returns how to end it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def open(self) -> None:
        """Lead the store and load it. Raises StoreFailed, StoreDamaged."""
        self._take(await self._on_thread(self._store.lead))
        self._leading = True

    async def submit(self, command: Command | By) -> Answer:
        """Carry out a command; returns when it is committed. Raises what the fleet raises, or Unavailable."""
        if self._closed or not self._leading:
            raise Unavailable(
                "the manager cannot write to its store at the moment; try again with the same request key"
            )
        waiting = _Waiting(command, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(waiting)
        except asyncio.QueueFull:
            raise Unavailable("too many commands wait; try again with the same request key") from None
        return await waiting.future

    async def run(self) -> None:
        """Work until cancelled. What waits then is refused; what was taken is finished first."""
        try:
            while True:
                group = await self._next_group()
                # Shielded: a transaction that was begun ends as it ends, and its callers are told.
                step = asyncio.ensure_future(self._group(group))
                try:
                    await asyncio.shield(step)
                    self.rounds += 1
                except asyncio.CancelledError:
                    self._closed = True
                    await step
                    raise
        finally:
            self._closed = True
            while not self._queue.empty():
                self._refuse([self._queue.get_nowait()], Unavailable("the manager is stopping"))

    async def close(self) -> None:
        """Let go of the store, after `run` has ended."""
        self._closed = True
        await self._on_thread(self._store.close)
        self._thread.shutdown()

    async def audit(self, after: int, limit: int) -> list[AuditRecord]:
        """Audit records of the store, after a sequence. Raises StoreDamaged, StoreFailed."""
        return await self._on_thread(lambda: self._store.audit(after, limit))

    # --- one group ----------------------------------------------------------------------------------------------------

    async def _next_group(self) -> list[_Waiting]:
        group: list[_Waiting] = []
        if self._more:
            # The rest of the work that follows does not wait, and neither do others wait for all of it.
            await asyncio.sleep(0)
        else:
            try:
                async with asyncio.timeout(self._idle_s):
                    group.append(await self._queue.get())
            except TimeoutError:
                return []
        while len(group) < GROUP and not self._queue.empty():
            group.append(self._queue.get_nowait())
        return group

    async def _group(self, group: list[_Waiting]) -> None:
        try:
            batches, self._more = self._apply(group)
            await self._commit(batches)
            self._trace("before-reply")
            self._answer(group)
        except Fenced as error:
            # Another manager leads. To lead again would fence it in turn; whoever started two must say which.
            self._leading = False
            self._refuse(group, Unavailable(str(error)))
            raise
        except StoreFailed as error:
            log.error("the commit failed: %s", str(error))
            self._refuse(group, Unavailable(f"{error}; the outcome is unknown: try again with the same request key"))
            await self._lead_again()
        except Exception:
            # A defect while the working state was folded: it may contradict the store, so it is not used again.
            log.exception("the working state is given up")
            self._refuse(group, InternalError("the manager failed; it has loaded its state anew"))
            await self._lead_again()

    def _apply(self, group: list[_Waiting]) -> tuple[list[Batch], bool]:
        """Apply the group and what follows from it. Returns the batches and whether more follows."""
        batches: list[Batch] = []
        now_s = self._clock()
        for waiting in group:
            batch, waiting.error = self._one(waiting.command, now_s)
            if batch is not None:
                waiting.answer = batch.answer
                batches.append(batch)
        following: list[Command] = [Advance(self._seed()) for _ in range(ADVANCES)]
        if now_s - self._expired_s > EXPIRE_S or is_crowded(self._working):
            self._expired_s = now_s
            # A group brings at most GROUP events, so that these keep pace with it.
            following[:0] = [Expire()] * EXPIRES
        if now_s - self._looked_s >= DUE_S:
            self._looked_s = now_s
            following.insert(0, Due())
        for command in following:
            batch, _ = self._one(command, now_s)
            if batch is not None:
                batches.append(batch)
            if isinstance(command, Advance) and not (
                batch and isinstance(batch.answer, Advanced) and batch.answer.again
            ):
                return batches, False
        return batches, True

    def _one(self, command: Command | By, now_s: float) -> tuple[Batch | None, CasemateError | None]:
        """Apply and fold. What `apply` raises has changed nothing; what folding raises ends the term."""
        batch, error = None, None
        try:
            batch = apply(self._working, self.observed, command, now_s, self._rules)
        except CasemateError as refused:
            error = refused
        except Exception as failed:
            log.exception("%s failed", type(command).__name__)
            error = InternalError(f"the manager failed on this request: {type(failed).__name__}")
        metrics.count_command(self.meter, command.command if isinstance(command, By) else command, error)
        if batch is None:
            return None, error
        self._working.fold(batch)
        for sighting in batch.sightings:
            self.observed.fold(sighting)
        return batch, None

    async def _commit(self, batches: list[Batch]) -> None:
        transactions = [Transaction(b.revision, b.records) for b in batches if b.records]
        if transactions:
            self._trace("before-commit")
            begun_s = asyncio.get_running_loop().time()
            try:
                await self._on_thread(lambda: self._store.commit(self._working.epoch, transactions))
            except CasemateError:
                self.meter.add(metrics.COMMITS_FAILED)
                raise
            self.meter.observe(metrics.COMMIT_S, asyncio.get_running_loop().time() - begun_s)
            self._trace("after-commit")
        self._publish(batches)

    def _publish(self, batches: list[Batch]) -> None:
        hosts: dict[str, set[str]] = {}
        effects: list[EndSession] = []
        made: set[Born] = set()
        for batch in batches:
            made.update(born(self.state, batch))
            for host, uids in desired.affected(self.state, batch).items():
                hosts.setdefault(host, set()).update(uids)
            metrics.count_batch(self.meter, self.state, batch)
            self.state.fold(batch)
            effects.extend(batch.effects)
        news = tuple(b for b in batches if b.records or b.sightings or b.effects)
        if news:
            self._tell(
                Published(
                    self.state,
                    self.observed,
                    self.state.revision,
                    news,
                    frozenset(made),
                    tuple((host, frozenset(uids)) for host, uids in hosts.items()),
                    tuple(effects),
                )
            )

    def _tell(self, published: Published) -> None:
        for listener in list(self._listeners):
            try:
                listener(published)
            except Exception:
                # One listener's defect is not another's, and the commit stands.
                log.exception("a listener failed")

    def _answer(self, group: list[_Waiting]) -> None:
        for waiting in group:
            if waiting.future.done():
                continue  # the caller went away
            if waiting.error is not None:
                waiting.future.set_exception(waiting.error)
            else:
                waiting.future.set_result(waiting.answer)

    def _refuse(self, group: list[_Waiting], error: CasemateError) -> None:
        for waiting in group:
            if not waiting.future.done():
                waiting.future.set_exception(error)

    # --- leadership ---------------------------------------------------------------------------------------------------

    async def _lead_again(self) -> None:
        """Load the state anew and lead a new term; until that succeeds, serve what can be read and refuse commands."""
        self._leading = False
        while not self._queue.empty():
            self._refuse([self._queue.get_nowait()], Unavailable("the manager is loading its state anew; try again"))
        told = False
        while not self._closed:
            try:
                self._take(await self._on_thread(self._store.lead))
            except CasemateError as error:
                log.error("the store cannot be led: %s", str(error))
                if not told:
                    told = await self._read_only()
                await asyncio.sleep(self._retry_s)
                continue
            self._leading = True
            log.warning("leading epoch %d from revision %d", self.epoch, self.state.revision)
            return

    async def _read_only(self) -> bool:
        """Serve what the store has, where it can at least be read."""
        try:
            self._take(await self._on_thread(self._store.load))
        except CasemateError:
            return False
        return True

    def _take(self, stored: Stored) -> None:
        self._working = State.of(stored.epoch, stored.revision, stored.records)
        self.state = State.of(stored.epoch, stored.revision, stored.records)
        # Sessions of the former term end with it; hosts tell everything again.
        self.observed = Observed()
        self._tell(Published(self.state, self.observed, stored.revision, reset=True))

    async def _on_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
