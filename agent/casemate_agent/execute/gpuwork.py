"""GPUs on their way between tenants: the acts, each behind its record.

What may live here: the order of durable writes and calls of drivers for one GPU. When a GPU moves is decided in
:mod:`casemate_agent.gpu.planning`, what the next rung is in :mod:`casemate_agent.gpu.passport`, whether a move exists in
:mod:`casemate_agent.gpu.lifecycle`.

Theory of operation. The ledger's record is changed first, by the one table, under the ledger's lock; then the act. A move that
the table does not have raises and nothing is done, so of two that want one GPU the second is refused. A climb is one call: its
steps are written as they are made, for whoever looks, but a climb that was cut short is begun anew.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from casemate_agent import actions as act
from casemate_agent.drivers.ports import Drivers
from casemate_agent.gpu import lifecycle
from casemate_agent.gpu.checks import checks, link_checks
from casemate_agent.gpu.lifecycle import Event, State
from casemate_agent.gpu.passport import Climb, climb, passport, proof_step
from casemate_agent.gpu.readings import Card, GpuFault
from casemate_agent.gpu.records import GpuEntry, GpuPolicy, moved, with_passport
from casemate_agent.gpu.shares import ShareFacts, shares_of
from casemate_agent.ledger.store import Ledger
from casemate_core.errors import CasemateError, MachineError
from casemate_core.gpu import Check, Result, Rung, Step
from casemate_core.spec.instance import DesiredInstance

log = logging.getLogger("casemate.agent.gpus")

STEP_S = 30.0
"""Deadline of a look, a binding, a reset: a bus reset waits for its devices a second each, and then up to a minute."""
SCRUB_S = 1800.0
"""Deadline of the scrubber: to write all of a board's memory takes seconds; to notice that it hangs must not take for ever."""
HOLD_STEP_S = 1.0
"""Between two looks at who holds a device that is to come back."""
DRIVER_S = 60.0
"""So long the host's driver has to tell a GPU that it was given back."""
RETRY_S = 5.0
"""After an act that failed for a reason that is not the GPU's."""


class GpuNotClean(MachineError):
    """It is not given: somebody has it, or had it and it was not sanitised."""

    reason = "GpuNotClean"


class GpuHeld(MachineError):
    """A process has the device open, after the time that it was given."""

    reason = "GpuHeld"


