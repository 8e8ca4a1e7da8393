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


@dataclass(slots=True, eq=False)
class Rises:
    """Rise of the badness by bin for one shape; inf where it does not fit. Right for versions up to ``tick``."""

    rise: NDArray[np.float64]
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
        self._bad = np.zeros(len(bins.model))
        self._known = np.full(len(bins.model), -1, dtype=np.int64)
        named = weights.models[:, None]
        self._compatible = (named == 0) | ((named >> np.minimum(np.arange(_KINDS), 62)) & 1 == 1)
        self._any_named = bool((weights.models != 0).any())
        self._several = bool(weights.usable[weights.sizes + 1 :].any())
        self._asked = [d for d in range(len(bins.free)) if weights.need[d].any()]
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
        bins, cached = self._bins, self._cache.pop(shape, None)
        if cached is None or cached.weights is not self._weights:
            if len(self._cache) >= MAX_CACHED_SHAPES:
                self._cache.pop(next(iter(self._cache)))
            cached = Rises(self.compute(shape, np.arange(len(bins.model))), bins.tick, self._weights)
        elif cached.tick != bins.tick:
            stale = (bins.version > cached.tick).nonzero()[0]
            cached.rise[stale] = self.compute(shape, stale)
            cached.tick = bins.tick
        self._cache[shape] = cached
        return cached.rise

    def best(self, shape: Shape) -> int | None:
        """The bin where ``shape`` should go; None where it fits nowhere."""
        rise = self.rises(shape)
        at = int(rise.argmin())
        return None if rise[at] == np.inf else at

    def slots(self, shape: Shape, bin_: int) -> tuple[int, ...]:
        """The GPUs of a bin where a shape that fits there should go: the first whole ones, or where slices cost least."""
        if shape.gpus == 0:
            return ()
        bins = self._bins
        if shape.share_milli == WHOLE_MILLI:
            return tuple((bins.gpu[:, bin_] == WHOLE_MILLI).nonzero()[0][: shape.gpus].tolist())
        at = np.array([bin_])
        after = bins.free[:, at]
        after[: len(shape.need)] -= np.array(shape.need)[:, None]
        _, worth, classes = self._badness(after, at, bins.total[at] - shape.gpu_milli, bins.whole[at])
        change = self._slice(shape, bins.gpu[:, at], bins.whole[at], worth, classes)[:, 0]
        return tuple(change.argsort(kind="stable")[: shape.gpus].tolist())

    def compute(self, shape: Shape, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rise of the bins ``at`` (K,), from their columns alone."""
        bins = self._bins
        after = bins.free[:, at]
        after[: len(shape.need)] -= np.array(shape.need, dtype=np.int64)[:, None]
        fits = after.min(axis=0) >= 0
        if shape.models:
            fits &= (shape.models >> bins.model[at]) & 1 == 1
        total = bins.total[at]
        if total.any():
            whole = bins.whole[at]
            if shape.gpus == 0:
                then, _, _ = self._badness(after, at, total, whole)
            elif shape.share_milli < WHOLE_MILLI:
                # The badness with every GPU as it is; then the change of the cheapest GPUs is added.
                then, worth, classes = self._badness(after, at, total - shape.gpu_milli, whole)
                change = self._slice(shape, bins.gpu[:, at], whole, worth, classes)
                if shape.gpus == 1:
                    then += change.min(axis=0)
                elif shape.gpus <= len(change):
                    change.partition(shape.gpus - 1, axis=0)
                    then += change[: shape.gpus].sum(axis=0)
                else:
                    then[:] = np.inf
            else:
                fits &= whole >= shape.gpus
                rest = np.maximum(whole - shape.gpus, 0)
                then, worth, _ = self._badness(after, at, total - shape.gpu_milli, rest)
                then += shape.gpus * (WHOLE_MILLI * FRAGMENT * worth[-1] + self._weights.value[WHOLE_MILLI])
            then -= self._before(at)
            if shape.gpus and self._weights.model_demand:
                then += self._scarcity[bins.model[at]] * shape.gpu_milli
        else:
            then = np.full(len(at), np.inf if shape.gpus else 0.0)
        if self._tight:
            left = sum((after[d] * scale for d, scale in self._tight), start=np.zeros(len(at)))
            then += np.where(total == 0, TIGHT * left, 0.0)
        then[~fits] = np.inf
        return then

    def _before(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """Badness (K,) of bins as they are; kept, since every shape compares with it."""
        bins = self._bins
        stale = at[bins.version[at] > self._known[at]]
        if len(stale):
            bad, _, _ = self._badness(bins.free[:, stale], stale, bins.total[stale], bins.whole[stale])
            self._bad[stale] = bad
            self._known[stale] = bins.version[stale]
        out: NDArray[np.float64] = self._bad[at]
        return out

    def _slice(
        self,
        shape: Shape,
        gpu: NDArray[np.int64],
        whole: NDArray[np.int64],
        worth: NDArray[np.float64],
        several: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """What taking a slice off each GPU (G, K) adds to the badness; inf where it has no room."""
        left = gpu - shape.share_milli
        can = left >= 0
        left[~can] = 0
        change = self._worth_of(gpu, worth) - self._worth_of(left, worth)
        if self._several:
            columns = np.arange(len(whole))
            fewer = several[whole, columns] - several[np.maximum(whole - 1, 0), columns]
            change += FRAGMENT * np.where(gpu == WHOLE_MILLI, fewer, 0.0)
        change[~can] = np.inf
        return change

    def _worth_of(self, gpu: NDArray[np.int64], worth: NDArray[np.float64]) -> NDArray[np.float64]:
        """What remainders (G, K) take off the badness: the requests of the mix they serve, and their value."""
        weights, count = self._weights, worth.shape[1]
        serves = worth.ravel().take(weights.class_of[gpu] * count + np.arange(count))
        out: NDArray[np.float64] = FRAGMENT * (gpu * serves) + weights.value[gpu]
        return out

    def _badness(
        self, free: NDArray[np.int64], at: NDArray[np.int64], total: NDArray[np.int64], whole: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Badness (K,) of bins ``at`` with these amounts; weight served by a remainder, by class (S + 1, K); by whole GPUs."""
        weights = self._weights
        if self._any_named:
            runs = self._compatible[:, self._bins.model[at]]
        else:
            runs = np.ones((len(weights.models), len(total)), dtype=np.bool_)
        for d in self._asked:
            runs &= weights.need[d][:, None] <= free[d]
        served = weights.usable @ runs.astype(np.float64)
        worth, several = served[: weights.sizes + 1], served[weights.sizes + 1 :]
        bad = FRAGMENT * total - self._worth_of(self._bins.gpu[:, at], worth).sum(axis=0)
        if self._several:
            bad -= FRAGMENT * several[whole, np.arange(len(total))]
        if len(self._priced):
            bad += BESIDE * np.maximum(0.0, total - free[self._priced] * self._per_unit).sum(axis=0)
        return bad, worth, several
