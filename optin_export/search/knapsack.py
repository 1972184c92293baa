"""An exact multiple-choice knapsack: one option per group, the most value within a capacity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Cells of the dynamic programme per group. Costs are divided by their greatest common divisor first, which for
#: transformers is large; beyond this many cells they are rounded up instead, and the gap is bounded and reported.
MAX_CELLS = 400_000


@dataclass(frozen=True)
class Options:
    """The options of one group: integer costs and values, index by index."""

    costs: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Choice:
    """The chosen option per group, and by how much of the value a better choice could exceed it at most."""

    chosen: tuple[int, ...]
    value: float
    gap: float


def solve(groups: Sequence[Options], capacity: int) -> Choice | None:
    """Choose one option per group with total cost <= capacity and the largest total value; None if nothing fits.

    Dynamic programme over capacity: exact when the costs' greatest common divisor leaves at most MAX_CELLS cells.
    Otherwise costs are rounded up to cells (the result always fits), and the gap is bounded by Lagrangian relaxation.
    """
    floor = sum(int(group.costs.min()) for group in groups)
    if floor > capacity:
        return None
    # Only what exceeds each group's cheapest option has to be distributed.
    extra = [group.costs - group.costs.min() for group in groups]
    room = capacity - floor
    cell = max(math.gcd(*(int(cost) for costs in extra for cost in costs)), 1)
    exact = room // cell <= MAX_CELLS
    if not exact:
        cell = -(-room // MAX_CELLS)
    cells = room // cell
    best = np.zeros(cells + 1)
    picks: list[np.ndarray] = []
    for group, costs in zip(groups, extra, strict=True):
        sizes = -(-costs // cell)
        following = np.full(cells + 1, -np.inf)
        pick = np.zeros(cells + 1, dtype=np.int32)
        for option, (size, value) in enumerate(zip(sizes, group.values, strict=True)):
            if size > cells:
                continue
            candidate = best[: cells + 1 - size] + value
            better = candidate > following[size:]
            following[size:][better] = candidate[better]
            pick[size:][better] = option
        best = following
        picks.append(pick)
    position, chosen = cells, []
    for (_, costs), pick in zip(reversed(list(zip(groups, extra, strict=True))), reversed(picks), strict=True):
        option = int(pick[position])
        chosen.append(option)
        position -= int(-(-costs[option] // cell))
    chosen.reverse()
    value = float(sum(group.values[option] for group, option in zip(groups, chosen, strict=True)))
    gap = 0.0 if exact else max(_upper_bound(groups, capacity) - value, 0.0)
    return Choice(tuple(chosen), value, gap)


def _upper_bound(groups: Sequence[Options], capacity: int) -> float:
    """min over multipliers m >= 0 of  m * capacity + sum over groups of max over options (value - m * cost)."""
    spread = max(float(group.values.max() - group.values.min()) for group in groups)
    low, high = 0.0, spread + 1e-12

    def relaxed(multiplier: float) -> tuple[float, int]:
        picks = [int(np.argmax(group.values - multiplier * group.costs)) for group in groups]
        value = sum(
            float(group.values[pick] - multiplier * group.costs[pick])
            for group, pick in zip(groups, picks, strict=True)
        )
        cost = sum(int(group.costs[pick]) for group, pick in zip(groups, picks, strict=True))
        return value + multiplier * capacity, cost

    bound = relaxed(low)[0]
    for _ in range(100):  # the dual is convex and piecewise linear: its subgradient's sign is (capacity - cost)
        middle = (low + high) / 2
        value, cost = relaxed(middle)
        bound = min(bound, value)
        low, high = (middle, high) if cost > capacity else (low, middle)
    return bound
