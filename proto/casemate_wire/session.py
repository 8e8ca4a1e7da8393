"""PURE. The protocol of a host's stream, both ends of it, as two state machines on values.

Theory of operation. A *session* is one stream: the agent says Hello, the manager Welcome (or Rejected), and from then
on desired state flows down and facts flow up until one of the two breaks it off. Neither end does I/O: a shell hands in
what arrived (`receive`), which returns what it means, and after anything that may have made messages takes those to be
sent (`take`), in order. What `receive` raises (`ProtocolError`) ends the session.

Rules, each tested in tests/wire/test_session.py against streams that are cut, delayed and superseded at any point:

- *Level-triggered.* Desired records and facts are whole. While the other side gives no credit they are not queued but
  merged, the last one of an instance wins; so each end holds at most one record an instance, however slow the other is.
- *Transfers.* A desired state too large for one message goes as parts; the host's end delivers it when the last part is
  there, so a half-told snapshot never ends an instance.
- *Revisions and epochs.* Both only grow. The host's end refuses a manager of an older epoch (fencing) and drops desired
  state that is older than what it delivered. A resume by revision is granted only within one epoch; a new term of the
  manager tells the whole state, for its store may have been restored from an older copy.
- *Ack after durable.* `persisted` makes the Ack, and the shell calls it after its fsync.
- *Barrier.* Messages of a stream arrive in order, so a FactsAck for sequence n says that everything that the host sent
  before those facts was taken as well. Events and outcomes stay in the `Outbox`, which outlives sessions, until a
  barrier behind them is acknowledged; the manager knows repeats by their id.
- *Credit.* Each end may send only as many counted messages (`COUNTED`) as the other has granted; grants follow what the
  shell says it consumed. More than granted is a violation. Hello, Welcome, acks, credit, Rejected and Bye are not
  counted: there are at most as many as counted messages.
- *Session counter.* On the agent's disk, raised and fsynced before each dial (`next_counter`). `admit` decides: a newer
  one supersedes a half-open older stream; an older one is stale; the same one again is a cloned identity.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeVar

from casemate_core.errors import CallerError
from casemate_core.spec.instance import DesiredInstance, HostNetwork, InstanceState
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

T = TypeVar("T")

#: Messages that use up credit.
COUNTED: Final = (Inventory, Facts, Outcome, HostEvent, Measurement, Desired, Operate, OpenChannel)

#: Counted messages that an end lets the other have in flight.
WINDOW: Final = 64

#: Parts of a transfer: at most so many records, and about so many characters of their free text; well under the 4 MiB
#: that gRPC takes by default.
PART_RECORDS: Final = 64
PART_CHARACTERS: Final = 512 * 1024

#: Events and outcomes kept for a manager that is away; the oldest events go first.
OUTBOX_LIMIT: Final = 1000

#: Operations and channel tickets that wait for credit.
ONCE_LIMIT: Final = 256


class ProtocolError(CallerError):
    """The other end broke the stream's rules: the session ends."""

    reason = "Protocol"


class Busy(CallerError):
    """The other end does not take more at the moment; nothing was sent."""

    reason = "Busy"


def next_counter(stored: int | None, now_s: float) -> int:
    """The session counter for the next dial: one more than the stored one.

    A host that lost its counter starts at the wall clock in seconds, which is more than any counter that began there
    and was raised once a dial.
    """
    return int(now_s) if stored is None else stored + 1


# --- admission --------------------------------------------------------------------------------------------------------


class Admission(StrEnum):
    """What becomes of a Hello."""

    WELCOME = "welcome"
    SUPERSEDE = "supersede"
    STALE = "stale"
    CLONE = "clone"


def admit(last_counter: int, connected: bool, counter: int) -> Admission:
    """Decide on a Hello with session ``counter`` for a host whose highest counter so far is ``last_counter`` (0: none).

    ``connected``: a stream with ``last_counter`` is open, as far as the manager knows.
    """
    if counter < last_counter:
        return Admission.STALE
    if counter == last_counter and last_counter > 0:
        # An agent raises its counter before each dial, so two streams with one counter are two machines.
        return Admission.CLONE
    return Admission.SUPERSEDE if connected else Admission.WELCOME


def resumable(hello: Hello, epoch: int, revision: int) -> bool:
    """Whether the desired state may be told as what changed since the host's revision."""
    return hello.epoch == epoch and 0 < hello.revision <= revision


# --- parts common to both ends ----------------------------------------------------------------------------------------


