"""PURE. The narrow call by which the fleet asks for a place, and the plainest answer to it.

``Placer`` is all that the fleet knows of scheduling: one request, on a fleet in which earlier decisions of the same batch
are already counted. ``ScanPlacer`` asks ``core.fit`` of every host that is open, best fit first.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

from casemate_core.claims import Claim, HostClaims
from casemate_core.fit import (
    CellPolicy,
    CpuPolicy,
    CpuRequest,
    DeviceRequest,
    EmulatorPolicy,
    Fit,
    GpuLink,
    GpuRequest,
    MemoryRequest,
    NicRequest,
    Refusal,
    Request,
    ThreadPolicy,
    VolumeRequest,
    fit,
)
from casemate_core.spec.environment import Environment, EnvironmentSpec, NicSpec, Toleration
from casemate_core.spec.fleet import Taint
from casemate_core.spec.volume import Attached
from casemate_manager.fleet.observed import HostSeen, Observed
from casemate_manager.fleet.records import HostRecord, InstanceRecord, tenant_key
from casemate_manager.fleet.state import State


@dataclass(frozen=True, slots=True)
class Stamp:
    """Who the claim is for, the epoch and generation that it carries, and the volumes that go with it."""

    owner: str
    epoch: int
    generation: int
    volumes: tuple[VolumeRequest, ...] = ()


@dataclass(frozen=True, slots=True)
class Placed:
    """A host and the exact resources of it."""

    host: str
    claim: Claim


@dataclass(frozen=True, slots=True)
class Unplaced:
    """Nothing fits: hosts that were looked at, and for each reason word the hosts it kept away and one sentence."""

    hosts: int
    reasons: tuple[tuple[str, int, str], ...]

    @property
    def message(self) -> str:
        """One sentence."""
        if not self.hosts:
            return "the fleet has no hosts"
        told = "; ".join(f"{count}: {sentence}" for _, count, sentence in self.reasons)
        return f"0 of {self.hosts} hosts fit ({told})"


#: Hosts that fit among which `ScanPlacer` chooses.
ENOUGH: Final = 8


class Overlay:
    """The fleet as a placer sees it: the state, what was observed, and the claims made in the batch so far."""

    def __init__(self, state: State, observed: Observed) -> None:
        self.state = state
        self.observed = observed
        self._claims: dict[str, HostClaims] = {}

    def claims(self, host: str) -> HostClaims:
        """Who holds what on a host now."""
        if host not in self._claims:
            self._claims[host] = self.state.host_claims(host, self.observed)
        return self._claims[host]

    def add(self, host: str, claim: Claim) -> None:
        """Count a decision."""
        self._claims[host] = self.claims(host).add(claim)

    def remove(self, host: str, owner: str) -> None:
        """Take an owner's claim out."""
        self._claims[host] = self.claims(host).remove(owner)

    def fork(self) -> "Overlay":
        """A copy on which a plan can be tried."""
        copy = Overlay(self.state, self.observed)
        copy._claims = dict(self._claims)
        return copy


class Placer(Protocol):
    """Finds a place for one instance."""

    def place(
        self,
        fleet: Overlay,
        environment: Environment,
        spec: EnvironmentSpec,
        stamp: Stamp,
        only: Collection[str] | None = None,
    ) -> Placed | Unplaced:
        """``only``: the hosts that are asked about; all of them where it is None."""
        ...

    def refit(
        self, fleet: Overlay, host: str, environment: Environment, spec: EnvironmentSpec, stamp: Stamp
    ) -> Placed | Unplaced:
        """As ``place``, on one host only, whatever keeps new instances away from it."""
        ...


def request_of(spec: EnvironmentSpec) -> Request:
    """What one instance of an environment asks of a host."""
    return Request(
        CpuRequest(
            spec.cpu.count,
            spec.cpu.max,
            CpuPolicy(spec.cpu.policy),
            ThreadPolicy(spec.cpu.threads),
            EmulatorPolicy(spec.cpu.emulator),
            spec.cpu.realtime,
        ),
        MemoryRequest(
            spec.memory.size_mib, spec.memory.max_mib, spec.memory.hugepages_kib, CellPolicy(spec.memory.cells)
        ),
        spec.disk_mib,
        gpus=tuple(
            GpuRequest(
                g.count, g.model, GpuLink(g.link), g.near, g.share, g.share_milli, tuple(sorted(g.labels.items()))
            )
            for g in spec.gpus
        ),
        nics=tuple(NicRequest(nic.network, needs=_needs(nic)) for nic in spec.nics if nic.type == "sriov"),
        devices=tuple(DeviceRequest(tuple(sorted(d.labels.items())), d.count, d.near) for d in spec.devices),
    )


def _needs(nic: NicSpec) -> tuple[str, ...]:
    """What the port must be able to give its VF: said at the placement, not when the host tries it."""
    asked = {
        "vlan": nic.vlan,
        "trust": nic.trust,
        "min-rate": nic.min_rate_mbps,
        "rate": nic.max_rate_mbps,
    }
    return tuple(name for name, value in asked.items() if value)


