"""Finding a place: filter, score, exact fit, decision. PURE.

May live here: the scheduler's state around the columns, and the path of one decision. What a shape is, how it is scored and
what labels forbid lives in ``shape``, ``pack`` and ``constraints``; why there is no place is counted in ``refused``.

Theory of operation. A request becomes two shapes. Their scores are kept for every bin and brought up to date for the bins
that changed since the last time (``pack``); rows that policy, labels, taints or neighbours exclude are masked. Then bins are
tried best first: ``fit`` decides with exact ids. Aligned bins (one cell has it all) come before hosts as a whole. A host
that ``fit`` refused for a request is remembered with its version, and not asked again before it changed. So nothing is ever
turned away while some host fits, and a decision costs one vector pass and one or two fits.

The columns are changed by ``upsert_host``, ``apply_claim`` and ``release`` alone. ``place`` changes nothing but caches, so a
decision that is not committed leaves no trace; the commit checks the host's generation, and asks ``fit`` once more where
it has moved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from casemate_core.claims import Claim, verify_claim
from casemate_core.fit import Fit, Overcommit, Refusal, Request, fit
from casemate_manager.columns import ANY_CPU, CPU, MEMORY, FleetColumns, HostView, Row
from casemate_manager.scheduler.bins import Bins
from casemate_manager.scheduler.constraints import Constraints, Instance
from casemate_manager.scheduler.mix import Mix, Shape
from casemate_manager.scheduler.pack import PackScore
from casemate_manager.scheduler.refused import count_reasons, volume_hosts
from casemate_manager.scheduler.request import (
    BALANCE,
    DEFAULT_POLICY,
    PACK,
    SPREAD,
    Decision,
    PlacementPolicy,
    PlacementRequest,
    Unplaceable,
)
from casemate_manager.scheduler.shape import Shapes, shapes_of

#: How much a preferred rule counts, in milli of a GPU: more than any difference of packing within a host of eight GPUs.
PREFERENCE = 10_000.0
#: One more instance of the group in the same domain counts more than all preferences of weight 1000 together.
SPREADING = 1e9

#: Requests whose refusals are remembered; the one asked longest ago is dropped beyond it.
MAX_REMEMBERED = 512


def seed_of(uid: str) -> int:
    """The seed of a request: from its id, so that a decision can be replayed."""
    return crc32(uid.encode())


@dataclass(slots=True, eq=False)
class _Known:
    """What is remembered of a request: its shapes, and the version of each row when ``fit`` refused it there."""

    shapes: Shapes
    refused: NDArray[np.int64]
    any_refused: bool = False


class Scheduler:
    """Places requests on a fleet. Not thread-safe: one owner."""

    def __init__(self) -> None:
        self.columns = FleetColumns()
        self.constraints = Constraints(self.columns)
        self._cell_mix, self._host_mix = Mix(), Mix()
        self._known: dict[tuple[Request, Overcommit], _Known] = {}
        self._same: dict[int, tuple[Request, Overcommit, _Known]] = {}
        self._layout = -1
        self._kinds = 0
        self._wide = False
        self._lay_out()

    # --- the fleet -------------------------------------------------------------------------------------------------------

    def upsert_host(self, view: HostView) -> None:
        """Add a host, or replace what is known of it."""
        self.columns.upsert(view)

    def remove_host(self, host: str) -> None:
        """Forget a host; raises UnknownHost."""
        self.columns.remove(host)

    def apply_claim(self, host: str, claim: Claim, request: PlacementRequest | None = None) -> None:
        """A placement is committed; with ``request``, its labels count for affinity and spreading from now on.

        Raises DoubleOwner where something of the claim is taken.
        """
        self.columns.apply_claim(host, claim)
        if request is not None:
            apart = tuple(rule for rule in request.affinity if rule.kind == "apart" and rule.required)
            labels = frozenset(request.labels.items())
            self.constraints.add(Instance(request.uid, host, labels, request.group, apart))

    def release(self, host: str, uid: str) -> Claim:
        """A placement has gone. Raises KeyError where there is none."""
        claim = self.columns.release(host, uid)
        self.constraints.remove(uid, host)
        return claim

    def commit(self, decision: Decision, request: PlacementRequest | None = None) -> bool:
        """Apply a decision if it still holds. False where the host has changed such that it does not."""
        row = self.columns.row(decision.host)
        if row.view.generation != decision.host_generation and (
            not self.columns.available[row.number] or verify_claim(row.view.topology, row.view.claims, decision.claim)
        ):
            return False
        self.apply_claim(decision.host, decision.claim, request)
        return True

    # --- deciding --------------------------------------------------------------------------------------------------------

    def place(
        self,
        request: PlacementRequest,
        policy: PlacementPolicy = DEFAULT_POLICY,
        *,
        seed: int | None = None,
        epoch: int = 0,
        generation: int = 0,
        only: str = "",
        note: bool = True,
    ) -> Decision | Unplaceable:
        """The best place for a request, or the hosts counted by what rejects each.

        ``seed`` (default: of the request's id) decides among equals of ``balance`` and ``spread``. ``only``: that host or
        none. ``note``: count the request into the learnt mix; False for questions that are no arrivals.
        """
        known = self._know(request.request, policy.overcommit)
        shapes = known.shapes
        if note:
            self._cell_score.note(shapes.aligned or shapes.whole)
            self._host_score.note(shapes.whole)
        allowed, bonus = self.allowed(request, policy)
        if only:
            here = np.zeros(len(self.columns.available), dtype=np.bool_)
            here[self.columns.row(only).number] = True
            allowed = allowed & here
        if shapes.missing:
            return self._unplaceable(request, policy, shapes, allowed)
        strategy = SPREAD if request.spread_by or policy.spread_by else policy.strategy
        chosen_seed = None if strategy == PACK else seed_of(request.uid) if seed is None else seed
        tried = 0
        for aligned in (True, False):
            if aligned and (shapes.aligned is None or strategy == BALANCE):
                continue
            penalty = self._penalty(known, allowed, bonus)
            scores = self._scores(shapes, aligned, strategy, penalty)
            own = penalty is not None
            while (at := _lowest(scores, chosen_seed)) is not None:
                number = int(self.columns.cell_row[at]) if aligned else at
                row = self.columns.rows[number]
                assert row is not None
                tried += 1
                found = self._fit(row, request, policy.overcommit, epoch, generation)
                if isinstance(found, Fit):
                    one_cell = found.claim.one_cell
                    return Decision(request.uid, row.view.name, found.claim, row.view.generation, one_cell, tried)
                known.refused[number] = self.columns.row_version[number]
                known.any_refused = True
                if not own:
                    scores, own = scores.copy(), True
                for bin_ in row.bins if aligned else (number,):
                    scores[bin_] = np.inf
        return self._unplaceable(request, policy, shapes, allowed)

    def _unplaceable(
        self, request: PlacementRequest, policy: PlacementPolicy, shapes: Shapes, allowed: NDArray[np.bool_]
    ) -> Unplaceable:
        return count_reasons(self.columns, request, policy, shapes, allowed, self.constraints)

    def place_gang(
        self,
        requests: Sequence[PlacementRequest],
        policies: Sequence[PlacementPolicy] | PlacementPolicy = DEFAULT_POLICY,
        *,
        epoch: int = 0,
        generations: Mapping[str, int] | None = None,
    ) -> tuple[Decision, ...] | Unplaceable:
        """All of them or none: places such that all claims hold together. The largest go first; nothing stays applied."""
        rules = (policies,) * len(requests) if isinstance(policies, PlacementPolicy) else tuple(policies)
        order = sorted(range(len(requests)), key=lambda i: _size(requests[i].request), reverse=True)
        decisions: dict[int, Decision] = {}
        try:
            for i in order:
                generation = (generations or {}).get(requests[i].uid, 0)
                found = self.place(requests[i], rules[i], epoch=epoch, generation=generation)
                if isinstance(found, Unplaceable):
                    return found
                decisions[i] = found
                self.apply_claim(found.host, found.claim, requests[i])
        finally:
            for i in reversed(list(decisions)):
                self.release(decisions[i].host, decisions[i].claim.owner)
        # The generations moved by trying; what counts is that the hosts are as they were.
        return tuple(
            replace(decisions[i], host_generation=self.columns.row(decisions[i].host).view.generation)
            for i in range(len(requests))
        )

    def allowed(
        self, request: PlacementRequest, policy: PlacementPolicy
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64] | None]:
        """(rows (N,) that everything but amounts allows, liking (N,) in units of one preference; None where all are alike)."""
        allowed, dislike = self.constraints.hosts(request.node_selector, request.tolerations)
        bonus = None if dislike is None else -dislike
        if (beside := volume_hosts(self.columns, request.request)) is not None:
            allowed = allowed & beside
        if policy.allowed is not None:
            allowed = allowed & policy.allowed
        if policy.weights is not None:
            bonus = policy.weights if bonus is None else bonus + policy.weights
        near, liking = self.constraints.neighbours(frozenset(request.labels.items()), request.affinity)
        if near is not None:
            allowed = allowed & near
        if liking is not None:
            bonus = liking if bonus is None else bonus + liking
        spread_by = request.spread_by or policy.spread_by
        if spread_by or policy.strategy == SPREAD:
            crowd = self.constraints.group_counts(request.group, spread_by or "host")
            bonus = -crowd * (SPREADING / PREFERENCE) + (0.0 if bonus is None else bonus)
        return allowed, bonus

    # --- parts of a decision ---------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        columns = self.columns
        if self._layout == columns.layout:
            return
        self._layout = columns.layout
        self._cell_score = PackScore(columns.cells, self._cell_mix, tight=(CPU, MEMORY), beside=(ANY_CPU,))
        self._host_score = PackScore(columns.hosts, self._host_mix, tight=(CPU, MEMORY), beside=(ANY_CPU,))
        self._forget()

    def _forget(self) -> None:
        self._known.clear()
        self._same.clear()

    def _know(self, request: Request, overcommit: Overcommit) -> _Known:
        self._lay_out()
        if self._kinds != len(self.columns.kinds):
            # A new kind of GPU: masks by kind were made without it.
            self._kinds = len(self.columns.kinds)
            self._forget()
        # Hashing a request costs more than all else here: the one asked last of a shape is told by its identity.
        same = self._same.get(id(request))
        if same is not None and same[0] is request and same[1] == overcommit:
            return same[2]
        key = (request, overcommit)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= MAX_REMEMBERED:
                self._known.pop(next(iter(self._known)))
                self._same.clear()
            refused = np.full(len(self.columns.available), -1, dtype=np.int64)
            known = self._known[key] = _Known(shapes_of(request, overcommit, self.columns), refused)
        if len(self._same) >= MAX_REMEMBERED:
            self._same.clear()
        self._same[id(request)] = (request, overcommit, known)
        return known

    def _penalty(
        self, known: _Known, allowed: NDArray[np.bool_], bonus: NDArray[np.float64] | None
    ) -> NDArray[np.float64] | None:
        """What is added to the score of each row (N,): inf where it may not be, less where it is liked. None: nothing."""
        if known.any_refused:
            still = known.refused == self.columns.row_version
            known.any_refused = bool(still.any())
            if known.any_refused:
                allowed = allowed & ~still
        if bonus is None and self.constraints.is_everything(allowed):
            return None
        penalty = np.where(allowed, 0.0, np.inf)
        if bonus is not None:
            penalty -= PREFERENCE * bonus
        return penalty

    def _scores(
        self, shapes: Shapes, aligned: bool, strategy: str, penalty: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        """Score of each bin of the cells (B,) or of the hosts (N,); lower is better, inf where it cannot be.

        Without a penalty it may be the array of a cache, not to be written.
        """
        if aligned:
            assert shapes.aligned is not None
            rises = self._cell_score.rises(shapes.aligned)
            return rises if penalty is None else rises + penalty[self.columns.cell_row]
        whole = self.columns.hosts
        rises = _balance(whole, shapes.whole) if strategy == BALANCE else self._host_score.rises(shapes.whole)
        return rises if penalty is None else rises + penalty

    def _fit(
        self, row: Row, request: PlacementRequest, overcommit: Overcommit, epoch: int, generation: int
    ) -> Fit | Refusal:
        view = row.view
        return fit(
            view.topology,
            view.claims,
            request.request,
            owner=request.uid,
            epoch=epoch,
            generation=generation,
            overcommit=overcommit,
        )


def _lowest(scores: NDArray[np.float64], seed: int | None) -> int | None:
    """Index of the lowest score; among equals the first, or the one that the seed picks. None where all are inf."""
    at = int(scores.argmin())
    lowest = scores[at]
    if lowest == np.inf:
        return None
    if seed is None:
        return at
    equals = (scores == lowest).nonzero()[0]
    return int(equals[seed % len(equals)])


def _balance(bins: Bins, shape: Shape) -> NDArray[np.float64]:
    """How full the fullest dimension of each host would be, of what is there now: the emptiest is lowest. (N,)"""
    after = bins.free.copy()
    after[: len(shape.need)] -= np.array(shape.need, dtype=np.int64)[:, None]
    fits = after.min(axis=0) >= 0
    if shape.models:
        fits &= (shape.models >> bins.model) & 1 == 1
    if shape.gpus:
        fits &= (bins.gpu >= shape.share_milli).sum(axis=0) >= shape.gpus
    score = np.zeros(len(fits))
    for d in (ANY_CPU, MEMORY):
        largest = max(int(bins.free[d].max(initial=0)), 1)
        np.maximum(score, 1.0 - after[d] / largest, out=score)
    if shape.gpus:
        largest = max(int(bins.total.max(initial=0)), 1)
        np.maximum(score, 1.0 - (bins.total - shape.gpu_milli) / largest, out=score)
    return np.where(fits, score, np.inf)


def _size(request: Request) -> tuple[int, int, int]:
    """Order of a gang: GPUs, CPUs, memory."""
    return sum(g.count for g in request.gpus), request.cpu.reserved_count, request.memory.reserved_mib
