"""PURE. What can be asked of the fleet, what comes of it, and the batch that carries both.

Order of a batch's parts, kept by :mod:`casemate_manager.writer`: records are committed BEFORE the answer leaves, before
watchers and sessions hear of it. Sightings are in memory and need no commit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from casemate_core.checkpoint import Checkpoint
from casemate_core.spec.access import RoleBinding, Tenant, User
from casemate_core.spec.environment import Environment
from casemate_core.spec.fleet import Host, Image, Network, Policy, Taint
from casemate_core.spec.secret import Secret
from casemate_core.spec.views import Change, ObjectRef
from casemate_core.spec.volume import Volume
from casemate_manager.fleet.observed import Sighting
from casemate_manager.fleet.records import NO_LIMITS, AccessKeyRecord, HostLimits, RecordChange, TokenRecord
from casemate_wire.stream import Facts, Hello, HostEvent, Inventory, Outcome

Object = Environment | Image | Network | Host | Policy | Tenant | User | RoleBinding | Secret | Volume


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ApplyResources:
    """Make or change objects: all or none. ``seed`` is random and gives new objects their uids."""

    request_key: str
    objects: tuple[Object, ...]
    seed: str
    dry_run: bool = False
    #: Who asks, for the story of the objects.
    by: str = ""


@dataclass(frozen=True, slots=True)
class DeleteResource:
    """End an object; only if it has this ``uid``, where one is given."""

    request_key: str
    kind: str
    tenant: str
    name: str
    uid: str = ""
    by: str = ""


@dataclass(frozen=True, slots=True)
class OperateInstances:
    """Do something once to an instance, or to each instance of an environment, of this ``name``; only if it has this
    ``uid``, where one is given. ``seed`` is random and gives operations their uids."""

    request_key: str
    tenant: str
    name: str
    verb: str
    seed: str
    grace_s: float | None = None
    timeout_s: float = 600.0
    uid: str = ""
    by: str = ""
    #: Of a certify; 0: the usual.
    duration_s: float = 0.0
    #: Of a migrate; empty: the scheduler chooses.
    to_host: str = ""


@dataclass(frozen=True, slots=True)
class HostHello:
    """A host dialled. ``key`` names the key of its certificate; None on plain text, where nobody has one."""

    hello: Hello
    seed: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class HostInventory:
    """A host told what it is made of."""

    host: str
    session: int
    inventory: Inventory


@dataclass(frozen=True, slots=True)
class HostFacts:
    """A host told what it observes."""

    host: str
    session: int
    facts: Facts


@dataclass(frozen=True, slots=True)
class HostNote:
    """A host told of an event or an outcome."""

    host: str
    session: int
    note: HostEvent | Outcome


@dataclass(frozen=True, slots=True)
class HostGone:
    """A host's stream ended."""

    host: str
    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class NoteAct:
    """Write down what changes no record: a denied attempt, a session of a command or console."""

    act: str
    outcome: str
    targets: tuple[str, ...] = ()
    tenants: tuple[str, ...] = ()
    detail: str = ""


@dataclass(frozen=True, slots=True)
class KeepCheckpoint:
    """Keep a signed place of the audit chain."""

    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class MakeAccessKey:
    """A new access key of a user; of its secret only the digest."""

    key_id: str
    user: str
    digest: str
    description: str
    lifetime_s: int


@dataclass(frozen=True, slots=True)
class ChangeAccessKey:
    """``disable``, ``enable``, ``delete``, or ``rotate`` to another digest, the former being taken for a while."""

    key_id: str
    change: str
    digest: str = ""
    overlap_s: int = 0


@dataclass(frozen=True, slots=True)
class OrderGpu:
    """Ask something of a GPU (`casemate_core.gpu.GpuVerb`)."""

    request_key: str
    gpu: str
    verb: str
    seed: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CreateToken:
    """Let a machine become ``host``. ``digest`` is SHA-256 of the secret that its holder is given."""

    token: str
    host: str
    digest: str
    life_s: float
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Taint, ...] = ()
    limits: HostLimits = NO_LIMITS


