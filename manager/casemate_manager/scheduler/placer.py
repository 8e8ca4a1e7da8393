"""The scheduler behind the fleet's narrow call: brings the columns in line with the records, asks, and words the answer. PURE.

May live here: what joins ``casemate_manager.fleet`` and the scheduler. Neither knows the other but through this module.

Theory of operation. The fleet's state is the truth; columns are a copy made for speed. Before each question the copy is
compared with the state by identity of records (they are frozen, so what is the same object has not changed), first those
of the state, once for each revision, then the few claims that the batch at hand has added. Of what hosts say the few parts
that matter here are compared. Only hosts that differ are written again. Several states may be asked about in turn; each
time the difference is what is written.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from casemate_core.claims import HostClaims
from casemate_core.fit import Fit, Request, VolumeRequest, fit
from casemate_core.gpu import GpuOrder
from casemate_core.spec.environment import Environment, EnvironmentSpec
from casemate_core.spec.fleet import Policy
from casemate_manager.columns import HostView
from casemate_manager.fleet.observed import HostSeen, Observed
from casemate_manager.fleet.placing import (
    Overlay,
    Placed,
    Stamp,
    Unplaced,
    closed_because,
    request_of,
    says_not_ready,
    stamp_for,
)
from casemate_manager.fleet.state import State
from casemate_manager.policy.book import PolicyBook
from casemate_manager.policy.expressions import Language
from casemate_manager.scheduler.constraints import Instance
from casemate_manager.scheduler.explain import Explanation, elsewhere, explain
from casemate_manager.scheduler.explain_gang import explain_gang
from casemate_manager.scheduler.place import Scheduler
from casemate_manager.scheduler.request import Decision, PlacementPolicy, PlacementRequest, Unplaceable


class FleetPlacer:
    """A ``Placer`` for fleets of any size. One owner at a time; asking does not change the fleet."""

    def __init__(self, language: Language) -> None:
        self._language = language
        self.scheduler = Scheduler()
        self.book = PolicyBook(language)
        self._policies: tuple[Policy, ...] = ()
        self._records: dict[str, object] = {}
        self._inventories: dict[str, object] = {}
        self._claims: dict[str, HostClaims] = {}
        self._gpu_orders: dict[str, Mapping[str, GpuOrder]] = {}
        self._seen: dict[str, HostSeen] = {}
        self._asked: tuple[int, int, int, int] = (0, -1, -1, -1)
        self._overlaid: set[str] = set()
        self._left: frozenset[str] = frozenset()
        self._emulated: set[str] = set()

    def place(
        self,
        fleet: Overlay,
        environment: Environment,
        spec: EnvironmentSpec,
        stamp: Stamp,
        only: Collection[str] | None = None,
    ) -> Placed | Unplaced:
        """See ``Placer``."""
        self.sync(fleet)
        asked = _with_volumes(self.request_for(environment, spec), stamp.volumes)
        request = placement_request(environment, spec, stamp.owner, asked)
        policy = self.policy_for(environment, spec)
        if only is not None:
            others = [name for name in fleet.state.hosts if name not in only]
            policy = self._without(policy, others, NOT_ASKED)
        found = self.scheduler.place(request, policy, epoch=stamp.epoch, generation=stamp.generation)
        if isinstance(found, Decision):
            return Placed(found.host, found.claim)
        return self._worded(fleet, spec, request, policy, found)

    def refit(
        self, fleet: Overlay, host: str, environment: Environment, spec: EnvironmentSpec, stamp: Stamp
    ) -> Placed | Unplaced:
        """See ``Placer``."""
        self.sync(fleet)
        if host not in self.scheduler.columns:
            return Unplaced(1, (("HostJoining", 1, "host has not told what it is made of"),))
        found = fit(
            fleet.state.inventories[host].topology,
            fleet.claims(host),
            _with_volumes(self.request_for(environment, spec), stamp.volumes),
            owner=stamp.owner,
            epoch=stamp.epoch,
            generation=stamp.generation,
            overcommit=self.policy_for(environment, spec).overcommit,
        )
        if isinstance(found, Fit):
            return Placed(host, found.claim)
        return Unplaced(1, tuple((type(r).__name__, 1, r.sentence) for r in found.reasons))

    def twin(self) -> Self:
        """Another placer of this kind, with columns of its own and nothing learnt: for questions."""
        return type(self)(self._language)

    def explain_synced(
        self,
        state: State,
        environment: Environment,
        spec: EnvironmentSpec,
        uid: str,
        host: str = "",
        gang: Sequence[str] = (),
    ) -> Explanation:
        """Why an instance has no place on the columns as ``sync`` left them, and what would give it one.

        Of ``state`` records of instances are read, to know what may be moved, and of volumes. ``gang``: uids of the
        instances that wait with it, where its environment is placed whole or not at all. Raises UnknownHost.
        """

        def movable(other: str) -> tuple[PlacementRequest, str] | None:
            instance = state.instances.get(other)
            if instance is None or state.is_ending(instance):
                return None
            owner, its = state.environment_of(instance).environment, state.spec_of(instance)
            asked = _with_volumes(self.request_for(owner, its), stamp_for(state, instance).volumes)
            request = placement_request(owner, its, other, asked)
            return request, f"{instance.meta.tenant}/{instance.meta.name}"

        def asking(other: str) -> PlacementRequest:
            instance = state.instances.get(other)
            volumes = stamp_for(state, instance).volumes if instance is not None else ()
            asked = _with_volumes(self.request_for(environment, spec), volumes)
            return placement_request(environment, spec, other, asked)

        request = asking(uid)
        policy = self.policy_for(environment, spec)
        if spec.gang and not host:
            # By uid as the fleet places them: in the order of their ordinals.
            mates = [asking(other) for other in gang or (uid,)]
            return explain_gang(self.scheduler, mates, policy, epoch=state.epoch)
        return explain(self.scheduler, request, policy, host=host, movable=movable)

    def explain_elsewhere(
        self, state: State, environment: Environment, spec: EnvironmentSpec, uid: str, host: str
    ) -> Explanation:
        """What keeps an instance that is on ``host`` from the other hosts, on the columns as ``sync`` left them."""
        if host not in self.scheduler.columns:
            return Explanation(None, 0)
        instance = state.instances.get(uid)
        volumes = stamp_for(state, instance).volumes if instance is not None else ()
        asked = _with_volumes(self.request_for(environment, spec), volumes)
        request = placement_request(environment, spec, uid, asked)
        return elsewhere(self.scheduler, request, self.policy_for(environment, spec), host)

    def request_for(self, environment: Environment, spec: EnvironmentSpec) -> Request:
        """What one instance of an environment asks of a host; the simulation asks for more than a spec can say yet."""
        return request_of(spec)

    def policy_for(self, environment: Environment, spec: EnvironmentSpec) -> PlacementPolicy:
        """The policy of an environment on the columns as they are."""
        meta, columns = environment.meta, self.scheduler.columns
        policy = self.book.resolve(columns, meta.name, meta.tenant, meta.labels)
        if spec.virtualisation != "require" or not self._emulated:
            return policy
        return self._without(policy, self._emulated, NO_KVM)

    def _without(self, policy: PlacementPolicy, hosts: Iterable[str], why: str) -> PlacementPolicy:
        """The policy that allows none of these hosts besides."""
        columns = self.scheduler.columns
        allowed = np.ones(len(columns.available), dtype=np.bool_) if policy.allowed is None else policy.allowed.copy()
        denied = np.full(len(allowed), -1, dtype=np.int64) if policy.denied is None else policy.denied.copy()
        for name in hosts:
            if name in columns:
                number = columns.row(name).number
                allowed[number], denied[number] = False, len(policy.reasons)
        return replace(policy, allowed=allowed, denied=denied, reasons=(*policy.reasons, why))

    # --- the copy --------------------------------------------------------------------------------------------------------

    def sync(self, fleet: Overlay, most: int = 0) -> bool:
        """Bring the columns in line with what ``fleet`` shows; with ``most``: so many hosts of it. Whether all is in line."""
        state, observed, columns = fleet.state, fleet.observed, self.scheduler.columns
        asked = (id(state), state.revision, id(observed), observed.hosts_version)
        overlay = fleet._claims
        if asked != self._asked:
            # Changes that were only tried, or seen in another state, are undone by the same comparison.
            changed = _differ(state.hosts, self._records) | _differ(state.inventories, self._inventories)
            changed |= _differ(state.claims, self._claims) | self._overlaid | self._left
            changed |= _differ(state.gpu_orders, self._gpu_orders)
            if asked[2:] != self._asked[2:]:
                changed |= _seen_otherwise(observed.hosts, self._seen)
                self._seen = dict(observed.hosts)
            self._records, self._inventories = dict(state.hosts), dict(state.inventories)
            self._claims, self._asked = dict(state.claims), asked
            self._gpu_orders = dict(state.gpu_orders)
            self._overlaid = set()
            # by name: rows are numbered as they come, and equal ones are chosen by their numbers
            order = sorted(changed)
            order, left = (order[:most], order[most:]) if most else (order, [])
            for host in order:
                self._write(state, observed, host, None)
            self._left = frozenset(left)
            if left:
                self._asked = (0, -1, -1, -1)
            policies = tuple(state.policies.values())
            if policies != self._policies:
                self._policies = policies
                self.book.set(policies)
        for host in sorted(self._overlaid - overlay.keys()):
            self._write(state, observed, host, None)
            self._overlaid.discard(host)
        for host, claims in overlay.items():
            if host in columns and columns.row(host).view.claims is not claims:
                self._write(state, observed, host, claims)
                self._overlaid.add(host)
        return not self._left

    def _write(self, state: State, observed: Observed, host: str, claims: HostClaims | None) -> None:
        """One host as the state shows it, with other claims where they are given."""
        scheduler = self.scheduler
        old = scheduler.columns.row(host).view if host in scheduler.columns else None
        record, inventory = state.hosts.get(host), state.inventories.get(host)
        if record is None or inventory is None:
            if old is not None:
                self._members(state, host, old.claims, HostClaims.empty())
                scheduler.remove_host(host)
            return
        seen = observed.host(host)
        held = claims if claims is not None else state.host_claims(host, observed)
        meta, spec = record.host.meta, record.host.spec
        available = not record.held and seen.connected and seen.whole and not says_not_ready(seen)
        (self._emulated.add if record.virtualisation == "tcg" else self._emulated.discard)(host)
        if old is not None and held == old.claims:
            held = old.claims
        generation = old.generation + (held is not old.claims) if old is not None else 0
        view = HostView(host, inventory.topology, held, meta.labels, spec.taints, spec.cordoned, available, generation)
        if old is not None and old.topology is not view.topology and old.topology == view.topology:
            view = replace(view, topology=old.topology)
        self._members(state, host, old.claims if old is not None else HostClaims.empty(), held)
        scheduler.upsert_host(view)

    def _members(self, state: State, host: str, before: HostClaims, after: HostClaims) -> None:
        """Tell the constraints which instances came and went."""
        constraints = self.scheduler.constraints
        if before is after:
            return
        for claim in before:
            if claim.owner not in after:
                constraints.remove(claim.owner, host)
        for claim in after:
            if claim.owner in before:
                continue
            instance = state.instances.get(claim.owner)
            if instance is not None:
                environment = state.environment_of(instance).environment
                rules = state.spec_of(instance).placement.affinity
                apart = tuple(rule for rule in rules if rule.kind == "apart" and rule.required)
                labels = frozenset(environment.meta.labels.items())
                constraints.add(Instance(claim.owner, host, labels, environment.meta.uid, apart))

    # --- words -----------------------------------------------------------------------------------------------------------

    def _worded(
        self,
        fleet: Overlay,
        spec: EnvironmentSpec,
        request: PlacementRequest,
        policy: PlacementPolicy,
        found: Unplaceable,
    ) -> Unplaced:
        """The counts, each told with the exact numbers of one host that it stands for."""
        reasons: list[tuple[str, int, str]] = []
        for text, count in sorted(found.counts.items(), key=lambda item: (-item[1], item[0])):
            host = found.samples[text]
            closed = closed_because(fleet.state, fleet.observed, fleet.state.hosts[host], spec)
            row = self.scheduler.columns.row(host)
            if closed is not None:
                reasons.append((closed[0], count, closed[1]))
                continue
            refusal = fit(
                row.view.topology, row.view.claims, request.request, owner=request.uid, overcommit=policy.overcommit
            )
            if isinstance(refusal, Fit):
                word = "Policy" if text.startswith("are denied by") else "Affinity"
                reasons.append((word, count, f"hosts that {text}"))
            else:
                first = refusal.reasons[0]
                reasons.append((type(first).__name__, count, first.sentence))
        unknown = len(fleet.state.hosts) - found.hosts
        if unknown > 0:
            reasons.append(("HostJoining", unknown, "host has not told what it is made of"))
        return Unplaced(len(fleet.state.hosts), tuple(reasons))


def _with_volumes(request: Request, volumes: tuple[VolumeRequest, ...]) -> Request:
    return replace(request, volumes=volumes) if volumes else request


NO_KVM = "the request for KVM, which they do not have"
NOT_ASKED = "the choice of hosts that it can move to"


def placement_request(environment: Environment, spec: EnvironmentSpec, uid: str, request: Request) -> PlacementRequest:
    """One instance of an environment, as the scheduler is asked."""
    rules = spec.placement
    return PlacementRequest(
        uid=uid,
        request=request,
        group=environment.meta.uid,
        labels=environment.meta.labels,
        node_selector=rules.node_selector,
        tolerations=rules.tolerations,
        affinity=rules.affinity,
        spread_by=rules.spread_by,
        priority=spec.priority,
    )


def _differ(now: Mapping[str, Any], known: Mapping[str, Any]) -> set[str]:
    """Keys whose values are not the same objects."""
    changed = {key for key, value in now.items() if known.get(key) is not value}
    if len(now) != len(known) or changed:
        changed |= _gone(known, now)
    return changed


def _seen_otherwise(now: Mapping[str, HostSeen], known: Mapping[str, HostSeen]) -> set[str]:
    """Hosts of which something is seen otherwise that `FleetPlacer._write` reads. Most words of a host are none of that."""
    changed = _gone(known, now)
    for host, seen in now.items():
        before = known.get(host)
        if before is not seen and (before is None or _told(before) != _told(seen)):
            changed.add(host)
    return changed


def _told(seen: HostSeen) -> tuple[object, ...]:
    if seen.report is None:
        return (seen.connected, seen.whole, False, (), ())
    held = tuple((gpu.uuid, gpu.held) for gpu in seen.report.gpus)
    return (seen.connected, seen.whole, says_not_ready(seen), seen.report.foreign_claims, held)


def _gone(known: Iterable[str], now: Mapping[str, Any]) -> set[str]:
    return {key for key in known if key not in now}
