"""What has been asked so far, as weights: the mix of requests that the packing score prepares for. PURE.

May live here: the shape of a request as the score sees it, counts of arrivals, and the arrays made of them.

Theory of operation. Nobody knows the requests to come; what has come is the best guess. Every arrival is counted, whether
it was placed or not. From time to time (:meth:`Mix.due`) the counts are frozen into :class:`Weights`, which the score
uses until the next time: seldom enough that caches live long, often enough that a young mix is soon learnt. Nothing here
looks at requests that have not arrived.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from casemate_manager.scheduler.value import WHOLE_MILLI, remainder_values

#: Shapes that a mix keeps; the rarest are left out beyond it, so that the cost of a score is bounded.
MAX_SHAPES = 256

#: A request for several GPUs counts a little more than its number: it is the first that fragmentation turns away.
GPU_COUNT_EXPONENT = 0.1

#: Multiples of the mean "dimension beside one GPU" of the mix at which being short of it is priced.
BESIDE_MULTIPLES = (0.36, 0.64, 0.9, 1.1, 1.36)

#: Arrivals at which the mix is frozen first; each further time after twice as many.
FIRST_FREEZE = 50
FREEZE_GROWTH = 2.0
#: In a long-lived fleet the mix is renewed at least this often, in arrivals.
MAX_FREEZE_GAP = 20_000


@dataclass(frozen=True, slots=True)
class Shape:
    """A request as the score sees it.

    ``need``: amounts of each further dimension of the bins, in their units and order. ``gpus`` GPUs of ``share_milli``
    each; below 1000 slices on so many different GPUs. ``models``: bit mask of the GPU models that will do, 0 for any.
    """

    need: tuple[int, ...]
    gpus: int = 0
    share_milli: int = WHOLE_MILLI
    models: int = 0

    @property
    def gpu_milli(self) -> int:
        """All that is asked of GPUs, in milli of one."""
        return self.gpus * self.share_milli


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A mix, frozen. J shapes with GPUs, D dimensions.

    Shapes stand in groups: first those that one remainder serves (one GPU, or slices), by size, S groups; then those of
    several whole GPUs, by number, M groups. ``weight`` (J, 1) float64, sums up to 1; ``need`` (D, J) int64; ``models`` (J,)
    int64; ``starts`` (S + M,) int64, first shape of each group. ``class_of`` (1001,) int64: groups 0..S - 1 that a remainder
    serves. ``several_of`` (G + 1,) int64: groups of several that so many whole GPUs serve. ``value`` (1001,) float64, milli.
    ``beside`` (D, Q) float64: milli of GPU that one unit of the dimension serves, at multiples of the mean; 0 where the mix
    does not ask it. ``model_demand``: (models mask, share of GPU demand) of shapes that name models.
    """

    need: NDArray[np.int64]
    models: NDArray[np.int64]
    weight: NDArray[np.float64]
    starts: NDArray[np.int64]
    sizes: int
    class_of: NDArray[np.int64]
    several_of: NDArray[np.int64]
    value: NDArray[np.float64]
    beside: NDArray[np.float64]
    model_demand: tuple[tuple[int, float], ...]
    arrivals: int


class Mix:
    """Counts of arrivals, by shape."""

    def __init__(self) -> None:
        self._counts: Counter[Shape] = Counter()
        self.arrivals = 0
        self._due_at = float(FIRST_FREEZE)

    def note(self, shape: Shape) -> None:
        """Count one arrival."""
        self.arrivals += 1
        if shape.gpus:
            self._counts[shape] += 1

    def due(self) -> bool:
        """Whether the weights in use are old enough to freeze new ones."""
        return self.arrivals >= self._due_at

    def freeze(self, dimensions: int, gpus_per_bin: int) -> Weights:
        """The weights of all arrivals so far for bins of that form; moves :meth:`due` on.

        Shapes made before a dimension was known ask nothing of it.
        """
        self._due_at = self.arrivals + min(max(FIRST_FREEZE, self.arrivals * (FREEZE_GROWTH - 1)), MAX_FREEZE_GAP)
        shapes = sorted(self._counts.most_common(MAX_SHAPES), key=lambda item: _group(item[0]))
        count = np.array([n for _, n in shapes], dtype=np.float64)
        gpu_milli = np.array([s.gpu_milli for s, _ in shapes], dtype=np.float64)
        weight = count * (gpu_milli / WHOLE_MILLI) ** GPU_COUNT_EXPONENT
        weight /= max(weight.sum(), 1e-12)
        need = np.zeros((dimensions, len(shapes)), dtype=np.int64)
        asked: Counter[int] = Counter()
        for j, (shape, n) in enumerate(shapes):
            need[: len(shape.need), j] = shape.need
            asked[shape.share_milli] += n * shape.gpus
        groups = [_group(shape) for shape, _ in shapes]
        distinct = sorted(set(groups))
        sizes = [size for several, size in distinct if not several]
        numbers = [number for several, number in distinct if several]
        demand = count * gpu_milli
        named: Counter[int] = Counter()
        for (shape, _), milli in zip(shapes, demand, strict=True):
            if shape.models:
                named[shape.models] += milli
        total = float(demand.sum()) or 1.0
        return Weights(
            need=need,
            models=np.array([s.models for s, _ in shapes], dtype=np.int64),
            weight=weight[:, None],
            starts=np.array([groups.index(group) for group in distinct], dtype=np.int64),
            sizes=len(sizes),
            class_of=_classes(sizes, WHOLE_MILLI),
            several_of=_classes(numbers, gpus_per_bin),
            value=remainder_values(asked),
            beside=_beside(need, demand, count),
            model_demand=tuple((mask, milli / total) for mask, milli in sorted(named.items())),
            arrivals=self.arrivals,
        )


def _group(shape: Shape) -> tuple[bool, int]:
    """(several whole GPUs, how many) or (one remainder serves it, its size)."""
    several = shape.gpus > 1 and shape.share_milli == WHOLE_MILLI
    return several, shape.gpus if several else shape.share_milli


def _classes(thresholds: list[int], most: int) -> NDArray[np.int64]:
    """For each amount 0..``most`` how many of the ascending thresholds it reaches."""
    out: NDArray[np.int64] = np.searchsorted(np.array(thresholds, dtype=np.int64), np.arange(most + 1), side="right")
    return out.astype(np.int64)


def _beside(need: NDArray[np.int64], demand: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    """Milli of GPU served by one unit of each dimension, at multiples of the mean: shape (D, Q)."""
    out = np.zeros((need.shape[0], len(BESIDE_MULTIPLES)))
    total = float(demand.sum())
    for d in range(need.shape[0]) if total else ():
        mean = float(need[d] @ count) / total
        if mean > 0:
            out[d] = 1.0 / (mean * np.array(BESIDE_MULTIPLES))
    return out
