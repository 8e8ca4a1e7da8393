"""The packing score: place where the least of what is left becomes useless. PURE.

May live here: the badness of a bin, what a request adds to it, and the cache of that by shape.

Theory of operation. The *badness* of a bin is

    B = FRAGMENT * sum_j p_j lost_j  +  BESIDE * sum_d,q max(0, T - free_d * beside_dq)  -  sum_k v(g_k)

with T the sum of the free milli ``g_k`` of its GPUs, and 0 where T is 0.

* ``lost_j`` is what of T a request of shape j of the mix could not use: all of it where j does not fit beside the other
  dimensions or the kind of GPU is wrong, else the remainders too small for it, else what is not whole.
* The second term prices, convexly, being short of a dimension for the GPUs still free.
* ``v`` is the value of a remainder (:mod:`casemate_manager.scheduler.value`).

A request goes where B rises least, plus a price on kinds of GPU that others ask by name, plus a whisper of best fit over
the plain dimensions, which decides where there are no GPUs at all. It is never turned away while a bin fits. What of B
depends on the mix is learnt from arrivals (:mod:`casemate_manager.scheduler.mix`). Ties go to the lowest index.

The rise for a shape is kept for every bin; a bin that changed has a newer version than the cache and is computed again,
all such bins in one go. The measure of fragments follows Weng et al., "Beware of Fragmentation" (USENIX ATC 2023); the
other terms are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from casemate_manager.scheduler.bins import Bins
from casemate_manager.scheduler.mix import Mix, Shape, Weights
from casemate_manager.scheduler.value import WHOLE_MILLI

#: Weights of the terms of the badness; found on public traces at 100 % and 130 % demand together.
FRAGMENT = 0.1
BESIDE = 0.05
SCARCITY = 0.3
SCARCITY_MAX = 1.5
#: Of the best fit, in milli of a GPU for a bin that is all free. Only where no GPU is free: among bins with GPUs, best fit
#: by the other dimensions did worse than any order (4.1 against 3.6 to 3.7 % of the GPUs of a public trace not allocated).
TIGHT = 1.0

#: Score caches kept, by shape; the one used longest ago is dropped beyond it.
MAX_CACHED_SHAPES = 512

_KINDS = 64

#: Weights of the mix are rounded to multiples of its inverse.
EXACT = float(1 << 40)


@dataclass(slots=True, eq=False)
class Rises:
    """Rise of the badness by bin for one shape, inf where it does not fit, and the GPU where one slice costs least.

    Right for versions up to ``tick``.
    """

    rise: NDArray[np.float64]
    slot: NDArray[np.int64]
    tick: int
    weights: Weights


class PackScore:
    """The rise of badness of each bin for a shape, kept up incrementally."""

    def __init__(self, bins: Bins, mix: Mix, *, tight: Sequence[int] = (), beside: Sequence[int] = ()) -> None:
        """``tight``: the dimensions whose fit decides among equals; ``beside``: those priced beside GPUs."""
        self._bins = bins
        self._mix = mix
        self._beside = tuple(beside)
        self._cache: dict[Shape, Rises] = {}
        self._tight = [(d, 1.0 / largest) for d in tight if (largest := float(bins.free[d].max(initial=0))) > 0]
        self._refreeze()

    def note(self, shape: Shape) -> None:
        """Count an arrival, and renew the weights when they are old."""
        self._mix.note(shape)
        if self._mix.due():
            self._refreeze()

    def _refreeze(self) -> None:
        bins = self._bins
        weights = self._mix.freeze(len(bins.free), len(bins.gpu))
        self._weights = weights
        named = weights.models[:, None]
        self._compatible = (named == 0) | ((named >> np.minimum(np.arange(_KINDS), 62)) & 1 == 1)
        self._any_named = bool((weights.models != 0).any())
        self._per_left = FRAGMENT if len(weights.starts) else 0.0
        self._needs: dict[Shape, NDArray[np.int64]] = {}
        self._asked = np.array([d for d in range(len(bins.free)) if weights.need[d].any()], dtype=np.int64)
        self._asked_need = weights.need[self._asked][:, :, None]
        self._served_by = _served_by(weights)
        priced = [(d, p) for d in self._beside for p in weights.beside[d].tolist() if p > 0]
        self._priced = np.array([d for d, _ in priced], dtype=np.int64)
        self._per_unit = np.array([p for _, p in priced], dtype=np.float64)[:, None]
        self._scarcity = self._scarce()

    def _scarce(self) -> NDArray[np.float64]:
        """Price per milli on each kind (64,): the demand that names it over its supply, where demand fills the fleet."""
        bins, wanted = self._bins, np.zeros(_KINDS)
        slots = (bins.gpu > 0).sum(axis=0)
        supply = np.bincount(bins.model, weights=slots, minlength=_KINDS)
        for mask, share in self._weights.model_demand:
            listed = np.array([(mask >> kind) & 1 for kind in range(63)] + [0], dtype=np.float64) * supply
            if listed.sum() > 0:
                wanted += share * supply.sum() * listed / listed.sum()
        ratio = np.divide(wanted, supply, out=np.zeros(_KINDS), where=supply > 0)
        return SCARCITY * np.minimum(SCARCITY_MAX, ratio)

    def rises(self, shape: Shape) -> NDArray[np.float64]:
        """Rise per bin (N,), up to date; inf where the shape does not fit. The array belongs to the cache: do not write."""
        return self._current(shape).rise

    def _current(self, shape: Shape) -> Rises:
        bins, cached = self._bins, self._cache.pop(shape, None)
        if cached is None or cached.weights is not self._weights:
            if len(self._cache) >= MAX_CACHED_SHAPES:
                self._cache.pop(next(iter(self._cache)))
            rise, slot = self.compute(shape, np.arange(len(bins.model)))
            cached = Rises(rise, slot, bins.tick, self._weights)
        elif cached.tick != bins.tick:
            stale = bins.changed_since(cached.tick)
            cached.rise[stale], cached.slot[stale] = self.compute(shape, stale)
            cached.tick = bins.tick
        self._cache[shape] = cached
        return cached

    def best(self, shape: Shape) -> tuple[int, tuple[int, ...]] | None:
        """The bin where ``shape`` should go and the GPUs there; None where it fits nowhere.

        For whole GPUs the first whole ones, for a slice the GPU where it costs least.
        """
        cached = self._current(shape)
        at = int(cached.rise.argmin())
        if cached.rise[at] == np.inf:
            return None
        if shape.gpus == 0:
            return at, ()
        if shape.gpus == 1 and shape.share_milli < WHOLE_MILLI:
            return at, (int(cached.slot[at]),)
        return at, tuple((self._bins.gpu[:, at] >= shape.share_milli).nonzero()[0][: shape.gpus].tolist())

    def compute(self, shape: Shape, at: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Rise (K,) of the bins ``at``, from their columns alone, and the slot of the cheapest slice."""
        bins = self._bins
        asked = self._needs.get(shape)
        if asked is None:
            asked = self._needs[shape] = self._asked_of(shape)
        dimensions = len(bins.free)
        now = bins.state.take(at, axis=1)
        after = now - asked
        fits = after[: dimensions + 1].min(axis=0) >= 0
        if shape.models:
            fits &= (shape.models >> now[dimensions + 2]) & 1 == 1
        if shape.gpus and shape.share_milli < WHOLE_MILLI:
            fits &= (now[dimensions + 3 :] >= shape.share_milli).sum(axis=0) >= shape.gpus
        # The badness is for where GPUs are free; the rest, often most of it, is best fit or does not fit at all.
        has_gpus = now[dimensions + 1] > 0
        heavy = (fits & has_gpus).nonzero()[0]
        if len(heavy) == len(at):
            return self._rise(shape, now, after)
        rise, slot = np.full(len(at), np.inf), np.zeros(len(at), dtype=np.int64)
        if len(heavy):
            rise[heavy], slot[heavy] = self._rise(shape, now.take(heavy, axis=1), after.take(heavy, axis=1))
        if not shape.gpus:
            room = np.zeros(len(at))
            for d, scale in self._tight:
                room += after[d] * (TIGHT * scale)
            plain = fits & ~has_gpus
            rise[plain] = room[plain]
        return rise, slot

    def _asked_of(self, shape: Shape) -> NDArray[np.int64]:
        """What a shape takes of each row of the state of a bin, but for the slots: (R, 1)."""
        bins = self._bins
        asked = np.zeros((len(bins.state), 1), dtype=np.int64)
        asked[: len(shape.need), 0] = shape.need
        asked[len(bins.free)] = shape.gpus if shape.share_milli == WHOLE_MILLI else 0
        asked[len(bins.free) + 1] = shape.gpu_milli
        return asked

    def _rise(
        self, shape: Shape, now: NDArray[np.int64], after: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """As ``compute``, for the states ``now`` (R, K) of bins where the shape fits and GPUs are free; ``after`` (R, K) has
        what it leaves, but for the slots, which are as now."""
        weights, known, dimensions = self._weights, now.shape[1], len(self._bins.free)
        slot = np.zeros(known, dtype=np.int64)
        # The badness after and before, in one pass over twice as many columns: that is cheaper than two.
        both = np.concatenate([after, now], axis=1)
        whole, left, gpu = both[dimensions], both[dimensions + 1], both[dimensions + 3 :]
        columns = np.arange(2 * known)
        worth, several = self._served(both, both[dimensions + 2])
        of_gpu = self._worth_of(gpu, worth, columns)
        bad = self._per_left * left
        bad -= of_gpu.sum(axis=0)
        if several is not None:
            in_wholes = several[weights.several_of[whole], columns]
            in_wholes *= whole
            bad -= (FRAGMENT * WHOLE_MILLI) * in_wholes
        if len(self._priced):
            short = both.take(self._priced, axis=0) * self._per_unit
            np.subtract(left, short, out=short)
            np.maximum(short, 0.0, out=short)
            bad += BESIDE * short.sum(axis=0)
        then = bad[:known]
        if shape.gpus and shape.share_milli == WHOLE_MILLI:
            then += shape.gpus * (WHOLE_MILLI * FRAGMENT * worth[-1, :known] + weights.value[WHOLE_MILLI])
        elif shape.gpus:
            # `then` counts every GPU as it is; the change of the cheapest ones is added.
            mine = gpu[:, :known]
            rest = mine - shape.share_milli
            can = rest >= 0
            rest *= can
            change = of_gpu[:, :known] - self._worth_of(rest, worth[:, :known], columns[:known])
            if several is not None:
                less = np.maximum(whole[:known] - 1, 0)
                fewer = in_wholes[:known] - several[weights.several_of[less], columns[:known]] * less
                change += FRAGMENT * WHOLE_MILLI * fewer * (mine == WHOLE_MILLI)
            change[~can] = np.inf
            if shape.gpus == 1:
                slot = change.argmin(axis=0)
                then += change[slot, columns[:known]]
            else:
                change.partition(shape.gpus - 1, axis=0)
                then += change[: shape.gpus].sum(axis=0)
        then -= bad[known:]
        if shape.gpus and weights.model_demand:
            then += self._scarcity[now[dimensions + 2]] * shape.gpu_milli
        return then, slot

    def _worth_of(
        self, gpu: NDArray[np.int64], worth: NDArray[np.float64], columns: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """What remainders (G, K) take off the badness: the requests of the mix they serve, and their value."""
        weights = self._weights
        serves = worth[weights.class_of[gpu], columns]
        serves *= gpu
        serves *= FRAGMENT
        serves += weights.value[gpu]
        return serves

    def _served(
        self, states: NDArray[np.int64], kinds: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Weight of the mix that bins (K) of these kinds serve beside their amounts: by remainders of each class (S + 1, K),
        and by whole GPUs that suffice for so many groups of several (M + 1, K), None where the mix has none."""
        sizes = self._weights.sizes
        if not len(self._served_by):
            return np.zeros((1, len(kinds))), None
        runs = self._asked_need <= states.take(self._asked, axis=0)[:, None, :]
        all_run = np.logical_and.reduce(runs, axis=0)
        if self._any_named:
            all_run &= self._compatible[:, kinds]
        served = self._served_by @ all_run.astype(np.float64)
        if sizes + 1 == len(served):
            return served, None
        return served[: sizes + 1], served[sizes + 1 :]


def _served_by(weights: Weights) -> NDArray[np.float64]:
    """Which shapes of the mix (J columns) are served by remainders of each class (S + 1 rows), then, where the mix has
    groups of several, by so many whole GPUs (M + 1 rows): their weights, 0 where one is not. Empty without a mix.

    The weights are whole multiples of a power of two, so that products with it are exact and do not depend on the order of
    the sums: bins alike score alike, to the last bit, on every machine.
    """
    shapes = len(weights.models)
    if not shapes:
        return np.zeros((0, 0))
    exact = np.round(weights.weight[:, 0] * EXACT) / EXACT
    groups = np.searchsorted(weights.starts, np.arange(shapes), side="right") - 1
    rows = [np.where(groups < s, exact, 0.0) for s in range(weights.sizes + 1)]
    if weights.sizes < len(weights.starts):
        single = groups < weights.sizes
        numbers = range(weights.sizes, len(weights.starts) + 1)
        rows += [np.where(~single & (groups < number), exact, 0.0) for number in numbers]
    return np.array(rows)
