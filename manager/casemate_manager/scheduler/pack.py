"""The packing score: place where the least of what is left becomes useless. PURE.

May live here: the columns of bins that the score reads, the badness of a bin, and the cache of scores by shape.

Theory of operation. A *bin* is what must be found together: a host, or one cell of it. A bin has GPUs, each with free
milli, and amounts of further dimensions (CPU, memory, pages of a size, virtual functions). Its *badness* is

    B = FRAGMENT * sum_j p_j lost_j  +  BESIDE * sum_d,q max(0, T - free_d * beside_dq)  -  sum_k v(g_k)

with T the sum of the free milli ``g_k`` of its GPUs, and 0 where T is 0.

* ``lost_j`` is what of T a request of shape j of the mix could not use: all of it where j does not fit beside the other
  dimensions or the model is wrong, else the remainders too small for it, else what is not whole.
* The second term prices, convexly, being short of a dimension for the GPUs still free.
* ``v`` is the value of a remainder (:mod:`casemate_manager.scheduler.value`).

A request goes where B rises least, plus a price on GPU models that others ask by name. It is never turned away while a bin
fits. What of B depends on the mix is learnt from arrivals (:mod:`casemate_manager.scheduler.mix`). Ties go to the lowest
index.

The rise for a shape is kept for every bin; a bin that changed has a newer version than the cache and is computed again,
all such bins in one go. The measure of fragments follows Weng et al., "Beware of Fragmentation" (USENIX ATC 2023); the
other terms are ours.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from casemate_manager.scheduler.mix import Mix, Shape, Weights
from casemate_manager.scheduler.value import WHOLE_MILLI

#: Weights of the terms of the badness; found on public traces at 100 % and 130 % demand together.
FRAGMENT = 0.4
BESIDE = 0.2
SCARCITY = 0.3
SCARCITY_MAX = 1.5

#: Score caches kept, by shape; the one used longest ago is dropped beyond it.
MAX_CACHED_SHAPES = 512

NO_GPU = -1


class Bins:
    """N bins as columns, G GPUs at most in each, D further dimensions.

    ``free`` (D, N) int64 in the units of the dimensions; ``gpu`` (G, N) int64, free milli, 0 where there is none;
    ``model`` (N,) int64, the model's number 0..62; ``total`` (N,) int64, sum of ``gpu``; ``whole`` (N,) int64, GPUs with
    1000 free; ``version`` (N,) int64, the tick of the last change.
    """

    def __init__(self, free: NDArray[np.int64], gpu: NDArray[np.int64], model: NDArray[np.int64]) -> None:
        self.free = np.ascontiguousarray(free, dtype=np.int64)
        self.gpu = np.ascontiguousarray(gpu, dtype=np.int64)
        self.model = np.ascontiguousarray(model, dtype=np.int64)
        self.total = self.gpu.sum(axis=0)
        self.whole = (self.gpu == WHOLE_MILLI).sum(axis=0)
        self.version = np.zeros(len(self.model), dtype=np.int64)
        self.tick = 0

    def take(self, bin_: int, shape: Shape, gpu: int = NO_GPU) -> tuple[int, ...]:
        """Take ``shape`` out of a bin; a share out of GPU ``gpu``, whole GPUs the first whole ones. Returns the GPUs."""
        for d, need in enumerate(shape.need):
            self.free[d, bin_] -= need
        taken: tuple[int, ...] = ()
        if shape.gpus == 1 and shape.share_milli < WHOLE_MILLI:
            taken = (gpu,)
        elif shape.gpus:
            taken = tuple(np.flatnonzero(self.gpu[:, bin_] == WHOLE_MILLI)[: shape.gpus].tolist())
        self._change(bin_, taken, -shape.share_milli)
        return taken

    def give(self, bin_: int, shape: Shape, gpus: tuple[int, ...]) -> None:
        """Give back what :meth:`take` took."""
        for d, need in enumerate(shape.need):
            self.free[d, bin_] += need
        self._change(bin_, gpus, shape.share_milli)

    def _change(self, bin_: int, gpus: tuple[int, ...], milli: int) -> None:
        for k in gpus:
            self.gpu[k, bin_] += milli
        if gpus:
            self.total[bin_] += milli * len(gpus)
            self.whole[bin_] = int((self.gpu[:, bin_] == WHOLE_MILLI).sum())
        self.tick += 1
        self.version[bin_] = self.tick


@dataclass(slots=True, eq=False)
class _Cached:
    """Rise of the badness by bin for one shape, and the GPU a share would go to; right for versions up to ``tick``."""

    rise: NDArray[np.float64]
    gpu: NDArray[np.int64]
    tick: int
    weights: Weights


class PackScore:
    """The rise of badness of each bin for a shape, kept up incrementally."""

    def __init__(self, bins: Bins, mix: Mix) -> None:
        self._bins = bins
        self._mix = mix
        self._supply = np.bincount(bins.model, weights=bins.total, minlength=64)
        self._weights = mix.freeze()
        self._refreeze()
        self._cache: dict[Shape, _Cached] = {}

    def note(self, shape: Shape) -> None:
        """Count an arrival, and renew the weights when they are old."""
        self._mix.note(shape)
        if self._mix.due():
            self._weights = self._mix.freeze()
            self._refreeze()

    def _refreeze(self) -> None:
        weights = self._weights
        every = np.arange(64)
        named = weights.models[:, None]
        self._compatible = (named == 0) | ((named >> np.minimum(every, 62)) & 1 == 1)
        self._any_named = bool((weights.models != 0).any())
        self._scarcity = self._scarce()
        # 1-D by design: value and class of a remainder are looked up by flat index.
        self._several = bool(weights.usable[weights.sizes + 1 :].any())
        self._priced = [
            (d, float(per_unit))
            for d in range(weights.beside.shape[0])
            for per_unit in weights.beside[d]
            if per_unit > 0
        ]

    def _scarce(self) -> NDArray[np.float64]:
        """Price per milli on each model (64,): its named demand over its supply, where demand fills the fleet."""
        supply, wanted = self._supply, np.zeros(64)
        for mask, share in self._weights.model_demand:
            listed = np.array([(mask >> m) & 1 for m in range(63)] + [0], dtype=np.float64) * supply
            if listed.sum() > 0:
                wanted += share * supply.sum() * listed / listed.sum()
        ratio = np.divide(wanted, supply, out=np.zeros(64), where=supply > 0)
        return SCARCITY * np.minimum(SCARCITY_MAX, ratio)

    def rises(self, shape: Shape) -> _Cached:
        """Rise per bin (inf where the shape does not fit) and the GPU a share goes to, up to date."""
        bins = self._bins
        cached = self._cache.get(shape)
        if cached is None or cached.weights is not self._weights:
            if cached is None and len(self._cache) >= MAX_CACHED_SHAPES:
                self._cache.pop(next(iter(self._cache)))
            rise, gpu = self.compute(shape, np.arange(len(bins.model)))
            cached = _Cached(rise, gpu, bins.tick, self._weights)
        else:
            del self._cache[shape]
            stale = np.flatnonzero(bins.version > cached.tick)
            if len(stale):
                cached.rise[stale], cached.gpu[stale] = self.compute(shape, stale)
                cached.tick = bins.tick
        self._cache[shape] = cached
        return cached

    def best(self, shape: Shape) -> tuple[int, int] | None:
        """The bin where ``shape`` should go, and the GPU of a share; None where it fits nowhere."""
        cached = self.rises(shape)
        at = int(cached.rise.argmin())
        if cached.rise[at] == np.inf:
            return None
        return at, int(cached.gpu[at])

    def compute(self, shape: Shape, at: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Rise and GPU of the bins ``at`` (K,), from their columns alone."""
        bins = self._bins
        free = bins.free[:, at]
        after = free - np.array(shape.need, dtype=np.int64)[:, None]
        fits = after.min(axis=0) >= 0
        if shape.models:
            fits &= (shape.models >> bins.model[at]) & 1 == 1
        gpu, total, whole, model = bins.gpu[:, at], bins.total[at], bins.whole[at], bins.model[at]
        before, _, _ = self._badness(free, gpu, total, whole, model)
        chosen = np.full(len(at), NO_GPU)
        if shape.gpus == 0:
            then, _, _ = self._badness(after, gpu, total, whole, model)
        elif shape.share_milli < WHOLE_MILLI:
            size = shape.share_milli
            then, worth, classes = self._badness(after, gpu, total - size, whole, model)
            # `then` still counts every GPU as it is; the change of one GPU is added for each, and the best is taken.
            left = gpu - size
            can = left >= 0
            left = np.where(can, left, 0)
            change = self._worth_of(gpu, worth) - self._worth_of(left, worth)
            if self._several:
                lost_whole = classes[whole, np.arange(len(at))] - classes[np.maximum(whole - 1, 0), np.arange(len(at))]
                change += FRAGMENT * np.where(gpu == WHOLE_MILLI, lost_whole, 0.0)
            change = np.where(can, change, np.inf)
            chosen = change.argmin(axis=0)
            then += change.min(axis=0)
            fits &= can.any(axis=0)
        else:
            fits &= whole >= shape.gpus
            rest = np.maximum(whole - shape.gpus, 0)
            then, worth, _ = self._badness(after, gpu, total - shape.gpu_milli, rest, model)
            then += shape.gpus * self._worth_of(np.full((1, len(at)), WHOLE_MILLI), worth)[0]
        if shape.gpus:
            then += self._scarcity[model] * shape.gpu_milli
        return np.where(fits, then - before, np.inf), chosen

    def _worth_of(self, gpu: NDArray[np.int64], worth: NDArray[np.float32]) -> NDArray[np.float64]:
        """What remainders (G, K) take off the badness: the requests of the mix they serve, and their value."""
        weights = self._weights
        serves = worth.take(weights.class_of[gpu] * worth.shape[1] + np.arange(worth.shape[1]))
        out: NDArray[np.float64] = FRAGMENT * (gpu * serves) + weights.value[gpu]
        return out

    def _badness(
        self,
        free: NDArray[np.int64],
        gpu: NDArray[np.int64],
        total: NDArray[np.int64],
        whole: NDArray[np.int64],
        model: NDArray[np.int64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
        """Badness (K,) of bins with these columns; weight served by a remainder, by class (S + 1, K); and by whole GPUs."""
        weights = self._weights
        if self._any_named:
            runs = self._compatible[:, model]
        else:
            runs = np.ones((len(weights.models), len(total)), dtype=np.bool_)
        for d in range(free.shape[0]):
            runs &= weights.need[d][:, None] <= free[d]
        served = weights.usable @ runs.astype(np.float32)
        worth, several = served[: weights.sizes + 1], served[weights.sizes + 1 :]
        bad = FRAGMENT * total - self._worth_of(gpu, worth).sum(axis=0)
        if self._several:
            bad -= FRAGMENT * several[whole, np.arange(len(total))]
        for d, per_unit in self._priced:
            bad += BESIDE * np.maximum(0.0, total - free[d] * per_unit)
        return bad, worth, several
