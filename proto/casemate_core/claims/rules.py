"""The invariants of the claims on a host, each with a name.

What may live here: ``check`` over all claims of a host, and ``verify_claim`` for one more. The scheduler's tests run
``check`` after every step; the agent runs ``verify_claim`` before it writes a claim to its ledger, and ``check`` when it
starts and finds one.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from casemate_core.claims.ledger import HostClaims
from casemate_core.claims.model import Claim
from casemate_core.cpuset import CpuSet, bits
from casemate_core.topology import Gpu, Topology


class ClaimRule(StrEnum):
    """What must hold of the claims on a host."""

    SHAPE = "a claim agrees with itself: counts, room and kinds of CPU"
    STAMP = "a claim carries an epoch and a generation, and no epoch is newer than its ledger's"
    EXISTS = "what a claim names is on this host"
    THREAD_OWNER = "a thread has one owner"
    THREAD_KIND = (
        "an owned thread is neither housekeeping nor unusable, and a shared emulator runs on housekeeping threads"
    )
    WHOLE_CORES = "a core promised to one instance has no thread of another, nor of the pool"
    ONE_CELL = "an instance promised one cell has all threads and memory there"
    REALTIME = "real-time vCPUs have isolated whole cores, and an emulator beside them in the same cell"
    POOL = "the charges on a cell's pool are at most what the dedicated left of it"
    POOL_FLOOR = "a host without housekeeping threads keeps a thread in its pools for emulators"
    MEMORY = "the charges on a cell's plain memory are at most what it has, growth room counted"
    PAGES = "the huge pages held of a pool are at most its count, growth room counted"
    DISK = "the disk held is at most the disk there is"
    GPU_OWNER = "a GPU has one owner, or is held in slices that fit"
    PARTITION = "a partition has one owner, joins GPUs of that owner only, and overlaps no other active one"
    VF_OWNER = "a virtual function has one owner"
    DEVICE_OWNER = "a device has one owner"
    IOMMU_GROUP = "functions of one IOMMU group have one owner"


@dataclass(frozen=True, slots=True)
class ClaimViolation:
    """One broken rule: whose claim (empty: the host's sum), and what exactly."""

    rule: ClaimRule
    owner: str
    where: str

    def __str__(self) -> str:
        return f"{self.owner + ': ' if self.owner else ''}{self.where}: broken: {self.rule.value}"


def check(topology: Topology, claims: HostClaims) -> list[ClaimViolation]:
    """Every broken invariant of the claims on a host; recomputed from the claims, trusting no sum kept beside them."""
    found = [violation for claim in claims for violation in _one(topology, claim)]
    return found + _together(topology, claims)


def verify_claim(topology: Topology, claims: HostClaims, claim: Claim) -> list[ClaimViolation]:
    """What would be broken if ``claim`` were added to (or took the place of its owner's in) ``claims``.

    Violations that were there before, of other owners, are not repeated. Empty: the host can carry it out.
    """
    others = [held for held in claims if held.owner != claim.owner]
    stale = (
        [ClaimViolation(ClaimRule.STAMP, claim.owner, f"epoch {claim.epoch} is older than {claims.epoch}")]
        if claim.epoch < claims.epoch
        else []
    )
    after = HostClaims.of([*others, claim], claims.epoch)
    # What is wrong with another claim by itself was wrong before: only the new one is looked at alone.
    found = [*stale, *_one(topology, claim)]
    together = _together(topology, after)
    if together:
        before = set(_together(topology, HostClaims.of(others, claims.epoch)))
        found += [violation for violation in together if violation not in before]
    return found


def _together(topology: Topology, claims: HostClaims) -> list[ClaimViolation]:
    """Rules on all claims of a host at once."""
    found = [
        ClaimViolation(ClaimRule.STAMP, claim.owner, f"epoch {claim.epoch}, the ledger is at {claims.epoch}")
        for claim in claims
        if claim.epoch > claims.epoch
    ]
    found += _threads(topology, claims)
    found += _amounts(topology, claims)
    found += _gpus(topology, claims)
    found += _functions(topology, claims)
    return found


def _one(topology: Topology, claim: Claim) -> Iterator[ClaimViolation]:
    """Rules on one claim alone."""
    for rule, problems in (
        (ClaimRule.SHAPE, _shape(claim)),
        (ClaimRule.EXISTS, _exists(topology, claim)),
        (ClaimRule.THREAD_KIND, _thread_kind(topology, claim)),
        (ClaimRule.ONE_CELL, _one_cell(topology, claim)),
        (ClaimRule.REALTIME, _realtime(topology, claim)),
    ):
        for where in problems:
            yield ClaimViolation(rule, claim.owner, where)
    if not claim.owner or claim.epoch < 0 or claim.generation < 0:
        yield ClaimViolation(
            ClaimRule.STAMP, claim.owner, f"owner {claim.owner!r}, epoch {claim.epoch}, generation {claim.generation}"
        )


def _shape(claim: Claim) -> Iterator[str]:
    if len(set(claim.vcpus)) != len(claim.vcpus):
        yield f"vCPUs on threads {list(claim.vcpus)}"
    vcpu_mask = sum(1 << t for t in set(claim.vcpus))
    if vcpu_mask & claim.held.mask or (claim.emulator_owned and claim.emulator.mask & (vcpu_mask | claim.held.mask)):
        yield "a thread serves as two of vCPU, held sibling and emulator"
    if claim.vcpus and (claim.shared or len(claim.vcpus) != claim.vcpus_max):
        yield f"{len(claim.vcpus)} dedicated threads for {claim.vcpus_max} vCPUs, {len(claim.shared)} shared charges"
    if not 0 <= claim.vcpus_online <= claim.vcpus_max or (claim.vcpus_max and not claim.vcpus_online):
        yield f"{claim.vcpus_online} of {claim.vcpus_max} vCPUs online"
    if (claim.held or claim.emulator_owned) and not claim.vcpus:
        yield "threads held without a dedicated vCPU"
    if claim.emulator_owned and not claim.emulator:
        yield "an owned emulator without a thread"
    for name, keys in (
        ("shared charge", [s.cell for s in claim.shared]),
        ("plain memory", [m.cell for m in claim.memory]),
        ("pages", [(p.cell, p.page_kib) for p in claim.pages]),
        ("GPU", list(claim.gpus)),
        ("device", list(claim.devices)),
        ("VF", [(v.pf, v.index) for v in claim.vfs]),
        ("NIC", [v.nic for v in claim.vfs]),
    ):
        if len(set(keys)) != len(keys):
            yield f"a {name} twice"
    if len({p.page_kib for p in claim.pages}) > 1:
        yield "pages of two sizes"
    amounts = [claim.disk_mib, *(s.milli for s in claim.shared), *(s.milli for s in claim.shares)]
    for m in claim.memory:
        amounts += [m.size_mib, m.growth_mib, m.charged_mib]
    for p in claim.pages:
        amounts += [p.count, p.growth]
    if any(amount < 0 for amount in amounts):
        yield "a negative amount"


def _exists(topology: Topology, claim: Claim) -> Iterator[str]:
    index = topology.index
    threads = claim.owned | claim.emulator
    if threads.mask & ~index.online:
        yield f"threads {CpuSet(threads.mask & ~index.online)} are not online"
    for cell in {s.cell for s in claim.shared} | {m.cell for m in claim.memory} | {p.cell for p in claim.pages}:
        if cell not in index.cell_by_id:
            yield f"cell {cell}"
    for p in claim.pages:
        if p.cell in index.cell_by_id and p.page_kib not in index.cell_by_id[p.cell].pages:
            yield f"pool of {p.page_kib} KiB pages on cell {p.cell}"
    functions = topology.functions
    for uuid in (*claim.gpus, *(s.gpu for s in claim.shares)):
        if uuid not in functions.gpu_bit:
            yield f"GPU {uuid}"
    for v in claim.vfs:
        port = functions.pf_position.get(v.pf)
        if port is None or v.index < 0 or not functions.vf_mask[port] >> v.index & 1:
            yield f"VF {v.index} of {v.pf}"
    for device in claim.devices:
        if device not in functions.device_position:
            yield f"device {device}"
    if claim.partition is not None and claim.partition not in functions.partition_ids:
        yield f"partition {claim.partition}"


def _thread_kind(topology: Topology, claim: Claim) -> Iterator[str]:
    index = topology.index
    wrong = claim.owned_mask & index.online & ~(index.pool | index.isolated)
    if wrong:
        yield f"threads {CpuSet(wrong)}"
    if not claim.emulator_owned and claim.emulator.mask & ~index.reserved:
        yield f"emulator on {CpuSet(claim.emulator.mask & ~index.reserved)}"


def _one_cell(topology: Topology, claim: Claim) -> Iterator[str]:
    if not claim.one_cell:
        return
    cells = {s.cell for s in claim.shared} | {m.cell for m in claim.memory} | {p.cell for p in claim.pages}
    owned = claim.owned_mask
    cells |= {cell.id for cell in topology.index.cells if cell.mask & owned}
    if len(cells) > 1:
        yield f"cells {sorted(cells)}"


def _realtime(topology: Topology, claim: Claim) -> Iterator[str]:
    if not claim.realtime:
        return
    index = topology.index
    vcpus = sum(1 << t for t in set(claim.vcpus))
    if not vcpus or not claim.exclusive_cores:
        yield "no whole cores"
    if loose := vcpus & index.online & ~index.isolated:
        yield f"threads {CpuSet(loose)} are not isolated"
    home = sum(cell.mask for cell in index.cells if cell.mask & vcpus)
    if not claim.emulator.mask & home:
        yield "no emulator thread in the cell"


def _threads(topology: Topology, claims: HostClaims) -> Iterator[ClaimViolation]:
    """One owner; whole cores; what is left of the pools."""
    index = topology.index
    owned = 0
    for claim in claims:
        mask = claim.owned_mask
        if mask & owned:
            yield ClaimViolation(ClaimRule.THREAD_OWNER, claim.owner, f"threads {CpuSet(mask & owned)}")
        owned |= mask
    for claim in claims:
        if not claim.exclusive_cores:
            continue
        # the emulator's own thread is no vCPU's: its core is not part of the promise
        mask = claim.owned_mask & ~(claim.emulator.mask if claim.emulator_owned else 0)
        around = 0
        for thread in bits(mask):
            around |= index.siblings.get(thread, 0)
        if around & ~mask:
            yield ClaimViolation(ClaimRule.WHOLE_CORES, claim.owner, f"threads {CpuSet(around & ~mask)}")
    for cell in index.cells:
        left = (cell.pool & ~owned).bit_count()
        charged = sum(s.milli for claim in claims for s in claim.shared if s.cell == cell.id)
        if charged > 1000 * left:
            yield ClaimViolation(ClaimRule.POOL, "", f"cell {cell.id}: {charged} thousandths on {left} threads")
    if len(claims) and not index.reserved and not index.pool & ~owned:
        yield ClaimViolation(ClaimRule.POOL_FLOOR, "", "no thread is left")


def _amounts(topology: Topology, claims: HostClaims) -> Iterator[ClaimViolation]:
    for cell in topology.index.cells:
        charged = sum(m.charged_mib for claim in claims for m in claim.memory if m.cell == cell.id)
        if charged > cell.plain_mib:
            yield ClaimViolation(ClaimRule.MEMORY, "", f"cell {cell.id}: {charged} of {cell.plain_mib} MiB")
        for page_kib, count in cell.pages.items():
            held = sum(
                p.count + p.growth
                for claim in claims
                for p in claim.pages
                if p.cell == cell.id and p.page_kib == page_kib
            )
            if held > count:
                yield ClaimViolation(ClaimRule.PAGES, "", f"cell {cell.id}: {held} of {count} pages of {page_kib} KiB")
    disk = sum(claim.disk_mib for claim in claims)
    if disk > topology.disk_mib:
        yield ClaimViolation(ClaimRule.DISK, "", f"{disk} of {topology.disk_mib} MiB")


def _gpus(topology: Topology, claims: HostClaims) -> Iterator[ClaimViolation]:
    owners = Counter(uuid for claim in claims for uuid in claim.gpus)
    for gpu in topology.gpus:
        slices = [share for claim in claims for share in claim.shares if share.gpu == gpu.uuid]
        if owners[gpu.uuid] > 1 or (owners[gpu.uuid] and slices):
            yield ClaimViolation(
                ClaimRule.GPU_OWNER, "", f"GPU {gpu.uuid}: {owners[gpu.uuid]} owners, {len(slices)} slices"
            )
        if gpu.share_alike and len(kinds := {share.profile for share in slices}) > 1:
            yield ClaimViolation(
                ClaimRule.GPU_OWNER, "", f"GPU {gpu.uuid}: slices {' and '.join(sorted(kinds))} at once"
            )
        if sum(share.milli for share in slices) > 1000:
            yield ClaimViolation(ClaimRule.GPU_OWNER, "", f"GPU {gpu.uuid}: slices are more than it")
        taken = 0
        for share in slices:
            mask = ((1 << share.slots) - 1) << share.start if share.slots else 0
            if mask & taken or not _is_slice_of(gpu, share.profile, share.milli, share.start, share.slots):
                yield ClaimViolation(
                    ClaimRule.GPU_OWNER, "", f"GPU {gpu.uuid}: slice {share.profile or share.milli} at {share.start}"
                )
            taken |= mask
    partitions = {p.id: p for p in topology.partitions}
    active: Counter[str] = Counter()
    ids: Counter[int] = Counter()
    for claim in claims:
        if claim.partition is None or claim.partition not in partitions:
            continue
        ids[claim.partition] += 1
        members = partitions[claim.partition].gpus
        active.update(members)
        if not set(members) <= set(claim.gpus):
            yield ClaimViolation(
                ClaimRule.PARTITION, claim.owner, f"partition {claim.partition} and GPUs {list(claim.gpus)}"
            )
    for partition, count in ids.items():
        if count > 1:
            yield ClaimViolation(ClaimRule.PARTITION, "", f"partition {partition} has {count} owners")
    for uuid, count in active.items():
        if count > 1:
            yield ClaimViolation(ClaimRule.PARTITION, "", f"GPU {uuid} is in {count} active partitions")


def _is_slice_of(gpu: Gpu, profile: str, milli: int, start: int, slots: int) -> bool:
    if not profile:
        return bool(gpu.share_step_milli) and milli % gpu.share_step_milli == 0 and 0 < milli < 1000 and slots == 0
    for known in gpu.share_profiles:
        if known.name == profile and not known.bare:
            return known.milli == milli and known.slots == slots and (start in known.starts if slots else start == -1)
    return False


def _functions(topology: Topology, claims: HostClaims) -> Iterator[ClaimViolation]:
    vfs = Counter((v.pf, v.index) for claim in claims for v in claim.vfs)
    for (pf, index), count in vfs.items():
        if count > 1:
            yield ClaimViolation(ClaimRule.VF_OWNER, "", f"VF {index} of {pf} has {count} owners")
    devices = Counter(device for claim in claims for device in claim.devices)
    for device, count in devices.items():
        if count > 1:
            yield ClaimViolation(ClaimRule.DEVICE_OWNER, "", f"device {device} has {count} owners")
    shared_groups = topology.index.shared_groups
    if not shared_groups:
        return
    owners: dict[int, set[str]] = {}
    for claim in claims:
        for identity in claim_functions(claim):
            group = topology.index.group_of.get(identity, -1)
            if group in shared_groups:
                owners.setdefault(group, set()).add(claim.owner)
    for group, names in owners.items():
        if len(names) > 1:
            yield ClaimViolation(ClaimRule.IOMMU_GROUP, "", f"group {group}: {', '.join(sorted(names))}")


def claim_functions(claim: Claim) -> Iterator[str]:
    """Names of the PCI functions of a claim, as ``TopologyIndex.group_of`` has them."""
    yield from claim.gpus  # a slice is no PCI function: slices of one GPU have many owners
    yield from claim.devices
    yield from (f"{v.pf}/{v.index}" for v in claim.vfs)
