"""What changed, for watchers: a bounded ring of touched objects, and subscriptions that never grow.

Theory of operation. After each commit the writer hands the batch to ``Feed.publish``. What it touches (records, and the
views that are joined from them and from what hosts say) is noted as (kind, key) under the next sequence number. A
subscription collects keys, each once however often it is touched; its watcher takes the keys and looks up what the
objects are *now*. So a slow watcher costs at most one key an object, and sees the latest state, never a backlog.

A resume token is the epoch and a sequence number. It is good while the ring still holds what came after it; otherwise the
watcher is told to drop what it holds and gets a snapshot. Tokens of an earlier epoch are never good: observed state is
not durable.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from casemate_core.spec.views import EventView
from casemate_manager.fleet.births import Born
from casemate_manager.fleet.commands import Batch
from casemate_manager.fleet.observed import ForgetHost, SeeHost, SeeInstance, Tried
from casemate_manager.fleet.records import (
    AuditCut,
    AuditHead,
    AuditMark,
    Drop,
    EnvironmentRecord,
    HostRecord,
    InstanceRecord,
    InventoryRecord,
    OperationRecord,
    PlacementRecord,
    Put,
    Record,
    key_of,
    kind_of,
    tenant_key,
)
from casemate_manager.fleet.state import State

#: Touched keys remembered for those who resume.
RING: Final = 65_536
#: Keys that one subscription holds before it is told to start over.
MAX_PENDING: Final = 16_384

Touched = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Token:
    """A place in the feed."""

    epoch: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.sequence}"


def parse_token(text: str) -> Token | None:
    """The token that was given out as ``text``; None for anything else."""
    epoch, _, sequence = text.partition(".")
    if len(text) > 40 or not (epoch.isdecimal() and sequence.isdecimal()):
        return None
    return Token(int(epoch), int(sequence))


class Subscription:
    """Keys of one kind that were touched and not yet looked at. Made and closed by `Feed.subscribe`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._keys: dict[str, None] = {}
        self._changed = asyncio.Event()
        self.overflowed = False
        self.sequence = 0

    def touch(self, kind: str, key: str, sequence: int) -> None:
        """Note a touched key, if it is of this kind."""
        self.sequence = sequence
        if kind != self.kind:
            return
        if len(self._keys) >= MAX_PENDING and key not in self._keys:
            self.overflowed = True
            self._keys.clear()
        if not self.overflowed:
            self._keys[key] = None
        self._changed.set()

    async def wait(self, timeout_s: float) -> bool:
        """Wait until something was touched. False: nothing was for so long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def take(self) -> tuple[str, ...]:
        """The touched keys, in the order of their first touch; empty after an overflow, which is then over."""
        keys = tuple(self._keys)
        self._keys.clear()
        self._changed.clear()
        self.overflowed = False
        return keys


class Feed:
    """The ring and its subscriptions. ``state`` is the committed one, folded before `publish` is called."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.sequence = 0
        self._ring: deque[tuple[int, str, str]] = deque(maxlen=RING)
        #: When objects were made, the latest last: as many as are remembered were made within the ring.
        self._born: dict[Born, int] = {}
        self._subscriptions: set[Subscription] = set()

    @property
    def token(self) -> Token:
        """The present place."""
        return Token(self._state.epoch, self.sequence)

    def reset(self, state: State) -> None:
        """The state was loaded anew: every watcher starts over."""
        self._state = state
        self._ring.clear()
        self._born.clear()
        self.sequence += 1
        for subscription in self._subscriptions:
            subscription.overflowed = True
            subscription._changed.set()

    def subscribe(self, kind: str) -> Subscription:
        """A subscription from now on; close it with `unsubscribe`."""
        subscription = Subscription(kind)
        subscription.sequence = self.sequence
        self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription."""
        self._subscriptions.discard(subscription)

    def watchers(self) -> Counter[str]:
        """How many watch, by kind."""
        return Counter(subscription.kind for subscription in self._subscriptions)

    def since(self, token: Token, kind: str) -> tuple[str, ...] | None:
        """Keys of a kind touched after ``token``; None where that is not known any more."""
        if token.epoch != self._state.epoch or token.sequence > self.sequence:
            return None
        oldest = self._ring[0][0] if self._ring else self.sequence + 1
        if token.sequence + 1 < oldest:
            return None
        return tuple(dict.fromkeys(key for n, k, key in self._ring if n > token.sequence and k == kind))

    def publish(self, batches: Iterable[Batch], born: Iterable[Born] = ()) -> None:
        """Note what committed and folded batches touched, and the objects that they made."""
        for batch in batches:
            for kind, key in dict.fromkeys(self._touched(batch)):
                self.sequence += 1
                self._ring.append((self.sequence, kind, key))
                for subscription in self._subscriptions:
                    subscription.touch(kind, key, self.sequence)
        for each in born:
            self._born.pop(each, None)
            self._born[each] = self.sequence
        while len(self._born) > RING:
            del self._born[next(iter(self._born))]

    def is_new(self, token: Token, kind: str, key: str, name: str) -> bool:
        """Whether an object was made after a token that `since` has an answer for."""
        return max(self._born.get((kind, key), 0), self._born.get((kind, f"{key}/{name}"), 0)) > token.sequence

    def _touched(self, batch: Batch) -> Iterator[Touched]:
        for change in batch.records:
            if isinstance(change, Put):
                yield from self._touched_by(change.record)
            else:
                yield from _touched_by_drop(change)
        for sighting in batch.sightings:
            match sighting:
                case ForgetHost(name):
                    yield "Host", name
                case SeeHost(name, _, news, link):
                    if news:
                        yield "Host", name
                        inventory = self._state.inventories.get(name)
                        for gpu in inventory.topology.gpus if inventory is not None else ():
                            yield "GPU", gpu.uuid
                    if not link:
                        continue
                    for placement in self._state.host_placements.get(name, {}).values():
                        yield from self._touched_instance(placement.instance_uid)
                    for key in self._state.host_volumes.get(name, ()):
                        yield "Volume", key
                case SeeInstance(uid, _, True) | Tried(uid, _):
                    yield from self._touched_instance(uid)
                case _:
                    pass

    def _touched_by(self, record: Record) -> Iterator[Touched]:
        match record:
            case EnvironmentRecord():
                yield "Environment", key_of(record)
                for instance in self._state.instances_of(record.environment.meta.uid):
                    yield "Instance", instance.meta.uid
                    yield "Pod", instance.meta.uid
            case InstanceRecord():
                yield from self._touched_instance(record.meta.uid)
                for use in record.volumes:
                    yield "Volume", tenant_key(record.meta.tenant, use.volume)
            case PlacementRecord():
                yield "Placement", key_of(record)
                yield "Host", record.host
                yield from self._touched_instance(record.instance_uid)
            case OperationRecord():
                yield "Operation", key_of(record)
                yield from self._touched_instance(record.instance_uid)
            case HostRecord():
                yield "Host", key_of(record)
            case InventoryRecord():
                yield "Host", record.host
                for gpu in record.topology.gpus:
                    yield "GPU", gpu.uuid
            case AuditHead() | AuditMark() | AuditCut():
                pass  # nobody watches them
            case _:
                yield kind_of(record), key_of(record)

    def _touched_instance(self, uid: str) -> Iterator[Touched]:
        yield "Instance", uid
        yield "Pod", uid
        instance = self._state.instances.get(uid)
        if instance is not None and (key := self._state.environment_keys.get(instance.environment_uid)):
            yield "Environment", key


def _touched_by_drop(change: Drop) -> Iterator[Touched]:
    yield change.kind, change.key
    if change.kind == "Instance":
        yield "Pod", change.key


def is_event_of(event: EventView, kind: str, name: str, tenant: str) -> bool:
    """Whether an event is about what was asked for, or about a part of it: an environment's instances, an instance's pods.

    Empty words ask for everything.
    """
    ref = event.regarding
    if tenant and ref.tenant not in ("", tenant):
        return False
    if not kind or not name:
        return not kind or ref.kind == kind
    if ref.kind == kind:
        return ref.name == name
    instance = ref.name.partition(".")[0] if ref.kind == "Pod" else ref.name
    if kind == "Environment" and ref.kind in ("Instance", "Pod"):
        head, _, ordinal = instance.rpartition("-")
        return head == name and ordinal.isdecimal()
    return kind == "Instance" and ref.kind == "Pod" and instance == name