class ScanPlacer:
    """Tries hosts one by one: those with fewest instances of the same environment first, then by name.

    Of the first `ENOUGH` that fit it takes the best fit: enough for a handful of hosts and for tests; a fleet wants the
    scheduler.
    """

    def place(
        self,
        fleet: Overlay,
        environment: Environment,
        spec: EnvironmentSpec,
        stamp: Stamp,
        only: Collection[str] | None = None,
    ) -> Placed | Unplaced:
        """See `Placer`."""
        request = replace(request_of(spec), volumes=stamp.volumes)
        refused: Counter[str] = Counter()
        sentences: dict[str, str] = {}
        best: tuple[tuple[object, ...], Placed] | None = None
        mates = _mates(fleet, environment.meta.uid)
        fitting = 0
        for name in sorted(fleet.state.hosts, key=lambda n: (mates.get(n, 0), n)):
            if fitting >= ENOUGH:
                break
            if only is not None and name not in only:
                continue
            host = fleet.state.hosts[name]
            closed = closed_because(fleet.state, fleet.observed, host, spec)
            if closed is None:
                found = self._fit(fleet, name, request, stamp)
                if isinstance(found, Fit):
                    # (instances of this environment there, quality of the fit, name)
                    fitting += 1
                    key = (mates.get(name, 0), found.key, name)
                    if best is None or key < best[0]:
                        best = (key, Placed(name, found.claim))
                    continue
                words = {type(reason).__name__: reason.sentence for reason in found.reasons}
            else:
                words = dict([closed])
            for word, sentence in words.items():
                refused[word] += 1
                sentences.setdefault(word, sentence)
        if best is not None:
            return best[1]
        return Unplaced(len(fleet.state.hosts), tuple((w, n, sentences[w]) for w, n in refused.most_common()))

    def refit(
        self, fleet: Overlay, host: str, environment: Environment, spec: EnvironmentSpec, stamp: Stamp
    ) -> Placed | Unplaced:
        """See `Placer`."""
        found = self._fit(fleet, host, replace(request_of(spec), volumes=stamp.volumes), stamp)
        if isinstance(found, Fit):
            return Placed(host, found.claim)
        return Unplaced(1, tuple((type(r).__name__, 1, r.sentence) for r in found.reasons))

    def _fit(self, fleet: Overlay, host: str, request: Request, stamp: Stamp) -> Fit | Refusal:
        topology = fleet.state.inventories[host].topology
        return fit(
            topology,
            fleet.claims(host),
            request,
            owner=stamp.owner,
            epoch=stamp.epoch,
            generation=stamp.generation,
        )


def _mates(fleet: Overlay, environment_uid: str) -> Mapping[str, int]:
    """Instances of the environment on each host, decisions of the batch included."""
    count: Counter[str] = Counter()
    for uid in fleet.state.environment_instances.get(environment_uid, {}).values():
        for placement in fleet.state.instance_placements.get(uid, {}).values():
            count[placement.host] += 1
        for host, claims in fleet._claims.items():
            if uid in claims and uid not in fleet.state.instance_placements:
                count[host] += 1
    return count


def closed_because(state: State, observed: Observed, host: HostRecord, spec: EnvironmentSpec) -> tuple[str, str] | None:
    """Why a host takes no new instance of this kind at all, before its resources are looked at: word and sentence."""
    name = host.host.meta.name
    if host.held:
        return "HostHeld", f"host is held: {host.held}"
    if not observed.host(name).connected:
        return "HostUnknown", "host is not heard from"
    if name not in state.inventories:
        return "HostJoining", "host has not told what it is made of"
    if not observed.host(name).whole:
        return "HostJoining", "host has not told what runs on it"
    if says_not_ready(observed.host(name)):
        return "HostNotReady", "host says that it is not ready"
    if host.host.spec.cordoned:
        return "HostCordoned", "host is cordoned"
    labels = host.host.meta.labels
    for key, value in spec.placement.node_selector.items():
        if labels.get(key) != value:
            return "NodeSelector", f"host does not carry the label {key}={value}"
    for taint in untolerated(host.host.spec.taints, spec.placement.tolerations):
        return "Taint", f"taint {taint.key}{'=' if taint.value else ''}{taint.value} is not tolerated"
    if spec.virtualisation == "require" and host.virtualisation == "tcg":
        return "NoKvm", "host has no KVM"
    return None


def says_not_ready(seen: HostSeen) -> bool:
    """Whether the host itself says that it takes nothing new."""
    report = seen.report
    return report is not None and any(c.type == "Ready" and c.status == "False" for c in report.conditions)


def untolerated(taints: tuple[Taint, ...], tolerations: tuple[Toleration, ...]) -> Iterator[Taint]:
    """Taints that keep an instance away."""
    for taint in taints:
        if taint.effect == "NoSchedule" and not any(_tolerates(t, taint) for t in tolerations):
            yield taint


def _tolerates(toleration: Toleration, taint: Taint) -> bool:
    if toleration.effect and toleration.effect != taint.effect:
        return False
    if toleration.key and toleration.key != taint.key:
        return False
    return toleration.operator == "Exists" or not toleration.key or toleration.value == taint.value


def stamp_for(state: State, instance: InstanceRecord, uses: tuple[Attached, ...] | None = None) -> Stamp:
    """The stamp of the instance's next placement; ``uses``: the volumes that it will have then, where they change."""
    asked = volumes_of(state, instance.meta.tenant, instance.volumes if uses is None else uses)
    return Stamp(instance.meta.uid, state.epoch, instance.placements + 1, asked)


def volumes_of(state: State, tenant: str, uses: tuple[Attached, ...]) -> tuple[VolumeRequest, ...]:
    """What an instance that uses these volumes asks of a host."""
    found = []
    for use in uses:
        record = state.volumes[tenant_key(tenant, use.volume)]
        volume = record.volume
        found.append(VolumeRequest(volume.meta.uid, use.volume, volume.spec.size_mib, record.host))
    return tuple(found)
