"""PURE. The agent's end of a session, and the outbox that outlives it."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from casemate_core.checkpoint import Checkpoint
from casemate_core.spec.instance import InstanceState
from casemate_wire.session.common import (
    OUTBOX_LIMIT,
    WINDOW,
    Credits,
    ProtocolError,
    cut_parts,
)
from casemate_wire.stream import (
    Ack,
    Bye,
    Credit,
    Desired,
    Facts,
    FactsAck,
    FromHost,
    Hello,
    HostEvent,
    HostReport,
    Inventory,
    Measurement,
    OpenChannel,
    Operate,
    Outcome,
    Rejected,
    ToHost,
    Welcome,
)


class Outbox:
    """Events and outcomes that the manager has not acknowledged. Lives as long as the agent, over many sessions."""

    def __init__(self, limit: int = OUTBOX_LIMIT) -> None:
        self._limit = limit
        self._notes: OrderedDict[int, HostEvent | Outcome] = OrderedDict()
        self._next = 0
        #: Events dropped for lack of room since the agent began.
        self.lost = 0

    def __len__(self) -> int:
        return len(self._notes)

    def add(self, note: HostEvent | Outcome) -> None:
        self._notes[self._next] = note
        self._next += 1
        if len(self._notes) > self._limit:
            # An outcome answers someone who waits; it goes only when there is nothing else to drop.
            victim = next(
                (n for n, kept in self._notes.items() if isinstance(kept, HostEvent)), next(iter(self._notes))
            )
            del self._notes[victim]
            self.lost += 1

    def after(self, number: int) -> list[tuple[int, HostEvent | Outcome]]:
        """Notes numbered higher than ``number``, in order."""
        return [(n, note) for n, note in self._notes.items() if n > number]

    def acknowledge(self, number: int) -> None:
        """Forget the notes up to this number."""
        for n in [n for n in self._notes if n <= number]:
            del self._notes[n]


@dataclass(frozen=True, slots=True)
class Refused:
    """To the shell: the manager does not take this session. ``retry_after_s`` < 0: wait for someone to act."""

    reason: str
    message: str
    retry_after_s: float


HostInput = Welcome | Desired | Operate | OpenChannel | Checkpoint | Refused


class HostEnd:
    """The agent's end of one session. Made anew, with a higher counter, for each dial.

    ``outbox`` is the agent's; ``window`` the counted messages that the manager may have in flight.
    """

    def __init__(self, hello: Hello, outbox: Outbox, *, window: int = WINDOW) -> None:
        self._hello = hello
        self._epoch = hello.epoch
        self._revision = hello.revision
        self._delivered = 0
        self._spare = 0
        self._credits = Credits(window)
        self._outbox = outbox
        self._out: list[FromHost] = [hello]
        self.open = False
        self.closed = False
        self._transfer: list[Desired] = []
        # Facts that wait for credit, merged.
        self._inventory: Inventory | None = None
        self._instances: dict[str, InstanceState] = {}
        self._gone: dict[str, None] = {}
        self._report: HostReport | None = None
        self._snapshot = False
        self._told_snapshot = False
        self._fact_parts: list[Facts] = []
        self._measurement: Measurement | None = None
        self._sequence = 0
        # Notes sent in this session, and barriers: facts sequence -> last note sent before it.
        self._noted = -1
        self._barrier_due = False
        self._barriers: OrderedDict[int, int] = OrderedDict()

    def receive(self, message: ToHost) -> HostInput | None:
        """Take one message. Returns what the shell must see, or None. Raises ProtocolError.

        A `Welcome` means: send `whole` facts now (and the inventory where it asks for it). A `Desired` is a complete
        transfer: persist it, then call `persisted`; call `consumed` as for every counted message, by its parts (that is
        done here for all but the last).
        """
        if self.closed:
            return None
        if isinstance(message, Rejected):
            self.closed = True
            return Refused(message.reason, message.message, message.retry_after_s)
        if isinstance(message, Welcome):
            return self._welcomed(message)
        if not self.open:
            raise ProtocolError(f"{type(message).__name__} before Welcome")
        match message:
            case Credit(messages):
                if messages <= 0:
                    raise ProtocolError("credit must be positive")
                self._credits.may_send += messages
                return None
            case Checkpoint():
                return message
            case FactsAck(sequence):
                self._facts_acked(sequence)
                return None
            case Desired():
                self._credits.arrived()
                return self._desired(message)
            case _:
                self._credits.arrived()
                return message

    def _welcomed(self, message: Welcome) -> Welcome | Refused:
        if self.open:
            raise ProtocolError("a second Welcome")
        if message.epoch < self._epoch:
            # Fencing: a manager that was replaced must not be obeyed, however well it is connected.
            self.closed = True
            return Refused("StaleManager", f"the manager's epoch {message.epoch} is older than {self._epoch}", 1.0)
        if message.since not in (0, self._revision):
            raise ProtocolError(f"resume from revision {message.since}, which is not ours")
        if message.epoch > self._epoch or message.since == 0:
            # Revisions are compared within one told state only.
            self._revision = 0
        self._epoch = message.epoch
        self.open = True
        self._credits.may_send = message.credit
        self._spare = message.credit // 2
        self._credits.granted = self._credits.window
        self._out.append(Credit(self._credits.window))
        return message

    def _desired(self, part: Desired) -> Desired | None:
        if part.epoch != self._epoch:
            raise ProtocolError(f"desired state of epoch {part.epoch} in a session of epoch {self._epoch}")
        if self._transfer and part.snapshot != self._transfer[0].snapshot:
            raise ProtocolError("a transfer within a transfer")
        self._transfer.append(part)
        if part.more:
            self._credits.consumed(1)
            return None
        parts, self._transfer = self._transfer, []
        if part.revision < self._revision:
            self._credits.consumed(1)
            return None
        self._revision = self._delivered = part.revision
        instances = {i.uid: i for p in parts for i in p.instances}
        networks = {n.name: n for p in parts for n in p.networks}
        return Desired(
            part.epoch,
            part.revision,
            part.snapshot,
            tuple(instances.values()),
            tuple(dict.fromkeys(u for p in parts for u in p.removed)),
            tuple(networks.values()),
            tuple(dict.fromkeys(n for p in parts for n in p.networks_removed)),
            volumes_removed=part.volumes_removed,
            gpu_orders=part.gpu_orders,
        )

    def _facts_acked(self, sequence: int) -> None:
        if sequence > self._sequence:
            raise ProtocolError(f"acknowledges facts {sequence} that were not sent")
        while self._barriers and next(iter(self._barriers)) <= sequence:
            _, noted = self._barriers.popitem(last=False)
            self._outbox.acknowledge(noted)

    def persisted(self, revision: int) -> None:
        """The desired state of this revision is on disk. Where another session delivered it, nothing is said."""
        if self.open and not self.closed and 0 < revision <= self._delivered:
            self._out.append(Ack(self._epoch, revision))

    def consumed(self, messages: int = 1) -> None:
        """The shell is done with so many counted messages."""
        self._credits.consumed(messages)

    def tell_inventory(self, inventory: Inventory) -> None:
        """What the host is made of; sent before facts."""
        self._inventory = inventory

    def whole(self, instances: Iterable[InstanceState], report: HostReport, gone: Iterable[str] = ()) -> None:
        """Tell everything: the first facts of each session, and whenever a whole observation is at hand."""
        self._instances = {state.uid: state for state in instances}
        self._gone.update(dict.fromkeys(gone))
        self._report = report
        self._snapshot = True
        self._told_snapshot = True

    def changed(
        self, instances: Iterable[InstanceState] = (), gone: Iterable[str] = (), report: HostReport | None = None
    ) -> None:
        """Tell what changed. Before the first `whole` of a session it is dropped, for that will tell it."""
        if not self._told_snapshot:
            return
        for state in instances:
            self._instances[state.uid] = state
            self._gone.pop(state.uid, None)
        for uid in gone:
            self._instances.pop(uid, None)
            self._gone[uid] = None
        self._report = report or self._report

    def measured(self, measurement: Measurement) -> None:
        """Offer figures; only the last ones are sent, and only where there is credit to spare."""
        self._measurement = measurement

    def bye(self, reason: str) -> None:
        """Leave on purpose; the last message of the session."""
        if not self.closed:
            self._out.append(Bye(reason))
        self.closed = True

    def take(self) -> tuple[FromHost, ...]:
        """Messages to send now, in order."""
        out, self._out = self._out, []
        if self.closed or not self.open:
            return tuple(out)
        if grant := self._credits.grant():
            out.append(grant)
        self._take_counted(out)
        return tuple(out)

    def _take_counted(self, out: list[FromHost]) -> None:
        credits = self._credits
        if self._inventory is not None and credits.may_send > 0:
            credits.may_send -= 1
            out.append(self._inventory)
            self._inventory = None
        # Once a note is sent, one credit is kept for the facts that serve as its barrier: with the least of windows notes
        # and facts take turns, and neither starves.
        for number, note in self._outbox.after(self._noted):
            if credits.may_send <= self._barrier_due:
                break
            credits.may_send -= 1
            out.append(note)
            self._noted = number
            self._barrier_due = True
        if self._barrier_due or self._snapshot or self._instances or self._gone or self._report is not None:
            self._cut_facts()
        while self._fact_parts and credits.may_send > 0:
            credits.may_send -= 1
            part = self._fact_parts.pop(0)
            self._sequence += 1
            out.append(
                Facts(self._sequence, part.snapshot, part.instances, part.gone, part.host, more=bool(self._fact_parts))
            )
            if not self._fact_parts:
                self._barriers[self._sequence] = self._noted
                self._barrier_due = False
        if self._measurement is not None and credits.may_send > self._spare:
            credits.may_send -= 1
            out.append(self._measurement)
            self._measurement = None

    def _cut_facts(self) -> None:
        """Turn the merged facts into parts, unless a transfer is under way (then they wait and go on merging)."""
        if self._fact_parts or self._credits.may_send <= 0 or not self._told_snapshot:
            return
        states = list(self._instances.values())
        weights = (512 + 512 * sum(1 + len(pod.containers) for pod in state.pods) for state in states)
        parts = cut_parts(states, weights)
        self._fact_parts = [Facts(0, self._snapshot, part) for part in parts]
        last = self._fact_parts[-1]
        self._fact_parts[-1] = Facts(0, self._snapshot, last.instances, tuple(self._gone), self._report)
        self._instances, self._gone, self._report, self._snapshot = {}, {}, None, False
