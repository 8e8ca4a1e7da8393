"""Slices of GPUs that VMs are given: what an instance is to have, and what it has. PURE.

What may live here: the frozen types that the port ``drivers.gpuports.GpuShares`` speaks, the names of slices, and the comparison
of what there is with what is wanted.

Theory of operation. A VM is given a slice as a vGPU: a function that the host's vGPU driver makes on a GPU and takes away again.
It is made for one instance, under a name that follows from the instance and the GPU alone, so that making it twice makes one;
it stays through stops and starts, as long as the claim names it, and is destroyed and read back absent when the claim does not.
What was in it goes with it; nothing is left that another one could be given. Its GPU stays with the host's driver, and is
neither given whole nor reset while a vGPU is on it: who has it is then the driver, not a tenant. A vGPU of which this host has
no record is somebody's: it counts as used, is named, and is left alone.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from casemate_core.claims import Claim, GpuShare
from casemate_core.topology import Topology


@dataclass(frozen=True, slots=True)
class Share:
    """A vGPU that an instance is to have. ``id`` is a UUID, and that of the mediated device where it is one."""

    id: str
    owner: str
    gpu: str
    profile: str


@dataclass(frozen=True, slots=True)
class ShareFacts:
    """A vGPU that there is. ``owner``: the instance for which this host made it, empty where it has no record of that.
    ``address``: of the virtual function that carries it, empty for a mediated device."""

    id: str
    gpu: str
    profile: str
    owner: str = ""
    address: str = ""


def share_id(owner: str, gpu: str) -> str:
    """Name of the vGPU that an instance has on a GPU; it has one there at most. A UUID of version 8 (RFC 9562)."""
    digest = hashlib.sha256(f"casemate vGPU/{owner}/{gpu}".encode()).hexdigest()
    return f"{digest[:8]}-{digest[8:12]}-8{digest[13:16]}-8{digest[17:20]}-{digest[20:32]}"


def shares_of(owner: str, claim: Claim) -> tuple[Share, ...]:
    """What a claim gives its instance, in its order."""
    return tuple(Share(share_id(owner, s.gpu), owner, s.gpu, s.profile) for s in claim.shares)


def to_take(owner: str, keep: Claim | None, seen: Mapping[str, ShareFacts]) -> tuple[str, ...]:
    """vGPUs that an instance has and should not. ``keep`` None: all of them."""
    kept = {share.id for share in shares_of(owner, keep)} if keep is not None else set[str]()
    return tuple(sorted(id for id, facts in seen.items() if facts.owner == owner and id not in kept))


def lost(owner: str, claim: Claim, seen: Mapping[str, ShareFacts]) -> tuple[str, ...]:
    """vGPUs that a running instance should have, and that are not as they were made; in words."""
    found = []
    for share in shares_of(owner, claim):
        facts = seen.get(share.id)
        if facts is None:
            found.append(
                f"ShareGone: vGPU {share.id} ({share.profile} of {share.gpu}) of a running instance is not there"
            )
        elif (facts.gpu, facts.profile) != (share.gpu, share.profile):
            found.append(f"ShareChanged: vGPU {share.id} is {facts.profile} of {facts.gpu}, should be {share.profile}")
    return tuple(found)


def promised(claims: Iterable[Claim]) -> frozenset[str]:
    """GPUs of which claims name slices."""
    return frozenset(share.gpu for claim in claims for share in claim.shares)


def strangers(seen: Mapping[str, ShareFacts]) -> tuple[ShareFacts, ...]:
    """vGPUs of which this host has no record."""
    return tuple(facts for _, facts in sorted(seen.items()) if not facts.owner)


def stranger_claims(seen: Mapping[str, ShareFacts], topology: Topology) -> tuple[Claim, ...]:
    """What they take, so that nobody is placed there. One on a GPU with slots takes the last place that would do."""
    profiles = {(gpu.uuid, p.name): p for gpu in topology.gpus for p in gpu.share_profiles}
    found = []
    taken: dict[str, set[int]] = {}
    for facts in strangers(seen):
        profile = profiles.get((facts.gpu, facts.profile))
        if profile is None:
            continue
        start = -1
        if profile.slots:
            used = taken.setdefault(facts.gpu, set())
            start = next((s for s in sorted(profile.starts, reverse=True) if s not in used), -1)
            if start < 0:
                continue
            used.add(start)
        share = GpuShare(facts.gpu, profile.milli, profile.name, start, profile.slots)
        found.append(Claim(owner=f"foreign:{facts.id}", shares=(share,)))
    return tuple(found)


def orphans(known: Collection[str], seen: Mapping[str, ShareFacts]) -> dict[str, tuple[str, ...]]:
    """vGPUs that this host made for an instance that it does not know any more, by that instance."""
    owners = {facts.owner for facts in seen.values() if facts.owner} - set(known)
    return {owner: to_take(owner, None, seen) for owner in sorted(owners)}
