"""An exact multiple-choice knapsack: one option per group, the most value within a capacity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Cells of the dynamic programme per group. Costs are divided by their greatest common divisor first, which for
#: transformers is large; beyond this many cells they are rounded up instead, and the gap is bounded and reported.
MAX_CELLS = 400_000
#: Halvings of the multiplier's interval, and relative rounding errors of sums of values.
HALVINGS, ROUNDING = 100, 1e-9


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

    Options that no better choice can contain, by the bound of a Lagrangian relaxation, are left out. Over the rest, a
    dynamic programme over capacity: exact when the costs' greatest common divisor leaves at most MAX_CELLS cells.
    Otherwise costs are rounded up to cells (the result always fits), and the gap is bounded by the relaxation.
    """
    if sum(int(group.costs.min()) for group in groups) > capacity:
        return None
    multiplier, bound, found = _relaxed(groups, capacity)
    found = _filled(groups, found, capacity)
    known = _value(groups, found)
    # A choice with this option is worth at most the bound, less what the option is worth less than its group's best.
    slack = bound - known + ROUNDING * (abs(bound) + sum(float(np.abs(group.values).max()) for group in groups))
    priced = [group.values - multiplier * group.costs for group in groups]
    places, rest = possible(groups, [one.max() - one for one in priced], slack, found)
    frontier = Frontier(rest, capacity)
    chosen = frontier.chosen(len(frontier.best) - 1)
    picks = tuple(int(place[one]) for place, one in zip(places, chosen, strict=True))
    if (value := _value(groups, picks)) < known:  # costs were rounded up
        picks, value = found, known
    gap = 0.0 if frontier.exact else max(bound - value, 0.0)
    return Choice(picks, value, gap)


def possible(
    groups: Sequence[Options], lost: Sequence[np.ndarray], slack: float, known: Sequence[int]
) -> tuple[list[np.ndarray], list[Options]]:
    """The options with which a choice loses at most `slack`, and those of the choice `known`: their indices, and they.

    lost: per group, what each option loses against the best one by the relaxation.
    """
    places = [np.union1d(np.flatnonzero(one <= slack), [pick]) for one, pick in zip(lost, known, strict=True)]
    rest = [Options(group.costs[place], group.values[place]) for group, place in zip(groups, places, strict=True)]
    return places, rest


class Frontier:
    """The dynamic programme: the most value within every capacity up to `capacity`, in cells above the least cost.

    cell: costs are rounded up to multiples of it. exact: none was. best: float64 [cells + 1], the most value within the
    least cost plus that many cells.
    """

    def __init__(self, groups: Sequence[Options], capacity: int) -> None:
        # Only what exceeds each group's cheapest option has to be distributed.
        extra = [group.costs - group.costs.min() for group in groups]
        room = capacity - sum(int(group.costs.min()) for group in groups)
        room = min(room, sum(int(costs.max()) for costs in extra))  # beyond the dearest choice there is nothing to gain
        cell = max(math.gcd(*(int(cost) for costs in extra for cost in costs)), 1)
        self.exact = room // cell <= MAX_CELLS
        if not self.exact:
            cell = -(-room // MAX_CELLS)
        self._sizes = [-(-costs // cell) for costs in extra]
        cells = room // cell
        self.best = np.zeros(cells + 1)
        self._picks: list[np.ndarray] = []
        for group, sizes in zip(groups, self._sizes, strict=True):
            following = np.full(cells + 1, -np.inf)
            pick = np.zeros(cells + 1, dtype=np.int32)
            for option, (size, value) in enumerate(zip(sizes, group.values, strict=True)):
                if size > cells:
                    continue
                candidate = self.best[: cells + 1 - size] + value
                better = candidate > following[size:]
                following[size:][better] = candidate[better]
                pick[size:][better] = option
            self.best = following
            self._picks.append(pick)

    def chosen(self, position: int) -> tuple[int, ...]:
        """The option of every group that gives `best[position]`."""
        options = []
        for sizes, pick in zip(reversed(self._sizes), reversed(self._picks), strict=True):
            option = int(pick[position])
            options.append(option)
            position -= int(sizes[option])
        return tuple(reversed(options))


def _filled(groups: Sequence[Options], picks: tuple[int, ...], capacity: int) -> tuple[int, ...]:
    """`picks`, exchanged one by one for the option that adds the most value within the capacity."""
    room = capacity - sum(int(group.costs[pick]) for group, pick in zip(groups, picks, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for at, (group, pick) in enumerate(zip(groups, picks, strict=True)):
            fits = np.where(group.costs - group.costs[pick] <= room, group.values - group.values[pick], -np.inf)
            option = int(np.argmax(fits))
            if fits[option] > 0 and (best is None or fits[option] > best[0]):
                best = float(fits[option]), at, option
        if best is None:
            return picks
        _, at, option = best
        room -= int(groups[at].costs[option] - groups[at].costs[picks[at]])
        picks = (*picks[:at], option, *picks[at + 1 :])


def _value(groups: Sequence[Options], picks: Sequence[int]) -> float:
    return float(sum(group.values[pick] for group, pick in zip(groups, picks, strict=True)))


def _relaxed(groups: Sequence[Options], capacity: int) -> tuple[float, float, tuple[int, ...]]:
    """min over multipliers m >= 0 of  m * capacity + sum over groups of max over options (value - m * cost).

    Returns the multiplier, that minimum, which no choice within the capacity exceeds, and a choice that fits.
    """
    spread = max(float(group.values.max() - group.values.min()) for group in groups)
    low, high = 0.0, spread + 1e-12

    def at(multiplier: float) -> tuple[float, int, tuple[int, ...]]:
        picks = tuple(int(np.argmax(group.values - multiplier * group.costs)) for group in groups)
        cost = sum(int(group.costs[pick]) for group, pick in zip(groups, picks, strict=True))
        return _value(groups, picks) + multiplier * (capacity - cost), cost, picks

    fitting, best = tuple(int(np.argmin(group.costs)) for group in groups), (at(low)[0], low)
    for _ in range(HALVINGS):  # the dual is convex and piecewise linear: its subgradient's sign is (capacity - cost)
        middle = (low + high) / 2
        bound, cost, picks = at(middle)
        best = min(best, (bound, middle))
        if cost > capacity:
            low = middle
        else:
            high, fitting = middle, picks
    return best[1], best[0], fitting
