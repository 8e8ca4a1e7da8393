"""Why a request has no place, how near it came, and the smallest change with which it would have one. PURE.

May live here: the search for near misses and changes. Counting hosts by reason is ``refused``; what relaxes a request on one
host is ``casemate_core.fit.remedies``.

Theory of operation. Hosts are ranked by how little is missing, from the columns: amounts short, relative to what is asked,
and one for each rule that stands in the way. The nearest few are asked for exact numbers. Changes are searched for where
they are small:

* of the request: what the reasons of the nearest hosts propose, and one selector label, affinity rule or toleration less or
  more;
* of a host: uncordon it, set aside more pages;
* of the fleet: move one instance to another host.

Each is applied to a copy and the scheduler is run again on it: nothing is told that was not placed in the trial. The
question changes nothing, and costs a few dozen fits whatever the size of the fleet.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from casemate_core.fit import Fit, Overcommit, Refusal, Request, fit
from casemate_core.fit.remedies import suggestions as remedies_on
from casemate_core.spec.environment import Toleration
from casemate_core.topology import Topology
from casemate_manager.columns import HostView, Row
from casemate_manager.scheduler.constraints import NO_SCHEDULE, tolerated
from casemate_manager.scheduler.place import Scheduler
from casemate_manager.scheduler.refused import ENOUGH, NEIGHBOUR, POLICY, count_reasons
from casemate_manager.scheduler.request import Decision, PlacementPolicy, PlacementRequest, Unplaceable
from casemate_manager.scheduler.shape import shapes_of

MAX_NEAREST = 5
MAX_SUGGESTIONS = 5
#: Instances on near hosts that are tried to be moved.
MAX_MOVES = 24
#: Cordoned hosts that are tried.
MAX_UNCORDONED = 8


@dataclass(frozen=True, slots=True)
class Miss:
    """A host that does not take it, and all that stands in the way there, with numbers."""

    host: str
    messages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """A change with which it was placed on ``host`` in a trial.

    ``request`` where it is the request that changes, ``topology`` where it is the host that gets other page pools.
    """

    sentence: str
    host: str
    command: str = ""
    request: PlacementRequest | None = None
    topology: Topology | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer: a decision where it fits now, else reasons (text, hosts, one host's own words), misses and changes."""

    decision: Decision | None
    hosts: int
    reasons: tuple[tuple[str, int, str], ...] = ()
    nearest: tuple[Miss, ...] = ()
    changes: tuple[Change, ...] = ()
    #: Of a gang: how many of its instances fit, and that the rest does not.
    group: str = ""


#: Gives the request of a placed instance by its uid and the name by which people know it; None where it is not to be moved
#: or not known.
Movable = Callable[[str], tuple[PlacementRequest, str] | None]


def explain(
    scheduler: Scheduler,
    request: PlacementRequest,
    policy: PlacementPolicy,
    *,
    host: str = "",
    movable: Movable = lambda uid: None,
) -> Explanation:
    """Why ``request`` is not placed; with ``host``: on that host. Changes nothing but caches."""
    found = scheduler.place(request, policy, only=host, note=False)
    total = 1 if host else len(scheduler.columns)
    if isinstance(found, Decision):
        return Explanation(found, total)
    near = [scheduler.columns.row(host)] if host else _nearest(scheduler, request, policy)
    misses = tuple(Miss(row.view.name, tuple(barriers(scheduler, request, policy, row))) for row in near)
    changes: list[Change] = []
    for change in _changes(scheduler, request, policy, near, host, movable):
        if all(change.sentence != other.sentence for other in changes):
            changes.append(change)
        if len(changes) == MAX_SUGGESTIONS:
            break
    reasons = () if host else tuple(_reasons(scheduler, request, policy, found))
    return Explanation(None, total, reasons, misses, tuple(changes))


def elsewhere(scheduler: Scheduler, request: PlacementRequest, policy: PlacementPolicy, host: str) -> Explanation:
    """Of an instance that is on ``host``: what keeps it from the other hosts, counted. Raises UnknownHost."""
    columns = scheduler.columns
    shapes = shapes_of(request.request, policy.overcommit, columns)
    allowed, _ = scheduler.allowed(request, policy)
    row = columns.row(host).number
    found = count_reasons(columns, request, policy, shapes, allowed, scheduler.constraints, beside=row)
    return Explanation(None, found.hosts, tuple(_reasons(scheduler, request, policy, found)))


# --- what stands in the way -----------------------------------------------------------------------------------------------


def _reasons(
    scheduler: Scheduler, request: PlacementRequest, policy: PlacementPolicy, found: Unplaceable
) -> Iterator[tuple[str, int, str]]:
    for text, count in sorted(found.counts.items(), key=lambda item: (-item[1], item[0])):
        row = scheduler.columns.row(found.samples[text])
        own = [] if text == ENOUGH else barriers(scheduler, request, policy, row)
        yield text, count, f"on {row.view.name}: {'; '.join(own)}" if own else ""


