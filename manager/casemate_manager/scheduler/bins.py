"""Columns of the packing score: what is free in each bin. PURE.

May live here: the arrays and their bookkeeping; what they mean is said by whoever fills them.

A *bin* is what must be found together: a host, or one cell of it. Each has free milli of up to G GPUs and free amounts of D
further dimensions. Every change stamps the bin with a new ``version``, so that caches know what is old.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from casemate_manager.scheduler.value import WHOLE_MILLI

if TYPE_CHECKING:
    from casemate_manager.scheduler.mix import Shape


#: Changes kept by number; who is further behind looks at the versions of all bins.
MAX_LOGGED = 4096


class Bins:
    """N bins as columns.

    ``free`` (D, N) int64 in the units of the dimensions; ``gpu`` (G, N) int64, free milli, 0 where there is none;
    ``model`` (N,) int64, number 0..62 of what kind of GPUs; ``total`` (N,) int64, sum of ``gpu``; ``whole`` (N,) int64,
    GPUs with 1000 free; ``version`` (N,) int64, the tick of the last change. All but the versions are rows of one array,
    ``state``, so that one gather reads a bin: the dimensions, ``whole``, ``total``, ``model``, the slots.
    """

    def __init__(self, free: NDArray[np.int64], gpu: NDArray[np.int64], model: NDArray[np.int64]) -> None:
        dimensions, slots = len(free), len(gpu)
        self.state = np.zeros((dimensions + 3 + slots, len(model)), dtype=np.int64)
        self.free = self.state[:dimensions]
        self.whole = self.state[dimensions]
        self.total = self.state[dimensions + 1]
        self.model = self.state[dimensions + 2]
        self.gpu = self.state[dimensions + 3 :]
        self.free[:], self.gpu[:], self.model[:] = free, gpu, model
        self.total[:] = self.gpu.sum(axis=0)
        self.whole[:] = (self.gpu == WHOLE_MILLI).sum(axis=0)
        self.version = np.zeros(len(self.model), dtype=np.int64)
        self.tick = 0
        self._log: list[int] = []
        self._logged_from = 0

    def touch(self, bin_: int) -> None:
        """Stamp a bin as changed."""
        self.tick += 1
        self.version[bin_] = self.tick
        self._log.append(bin_)
        if len(self._log) > 2 * MAX_LOGGED:
            del self._log[:MAX_LOGGED]
            self._logged_from += MAX_LOGGED

    def changed_since(self, tick: int) -> NDArray[np.int64]:
        """Numbers of the bins that changed after ``tick``, ascending: (K,) int64."""
        if tick < self._logged_from:
            return (self.version > tick).nonzero()[0]
        return np.array(sorted(set(self._log[tick - self._logged_from :])), dtype=np.int64)

    def count(self, bin_: int) -> None:
        """Bring ``total`` and ``whole`` of a bin in line with its GPUs."""
        column = self.gpu[:, bin_].tolist()
        self.total[bin_] = sum(column)
        self.whole[bin_] = column.count(WHOLE_MILLI)

    def take(self, bin_: int, shape: "Shape", gpus: tuple[int, ...]) -> None:
        """Take a shape out of a bin, its GPUs or slices from the slots ``gpus``."""
        self._change(bin_, shape, gpus, -1)

    def give(self, bin_: int, shape: "Shape", gpus: tuple[int, ...]) -> None:
        """Give back what :meth:`take` took."""
        self._change(bin_, shape, gpus, 1)

    def _change(self, bin_: int, shape: "Shape", gpus: tuple[int, ...], sign: int) -> None:
        for d, need in enumerate(shape.need):
            self.free[d, bin_] += sign * need
        for k in gpus:
            self.gpu[k, bin_] += sign * shape.share_milli
        if gpus:
            self.count(bin_)
        self.touch(bin_)
