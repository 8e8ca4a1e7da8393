"""A played host at the far end of a session, from core and wire alone: it takes placements or refuses them.

May live here: what a host has on disk, in memory and running, and the stream between it and a manager. No driver, no VM: an
instance "runs" after a while and is "gone" after a while.

Theory of operation. On disk are the session counter, the desired state as it was told, and the ledger of claims; they
outlive the agent. Running instances outlive the agent too, but not a reboot. The end of the session, the outbox and all
timers are the agent's memory. A claim enters the ledger only by `verify_claim`; it leaves when its instance is gone, which
is what the manager is then told. A claim is exchanged for another (a changed size) only while its instance is off.
What a host cannot take is refused, counted, told, and tried again when its ledger changes, as a real host does.
"""

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from casemate_core.claims import Claim, HostClaims, verify_claim
from casemate_core.gpu import GpuPhase, GpuState
from casemate_core.spec.instance import DesiredInstance, InstanceState, Phase, Run
from casemate_core.spec.operation import OrderPhase, OrderState
from casemate_core.topology import Topology
from casemate_wire.session import HostEnd, Outbox, ProtocolError, Refused
from casemate_wire.stream import (
    Desired,
    FromHost,
    Hello,
    HostEvent,
    HostReport,
    Inventory,
    Outcome,
    ToHost,
    Welcome,
)

#: Mean seconds: from told to running, from told to gone, from something new to its report, and of one way of a message.
START_S, END_S, REPORT_S, WAY_S = 1.0, 1.0, 0.05, 0.01
#: A host dials again within so many seconds, and gives up a stream that was not welcomed for this long.
REDIAL_S, WELCOME_S = 3.0, 15.0
#: Of the reports, so many tell what was told before; of the starts, so many are also told as events.
TWICE, NOTED = 0.05, 0.1


class World(Protocol):
    """What a played host is given: time, and somebody to dial."""

    def later(self, seconds: float, call: Callable[..., None], *args: object) -> None:
        """Call after so many virtual seconds."""
        ...

    def dial(self, link: "Link") -> None:
        """A stream goes to the manager, or breaks."""
        ...


@dataclass(eq=False)
class Link:
    """One stream, as the manager sees it; messages of one direction stay in order, however late they come."""

    host: "PlayedHost"
    world: World
    up: "asyncio.Queue[FromHost | None]" = field(default_factory=asyncio.Queue)
    #: More seconds on each way, while the network is slow.
    extra_s: float = 0.0
    _waiting_up: list[FromHost | None] = field(default_factory=list)
    _waiting_down: list[ToHost] = field(default_factory=list)

    async def receive(self) -> FromHost | None:
        """The manager takes a message."""
        return await self.up.get()

    async def send(self, message: ToHost) -> None:
        """The manager says something."""
        self._waiting_down.append(message)
        self.world.later(self._way(), self._arrive_down)

    def say(self, messages: Iterable[FromHost | None]) -> None:
        """The host says something; None closes the stream."""
        for message in messages:
            self._waiting_up.append(message)
            self.world.later(self._way(), self._arrive_up)

    def _way(self) -> float:
        return self.extra_s + self.host.rng.expovariate(1 / WAY_S)

    # Whichever timer fires first brings the oldest message: late, never out of order.

    def _arrive_up(self) -> None:
        self.up.put_nowait(self._waiting_up.pop(0))

    def _arrive_down(self) -> None:
        self.host.hear(self, self._waiting_down.pop(0))