def barriers(scheduler: Scheduler, request: PlacementRequest, policy: PlacementPolicy, row: Row) -> list[str]:
    """All that keeps a request from one host, in words."""
    view, number = row.view, row.number
    out = []
    if view.cordoned:
        out.append("the host is cordoned")
    if not view.available:
        out.append("the host is not ready or not heard from")
    for key, value in request.node_selector.items():
        if view.labels.get(key) != value:
            has = f"has {key}={view.labels[key]}" if key in view.labels else f"has no label {key}"
            out.append(f"the node selector asks for {key}={value}, the host {has}")
    out += [
        f"the taint {taint.key}{'=' if taint.value else ''}{taint.value} is not tolerated"
        for taint in view.taints
        if taint.effect == NO_SCHEDULE and not tolerated(taint, request.tolerations)
    ]
    if policy.allowed is not None and not policy.allowed[number]:
        known = policy.denied is not None and policy.denied[number] >= 0
        out.append(
            f"denied by {policy.reasons[int(policy.denied[number])]}" if known and policy.denied is not None else POLICY
        )
    near, _ = scheduler.constraints.neighbours(frozenset(request.labels.items()), request.affinity)
    if near is not None and not near[number]:
        out.append(f"hosts here {NEIGHBOUR} between instances")
    answer = _fit(view, request.request, policy.overcommit)
    if isinstance(answer, Refusal):
        out += [reason.sentence for reason in answer.reasons]
    return out


def _nearest(scheduler: Scheduler, request: PlacementRequest, policy: PlacementPolicy) -> list[Row]:
    """The hosts where least is missing, nearest first."""
    columns = scheduler.columns
    missing = _missing(scheduler, request, policy)
    order = np.argsort(missing, kind="stable")[: min(MAX_NEAREST, len(columns))]
    rows = [columns.rows[int(number)] for number in order if np.isfinite(missing[number])]
    return [row for row in rows if row is not None]


def _missing(scheduler: Scheduler, request: PlacementRequest, policy: PlacementPolicy) -> NDArray[np.float64]:
    """How far each row (N,) is from taking the request: 0 would be none; inf where there is no host."""
    columns = scheduler.columns
    bins = columns.hosts
    shape = shapes_of(request.request, policy.overcommit, columns).whole
    missing = np.zeros(len(columns.available))
    for d, need in enumerate(shape.need):
        if need:
            missing += np.maximum(0.0, need - bins.free[d]) / need
    if shape.gpus:
        free = (bins.gpu >= shape.share_milli).sum(axis=0)
        missing += np.maximum(0.0, shape.gpus - free) / shape.gpus
        if shape.models:
            missing += (shape.models >> bins.model) & 1 == 0
    allowed, _ = scheduler.allowed(request, policy)
    missing += ~allowed
    missing[~columns.live] = np.inf
    return missing


# --- changes --------------------------------------------------------------------------------------------------------------


def _changes(
    scheduler: Scheduler,
    request: PlacementRequest,
    policy: PlacementPolicy,
    near: list[Row],
    host: str,
    movable: Movable,
) -> Iterator[Change]:
    """Changes that were tried and worked, in the order in which they are told: what takes nothing away first."""
    yield from _uncordon(scheduler, request, policy, near, host)
    yield from _moves(scheduler, request, policy, near, movable)
    yield from _looser_rules(scheduler, request, policy, near, host)
    yield from _less(scheduler, request, policy, near, host)


def _uncordon(
    scheduler: Scheduler, request: PlacementRequest, policy: PlacementPolicy, near: list[Row], host: str
) -> Iterator[Change]:
    columns = scheduler.columns
    cordoned = near if host else [row for row in columns.live_rows() if row.view.cordoned]
    cordoned = sorted(cordoned, key=lambda row: row.view.name)
    tried = 0
    for row in cordoned:
        if not row.view.cordoned or not row.view.available or not _permitted(scheduler, request, policy, row):
            continue
        if (tried := tried + 1) > MAX_UNCORDONED:
            return
        name = row.view.name
        if _alone(replace(row.view, cordoned=False), request, policy.overcommit):
            yield Change(f"uncordon host {name}", name, f"casemate uncordon {name}")


def _moves(
    scheduler: Scheduler, request: PlacementRequest, policy: PlacementPolicy, near: list[Row], movable: Movable
) -> Iterator[Change]:
    """One instance moved to another host: it makes room here, and there is a place for it there."""
    allowed, _ = scheduler.allowed(request, policy)
    tried = 0
    for row in near:
        if not allowed[row.number]:
            continue
        view = row.view
        for claim in sorted(view.claims, key=lambda c: (c.memory_max_mib, c.owner)):
            known = movable(claim.owner)
            if known is None:
                continue
            other, name = known
            if (tried := tried + 1) > MAX_MOVES:
                return
            without = replace(view, claims=view.claims.remove(claim.owner))
            if not _alone(without, request, policy.overcommit):
                continue
            elsewhere = replace(policy, allowed=_but(scheduler, row), weights=None, denied=None)
            found = scheduler.place(other, elsewhere, note=False)
            if isinstance(found, Decision):
                yield Change(f"move instance {name} from {view.name} to {found.host}", view.name)
                break


