"""The plan of a budget: a knapsack over the number of units that every group keeps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from optin_export.errors import InputError
from optin_export.recipe import Budget
from optin_export.search.knapsack import Options, solve
from optin_export.search.plan import Cost, GroupPlan, Plan
from optin_export.search.table import LatencyTable
from optin_export.units import CostKind, Costs

#: Maximum linearisations of a cost that is a product of two groups' counts; they converge within a few.
ROUNDS = 12


def check_budget(costs: Costs, budget: Budget, least: Mapping[str, int], table: LatencyTable | None = None) -> None:
    """Raises InputError if not even the minimum number of units per group (`least`) meets the budget.

    A latency budget is checked by the `table`, once it exists.
    """
    if budget.kind == "latency":
        if table is not None:
            _check_latency(table, budget, least)
        return
    whole = costs.whole(budget.kind)
    smallest = costs.of(budget.kind, least)
    if smallest > int(budget.fraction * whole):
        raise InputError(
            f"no plan meets the budget {budget.kind}: {budget.fraction:g}",
            f"with the minimum of units the model still has {smallest / whole:.4f} of its {budget.kind}",
            f"ask for more than {smallest / whole:.4f}, or allow more kinds of units in prune.units",
        )


def _check_latency(table: LatencyTable, budget: Budget, least: Mapping[str, int]) -> None:
    fastest = table.fastest(least)
    if fastest <= budget.nanoseconds(table.base_ns):
        return
    ((name, value),) = budget.named.items()
    where = f"on {table.target} at batch {table.batch}"
    if budget.speedup is not None:
        reached, limit = f"is {table.base_ns / fastest:.2f}x as fast as the unpruned one", "less"
    else:
        reached, limit = f"takes {fastest / 1e6:.3g} ms (unpruned {table.base_ns / 1e6:.3g} ms)", "more"
    raise InputError(
        f"no plan meets the budget {name}: {value:g}",
        f"with the minimum of units the engine {reached} {where}, by the measured table",
        f"ask for {limit}, or allow more kinds of units in prune.units",
    )


def find_plan(
    scores: Mapping[str, np.ndarray],
    costs: Costs,
    budget: Budget,
    align: Mapping[str, int],
    least: Mapping[str, int] | None = None,
    curves: Mapping[str, np.ndarray] | None = None,
    table: LatencyTable | None = None,
) -> Plan:
    """The plan that keeps the most score within the budget: a knapsack over aligned counts per group.

    scores: group key -> [units]. align: group key -> counts are multiples of it (or all units, or `least`). least: how
    many units of a group must stay, if not 0. curves: per group [points, 2] with the number of units kept (ascending)
    and the loss of keeping that many; the plan then minimises the total loss instead of maximising the score.
    table: the measured costs for a latency budget.

    Exact if costs are linear in the counts. If the cost of a layer is a product of two counts (units on both sides), it
    is linearised around the plan until the plan no longer changes. Raises InputError if not even removing every unit
    meets the budget.
    """
    keys = list(scores)
    least = {key: (least or {}).get(key, 0) for key in keys}
    order = {key: np.argsort(-scores[key], kind="stable") for key in keys}
    counts = {key: counts_of(len(scores[key]), align[key], least[key]) for key in keys}
    check_budget(costs, budget, {key: int(counts[key][0]) for key in keys}, table)
    values = values_of(counts, scores, curves)
    if budget.kind == "latency":
        assert table is not None
        kept, gap = _choose_by_table(counts, values, table, budget)
    else:
        kept, gap = _choose(counts, values, costs, budget, budget.kind)
    groups = {
        key: GroupPlan(count=len(scores[key]), kept=tuple(int(index) for index in np.sort(order[key][: kept[key]])))
        for key in keys
    }
    total = sum(float(scores[key].sum()) for key in keys)
    loss = None if curves is None else -_total(kept, counts, values)
    scale = total if loss is None else loss
    held = sum(float(scores[key][order[key][: kept[key]]].sum()) for key in keys)
    return Plan(
        budget=budget.named if budget.kind == "latency" else {budget.kind: budget.fraction},
        base=Cost(macs=costs.whole("macs"), params=costs.params),
        predicted=Cost(macs=costs.of("macs", kept), params=costs.of("params", kept)),
        score_kept=held / total if total > 0 else 1.0,
        optimality_gap=None if gap is None else gap / scale if scale > 0 else 0.0,
        predicted_loss=loss,
        groups=groups,
    )


def _choose_by_table(
    counts: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], table: LatencyTable, budget: Budget
) -> tuple[dict[str, int], float | None]:
    """Units kept per group by their measured costs, which are linear in the groups, not in the counts; exact.

    The fewest units if the sum of savings misses the budget, although the engine measured with them meets it.
    """
    options = [Options(-table.saved(key, counts[key]), values[key]) for key in counts]
    choice = solve(options, budget.nanoseconds(table.base_ns) - table.full_ns)
    if choice is None:
        return {key: int(counts[key][0]) for key in counts}, None
    kept = {key: int(counts[key][option]) for key, option in zip(counts, choice.chosen, strict=True)}
    return kept, choice.gap


def _choose(
    counts: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], costs: Costs, budget: Budget, kind: CostKind
) -> tuple[dict[str, int], float | None]:
    """Units kept per group, and a bound on the value lost by rounding (None: costs were linearised, no bound)."""
    keys = list(counts)
    capacity = int(budget.fraction * costs.whole(kind))

    def best(around: Mapping[str, int], target: int) -> tuple[dict[str, int], float] | None:
        """The knapsack with costs linear around a plan: cost(around) + sum of per_unit * (kept - around)."""
        per_unit = costs.per_unit(kind, around)
        room = target - costs.of(kind, around) + sum(per_unit[key] * around[key] for key in keys)
        choice = solve([Options(counts[key] * per_unit[key], values[key]) for key in keys], room)
        if choice is None:
            return None
        return {key: int(counts[key][option]) for key, option in zip(keys, choice.chosen, strict=True)}, choice.gap

    full = {key: int(counts[key][-1]) for key in keys}
    if costs.is_linear(kind):
        found = best(full, capacity)
        assert found is not None  # check_budget ensures that removing everything fits
        return found
    share = budget.fraction**0.5
    kept = {key: max(int(counts[key][0]), round(share * full[key])) for key in keys}
    winner = {key: int(counts[key][0]) for key in keys}
    target = capacity
    for _ in range(ROUNDS):
        found = best(kept, target)
        if found is None:
            break
        previous, kept = kept, found[0]
        over = costs.of(kind, kept) - capacity
        if over <= 0 and _total(kept, counts, values) > _total(winner, counts, values):
            winner = kept
        if over > 0:
            target -= over  # the product is convex along some directions, so aim lower
            kept = {key: max(int(counts[key][0]), (kept[key] + previous[key]) // 2) for key in keys}
        elif kept == previous:
            break
    return _fill(winner, counts, values, costs, kind, capacity), None


def _total(kept: Mapping[str, int], counts: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]) -> float:
    return sum(float(values[key][np.searchsorted(counts[key], kept[key])]) for key in kept)


def _fill(
    kept: dict[str, int],
    counts: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
    costs: Costs,
    kind: CostKind,
    capacity: int,
) -> dict[str, int]:
    """Spend the rest of the budget, step by step, where a step adds the most score for its cost."""
    while True:
        best: tuple[float, dict[str, int]] | None = None
        spent = costs.of(kind, kept)
        for key in kept:
            place = int(np.searchsorted(counts[key], kept[key])) + 1
            if place == len(counts[key]):
                continue
            larger = {**kept, key: int(counts[key][place])}
            price = costs.of(kind, larger)
            if price > capacity:
                continue
            gain = float(values[key][place] - values[key][place - 1]) / max(price - spent, 1)
            if gain >= 0 and (best is None or gain > best[0]):
                best = (gain, larger)
        if best is None:
            return kept
        kept = best[1]


def values_of(
    counts: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray], curves: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Group key -> the value of each of `counts`: the sum of that many best scores, or minus the loss on the curve."""
    if curves is not None:
        return {key: -np.interp(counts[key], curves[key][:, 0], curves[key][:, 1]) for key in counts}
    best = {key: scores[key][np.argsort(-scores[key], kind="stable")] for key in counts}
    return {key: np.concatenate([[0.0], np.cumsum(best[key])])[counts[key]] for key in counts}


def counts_of(units: int, align: int, least: int) -> np.ndarray:
    """Allowed numbers of units: the minimum, the multiples of `align`, and all (even if not a multiple)."""
    fewest = min(-(-least // align) * align, units)
    steps = np.arange(0, units + 1, align)
    return np.unique(np.concatenate([[fewest], steps[steps >= fewest], [units]]))