class GpuWork:
    """The acts of one host. ``faults``: what its GPUs told of themselves; ``rung`` is told before (True) and after each step
    of a climb; ``forget`` is told of a GPU whose faults until now are dealt with."""

    def __init__(
        self,
        drivers: Drivers,
        ledger: Ledger,
        now: Callable[[], float],
        policy: GpuPolicy,
        faults: Iterable[GpuFault],
        rung: Callable[[bool, str, act.Action], None] = lambda before, uuid, action: None,
        forget: Callable[[str], None] = lambda uuid: None,
    ) -> None:
        self._drivers = drivers
        self._ledger = ledger
        self._now = now
        self._policy = policy
        self._faults = faults
        self._rung = rung
        self._forget = forget

    async def do(self, action: act.GpuAction) -> None:
        """Carry out what is a GPU's own."""
        try:
            await self._do(action)
        except CasemateError:
            # It is planned again at once: a disk that is full, or a process that holds on, must not make that a busy loop.
            await asyncio.sleep(RETRY_S)
            raise

    async def _do(self, action: act.GpuAction) -> None:
        match action:
            case act.EnrolGpu(gpu=uuid, owner=owner, tenant=tenant):
                record = lifecycle.held(uuid, owner, tenant) if owner else lifecycle.first_seen(uuid)
                await self._ledger.amend_gpu(uuid, lambda old: old or GpuEntry(record, self._now()))
            case act.UnprepareGpu(gpu=uuid, generation=generation):
                if (await self._card(uuid)).holders:
                    raise GpuHeld(f"GPU {uuid} was prepared, and a process has it open")
                await self._drivers.cards.unbind(uuid, STEP_S)
                await self._move(uuid, Event.RELEASE, generation=generation)
            case act.ReturnGpu(gpu=uuid, generation=generation):
                await self._ledger.amend_gpu(uuid, lambda old: self._returned(uuid, old, generation))
            case act.SanitiseGpu():
                await self._sanitise(action)
            case act.QuarantineGpu(gpu=uuid, why=why, order=order, later=later):
                await self._ledger.amend_gpu(uuid, lambda old: self._quarantined(old, why, order, later=later))
            case act.ClearGpu(gpu=uuid, order=order):
                await self._clear(uuid, order)
            case act.KeepGpu(gpu=uuid, by_host=by_host):
                await self._move(uuid, Event.TAKE if by_host else Event.RELEASE)
            case act.LoseGpu(gpu=uuid):
                await self._move(uuid, Event.LOSE)

    # --- giving -----------------------------------------------------------------------------------------------------

    async def prepare(self, action: act.PrepareGpus) -> None:
        """Record the instance's GPUs as its own, and bind them. What is its own already is bound again."""
        desired = action.desired
        for uuid in desired.placement.claim.gpus:
            entry = self._ledger.gpu(uuid)
            if entry is None:
                raise GpuNotClean(f"GPU {uuid}: this host has no record of it yet")
            if not self._is_of(entry, desired.uid):
                entry = await self._before(entry)
                await self._ledger.amend_gpu(uuid, lambda old, seen=entry: self._prepared(old, seen, action))  # type: ignore[misc]
            await self._drivers.cards.bind(uuid, STEP_S)

    async def addresses(self, gpus: tuple[str, ...], deadline_s: float) -> tuple[str, ...]:
        """Where GPUs that were prepared are now. Raises GpuNotClean for one that is not there, or not on vfio-pci."""
        if not gpus:
            return ()
        cards = await self._drivers.cards.look(deadline_s)
        for uuid in gpus:
            if uuid not in cards or cards[uuid].driver != "vfio-pci":
                raise GpuNotClean(f"GPU {uuid} is not bound for a guest")
        return tuple(cards[uuid].address for uuid in gpus)

    async def attach(self, action: act.AttachGpus) -> None:
        """Record that a domain is about to run with them."""
        for uuid in action.gpus:
            entry = self._ledger.gpu(uuid)
            if entry is None or not self._is_of(entry, action.uid):
                raise GpuNotClean(f"GPU {uuid} is not prepared for {action.uid}")
            if entry.record.state is State.PREPARED:
                await self._move(uuid, Event.ATTACH)

    async def shares(self, desired: DesiredInstance, deadline_s: float) -> tuple[ShareFacts, ...]:
        """Have the instance's slices made; where they are. The host's own driver carries them, so it has the GPU."""
        wanted = shares_of(desired.uid, desired.placement.claim)
        if not wanted:
            return ()
        async with asyncio.timeout(deadline_s):
            cards = await self._drivers.cards.look(deadline_s)
            for share in wanted:
                if share.gpu in cards and cards[share.gpu].driver == "vfio-pci":
                    await self._drivers.cards.unbind(share.gpu, deadline_s)
            return tuple([await self._drivers.shares.create(share, deadline_s) for share in wanted])

    @staticmethod
    def _is_of(entry: GpuEntry, uid: str) -> bool:
        return entry.record.owner == uid and entry.record.state in (State.PREPARED, State.ATTACHED)

    async def _before(self, entry: GpuEntry) -> GpuEntry:
        """What it counts now, before a tenant has it."""
        uuid = entry.uuid
        reading = next((p.reading for p in await self._drivers.gpus.read(STEP_S) if p.uuid == uuid), None)
        link = await self._drivers.cards.link(uuid, STEP_S)
        return replace(entry, reading=reading or entry.reading, link=link)

    def _prepared(self, old: GpuEntry | None, seen: GpuEntry, action: act.PrepareGpus) -> GpuEntry:
        if old is None or not old.record.assignable or old.condemned:
            state = old.record.state if old else "not known"
            raise GpuNotClean(f"GPU {seen.uuid} is {state}, and is not given to {action.desired.uid}")
        entry = replace(old, reading=seen.reading, link=seen.link)
        desired = action.desired
        return moved(entry, Event.PREPARE, self._now(), owner=desired.uid, tenant=desired.tenant)

    # --- coming back ------------------------------------------------------------------------------------------------

    async def _sanitise(self, action: act.SanitiseGpu) -> None:
        uuid = action.gpu
        entry = await self._ledger.amend_gpu(uuid, lambda old: self._begun(old, action))
        steps: list[Step] = []
        try:
            end = await self._climb(uuid, action, entry, steps)
        except CasemateError as error:
            # what is not sure is held back: an operator sees why, and lets it out
            end = Climb(reason=f"{error.reason}: {error}"[:500])
        record = passport(uuid, entry.record.generation, entry.record.tenant, steps, end, entry.climbs)

        def ended(old: GpuEntry | None) -> GpuEntry:
            assert old is not None
            kept = with_passport(replace(old, steps=tuple(steps)), record)
            if end.clean:
                return moved(kept, Event.PASS, self._now(), generation=action.generation)  # type: ignore[arg-type]
            return moved(kept, Event.QUARANTINE, self._now(), reason=end.reason)

        ended_as = await self._ledger.amend_gpu(uuid, ended)
        if ended_as.record.state is State.CHECKED:
            await self._move(uuid, Event.RELEASE)  # its passport is on disk
            self._forget(uuid)

    def _begun(self, old: GpuEntry | None, action: act.SanitiseGpu) -> GpuEntry:
        if old is None:
            raise GpuNotClean(f"GPU {action.gpu}: this host has no record of it")
        if old.record.state in (State.SANITISING, State.CHECKED):
            old = moved(old, Event.CRASH, self._now())  # a climb that was cut short
        entry = moved(old, Event.SANITISE, self._now(), generation=action.generation)  # type: ignore[arg-type]
        return replace(entry, steps=(), climbs=entry.climbs + 1, order=action.order or entry.order)

    async def _climb(self, uuid: str, action: act.SanitiseGpu, entry: GpuEntry, steps: list[Step]) -> Climb:
        facts = (await self._drivers.cards.look(STEP_S)).get(uuid)
        hygiene = self._policy.hygiene
        if facts is None or not facts.told:
            hygiene = replace(hygiene, driver_checks=False)  # nobody on this host could tell
        while True:
            card = await self._card(uuid)
            answer = climb(steps, card, hygiene)
            if answer.next is None:
                return answer
            self._rung(True, uuid, action)
            steps.append(await self._step(answer.next, uuid, entry))
            made = tuple(steps)
            await self._ledger.amend_gpu(uuid, lambda old, made=made: replace(old, steps=made))  # type: ignore[misc]
            self._rung(False, uuid, action)

    async def _step(self, rung: Rung, uuid: str, entry: GpuEntry) -> Step:
        loop, at_s = asyncio.get_running_loop(), self._now()
        began = loop.time()
        result, evidence, found = await self._made(rung, uuid, entry)
        log.info("GPU %s: %s %s: %s", uuid, rung, result, evidence)
        return Step(rung, result, evidence[:500], at_s, loop.time() - began, found)

    async def _made(self, rung: Rung, uuid: str, entry: GpuEntry) -> tuple[Result, str, tuple[Check, ...]]:
        cards = self._drivers.cards
        match rung:
            case Rung.RELEASED:
                held = await self._until_let_go(uuid)
                if held:
                    return Result.FAILED, f"{', '.join(held)}, for {self._policy.held_limit_s:.0f} s", ()
                # away from the host's own driver, which would not stand a reset
                await cards.bind(uuid, STEP_S)
                return Result.PASSED, "no process holds it; it is on vfio-pci", ()
            case Rung.FUNCTION_RESET | Rung.BUS_RESET:
                return await _tried(cards.reset(uuid, rung, STEP_S * 3))
            case Rung.PROVED:
                result, evidence, seen = proof_step(await cards.prove(uuid, STEP_S))
                more = link_checks(await cards.link(uuid, STEP_S), entry.link)
                return result, evidence, (*seen, *more)
            case Rung.SCRUB:
                return await _tried(cards.scrub(uuid, SCRUB_S))
            case Rung.CHECKS:
                return await self._checked(uuid, entry)

    async def _until_let_go(self, uuid: str) -> tuple[str, ...]:
        """Who holds it still after the time that they are given."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._policy.held_limit_s
        while True:
            holders = (await self._card(uuid)).holders
            if not holders or loop.time() >= ends:
                return holders
            await asyncio.sleep(HOLD_STEP_S)

    async def _checked(self, uuid: str, entry: GpuEntry) -> tuple[Result, str, tuple[Check, ...]]:
        """Give it to the host's driver, and judge what that tells."""
        await self._drivers.cards.unbind(uuid, STEP_S)
        loop = asyncio.get_running_loop()
        ends = loop.time() + DRIVER_S
        while True:
            parts = await self._drivers.gpus.read(STEP_S)
            reading = next((p.reading for p in parts if p.uuid == uuid), None)
            if reading is not None or loop.time() >= ends:
                break
            await asyncio.sleep(HOLD_STEP_S)
        if reading is None:
            evidence = f"the host's driver did not tell it within {DRIVER_S:.0f} s"
            return Result.FAILED, evidence, (Check("reachable", Result.FAILED, evidence),)
        found = checks(reading, entry.reading, (fault for fault in self._faults if fault.uuid == uuid))
        failed = [check.name for check in found if check.result is Result.FAILED]
        unknown = [check.name for check in found if check.result is Result.UNKNOWN]
        evidence = f"{len(found) - len(failed) - len(unknown)} passed"
        evidence += f"; failed: {', '.join(failed)}" if failed else ""
        evidence += f"; not told: {', '.join(unknown)}" if unknown else ""
        return Result.FAILED if failed else Result.PASSED, evidence, found

    # --- small things -----------------------------------------------------------------------------------------------

    async def _card(self, uuid: str) -> Card:
        return await self._drivers.cards.card(uuid, STEP_S)

    async def _move(self, uuid: str, event: Event, generation: int | None = None) -> GpuEntry:
        def change(old: GpuEntry | None) -> GpuEntry:
            if old is None:
                raise GpuNotClean(f"GPU {uuid}: this host has no record of it")
            return moved(old, event, self._now(), generation=generation)  # type: ignore[arg-type]

        return await self._ledger.amend_gpu(uuid, change)

    def _quarantined(self, old: GpuEntry | None, why: str, order: str, *, later: bool) -> GpuEntry:
        """At once where nobody has it; else it is condemned, and is quarantined when it comes back. ``later``: others have
        slices of it."""
        if old is None:
            raise GpuNotClean("this host has no record of the GPU")
        entry = replace(old, order=order or old.order)
        if later or entry.record.state in (State.PREPARED, State.ATTACHED):
            return replace(entry, condemned=why)
        return replace(moved(entry, Event.QUARANTINE, self._now(), reason=why), condemned="")

    async def _clear(self, uuid: str, order: str) -> None:
        """An operator knows what was wrong with it: what it counted and told until now is held against it no more."""
        entry = self._ledger.gpu(uuid)
        seen = await self._before(entry) if entry is not None else None

        def cleared(old: GpuEntry | None) -> GpuEntry:
            if old is None or seen is None:
                raise GpuNotClean(f"GPU {uuid}: this host has no record of it")
            entry = replace(old, order=order, condemned="")
            if entry.record.state is not State.QUARANTINED:
                return entry
            return replace(moved(entry, Event.CLEAR, self._now()), reading=seen.reading, link=seen.link)

        await self._ledger.amend_gpu(uuid, cleared)
        self._forget(uuid)

    def _returned(self, uuid: str, old: GpuEntry | None, generation: int) -> GpuEntry:
        """Under the ledger's lock: an instance that is wanted again meanwhile keeps it."""
        if old is None:
            raise GpuNotClean(f"GPU {uuid}: this host has no record of it")
        owner = self._ledger.get(old.record.owner)
        if owner is not None and not owner.removed and owner.claim is not None and uuid in owner.claim.gpus:
            raise GpuNotClean(f"GPU {uuid} is wanted again by {old.record.owner}")
        return moved(old, Event.RETURN, self._now(), generation=generation)  # type: ignore[arg-type]


async def _tried(call: Awaitable[str]) -> tuple[Result, str, tuple[Check, ...]]:
    """An act whose failure is a step that failed."""
    try:
        return Result.PASSED, await call, ()
    except MachineError as error:
        return Result.FAILED, f"{error.reason}: {error}", ()
