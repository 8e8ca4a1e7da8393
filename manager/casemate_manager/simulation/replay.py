"""Replay of a list of requests on empty bins, one at a time, without departures: how much GPU is left that nobody gets.

May live here: the order of arrivals, the strategies to compare, and the curve. PURE: files are read by
:mod:`casemate_manager.simulation.openb`, the clock is given by the caller.

Theory of operation. The list is inflated to a demand (a multiple of all GPUs) with requests drawn from itself, shuffled by
a seed, and placed in order; a request that fits nowhere is dropped and counts as arrived. The curve gives, for each whole
per cent of arrived GPU demand, the part of all GPUs that is not allocated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from casemate_manager.scheduler.bins import Bins
from casemate_manager.scheduler.mix import Mix, Shape
from casemate_manager.scheduler.pack import PackScore


class Strategy(Protocol):
    """Chooses a bin, and the slots of its GPUs, for each arrival; None where it fits nowhere."""

    def place(self, shape: Shape) -> tuple[int, tuple[int, ...]] | None: ...


def feasible(bins: Bins, shape: Shape) -> NDArray[np.bool_]:
    """Where a shape fits, (N,): the plain definition."""
    fits = np.asarray((bins.free >= np.array(shape.need)[:, None]).all(axis=0))
    if shape.models:
        fits &= (shape.models >> bins.model) & 1 == 1
    if shape.gpus:
        fits &= (bins.gpu >= shape.share_milli).sum(axis=0) >= shape.gpus
    return fits


def _slots(bins: Bins, at: int, shape: Shape) -> list[int]:
    """The GPUs of a bin with room for (a slice of) what is asked, the tightest first."""
    free = bins.gpu[:, at]
    return sorted((free >= shape.share_milli).nonzero()[0].tolist(), key=lambda slot: int(free[slot]))


class Random:
    """Any bin that fits, all alike; a share goes to any GPU there that has room."""

    def __init__(self, bins: Bins, rng: np.random.Generator) -> None:
        self._bins, self._rng = bins, rng

    def place(self, shape: Shape) -> tuple[int, tuple[int, ...]] | None:
        fitting = np.flatnonzero(feasible(self._bins, shape))
        if not len(fitting):
            return None
        at = int(self._rng.choice(fitting))
        slots = _slots(self._bins, at, shape)
        return at, tuple(self._rng.permutation(slots)[: shape.gpus].tolist())


class BestFit:
    """The bin with least left of CPU and GPU, each over the largest bin's; whole per cents, ties at random."""

    def __init__(self, bins: Bins, rng: np.random.Generator) -> None:
        self._bins, self._rng = bins, rng
        self._largest_cpu = int(bins.free[0].max())
        self._largest_gpu = max(int(bins.total.max()), 1)

    def place(self, shape: Shape) -> tuple[int, tuple[int, ...]] | None:
        fitting = np.flatnonzero(feasible(self._bins, shape))
        if not len(fitting):
            return None
        cpu = (self._bins.free[0, fitting] - shape.need[0]) / self._largest_cpu
        gpu = (self._bins.total[fitting] - shape.gpu_milli) / self._largest_gpu
        score = ((1.0 - 0.5 * cpu - 0.5 * gpu) * 100).astype(np.int64)
        at = int(self._rng.choice(fitting[score == score.max()]))
        return at, tuple(_slots(self._bins, at, shape)[: shape.gpus])


class Pack:
    """The scheduler's own packing score, its mix learnt from the arrivals of this replay."""

    def __init__(self, bins: Bins, rng: np.random.Generator) -> None:
        self._score = PackScore(bins, Mix(), tight=range(len(bins.free)), beside=(0,))

    def place(self, shape: Shape) -> tuple[int, tuple[int, ...]] | None:
        self._score.note(shape)
        return self._score.best(shape)


STRATEGIES: dict[str, Callable[[Bins, np.random.Generator], Strategy]] = {
    "random": Random,
    "bestfit": BestFit,
    "pack": Pack,
}


#: Arrivals between two words about the progress.
TELL_EVERY = 100


@dataclass(frozen=True, slots=True)
class Result:
    """Outcome of a replay. ``unallocated_pct[k]``: per cent of all GPUs not allocated when k % demand had arrived."""

    gpu_allocated_pct: float
    unallocated_pct: tuple[float, ...]
    placed: int
    refused: int
    seconds: float

    @property
    def placements_per_s(self) -> float:
        """Decisions, placed or not, a second."""
        return (self.placed + self.refused) / self.seconds if self.seconds > 0 else 0.0


def arrivals(pods: Sequence[Shape], capacity_milli: int, demand: float, rng: np.random.Generator) -> list[Shape]:
    """``pods`` and as many drawn from them as keep the GPU demand within ``demand`` times the capacity, shuffled."""
    order = list(pods)
    asked = sum(p.gpu_milli for p in order)
    while order:
        drawn = order[int(rng.integers(len(pods)))]
        if asked + drawn.gpu_milli > demand * capacity_milli:
            break
        asked += drawn.gpu_milli
        order.append(drawn)
    return [order[i] for i in rng.permutation(len(order))]


def replay(
    bins: Bins,
    order: Sequence[Shape],
    strategy: Strategy,
    clock: Callable[[], float],
    upto: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Place ``order`` one at a time; the curve has ``upto`` + 1 points. ``clock`` gives seconds, monotonic.

    ``progress`` is told now and then how many arrivals are done, and of how many.
    """
    capacity = int(bins.total.sum())
    curve = [100.0]
    arrived = allocated = placed = 0
    start = clock()
    for number, shape in enumerate(order):
        if number % TELL_EVERY == 0:
            progress(number, len(order))
        # The curve is read before the arrival that would pass a whole per cent.
        while len(curve) <= upto and (arrived + shape.gpu_milli) * 100 > len(curve) * capacity:
            curve.append(100.0 - 100.0 * allocated / capacity)
        arrived += shape.gpu_milli
        choice = strategy.place(shape)
        if choice is None:
            continue
        bins.take(choice[0], shape, choice[1])
        allocated += shape.gpu_milli
        placed += 1
    progress(len(order), len(order))
    seconds = clock() - start
    final = 100.0 * allocated / capacity
    curve.extend([100.0 - final] * (upto + 1 - len(curve)))
    return Result(final, tuple(curve), placed, len(order) - placed, seconds)