class PlayedHost:
    """See the module. ``rng`` is this host's own, so that what others do does not change its chances."""

    def __init__(self, name: str, topology: Topology, rng: random.Random, world: World) -> None:
        self.name, self.topology, self.rng, self._world = name, topology, rng, world
        # its GPUs are clean at once
        self._report = HostReport(gpus=tuple(GpuState(gpu.uuid, GpuPhase.FREE) for gpu in topology.gpus))
        # --- disk ---
        self.counter = 0
        self.epoch = self.revision = 0
        self.desired: dict[str, DesiredInstance] = {}
        self.ending: dict[str, None] = {}
        self.claims = HostClaims.empty()
        # --- the machine ---
        self.running: dict[str, None] = {}
        self.boots = 1
        # --- the agent's memory ---
        self.life = 0
        self.outbox = Outbox()
        self.end: HostEnd | None = None
        self.link: Link | None = None
        self._refused: dict[str, tuple[int, int]] = {}
        self._flushing = False
        self._notes = 0
        # --- what is counted ---
        self.taken = 0
        self.refusals: list[str] = []
        self.protocol_errors: list[str] = []
        self.turned_away: dict[str, int] = {}
        #: Timers that have something still to do.
        self.busy = 0

    @property
    def settled(self) -> bool:
        """Whether it is connected and does all that it was told."""
        return self.end is not None and self.end.open and not self.busy and not self._flushing and not self.ending

    # --- what happens to it -------------------------------------------------------------------------------------------

    def restart_agent(self) -> None:
        """The agent dies and comes back: its memory is lost, its disk and its instances are not."""
        self.hang_up()
        self.life += 1
        self.busy = 0
        self.outbox, self._refused, self._flushing = Outbox(), {}, False
        for uid in list(self.ending):
            self._after(END_S, self._ended, uid)
        for uid in self.desired:
            self._converge(uid)
        self._world.later(self.rng.uniform(0.1, REDIAL_S), self.dial, self.life)

    def reboot(self) -> None:
        """The machine restarts: nothing runs any more."""
        self.running.clear()
        self.boots += 1
        self.restart_agent()

    def hang_up(self) -> Link | None:
        """Give up the stream; the manager may or may not notice. Returns the stream that was there."""
        link, self.link, self.end = self.link, None, None
        return link

    def lose_stream(self) -> Link | None:
        """The stream is lost to the host, which dials again. Returns the stream that was there."""
        link = self.hang_up()
        if link is not None:
            self._world.later(self.rng.uniform(0.1, REDIAL_S), self.dial, self.life)
        return link

    def broken(self, link: Link) -> None:
        """A stream ended at the other side."""
        if link is self.link:
            self.lose_stream()

    # --- the session --------------------------------------------------------------------------------------------------

    def dial(self, life: int) -> None:
        """Begin a session, unless there is one."""
        if life != self.life or self.link is not None:
            return
        self.counter += 1
        hello = Hello(self.name, f"boot-{self.boots}", self.epoch, self.revision, self.digest, self.counter)
        self.end = HostEnd(hello, self.outbox)
        self.link = Link(self, self._world)
        self._world.dial(self.link)
        if self.link is not None:
            self._send()
            self._world.later(WELCOME_S, self._unwelcome, self.link)

    @property
    def digest(self) -> str:
        """Stands for what the machine is made of, which does not change here."""
        return f"digest-{self.name}"

    def _unwelcome(self, link: Link) -> None:
        if link is self.link and self.end is not None and not self.end.open:
            link.say([None])
            self.lose_stream()

    def hear(self, link: Link, message: ToHost) -> None:
        """The manager said something on a stream; on one that was given up, nobody hears it."""
        end = self.end
        if link is not self.link or end is None:
            return
        try:
            value = end.receive(message)
        except ProtocolError as error:
            self.protocol_errors.append(f"{self.name}: {error}")
            self.broken(link)
            return
        match value:
            case Welcome():
                if value.send_inventory:
                    end.tell_inventory(Inventory(self.digest, self.topology))
                self._tell_whole(end)
            case Desired():
                self._obey(end, value)
            case Refused():
                self.turned_away[value.reason] = self.turned_away.get(value.reason, 0) + 1
                self.hang_up()
                self._world.later(max(0.0, value.retry_after_s) * self.rng.random() + 0.1, self.dial, self.life)
            case None:
                pass
            case _:
                end.consumed()
        self._flush_soon()

    def _tell_whole(self, end: HostEnd) -> None:
        uids = [*self.desired, *self.ending]
        end.whole([self._state(uid, whole=True) for uid in uids], self._report)

    def _state(self, uid: str, *, whole: bool = False) -> InstanceState:
        claim = self.claims.get(uid) if whole else None
        wanted = self.desired.get(uid)
        if wanted is None:
            return InstanceState(uid, 0, Phase.DELETING, claim=claim)
        if uid in self.running:
            phases = {Run.STARTED: Phase.RUNNING, Run.PAUSED: Phase.PAUSED}
            phase = phases.get(wanted.run, Phase.STOPPING)
        else:
            phase = Phase.PREPARING if wanted.run is Run.STARTED else Phase.STOPPED
        placement = wanted.placement
        return InstanceState(
            uid,
            wanted.generation,
            phase,
            placement_epoch=placement.epoch,
            placement_generation=placement.generation,
            claim=claim,
            # a played host has no process and no guest that an order could tell apart: what it is asked is done
            order=OrderState(wanted.order.uid, OrderPhase.DONE, "", "played") if wanted.order else None,
        )

    def _news(self, *uids: str) -> None:
        if self.end is not None:
            self.end.changed([self._state(uid) for uid in uids])
            self._flush_soon()

    def _gone(self, uid: str) -> None:
        if self.end is not None:
            self.end.changed(gone=[uid])
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._world.later(self.rng.expovariate(1 / REPORT_S), self._flush, self.life)

    def _flush(self, life: int) -> None:
        if life != self.life:
            return
        self._flushing = False
        if self.end is not None and self.end.open and self.rng.random() < TWICE:
            if self.rng.random() < 0.3:
                self._tell_whole(self.end)
            else:
                self.end.changed([self._state(uid) for uid in list(self.desired)[-3:]])
        self._send()

    def _send(self) -> None:
        if self.end is not None and self.link is not None:
            self.link.say(self.end.take())

    # --- desired state ------------------------------------------------------------------------------------------------

    def _obey(self, end: HostEnd, told: Desired) -> None:
        new = {instance.uid: instance for instance in told.instances}
        lost = [uid for uid in self.desired if uid not in new] if told.snapshot else []
        for uid in dict.fromkeys([*told.removed, *lost]):
            if uid in self.desired:
                del self.desired[uid]
                self.ending[uid] = None
                self._after(END_S, self._ended, uid)
            elif uid not in self.ending:
                self._gone(uid)  # it never was here, or is gone already: say so again
        for uid in new:
            self.ending.pop(uid, None)
        self.desired.update(new)
        self.epoch, self.revision = told.epoch, told.revision
        end.persisted(told.revision)
        end.consumed()
        self._admit()
        for uid in new:
            self._converge(uid)
        self._news(*new)

    def _admit(self) -> None:
        """Take the placements that are not in the ledger yet, oldest first, each on top of those taken before it."""
        wanting = [
            uid
            for uid, instance in self.desired.items()
            if uid not in self.running and self.claims.get(uid) != instance.placement.claim
        ]
        if not wanting:
            return
        # What is exchanged is let go first: one that shrinks may make room for another that is told with it.
        held = {uid: old for uid in wanting if (old := self.claims.get(uid)) is not None}
        for uid in held:
            self.claims = self.claims.remove(uid)
        # (term, count of its placements, uid): the order in which they were made, as far as it can be told
        order = sorted(
            wanting,
            key=lambda uid: (self.desired[uid].placement.epoch, self.desired[uid].placement.generation, uid),
        )
        for uid in order:
            self._take(uid, held.get(uid))

    def _take(self, uid: str, old: Claim | None) -> None:
        placement = self.desired[uid].placement
        claim = placement.claim
        problems = verify_claim(self.topology, self.claims, claim)
        if not problems and claim.owner == uid:
            self.claims = self.claims.add(claim)
            self.taken += 1
            self._refused.pop(uid, None)
            return
        stamp = (placement.epoch, placement.generation)
        if self._refused.get(uid) != stamp:
            self._refused[uid] = stamp
            words = "; ".join(map(str, problems[:4])) or f"the claim is of {claim.owner}"
            self.refusals.append(f"{self.name}: {uid}: {words}")
            self.outbox.add(Outcome("", uid, "Failed", "PlacementRefused", words, placement_refused=True))
        if old is not None and not verify_claim(self.topology, self.claims, old):
            self.claims = self.claims.add(old)

    def _converge(self, uid: str) -> None:
        """Begin what is to be done for one instance."""
        wanted = self.desired[uid]
        if wanted.run is Run.STARTED and uid not in self.running and uid in self.claims:
            self._after(START_S, self._started, uid)
        elif wanted.run is Run.STOPPED and uid in self.running:
            self._after(END_S, self._stopped, uid)

    def _after(self, mean_s: float, call: Callable[[str], None], uid: str) -> None:
        self.busy += 1
        self._world.later(self.rng.expovariate(1 / mean_s), self._due, self.life, call, uid)

    def _due(self, life: int, call: Callable[[str], None], uid: str) -> None:
        if life == self.life:
            self.busy -= 1
            call(uid)

    def _started(self, uid: str) -> None:
        wanted = self.desired.get(uid)
        if wanted is None or wanted.run is not Run.STARTED or self.claims.get(uid) != wanted.placement.claim:
            return
        if uid not in self.running:
            self.running[uid] = None
            if self.rng.random() < NOTED:
                self._notes += 1
                self.outbox.add(HostEvent(f"{self.boots}-{self.life}-{self._notes}", uid, "", "Started", "it runs"))
        self._news(uid)

    def _stopped(self, uid: str) -> None:
        wanted = self.desired.get(uid)
        if wanted is None or wanted.run is not Run.STOPPED:
            return
        self.running.pop(uid, None)
        self._admit()
        self._news(uid)

    def _ended(self, uid: str) -> None:
        if uid not in self.ending:
            return
        del self.ending[uid]
        self.running.pop(uid, None)
        if uid in self.claims:
            self.claims = self.claims.remove(uid)
        self._refused.pop(uid, None)
        self._gone(uid)
        if self._refused:
            self._admit()
            for other in list(self.desired):
                self._converge(other)
