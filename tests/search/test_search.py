"""The knapsack is exact: compared with brute force; plans are aligned, within budget, and replayable."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from optin_export.errors import InputError
from optin_export.families import Costs, Term
from optin_export.recipe import Budget
from optin_export.search import GroupPlan, Plan, find_plan, knapsack
from optin_export.search.knapsack import Options, solve


def random_groups(generator: np.random.Generator, cell: int = 1) -> list[Options]:
    groups = []
    for _ in range(4):
        size = int(generator.integers(1, 6))
        costs = np.sort(generator.integers(0, 30, size)) * cell
        groups.append(Options(costs, np.cumsum(generator.random(size))))
    return groups


def brute_force(groups: list[Options], capacity: int) -> float | None:
    best = None
    for choice in itertools.product(*(range(len(group.costs)) for group in groups)):
        cost = sum(group.costs[option] for group, option in zip(groups, choice, strict=True))
        value = sum(group.values[option] for group, option in zip(groups, choice, strict=True))
        if cost <= capacity and (best is None or value > best):
            best = value
    return best


@pytest.mark.parametrize("seed", range(40))
def test_solution_is_the_brute_force_optimum(seed: int) -> None:
    generator = np.random.default_rng(seed)
    groups = random_groups(generator, cell=int(generator.integers(1, 1000)))
    highest = sum(int(group.costs.max()) for group in groups)
    for capacity in (0, highest // 3, highest // 2, highest):
        expected, choice = brute_force(groups, capacity), solve(groups, capacity)
        if expected is None:
            assert choice is None
            continue
        assert choice is not None
        assert choice.value == pytest.approx(expected)
        assert choice.gap == 0.0
        assert sum(g.costs[o] for g, o in zip(groups, choice.chosen, strict=True)) <= capacity


@pytest.mark.parametrize("seed", range(10))
def test_rounded_solution_fits_and_its_gap_is_a_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "MAX_CELLS", 40)
    groups = random_groups(np.random.default_rng(seed), cell=7)
    groups = [Options(group.costs + np.arange(len(group.costs)), group.values) for group in groups]
    lowest, highest = (sum(int(pick(group.costs)) for group in groups) for pick in (np.min, np.max))
    capacity = (lowest + highest) // 2
    expected, choice = brute_force(groups, capacity), solve(groups, capacity)
    assert expected is not None and choice is not None
    assert sum(g.costs[o] for g, o in zip(groups, choice.chosen, strict=True)) <= capacity
    assert choice.value <= expected + 1e-9 <= choice.value + choice.gap + 2e-9


COSTS = Costs(
    macs=1000,
    params=500,
    units={"block00.heads": 4, "block00.neurons": 20},
    terms={
        "macs": (Term(100, ("block00.heads",)), Term(10, ("block00.neurons",))),
        "params": (Term(40, ("block00.heads",)), Term(4, ("block00.neurons",))),
    },
)
SCORES = {"block00.heads": np.array([5.0, 1.0, 3.0, 2.0]), "block00.neurons": np.linspace(0.1, 2.0, 20)}
ALIGN = {"block00.heads": 1, "block00.neurons": 8}


def test_plan_keeps_the_best_units_within_the_budget() -> None:
    plan = find_plan(SCORES, COSTS, Budget(macs=0.7), ALIGN)
    assert plan.predicted.macs <= 700
    assert set(plan.groups) == set(SCORES)
    heads, neurons = plan.groups["block00.heads"].kept, plan.groups["block00.neurons"].kept
    assert set(heads) == set(np.argsort(-SCORES["block00.heads"])[: len(heads)])
    assert set(neurons) == set(np.argsort(-SCORES["block00.neurons"])[: len(neurons)])
    assert len(neurons) in (0, 8, 16, 20)
    assert plan.predicted.params == 500 - 40 * (4 - len(heads)) - 4 * (20 - len(neurons))


def test_budget_of_one_keeps_everything() -> None:
    plan = find_plan(SCORES, COSTS, Budget(params=1.0), ALIGN)
    assert all(len(group.kept) == group.count for group in plan.groups.values())
    assert plan.score_kept == pytest.approx(1.0)


def test_budget_in_parameters_counts_parameters() -> None:
    assert find_plan(SCORES, COSTS, Budget(params=0.8), ALIGN).predicted.params <= 400


def test_same_scores_same_plan() -> None:
    plans = [find_plan(SCORES, COSTS, Budget(macs=0.7), ALIGN).model_dump_json() for _ in range(2)]
    assert plans[0] == plans[1]
    assert Plan.model_validate_json(plans[0]).model_dump_json() == plans[0]


def test_equal_scores_keep_the_first_units() -> None:
    plan = find_plan({"block00.heads": np.ones(4)}, COSTS, Budget(macs=0.9), {"block00.heads": 1})
    kept = plan.groups["block00.heads"].kept
    assert kept == tuple(range(len(kept)))


def test_a_budget_no_plan_meets_says_what_is_possible() -> None:
    with pytest.raises(InputError) as error:
        find_plan(SCORES, COSTS, Budget(macs=0.3), ALIGN)
    assert error.value.exit_code == 2
    assert "0.4000" in error.value.why  # 1000 - 4 * 100 - 20 * 10 = 400 MACs cannot be removed


@pytest.mark.parametrize("kept", [[1, 0], [0, 0], [4], [-1]])
def test_a_damaged_plan_is_refused(kept: list[int]) -> None:
    with pytest.raises(ValidationError):
        GroupPlan.model_validate({"count": 4, "kept": kept})
