"""What a free remainder of a GPU is worth, learnt from the mix of shares that has arrived. PURE.

May live here: the one-dimensional packing problem of shares on GPUs, its dual, and the value derived from it.

Theory of operation. A GPU of 1000 milli with ``g`` free is worth what the shares it can still take are worth, and a share
is worth the part of a GPU that an optimal packing of the whole mix spends on it. That is the dual price of the cutting
stock problem (Gilmore and Gomory, 1961): with ``d_s`` the demand for size ``s``, minimise the number of GPUs such that the
patterns cover all demands. The price of a size times 1000 is in milli; the value of a remainder is the best sum of prices
that fits into it, so it is a staircase that never falls. Two examples: where most shares ask 810, a remainder of 190 is
worth next to nothing and one of 810 almost a whole GPU; where most ask 250, the staircase has four equal steps.

The linear program is solved here by column generation over a grid of :data:`STEP_MILLI`: as many rows as there are sizes
(a few tens), so each step is one small solve and one knapsack.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

WHOLE_MILLI = 1000

#: Grid of the knapsack. Sizes are rounded up to it and remainders down, so that a value never promises what does not fit.
STEP_MILLI = 10

#: Rounds of column generation; the instances met needed fewer than 80, and a price cut short is still a valid lower value.
MAX_ROUNDS = 400

_EPSILON = 1e-9


def _knapsack(
    prices: NDArray[np.float64], cells: NDArray[np.int64], room: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Best sum of prices for every room 0..``room`` (unbounded knapsack), and the last size taken there (-1: none)."""
    best = np.zeros(room + 1)
    last = np.full(room + 1, -1, dtype=np.int64)
    for at in range(int(cells.min()), room + 1):
        fits = cells <= at
        gains = np.where(fits, prices + best[at - np.minimum(cells, at)], -1.0)
        taken = int(gains.argmax())
        best[at], last[at] = best[at - 1], -1
        if gains[taken] > best[at] + _EPSILON:
            best[at], last[at] = gains[taken], taken
    return best, last


def _pattern(last: NDArray[np.int64], cells: NDArray[np.int64], sizes: int) -> NDArray[np.float64]:
    pattern = np.zeros(sizes)
    at = len(last) - 1
    while at > 0:
        if last[at] < 0:
            at -= 1
            continue
        pattern[last[at]] += 1
        at -= int(cells[last[at]])
    return pattern


def share_prices(demand: Mapping[int, float]) -> dict[int, float]:
    """Dual price of each share size, in milli of a GPU.

    ``demand`` maps a size in milli (1..999) to how many of it are asked, any scale; sizes with no demand are left out.
    Every price lies in 0..1000, and no set of shares that fits one GPU is priced above 1000.
    """
    sizes = sorted(size for size, count in demand.items() if count > 0)
    if not sizes:
        return {}
    cells = np.array([-(-size // STEP_MILLI) for size in sizes], dtype=np.int64)
    wanted = np.array([demand[size] for size in sizes], dtype=np.float64)
    wanted /= wanted.sum()
    room, rows = WHOLE_MILLI // STEP_MILLI, len(sizes)
    # The first basis: each size alone, as often as it fits. Columns of cost 0 (surplus) may enter later.
    basis = np.diag((room // cells).astype(np.float64))
    cost = np.ones(rows)
    prices = np.linalg.solve(basis.T, cost)
    for _ in range(MAX_ROUNDS):
        lowest = int(prices.argmin())
        if prices[lowest] < -_EPSILON:
            column, column_cost = np.zeros(rows), 0.0
            column[lowest] = -1.0
        else:
            best, last = _knapsack(prices, cells, room)
            if best[room] <= 1.0 + 1e-7:
                break
            column, column_cost = _pattern(last, cells, rows), 1.0
        direction = np.linalg.solve(basis, column)
        amounts = np.linalg.solve(basis, wanted)
        positive = direction > _EPSILON
        if not positive.any():
            break
        ratios = np.where(positive, amounts / np.where(positive, direction, 1.0), np.inf)
        leaving = int(ratios.argmin())
        basis[:, leaving], cost[leaving] = column, column_cost
        prices = np.linalg.solve(basis.T, cost)
    prices = np.clip(prices, 0.0, 1.0)
    return {size: float(price) * WHOLE_MILLI for size, price in zip(sizes, prices, strict=True)}


def remainder_values(demand: Mapping[int, float]) -> NDArray[np.float64]:
    """Value in milli of a remainder of 0..1000 milli: shape (1001,), float64, never falling, 0 at 0 and 1000 at 1000.

    With no demand for shares only a whole GPU is worth anything.
    """
    values = np.zeros(WHOLE_MILLI + 1)
    prices = share_prices(demand)
    if prices:
        cells = np.array([-(-size // STEP_MILLI) for size in prices], dtype=np.int64)
        best, _ = _knapsack(np.array(list(prices.values())), cells, WHOLE_MILLI // STEP_MILLI)
        values = np.minimum(best, WHOLE_MILLI)[np.arange(WHOLE_MILLI + 1) // STEP_MILLI]
    values[WHOLE_MILLI] = WHOLE_MILLI
    return values
