"""Who holds what on one host.

What may live here: the set of claims of a host and the sums that are kept beside it. The rules are in ``rules``.

Theory of operation. ``HostClaims`` is a value: adding and removing return a new one that shares what did not change.
Beside the claims it keeps their ``Usage``: masks and sums, changed by each claim's own amount, so that "what is free"
costs the size of one claim and not that of the host. Adding refuses to break "one owner" (it raises, because whoever
adds has run ``fit`` or ``verify_claim`` before); ``HostClaims.of`` takes claims as they were found, so that ``check`` can
say what is wrong with them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

from casemate_core.claims.model import Claim
from casemate_core.cpuset import CpuSet
from casemate_core.errors import InternalError
from casemate_core.plain import BadPlain

if TYPE_CHECKING:
    from casemate_core.claims.rules import ClaimViolation
    from casemate_core.topology import Topology


K = TypeVar("K")


class DoubleOwner(InternalError):
    """A claim that takes what another one holds: whoever adds it did not ask first."""

    reason = "DoubleOwner"

    def __init__(self, owner: str, what: str) -> None:
        self.owner = owner
        self.what = what
        super().__init__(f"{owner}: {what} held by another claim")


@dataclass(frozen=True, slots=True)
class Usage:
    """Sums over the claims of a host; never changed in place. Amounts of zero are left out of the mappings."""

    owned: int = 0
    """Mask of the threads that have one owner."""
    shared_milli: Mapping[int, int] = field(default_factory=dict)
    """Cell to the charge on its pool."""
    charged_mib: Mapping[int, int] = field(default_factory=dict)
    """Cell to the charge on its plain memory."""
    pages: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(cell, page size in KiB) to pages held, growth room included."""
    disk_mib: int = 0
    gpus: Mapping[str, str] = field(default_factory=dict)
    """UUID of a GPU held whole to its owner."""
    share_milli: Mapping[str, int] = field(default_factory=dict)
    """UUID of a GPU held in slices to their sum."""
    share_slots: Mapping[str, int] = field(default_factory=dict)
    """UUID of a GPU with slots to the mask of those taken."""
    share_profile: Mapping[str, str] = field(default_factory=dict)
    """UUID of a GPU held in slices to the profile of the one that came last: of them all, where it takes but one kind."""
    vfs: Mapping[str, int] = field(default_factory=dict)
    """MAC of a PF to the mask of VF indices taken."""
    devices: Mapping[str, str] = field(default_factory=dict)
    partitions: Mapping[int, str] = field(default_factory=dict)

    def plus(self, claim: Claim) -> "Usage":
        """With one claim more."""
        return self._changed(claim, 1)

    def minus(self, claim: Claim) -> "Usage":
        """With one claim less; it must have been added before."""
        return self._changed(claim, -1)

    def _changed(self, claim: Claim, sign: int) -> "Usage":
        add = sign > 0
        owned = claim.owned_mask
        shared, charged, pages = self.shared_milli, self.charged_mib, self.pages
        if claim.shared:
            shared = _summed(shared, [(s.cell, s.milli * sign) for s in claim.shared])
        if claim.memory:
            charged = _summed(charged, [(m.cell, m.charged_mib * sign) for m in claim.memory])
        if claim.pages:
            pages = _summed(pages, [((p.cell, p.page_kib), (p.count + p.growth) * sign) for p in claim.pages])
        share_milli, share_slots, share_profile = self.share_milli, self.share_slots, self.share_profile
        if claim.shares:
            share_milli = _summed(share_milli, ((s.gpu, s.milli * sign) for s in claim.shares))
            slots = ((s.gpu, ((1 << s.slots) - 1) << s.start) for s in claim.shares if s.slots)
            share_slots = _masked(share_slots, slots, add)
            cut = {**share_profile, **({s.gpu: s.profile for s in claim.shares} if add else {})}
            share_profile = {uuid: profile for uuid, profile in cut.items() if uuid in share_milli}
        vfs = self.vfs
        if claim.vfs:
            vfs = _masked(vfs, [(v.pf, 1 << v.index) for v in claim.vfs], add)
        return Usage(
            self.owned | owned if add else self.owned & ~owned,
            shared,
            charged,
            pages,
            self.disk_mib + sign * claim.disk_mib,
            _named(self.gpus, claim.gpus, claim.owner, add) if claim.gpus else self.gpus,
            share_milli,
            share_slots,
            share_profile,
            vfs,
            _named(self.devices, claim.devices, claim.owner, add) if claim.devices else self.devices,
            self.partitions
            if claim.partition is None
            else _named(self.partitions, (claim.partition,), claim.owner, add),
        )


def _summed(old: Mapping[K, int], changes: Iterable[tuple[K, int]]) -> dict[K, int]:
    new = dict(old)
    for key, amount in changes:
        total = new.get(key, 0) + amount
        if total:
            new[key] = total
        else:
            new.pop(key, None)
    return new


def _masked(old: Mapping[str, int], changes: Iterable[tuple[str, int]], add: bool) -> dict[str, int]:
    new = dict(old)
    for key, mask in changes:
        total = new.get(key, 0) | mask if add else new.get(key, 0) & ~mask
        if total:
            new[key] = total
        else:
            new.pop(key, None)
    return new


def _named(old: Mapping[K, str], keys: Iterable[K], owner: str, add: bool) -> dict[K, str]:
    new = dict(old)
    for key in keys:
        if add:
            new[key] = owner
        else:
            new.pop(key, None)
    return new