@dataclass(frozen=True, slots=True)
class RevokeToken:
    """Take a token back."""

    token: str


@dataclass(frozen=True, slots=True)
class UseToken:
    """A machine with the key ``key`` wants to become the host that its token names; see `RenewEnrolment`."""

    token: str
    secret: str = field(repr=False)
    key: str
    authority: str
    expires_s: float
    seed: str
    sealing: str = ""


@dataclass(frozen=True, slots=True)
class RenewEnrolment:
    """A host asks for a certificate for its key; ``authority`` would sign it, until ``expires_s``."""

    host: str
    key: str
    authority: str
    expires_s: float


@dataclass(frozen=True, slots=True)
class RevokeHost:
    """End a host's identity."""

    host: str


@dataclass(frozen=True, slots=True)
class Advance:
    """Do a bounded part of the work that follows from the records: make, place, end instances."""

    seed: str


@dataclass(frozen=True, slots=True)
class Due:
    """Do what has come due by the clock: lifetimes, deadlines."""


@dataclass(frozen=True, slots=True)
class Expire:
    """Forget answered requests of more than a day ago, and the oldest events beyond the limit."""


Command = (
    ApplyResources
    | DeleteResource
    | OperateInstances
    | NoteAct
    | MakeAccessKey
    | ChangeAccessKey
    | OrderGpu
    | HostHello
    | HostInventory
    | HostFacts
    | HostNote
    | HostGone
    | CreateToken
    | RevokeToken
    | UseToken
    | RenewEnrolment
    | RevokeHost
    | KeepCheckpoint
    | Advance
    | Due
    | Expire
)


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one object: ``created``, ``changed`` or ``unchanged``."""

    ref: ObjectRef
    action: str
    changes: tuple[Change, ...] = ()
    warnings: tuple[str, ...] = ()
    #: As it would be, for a dry run.
    object: Object | None = None


@dataclass(frozen=True, slots=True)
class ApplyAnswer:
    """``revision`` 0 for a dry run."""

    results: tuple[Applied, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class DeleteAnswer:
    """``pending``: hosts still have to let go."""

    ref: ObjectRef
    pending: bool
    revision: int


@dataclass(frozen=True, slots=True)
class OperateAnswer:
    """The operations that were made, one an instance."""

    operations: tuple[ObjectRef, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class KeyAnswer:
    """The access key as it is now, or as it was when it was deleted."""

    key: AccessKeyRecord


@dataclass(frozen=True, slots=True)
class GpuAnswer:
    """The order that was made; empty where nothing was to be done."""

    order: str
    host: str


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The host's session is taken."""

    resume: bool
    send_inventory: bool


@dataclass(frozen=True, slots=True)
class Turned:
    """The host's session is refused."""

    reason: str
    message: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class TokenMade:
    """The token as it is now."""

    record: TokenRecord


@dataclass(frozen=True, slots=True)
class Enrolled:
    """The machine is this host, and may have a certificate."""

    host: str


@dataclass(frozen=True, slots=True)
class Revoked:
    """The host's identity has ended."""

    host: str


@dataclass(frozen=True, slots=True)
class Advanced:
    """``again``: there may be more to do now."""

    again: bool


Answer = (
    ApplyAnswer
    | DeleteAnswer
    | OperateAnswer
    | KeyAnswer
    | GpuAnswer
    | Welcomed
    | Turned
    | TokenMade
    | Enrolled
    | Revoked
    | Advanced
    | None
)


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EndSession:
    """Close this session of a host: another superseded it, or its identity is held."""

    host: str
    session: int
    reason: str
    message: str
    retry_after_s: float


Effect = EndSession


@dataclass(frozen=True, slots=True)
class Batch:
    """What one command does. ``revision`` is the store's after it; 0 where no record changes.

    ``done`` names environments of which no work is left, ``wake`` those that may have some.
    """

    records: tuple[RecordChange, ...] = ()
    revision: int = 0
    answer: Answer = None
    sightings: tuple[Sighting, ...] = ()
    effects: tuple[Effect, ...] = ()
    done: tuple[str, ...] = ()
    wake: tuple[str, ...] = ()