def _looser_rules(
    scheduler: Scheduler, request: PlacementRequest, policy: PlacementPolicy, near: list[Row], host: str
) -> Iterator[Change]:
    for key, value in request.node_selector.items():
        fewer = {k: v for k, v in request.node_selector.items() if k != key}
        yield from _tried(
            scheduler, replace(request, node_selector=fewer), policy, host, f"drop the node selector {key}={value}"
        )
    taints = dict.fromkeys(t for row in near for t in row.view.taints if t.effect == NO_SCHEDULE)
    for taint in taints:
        if not tolerated(taint, request.tolerations):
            more = (*request.tolerations, Toleration(taint.key, "Equal", taint.value, taint.effect))
            told = f"tolerate the taint {taint.key}{'=' if taint.value else ''}{taint.value}"
            yield from _tried(scheduler, replace(request, tolerations=more), policy, host, told)
    for i, rule in enumerate(request.affinity):
        if rule.required:
            softer = tuple(replace(r, required=False) if j == i else r for j, r in enumerate(request.affinity))
            words = ", ".join(f"{k}={v}" for k, v in rule.match.items())
            told = f"let the rule to stay {rule.kind} {'to' if rule.kind == 'near' else 'from'} {words} be a preference"
            yield from _tried(scheduler, replace(request, affinity=softer), policy, host, told)


def _less(
    scheduler: Scheduler, request: PlacementRequest, policy: PlacementPolicy, near: list[Row], host: str
) -> Iterator[Change]:
    """What the reasons of near hosts propose, fewest changes first over all of them."""
    allowed, _ = scheduler.allowed(request, policy)
    found: list[tuple[int, int, Change]] = []
    for rank, row in enumerate(near):
        view = row.view
        answer = _fit(view, request.request, policy.overcommit)
        if not isinstance(answer, Refusal) or not allowed[row.number]:
            continue
        for way in remedies_on(view.topology, view.claims, request.request, answer, overcommit=policy.overcommit):
            if way.topology is not view.topology:
                changed = replace(view, topology=way.topology)
                smaller = replace(request, request=way.request)
                if _alone(changed, smaller, policy.overcommit):
                    told = f"{way.sentence} (host {view.name})"
                    asked = smaller if way.request != request.request else None
                    change = Change(told, view.name, request=asked, topology=way.topology)
                    found.append((len(way.remedies), rank, change))
                continue
            smaller = replace(request, request=way.request)
            tried = _tried(scheduler, smaller, policy, host, way.sentence)
            found += [(len(way.remedies), rank, change) for change in tried]
    for _, _, change in sorted(found, key=lambda item: item[:2]):
        yield change


def _tried(
    scheduler: Scheduler, request: PlacementRequest, policy: PlacementPolicy, host: str, told: str
) -> Iterator[Change]:
    found = scheduler.place(request, policy, only=host, note=False)
    if isinstance(found, Decision):
        yield Change(told, found.host, "", request)


def _permitted(scheduler: Scheduler, request: PlacementRequest, policy: PlacementPolicy, row: Row) -> bool:
    """Whether nothing but being closed keeps the request from a host, amounts aside."""
    if policy.allowed is not None and not policy.allowed[row.number]:
        return False
    if any(row.view.labels.get(k) != v for k, v in request.node_selector.items()):
        return False
    if any(t.effect == NO_SCHEDULE and not tolerated(t, request.tolerations) for t in row.view.taints):
        return False
    near, _ = scheduler.constraints.neighbours(frozenset(request.labels.items()), request.affinity)
    return near is None or bool(near[row.number])


def _alone(view: HostView, request: PlacementRequest, overcommit: Overcommit) -> bool:
    """Whether the scheduler places a request on a fleet of this one host; rules between instances were looked at before."""
    trial = Scheduler()
    trial.upsert_host(view)
    found = trial.place(replace(request, affinity=()), PlacementPolicy(overcommit=overcommit), note=False)
    return isinstance(found, Decision)


def _but(scheduler: Scheduler, row: Row) -> NDArray[np.bool_]:
    allowed = np.ones(len(scheduler.columns.available), dtype=np.bool_)
    allowed[row.number] = False
    return allowed


def _fit(view: HostView, request: Request, overcommit: Overcommit) -> Fit | Refusal:
    return fit(view.topology, view.claims, request, owner="?", overcommit=overcommit)
