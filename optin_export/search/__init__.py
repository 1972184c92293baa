"""search: scores, costs and a budget become a plan. Knows nothing of torch modules."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from optin_export.errors import InputError
from optin_export.families import Costs
from optin_export.recipe import Budget
from optin_export.search.knapsack import Options, solve
from optin_export.search.plan import Cost, GroupPlan, Plan, keep_first

__all__ = ["Cost", "GroupPlan", "Plan", "check_budget", "find_plan", "keep_first"]


def check_budget(costs: Costs, units: Mapping[str, int], budget: Budget) -> int:
    """Cost that no plan can avoid, for groups of so many `units`; raises InputError if that exceeds the budget."""
    whole, per_unit = costs.of(budget.kind)
    fixed = whole - sum(per_unit[key] * count for key, count in units.items())
    if fixed > int(budget.fraction * whole):
        raise InputError(
            f"no plan meets the budget {budget.kind}: {budget.fraction:g}",
            f"with every unit removed the model still has {fixed / whole:.4f} of its {budget.kind}",
            f"ask for more than {fixed / whole:.4f}, or free more kinds of units in prune.units",
        )
    return fixed


def find_plan(scores: Mapping[str, np.ndarray], costs: Costs, budget: Budget, align: Mapping[str, int]) -> Plan:
    """The plan that keeps the most score within the budget: an exact knapsack over aligned counts per group.

    scores: group key -> [units]. align: group key -> counts are multiples of it (or all units, or none).
    Raises InputError when not even removing every unit meets the budget.
    """
    keys = list(scores)
    whole, per_unit = costs.of(budget.kind)
    fixed = check_budget(costs, {key: len(scores[key]) for key in keys}, budget)
    capacity = int(budget.fraction * whole)
    order = {key: np.argsort(-scores[key], kind="stable") for key in keys}
    counts = {key: _counts(len(scores[key]), align[key]) for key in keys}
    options = []
    for key in keys:
        kept_value = np.concatenate([[0.0], np.cumsum(scores[key][order[key]])])
        options.append(Options(counts[key] * per_unit[key], kept_value[counts[key]]))
    choice = solve(options, capacity - fixed)
    assert choice is not None  # check_budget: removing everything fits
    groups = {}
    for key, option in zip(keys, choice.chosen, strict=True):
        kept = np.sort(order[key][: counts[key][option]])
        groups[key] = GroupPlan(count=len(scores[key]), kept=tuple(int(index) for index in kept))
    removed = {key: plan.count - len(plan.kept) for key, plan in groups.items()}
    total = sum(float(values.sum()) for values in scores.values())
    return Plan(
        budget={budget.kind: budget.fraction},
        base=Cost(macs=costs.macs, params=costs.params),
        predicted=Cost(
            macs=costs.macs - sum(costs.macs_per_unit[key] * removed[key] for key in keys),
            params=costs.params - sum(costs.params_per_unit[key] * removed[key] for key in keys),
        ),
        score_kept=choice.value / total if total > 0 else 1.0,
        optimality_gap=choice.gap / total if total > 0 else 0.0,
        groups=groups,
    )


def _counts(units: int, align: int) -> np.ndarray:
    """How many units may stay: none, the multiples of `align`, and all (even where all is not a multiple)."""
    return np.unique(np.append(np.arange(0, units + 1, align), units))
