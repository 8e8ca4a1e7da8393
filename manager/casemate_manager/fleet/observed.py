"""PURE. What hosts say, in memory only: it is gone with the manager and comes back with the hosts' streams.

``Observed`` is one value store shared by the working and the committed state; only ``fold`` of a batch changes it.
A host that is not connected is Unknown, and so is everything on it: its last words are kept, never believed.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from casemate_core.spec.instance import InstanceState
from casemate_wire.stream import HostReport

#: Ids of host events remembered for each host, to know repeats.
EVENT_IDS = 2000


@dataclass(frozen=True, slots=True)
class HostSeen:
    """A host as it was last heard. ``whole``: in this session it has told all of its instances."""

    connected: bool = False
    session: int = 0
    whole: bool = False
    heard_s: float = 0.0
    report: HostReport | None = None


@dataclass(frozen=True, slots=True)
class InstanceSeen:
    """An instance as its host last described it; ``state`` None: the host says that it has no trace of it."""

    host: str
    heard_s: float
    state: InstanceState | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """The last try to place an instance that did not fit. ``capacity`` is the version of the fleet that was tried."""

    at_s: float
    capacity: int
    message: str


# --- changes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SeeHost:
    """A host was heard, or its stream ended. ``news``: more changed than when it was heard; ``link``: whether what is
    known of its instances can be believed."""

    name: str
    seen: HostSeen
    news: bool = True
    link: bool = False


@dataclass(frozen=True, slots=True)
class ForgetHost:
    """A host's record was deleted."""

    name: str


@dataclass(frozen=True, slots=True)
class SeeInstance:
    """An instance was described. ``news``: otherwise than before."""

    uid: str
    seen: InstanceSeen
    news: bool = True


@dataclass(frozen=True, slots=True)
class ForgetInstance:
    """An instance's record is gone."""

    uid: str


@dataclass(frozen=True, slots=True)
class Tried:
    """An instance could not be placed (or, None, it was)."""

    uid: str
    attempt: Attempt | None


@dataclass(frozen=True, slots=True)
class HeardEvent:
    """A host's event was taken."""

    host: str
    id: str


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """What did not fit may fit now."""


Sighting = SeeHost | ForgetHost | SeeInstance | ForgetInstance | Tried | HeardEvent | CapacityChanged


@dataclass(slots=True)
class Observed:
    """All that hosts have said."""

    hosts: dict[str, HostSeen] = field(default_factory=dict)
    instances: dict[str, InstanceSeen] = field(default_factory=dict)
    attempts: dict[str, Attempt] = field(default_factory=dict)
    event_ids: dict[str, OrderedDict[str, None]] = field(default_factory=dict)
    capacity: int = 0
    #: Counts changes of what is known of hosts.
    hosts_version: int = 0

    def host(self, name: str) -> HostSeen:
        """What is known of a host; nothing, where it was never heard."""
        return self.hosts.get(name, _NEVER)

    def see_host(self, name: str, seen: HostSeen) -> SeeHost:
        """The sighting that makes ``seen`` what is known of a host."""
        old = self.host(name)
        link = (old.connected, old.whole) != (seen.connected, seen.whole)
        return SeeHost(name, seen, link or old.report != seen.report, link)

    def see_instance(self, uid: str, seen: InstanceSeen) -> SeeInstance:
        """The sighting that makes ``seen`` what is known of an instance."""
        old = self.instances.get(uid)
        return SeeInstance(uid, seen, old is None or old.host != seen.host or old.state != seen.state)

    def fold(self, sighting: Sighting) -> None:
        """Take one change."""
        match sighting:
            case SeeHost(name, seen, news, _):
                self.hosts[name] = seen
                self.hosts_version += news
            case ForgetHost(name):
                self.hosts.pop(name, None)
                self.hosts_version += 1
                self.event_ids.pop(name, None)
            case SeeInstance(uid, instance, _):
                self.instances[uid] = instance
            case ForgetInstance(uid):
                self.instances.pop(uid, None)
                self.attempts.pop(uid, None)
            case Tried(uid, attempt):
                if attempt is None:
                    self.attempts.pop(uid, None)
                else:
                    self.attempts[uid] = attempt
            case HeardEvent(host, event_id):
                ids = self.event_ids.setdefault(host, OrderedDict())
                ids[event_id] = None
                while len(ids) > EVENT_IDS:
                    ids.popitem(last=False)
            case CapacityChanged():
                self.capacity += 1

    def heard_event(self, host: str, event_id: str) -> bool:
        """Whether this event of a host was taken already."""
        return event_id in self.event_ids.get(host, ())


_NEVER = HostSeen()
