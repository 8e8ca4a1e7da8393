"""What a free remainder of a GPU is worth, learnt from the mix of requests that has arrived. PURE.

May live here: the one-dimensional packing problem of requests on GPUs, its dual, and the value derived from it.

Theory of operation. Suppose that demand of the learnt mix goes on until it is :data:`OVERLOAD` times what there is, and
that a small request is never turned away before a larger one (space that takes the larger takes the smaller too). How much
could be allocated at best? That is a linear program over *patterns* (what shares one GPU holds together) and over how far
each size is accepted:

    maximise   sum_t delta_t * (milli asked by all sizes <= t)
    subject to patterns hold what is accepted, size by size     (price pi_s of a size)
               no more patterns than GPUs                       (price of a GPU)
               sum_t delta_t <= 1                               (delta_t: share of the demand at which t is the largest taken)

The prices tell what room is worth at the margin: nothing where more such room is left over than anybody asks, more than its
milli where only this size can save a GPU from being broken. The value of a remainder is the best sum of prices that fits
into it, scaled so that a GPU as good as any is worth 1000: a staircase that never falls.

Solved by the simplex method with column generation (Gilmore and Gomory, 1961) on a grid of :data:`STEP_MILLI`: as many
rows as sizes and two more, so each step is one small system and one knapsack.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

WHOLE_MILLI = 1000

#: Grid of the knapsack. Sizes are rounded up to it and remainders down, so that a value never promises what does not fit.
STEP_MILLI = 10
_ROOM = WHOLE_MILLI // STEP_MILLI

#: Demand assumed to come, over what there is: room is worth something only where it is short.
OVERLOAD = 1.3

#: Sizes that prices are made for; the least asked are left out beyond it.
MAX_SIZES = 48

#: Rounds of the simplex method; instances met needed fewer than 150. Prices cut short are still prices, only less sharp.
MAX_ROUNDS = 600

_EPSILON = 1e-9


def _knapsack(prices: Sequence[float], cells: Sequence[int]) -> tuple[list[float], list[int]]:
    """Best sum of prices for every room 0.._ROOM (each size any number of times), and the last size taken (-1: none)."""
    best, last = [0.0] * (_ROOM + 1), [-1] * (_ROOM + 1)
    items = [(cells[i], prices[i], i) for i in range(len(cells)) if prices[i] > _EPSILON]
    for at in range(1, _ROOM + 1):
        top, taken = best[at - 1], -1
        for size, price, i in items:
            if size <= at and price + best[at - size] > top + _EPSILON:
                top, taken = price + best[at - size], i
        best[at], last[at] = top, taken
    return best, last


def _pattern(last: Sequence[int], cells: Sequence[int]) -> NDArray[np.float64]:
    """How often each size is in the best filling of a whole GPU."""
    pattern = np.zeros(len(cells))
    at = _ROOM
    while at > 0:
        if last[at] < 0:
            at -= 1
        else:
            pattern[last[at]] += 1
            at -= cells[last[at]]
    return pattern


def size_prices(demand: Mapping[int, float]) -> dict[int, float]:
    """Price of each size in milli of a GPU, as the module says.

    ``demand`` maps a size in milli (1..1000) to how many GPUs or slices of it are asked, in any unit. Prices are at least
    0, and no set of sizes that fits one GPU is priced above 1000 together.
    """
    asked = sorted(demand, key=lambda size: -demand[size])[:MAX_SIZES]
    sizes = sorted(size for size in asked if demand[size] > 0)
    if not sizes:
        return {}
    cells = [-(-size // STEP_MILLI) for size in sizes]
    rows = len(sizes)
    counts = np.array([demand[size] for size in sizes], dtype=np.float64)
    counts /= counts.sum()
    milli = counts * np.array(sizes)
    # Columns of accepting everything up to size t: what must be held, and the share that it uses up.
    accept = np.zeros((rows + 2, rows))
    for t in range(rows):
        accept[: t + 1, t] = counts[: t + 1]
    accept[rows + 1] = 1.0
    reward_of = np.cumsum(milli) / WHOLE_MILLI
    # Slack basis: nothing accepted. Right-hand sides of 0 are lifted a little, each differently, against cycling.
    basis, reward = np.eye(rows + 2), np.zeros(rows + 2)
    limits = np.concatenate([1e-7 * (1.0 + np.arange(rows) / rows), [reward_of[-1] / OVERLOAD, 1.0]])
    for _ in range(MAX_ROUNDS):
        dual = np.linalg.solve(basis.T, reward)
        gains = reward_of - dual @ accept
        t, slack = int(gains.argmax()), int(dual.argmin())
        best, last = _knapsack(dual[:rows].tolist(), cells)
        gain, column, worth = float(gains[t]), accept[:, t], float(reward_of[t])
        if best[_ROOM] - dual[rows] > gain:
            gain, worth = best[_ROOM] - float(dual[rows]), 0.0
            column = np.concatenate([-_pattern(last, cells), [1.0, 0.0]])
        if -dual[slack] > gain:
            gain, worth, column = -float(dual[slack]), 0.0, np.eye(rows + 2)[slack]
        if gain <= 1e-8:
            break
        direction = np.linalg.solve(basis, column)
        amounts = np.linalg.solve(basis, limits)
        positive = direction > _EPSILON
        if not positive.any():
            break
        leaving = int(np.where(positive, amounts / np.where(positive, direction, 1.0), np.inf).argmin())
        basis[:, leaving], reward[leaving] = column, worth
    prices = np.maximum(np.linalg.solve(basis.T, reward)[:rows], 0.0)
    best, _ = _knapsack(prices.tolist(), cells)
    scale = WHOLE_MILLI / best[_ROOM] if best[_ROOM] > _EPSILON else 0.0
    return {size: float(price) * scale for size, price in zip(sizes, prices, strict=True)}


def remainder_values(demand: Mapping[int, float]) -> NDArray[np.float64]:
    """Value in milli of a remainder of 0..1000 milli: shape (1001,), float64, never falling, 0 at 0 and 1000 at 1000."""
    prices = size_prices(demand)
    best, _ = _knapsack(list(prices.values()), [-(-size // STEP_MILLI) for size in prices])
    values: NDArray[np.float64] = np.minimum(np.array(best), WHOLE_MILLI)[np.arange(WHOLE_MILLI + 1) // STEP_MILLI]
    values[WHOLE_MILLI] = WHOLE_MILLI
    return values
