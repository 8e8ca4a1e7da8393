"""A claim: the exact resources of one host that one instance holds.

What may live here: the record and what follows from it alone. Who else holds what is ``ledger``; what must hold is
``rules``.

Theory of operation. A claim names things by the identities of the topology, never by an ordinal in a list: thread
numbers, cell ids, GPU UUIDs, (PF MAC, VF index), device ids, partition ids. It charges what it takes from divisible
amounts (the pool of shared CPUs, plain memory) *after* overcommit: a ratio is applied once, when the claim is made, so
the sums over claims compare with the host as it is, whatever ratio each of them was admitted under.

Growth room is part of the claim from the start: the threads of vCPUs not yet online and the memory up to the maximum
belong to the instance like the rest, and growing moves a line within the claim. It never has to ask for anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from casemate_core.cpuset import EMPTY, MAX_CPU, CpuSet
from casemate_core.errors import CallerError
from casemate_core.plain import BadPlain, from_plain, to_plain
from casemate_core.topology.model import MAX_SHARE_SLOTS, MAX_VF_INDEX

FORMAT_VERSION = 1
"""Of the plain form of a Claim. A reader refuses any other."""


@dataclass(frozen=True, slots=True)
class SharedCpu:
    """A charge on the pool of shared threads of one cell, in thousandths of a thread, after overcommit."""

    cell: int
    milli: int


@dataclass(frozen=True, slots=True)
class PlainMemory:
    """Memory of one cell outside huge-page pools, in MiB.

    ``size_mib`` is the guest's now, ``growth_mib`` what it may grow by; ``charged_mib`` is what both and the
    hypervisor's own overhead take from the cell, after overcommit.
    """

    cell: int
    size_mib: int
    growth_mib: int
    charged_mib: int


@dataclass(frozen=True, slots=True)
class Pages:
    """Huge pages of one cell: ``count`` that the guest has now and ``growth`` more that are its own."""

    cell: int
    page_kib: int
    count: int
    growth: int = 0


@dataclass(frozen=True, slots=True)
class GpuShare:
    """A slice of a GPU. ``profile`` is empty for a slice of free size; ``start`` is its first slot, -1 without slots."""

    gpu: str
    milli: int
    profile: str = ""
    start: int = -1
    slots: int = 0


@dataclass(frozen=True, slots=True)
class VfClaim:
    """A virtual function, and which of the instance's NICs it serves (ordinal in the request, from 0)."""

    pf: str
    index: int
    nic: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """Everything that one placement takes from its host."""

    owner: str
    """Who: the uid of the placement's instance, ``foreign:<uuid>`` for a VM that is not ours,
    or ``volume:<uid>``. Unique on the host."""
    epoch: int = 0
    """Of the manager that decided it."""
    generation: int = 0
    """Of the placement within the epoch."""
    vcpus: tuple[int, ...] = ()
    """Dedicated: the thread of each vCPU, growth room last. Empty for shared CPUs."""
    vcpus_online: int = 0
    """How many vCPUs run now, dedicated or shared; the rest up to ``vcpus_max`` is growth room."""
    vcpus_max: int = 0
    held: CpuSet = EMPTY
    """Siblings of the instance's vCPUs that nobody may use."""
    emulator: CpuSet = EMPTY
    """Where the emulator's own threads run. Empty: they float over the pool."""
    emulator_owned: bool = False
    """True: ``emulator`` belongs to this instance alone. False: those are housekeeping threads, used by many."""
    shared: tuple[SharedCpu, ...] = ()
    memory: tuple[PlainMemory, ...] = ()
    pages: tuple[Pages, ...] = ()
    disk_mib: int = 0
    gpus: tuple[str, ...] = ()
    """UUIDs of whole GPUs."""
    partition: int | None = None
    """The fabric partition that joins GPUs of this claim."""
    shares: tuple[GpuShare, ...] = ()
    vfs: tuple[VfClaim, ...] = ()
    devices: tuple[str, ...] = ()
    exclusive_cores: bool = False
    """Promise: no other instance has a thread on a core of ours."""
    one_cell: bool = False
    """Promise: all threads, pages and memory are of one cell."""
    realtime: bool = False
    """Promise: every vCPU thread is isolated and the emulator is off them, in the same cell."""

    @property
    def owned_mask(self) -> int:
        """Threads that nobody else may run on: vCPUs, held siblings, an owned emulator thread."""
        mask = self.held.mask
        for thread in self.vcpus:
            mask |= 1 << thread
        return mask | self.emulator.mask if self.emulator_owned else mask

    @property
    def owned(self) -> CpuSet:
        """``owned_mask`` as a set."""
        return CpuSet(self.owned_mask)

    @property
    def cells(self) -> tuple[int, ...]:
        """Cells that hold its memory, plain, huge or both, ascending: the nodeset of the domain."""
        sized = {m.cell for m in self.memory if m.size_mib + m.growth_mib} | {p.cell for p in self.pages}
        return tuple(sorted(sized))

    @property
    def memory_mib(self) -> int:
        """What the guest has now."""
        return sum(m.size_mib for m in self.memory) + sum(p.count * p.page_kib for p in self.pages) // 1024

    @property
    def memory_max_mib(self) -> int:
        """What the guest may grow to."""
        plain = sum(m.size_mib + m.growth_mib for m in self.memory)
        return plain + sum((p.count + p.growth) * p.page_kib for p in self.pages) // 1024

    def resized(self, *, vcpus: int | None = None, memory_mib: int | None = None) -> Self:
        """The claim after growing or shrinking within its own room; what it holds of the host stays the same.

        Memory grows evenly over its cells, in whole pages, never past a cell's room. Raises OutsideRoom.
        """
        claim = self
        if vcpus is not None:
            if not 1 <= vcpus <= self.vcpus_max:
                raise OutsideRoom("vCPUs", vcpus, self.vcpus_max)
            claim = replace(claim, vcpus_online=vcpus)
        if memory_mib is not None and memory_mib != self.memory_mib:
            claim = claim._with_memory(memory_mib)
        return claim

    def _with_memory(self, target_mib: int) -> Self:
        if not 0 < target_mib <= self.memory_max_mib:
            raise OutsideRoom("MiB of memory", target_mib, self.memory_max_mib)
        if self.pages:
            page_kib = self.pages[0].page_kib
            rooms = [p.count + p.growth for p in self.pages]
            counts = split_within(-(-target_mib * 1024 // page_kib), rooms)
            return replace(
                self,
                pages=tuple(
                    replace(p, count=n, growth=room - n) for p, n, room in zip(self.pages, counts, rooms, strict=True)
                ),
            )
        rooms = [m.size_mib + m.growth_mib for m in self.memory]
        sizes = split_within(target_mib, rooms)
        return replace(
            self,
            memory=tuple(
                replace(m, size_mib=n, growth_mib=room - n)
                for m, n, room in zip(self.memory, sizes, rooms, strict=True)
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """The plain form: JSON-able, complete but for defaults, with ``version``."""
        plain: dict[str, Any] = {"version": FORMAT_VERSION}
        for name, kind_default in _DEFAULTS.items():
            value = getattr(self, name)
            if value != kind_default:
                plain[name] = to_plain(value)
        return plain

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Read the plain form. Raises BadPlain; whether the claim holds on a host is ``verify_claim``."""
        if not isinstance(data, Mapping):
            raise BadPlain("", f"expected a claim, got {type(data).__name__}")
        if data.get("version") != FORMAT_VERSION:
            raise BadPlain("version", f"expected {FORMAT_VERSION}, got {data.get('version')!r}")
        for key in data:
            if key != "version" and key not in _KINDS:
                raise BadPlain(str(key), "Claim has no such field")
        if "owner" not in data:
            raise BadPlain("owner", "is missing")
        claim = cls(**{name: from_plain(kind, data[name], path=name) for name, kind in _KINDS.items() if name in data})
        _refuse_huge(claim)
        return claim


def volume_owner(uid: str) -> str:
    """Who holds the room of a volume on its host: the volume itself, whether or not an instance uses it."""
    return f"volume:{uid}"


def volume_claim(uid: str, size_mib: int, epoch: int) -> Claim:
    """What a volume takes of its host."""
    return Claim(owner=volume_owner(uid), epoch=epoch, disk_mib=size_mib)


_KINDS: dict[str, Any] = {
    "owner": str,
    "epoch": int,
    "generation": int,
    "vcpus": tuple[int, ...],
    "vcpus_online": int,
    "vcpus_max": int,
    "held": CpuSet,
    "emulator": CpuSet,
    "emulator_owned": bool,
    "shared": tuple[SharedCpu, ...],
    "memory": tuple[PlainMemory, ...],
    "pages": tuple[Pages, ...],
    "disk_mib": int,
    "gpus": tuple[str, ...],
    "partition": int | None,
    "shares": tuple[GpuShare, ...],
    "vfs": tuple[VfClaim, ...],
    "devices": tuple[str, ...],
    "exclusive_cores": bool,
    "one_cell": bool,
    "realtime": bool,
}
_EMPTY_CLAIM = Claim(owner="")
_DEFAULTS: dict[str, object] = {name: getattr(_EMPTY_CLAIM, name) for name in _KINDS}


def _refuse_huge(claim: Claim) -> None:
    """Numbers that become positions of bits are bounded where they come in: a mask of 10**12 bits is an attack."""
    for path, numbers, most in (
        ("vcpus", claim.vcpus, MAX_CPU),
        ("vfs", [v.index for v in claim.vfs], MAX_VF_INDEX),
        ("shares", [s.slots for s in claim.shares], MAX_SHARE_SLOTS),
        ("shares", [s.start if s.slots else 0 for s in claim.shares], MAX_SHARE_SLOTS),
    ):
        for number in numbers:
            if not 0 <= number <= most:
                raise BadPlain(path, f"{number} is outside 0..{most}")


class OutsideRoom(CallerError):
    """A resize that the claim's own room does not cover; a larger one is a new placement."""

    reason = "OutsideRoom"

    def __init__(self, what: str, asked: int, room: int) -> None:
        self.what = what
        self.asked = asked
        self.room = room
        super().__init__(f"{asked} {what} asked, between 1 and {room} are reserved for this instance")


def split_within(total: int, rooms: list[int]) -> list[int]:
    """``total`` over places with so much room each, as evenly as they allow; ``total`` is at most their sum."""
    parts = [0] * len(rooms)
    for rank, i in enumerate(sorted(range(len(rooms)), key=rooms.__getitem__)):
        # smallest room first: what it cannot take is shared by those that are left
        parts[i] = min(rooms[i], total // (len(rooms) - rank))
        total -= parts[i]
    for i in range(len(rooms)):
        extra = min(total, rooms[i] - parts[i])
        parts[i] += extra
        total -= extra
    return parts
