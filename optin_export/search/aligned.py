"""What keeping units in multiples costs: the cost that a plan with any numbers of units could do without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from optin_export.search.allocate import counts_of, values_of
from optin_export.search.knapsack import HALVINGS, ROUNDING, Frontier, Options, possible
from optin_export.search.plan import Plan
from optin_export.units import CostKind, Costs


def lost_to_alignment(
    plan: Plan,
    scores: Mapping[str, np.ndarray],
    costs: Costs,
    kind: CostKind,
    least: Mapping[str, int],
    curves: Mapping[str, np.ndarray] | None,
) -> float:
    """Share of the unpruned model's cost that the plan spends because counts are multiples.

    The plan's cost, less that of the cheapest plan that may keep any numbers of units from `least` up and is worth as
    much by the same scores (curves). Exact if costs are linear in the counts; otherwise they are linearised around the
    plan, and another unaligned plan could be cheaper still. Arguments as of `find_plan`.
    """
    kept = {key: len(group.kept) for key, group in plan.groups.items()}
    counts = {key: counts_of(len(scores[key]), 1, min(least.get(key, 0), kept[key])) for key in kept}
    values = values_of(counts, scores, curves)
    per_unit = costs.per_unit(kind, kept)
    options = [Options(counts[key] * per_unit[key], values[key]) for key in kept]
    chosen = cheapest(options, [int(np.searchsorted(counts[key], kept[key])) for key in kept])
    unaligned = {key: int(counts[key][option]) for key, option in zip(kept, chosen, strict=True)}
    return max(costs.of(kind, kept) - costs.of(kind, unaligned), 0) / costs.whole(kind)


def cheapest(groups: Sequence[Options], known: Sequence[int]) -> tuple[int, ...]:
    """One option per group with the least total cost among those worth as much as the options `known`.

    Options that no cheaper choice can contain, by the bound of a Lagrangian relaxation, are left out; the exact
    knapsack over the few that remain is quick. Up to a cell per group where costs are rounded (`knapsack`).
    """
    enough = _sums(groups, known)[1] - ROUNDING * sum(float(np.abs(group.values).max()) for group in groups)
    multiplier, bound, found = _relaxed(groups, enough)
    candidates = [picks for picks in (tuple(known), found) if _sums(groups, picks)[1] >= enough]
    best = min(candidates, key=lambda picks: _sums(groups, picks)[0])
    high = _sums(groups, best)[0]
    # A choice with an option costs at least the bound and what the option adds to its group's best.
    priced = [group.costs - multiplier * group.values for group in groups]
    places, rest = possible(groups, [one - one.min() for one in priced], high - bound + 1, best)
    frontier = Frontier(rest, high)
    enough_at = np.flatnonzero(frontier.best >= enough)
    if len(enough_at):
        chosen = frontier.chosen(int(enough_at[0]))
        picks = tuple(int(place[one]) for place, one in zip(places, chosen, strict=True))
        if _sums(groups, picks)[0] < high:  # costs are rounded up where there are too many cells
            return picks
    return best


def _relaxed(groups: Sequence[Options], value: float) -> tuple[float, float, tuple[int, ...]]:
    """Maximise  m * value + sum over groups of min over options (cost - m * value of it)  over multipliers m >= 0.

    Returns the multiplier, that maximum, which no choice worth `value` can cost less than, and options worth as much.
    """
    low, high = 0.0, 1.0

    def picks_at(multiplier: float) -> tuple[int, ...]:
        return tuple(int(np.argmin(group.costs - multiplier * group.values)) for group in groups)

    while _sums(groups, picks_at(high))[1] < value and high < 1e60:
        high *= 16
    for _ in range(HALVINGS):  # concave in the multiplier, with the slope (value - worth)
        middle = (low + high) / 2
        low, high = (middle, high) if _sums(groups, picks_at(middle))[1] < value else (low, middle)
    cost, worth = _sums(groups, picks_at(high))
    return high, cost + high * (value - worth), picks_at(high)


def _sums(groups: Sequence[Options], picks: Sequence[int]) -> tuple[int, float]:
    """Total cost and total value of one option per group."""
    pairs = list(zip(groups, picks, strict=True))
    return sum(int(group.costs[pick]) for group, pick in pairs), sum(float(group.values[pick]) for group, pick in pairs)
