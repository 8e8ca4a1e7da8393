"""PURE. The manager's end of a session."""

from collections.abc import Iterable

from casemate_core.checkpoint import Checkpoint
from casemate_core.gpu import GpuOrder
from casemate_core.spec.instance import DesiredInstance, HostNetwork
from casemate_wire.session.common import ONCE_LIMIT, WINDOW, Busy, Credits, ProtocolError, cut_parts, weight
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
    Inventory,
    Measurement,
    OpenChannel,
    Operate,
    Outcome,
    Rejected,
    ToHost,
    Welcome,
)

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
        self._credits = Credits(window)
        self._out: list[ToHost] = []
        self._instances: dict[str, DesiredInstance] = {}
        self._removed: dict[str, None] = {}
        self._networks: dict[str, HostNetwork] = {}
        self._networks_removed: dict[str, None] = {}
        self._volumes_removed: tuple[str, ...] = ()
        self._gpu_orders: tuple[GpuOrder, ...] | None = None
        self._revision = 0
        self._sent = 0
        self._snapshot = False
        self._dirty = False
        self._parts: list[Desired] = []
        self._once: list[Operate | OpenChannel] = []
        self._sequence = 0
        self._taken = 0
        #: Facts were taken that are not acknowledged yet. It may wait a little, for it is of those that follow too.
        self.ack_due = False
        self._facts: list[Facts] = []
        self._whole = False
        self._checkpoint: Checkpoint | None = None

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
        volumes_removed: Iterable[str] = (),
        gpu_orders: Iterable[GpuOrder] | None = None,
    ) -> None:
        """The host's desired state as of ``revision``: whole, or what changed. Merged until it can be sent; of
        ``volumes_removed``, which is always whole, the last one counts. ``gpu_orders`` are all of them, where they are told."""
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
        self._volumes_removed = tuple(volumes_removed)
        if gpu_orders is not None:
            self._gpu_orders = tuple(gpu_orders)
        self._revision = revision
        self._dirty = True

    def witness(self, checkpoint: Checkpoint) -> None:
        """Have the host keep a place of the audit chain. One that waits to be sent gives way to a newer one."""
        self._checkpoint = checkpoint

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
        """Facts up to this sequence are taken. One acknowledgement is of all that were taken when it leaves."""
        if sequence > self._sequence:
            raise ProtocolError(f"facts {sequence} have not arrived")
        if sequence > self._taken and self.open and not self.closed:
            self._taken = sequence
            self.ack_due = True

    def consumed(self, messages: int = 1) -> None:
        """The shell is done with so many counted messages."""
        self._credits.consumed(messages)

    @property
    def pressing(self) -> bool:
        """Whether `take` has more to say than an acknowledgement."""
        credits = self._credits
        waits = credits.may_send > 0 and bool(self._dirty or self._parts or self._once)
        return waits or bool(self._out) or self.closed or credits.owed

    def take(self) -> tuple[ToHost, ...]:
        """Messages to send now, in order."""
        out, self._out = self._out, []
        if self.closed or not self.open:
            return tuple(out)
        if self.ack_due:
            self.ack_due = False
            out.append(FactsAck(self._taken))
        if grant := self._credits.grant():
            out.append(grant)
        if self._checkpoint is not None:
            out.append(self._checkpoint)
            self._checkpoint = None
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
        cut = cut_parts(records, map(weight, records))
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
                    volumes_removed=self._volumes_removed,
                    gpu_orders=self._gpu_orders if last else None,
                )
            )
        self._gpu_orders = None
        self._instances, self._removed, self._networks, self._networks_removed = {}, {}, {}, {}
        self._snapshot = self._dirty = False