class HostClaims:
    """The claims on one host, by owner; a value.

    ``epoch`` is the highest that any claim ever added carried: it never goes back, so that a claim of a manager that
    has been superseded can be told (see ``StaleClaim``).
    """

    __slots__ = ("_claims", "epoch", "usage")

    def __init__(self, claims: Mapping[str, Claim] | None = None, usage: Usage | None = None, epoch: int = 0) -> None:
        """For ``empty``, ``of`` and ``add``; the three arguments must belong together."""
        self._claims: dict[str, Claim] = dict(claims or {})
        self.usage = usage or Usage()
        self.epoch = epoch

    @classmethod
    def empty(cls) -> Self:
        """A host on which nobody holds anything."""
        return cls()

    @classmethod
    def of(cls, claims: Iterable[Claim], epoch: int = 0) -> Self:
        """Claims as they were found, conflicts included: run ``check`` on the result. Of two claims of one owner the
        second counts."""
        by_owner = {claim.owner: claim for claim in claims}
        usage = Usage()
        for claim in by_owner.values():
            usage = usage.plus(claim)
            epoch = max(epoch, claim.epoch)
        return cls(by_owner, usage, epoch)

    def add(self, claim: Claim) -> "HostClaims":
        """With one claim more. Raises DoubleOwner, StaleClaim."""
        usage = self.usage
        if claim.owner in self._claims:
            raise DoubleOwner(claim.owner, "the owner's name is")
        if claim.epoch < self.epoch:
            raise StaleClaim(claim.owner, claim.epoch, self.epoch)
        if both := usage.owned & claim.owned_mask:
            raise DoubleOwner(claim.owner, f"threads {CpuSet(both)} are")
        if claim.gpus or claim.shares or claim.vfs or claim.devices or claim.partition is not None:
            self._refuse_taken(claim)
        new = HostClaims.__new__(HostClaims)
        new._claims = {**self._claims, claim.owner: claim}
        new.usage = usage.plus(claim)
        new.epoch = max(self.epoch, claim.epoch)
        return new

    def _refuse_taken(self, claim: Claim) -> None:
        usage = self.usage
        for uuid in claim.gpus:
            if uuid in usage.gpus or uuid in usage.share_milli:
                raise DoubleOwner(claim.owner, f"GPU {uuid} is")
        for share in claim.shares:
            slots = ((1 << share.slots) - 1) << share.start if share.slots else 0
            full = usage.share_milli.get(share.gpu, 0) + share.milli > 1000
            if share.gpu in usage.gpus or full or usage.share_slots.get(share.gpu, 0) & slots:
                raise DoubleOwner(claim.owner, f"slice of GPU {share.gpu} is")
        for vf in claim.vfs:
            if usage.vfs.get(vf.pf, 0) >> vf.index & 1:
                raise DoubleOwner(claim.owner, f"VF {vf.index} of {vf.pf} is")
        for device in claim.devices:
            if device in usage.devices:
                raise DoubleOwner(claim.owner, f"device {device} is")
        if claim.partition is not None and claim.partition in usage.partitions:
            raise DoubleOwner(claim.owner, f"partition {claim.partition} is")

    def remove(self, owner: str) -> "HostClaims":
        """Without that owner's claim. Raises KeyError where there is none."""
        claim = self._claims[owner]
        new = HostClaims.__new__(HostClaims)
        new._claims = self._claims.copy()
        del new._claims[owner]
        new.usage = self.usage.minus(claim)
        new.epoch = self.epoch
        return new

    def replace(self, claim: Claim) -> "HostClaims":
        """With this claim in place of the owner's former one (a resize, a newer generation). Raises as ``add``."""
        return self.remove(claim.owner).add(claim)

    def check(self, topology: "Topology") -> "list[ClaimViolation]":
        """Every broken invariant; see ``casemate_core.claims.rules``."""
        from casemate_core.claims.rules import check  # the rules read ledgers

        return check(topology, self)

    def get(self, owner: str) -> Claim | None:
        """That owner's claim."""
        return self._claims.get(owner)

    def __getitem__(self, owner: str) -> Claim:
        return self._claims[owner]

    def __contains__(self, owner: object) -> bool:
        return owner in self._claims

    def __iter__(self) -> Iterator[Claim]:
        return iter(self._claims.values())

    def __len__(self) -> int:
        return len(self._claims)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostClaims) and self._claims == other._claims and self.epoch == other.epoch

    def __hash__(self) -> int:
        return hash((frozenset(self._claims), self.epoch))

    def __repr__(self) -> str:
        return f"HostClaims({len(self._claims)} claims, epoch {self.epoch})"

    def to_dict(self) -> dict[str, Any]:
        """The plain form."""
        return {"epoch": self.epoch, "claims": [claim.to_dict() for claim in self]}

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Read the plain form; conflicts are kept for ``check``. Raises BadPlain."""
        if not isinstance(data, Mapping) or set(data) != {"epoch", "claims"}:
            raise BadPlain("", "expected an object with epoch and claims")
        if type(data["epoch"]) is not int or not isinstance(data["claims"], list | tuple):
            raise BadPlain("", "expected a whole number and a list")
        claims = [Claim.from_dict(item) for item in data["claims"]]
        if len({claim.owner for claim in claims}) != len(claims):
            raise BadPlain("claims", "an owner has two claims")
        return cls.of(claims, data["epoch"])


class StaleClaim(InternalError):
    """A claim of an epoch that has ended."""

    reason = "StaleClaim"

    def __init__(self, owner: str, epoch: int, newest: int) -> None:
        self.owner = owner
        self.epoch = epoch
        self.newest = newest
        super().__init__(f"{owner}: claim of epoch {epoch}, the host has seen epoch {newest}")