class _Credits:
    """Credit of one direction at the sender, and the grants owed at the receiver."""

    def __init__(self, window: int) -> None:
        self.window = window
        #: What we may still send.
        self.may_send = 0
        #: What the other may still send.
        self.granted = 0
        self._consumed = 0

    def arrived(self) -> None:
        if self.granted <= 0:
            raise ProtocolError("message beyond the credit given")
        self.granted -= 1

    def consumed(self, messages: int) -> None:
        self._consumed += messages

    def grant(self) -> Credit | None:
        """Give back what was consumed, in steps of half a window, so that grants are few."""
        if self._consumed < max(1, self.window // 2):
            return None
        given, self._consumed = self._consumed, 0
        self.granted += given
        return Credit(given)


def _weight(record: DesiredInstance) -> int:
    return 2048 + len(record.user_data) + sum(len(repr(pod)) for pod in record.pods)


def _parts(records: Sequence[T], weights: Iterable[int]) -> list[tuple[T, ...]]:
    """Cut into runs within PART_RECORDS and PART_CHARACTERS, at least one (it may be empty)."""
    parts: list[tuple[T, ...]] = []
    part: list[T] = []
    total = 0
    for record, weight in zip(records, weights, strict=True):
        if part and (len(part) >= PART_RECORDS or total + weight > PART_CHARACTERS):
            parts.append(tuple(part))
            part, total = [], 0
        part.append(record)
        total += weight
    parts.append(tuple(part))
    return parts


# --- the host's end ---------------------------------------------------------------------------------------------------


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


HostInput = Welcome | Desired | Operate | OpenChannel | Refused


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
        self._credits = _Credits(window)
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
        parts = _parts(states, weights)
        self._fact_parts = [Facts(0, self._snapshot, part) for part in parts]
        last = self._fact_parts[-1]
        self._fact_parts[-1] = Facts(0, self._snapshot, last.instances, tuple(self._gone), self._report)
        self._instances, self._gone, self._report, self._snapshot = {}, {}, None, False


# --- the manager's end ------------------------------------------------------------------------------------------------

ManagerInput = Hello | Inventory | Facts | Outcome | HostEvent | Measurement | Ack | Bye


class ManagerEnd:
    """The manager's end of one session, made when a stream arrives.

    ``epoch`` is the manager's term. After the Hello the shell asks the fleet and answers with `welcome` or `reject`,
    then `desire` with the state (whole where it did not resume).
    """

    def __init__(self, epoch: int, *, window: int = WINDOW, reconnect_window_s: float = 5.0) -> None:
        self.epoch = epoch
        self.hello: Hello | None = None
        self.open = False
        self.closed = False
        #: Highest revision that the host has on disk.
        self.acked = 0
        self._reconnect_window_s = reconnect_window_s
        self._credits = _Credits(window)
        self._out: list[ToHost] = []
        self._instances: dict[str, DesiredInstance] = {}
        self._removed: dict[str, None] = {}
        self._networks: dict[str, HostNetwork] = {}
        self._networks_removed: dict[str, None] = {}
        self._revision = 0
        self._sent = 0
        self._snapshot = False
        self._dirty = False
        self._parts: list[Desired] = []
        self._once: list[Operate | OpenChannel] = []
        self._sequence = 0
        self._taken = 0
        self._facts: list[Facts] = []
        self._whole = False

    def receive(self, message: FromHost) -> ManagerInput | None:
        """Take one message. Returns what the shell must see, or None. Raises ProtocolError.

        `Facts` are complete transfers; call `facts_taken` when they are taken (and what of them must be durable is),
        and `consumed` as for every counted message.
        """
        if self.closed:
            return None
        if isinstance(message, Hello):
            if self.hello is not None:
                raise ProtocolError("a second Hello")
            if message.session <= 0 or message.epoch < 0 or message.revision < 0:
                raise ProtocolError("a Hello with a counter that is not positive")
            self.hello = message
            return message
        if self.hello is None:
            raise ProtocolError(f"{type(message).__name__} before Hello")
        if isinstance(message, Bye):
            self.closed = True
            return message
        if not self.open:
            raise ProtocolError(f"{type(message).__name__} before Welcome")
        match message:
            case Credit(messages):
                if messages <= 0:
                    raise ProtocolError("credit must be positive")
                self._credits.may_send += messages
                return None
            case Ack(epoch, revision):
                if epoch != self.epoch or revision > self._sent:
                    raise ProtocolError(f"acknowledges ({epoch}, {revision}), which was not sent")
                self.acked = max(self.acked, revision)
                return message
            case Facts():
                self._credits.arrived()
                return self._facts_arrived(message)
            case _:
                self._credits.arrived()
                return message

    def _facts_arrived(self, part: Facts) -> Facts | None:
        if part.sequence != self._sequence + 1:
            raise ProtocolError(f"facts {part.sequence} after {self._sequence}")
        if not part.snapshot and not self._whole:
            raise ProtocolError("facts as deltas before whole facts")
        if self._facts and part.snapshot != self._facts[0].snapshot:
            raise ProtocolError("a transfer within a transfer")
        self._sequence = part.sequence
        self._whole = True
        self._facts.append(part)
        if part.more:
            self._credits.consumed(1)
            return None
        parts, self._facts = self._facts, []
        states = {state.uid: state for p in parts for state in p.instances}
        return Facts(
            part.sequence,
            part.snapshot,
            tuple(states.values()),
            tuple(dict.fromkeys(uid for p in parts for uid in p.gone)),
            part.host,
        )

    def welcome(self, *, resume: bool, send_inventory: bool) -> None:
        """Open the session; ``resume`` where `resumable` says so, and then `desire` need only tell what changed."""
        if self.hello is None or self.open or self.closed:
            raise ProtocolError("welcome without a Hello, or twice")
        self.open = True
        since = self.hello.revision if resume else 0
        self._sent = self._revision = self.acked = since
        self._credits.granted = self._credits.window
        self._out.append(
            Welcome(self.epoch, since, send_inventory, self._reconnect_window_s, credit=self._credits.window)
        )

    def reject(self, reason: str, message: str, retry_after_s: float) -> None:
        """End the session; the last message of it."""
        if not self.closed:
            self._out.append(Rejected(reason, message, retry_after_s))
        self.closed = True

    def desire(
        self,
        revision: int,
        instances: Iterable[DesiredInstance] = (),
        removed: Iterable[str] = (),
        networks: Iterable[HostNetwork] = (),
        networks_removed: Iterable[str] = (),
        *,
        snapshot: bool = False,
    ) -> None:
        """The host's desired state as of ``revision``: whole, or what changed. Merged until it can be sent."""
        if revision < self._revision:
            raise ProtocolError(f"desired state goes back from revision {self._revision} to {revision}")
        if snapshot:
            self._instances, self._removed, self._networks, self._networks_removed = {}, {}, {}, {}
            self._snapshot = True
            # A transfer that is under way is completed first: its parts are already counted by the other end.
        for record in instances:
            self._instances[record.uid] = record
            self._removed.pop(record.uid, None)
        for uid in removed:
            self._instances.pop(uid, None)
            self._removed[uid] = None
        for network in networks:
            self._networks[network.name] = network
            self._networks_removed.pop(network.name, None)
        for name in networks_removed:
            self._networks.pop(name, None)
            self._networks_removed[name] = None
        self._revision = revision
        self._dirty = True

    def operate(self, operation: Operate) -> None:
        """Ask for something to be done once. Raises Busy where too many wait."""
        self._add_once(operation)

    def open_channel(self, channel: OpenChannel) -> None:
        """Ask the agent to dial a channel. Raises Busy where too many wait."""
        self._add_once(channel)

    def _add_once(self, message: Operate | OpenChannel) -> None:
        if self.closed or len(self._once) >= ONCE_LIMIT:
            raise Busy("the host does not take more requests at the moment")
        self._once.append(message)

    def facts_taken(self, sequence: int) -> None:
        """Facts up to this sequence are taken."""
        if sequence > self._sequence:
            raise ProtocolError(f"facts {sequence} have not arrived")
        if sequence > self._taken and self.open and not self.closed:
            self._taken = sequence
            self._out.append(FactsAck(sequence))

    def consumed(self, messages: int = 1) -> None:
        """The shell is done with so many counted messages."""
        self._credits.consumed(messages)

    def take(self) -> tuple[ToHost, ...]:
        """Messages to send now, in order."""
        out, self._out = self._out, []
        if self.closed or not self.open:
            return tuple(out)
        if grant := self._credits.grant():
            out.append(grant)
        credits = self._credits
        while credits.may_send > 0:
            if not self._parts:
                self._cut_desired()
            if self._parts:
                part = self._parts.pop(0)
                self._sent = max(self._sent, part.revision)
                out.append(part)
            elif self._once:
                out.append(self._once.pop(0))
            else:
                break
            credits.may_send -= 1
        return tuple(out)

    def _cut_desired(self) -> None:
        if not self._dirty:
            return
        records = list(self._instances.values())
        cut = _parts(records, map(_weight, records))
        for index, part in enumerate(cut):
            last = index == len(cut) - 1
            self._parts.append(
                Desired(
                    self.epoch,
                    self._revision,
                    self._snapshot,
                    part,
                    tuple(self._removed) if last else (),
                    tuple(self._networks.values()) if index == 0 else (),
                    tuple(self._networks_removed) if last else (),
                    more=not last,
                )
            )
        self._instances, self._removed, self._networks, self._networks_removed = {}, {}, {}, {}
        self._snapshot = self._dirty = False
