"""The knapsack is exact: compared with brute force; plans are aligned, within budget, and replayable."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from optin_export.errors import InputError
from optin_export.recipe import Budget
from optin_export.search import GroupPlan, Plan, find_plan, knapsack
from optin_export.search.knapsack import Options, solve
from optin_export.units import Costs, Term


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


@pytest.mark.parametrize(("align", "least", "expected"), [
    (8, 0, [0, 8, 16, 20]), (8, 1, [8, 16, 20]), (8, 9, [16, 20]), (4, 4, [4, 8, 12, 16, 20]), (32, 1, [20]),
    (1, 19, [19, 20]),
])  # fmt: skip
def test_at_least_so_many_units_stay(align: int, least: int, expected: list[int]) -> None:
    """As multiples of `align`, or all; the largest budget below the next count still keeps this one."""
    key = "block00.neurons"
    costs = Costs(1000, 1000, {key: 20}, {"macs": (Term(10, (key,)),), "params": ()})
    scores, found = {key: np.linspace(1.0, 2.0, 20)}, set()
    for removable in range(21):
        budget = Budget(macs=(1000 - 10 * removable) / 1000)
        if 20 - removable < expected[0]:
            with pytest.raises(InputError, match="no plan meets"):
                find_plan(scores, costs, budget, {key: align}, {key: least})
            continue
        found.add(len(find_plan(scores, costs, budget, {key: align}, {key: least}).groups[key].kept))
    assert sorted(found) == expected


class Chain:
    """A random chain of layers whose cost is a product: what one layer makes the next one reads (as in VGG)."""

    def __init__(self, seed: int, groups: int, units: int) -> None:
        generator = np.random.default_rng(seed)
        self.keys = [f"block{block:02d}.channels" for block in range(groups)]
        self.align = dict.fromkeys(self.keys, 1)
        self.least = dict.fromkeys(self.keys, 1)
        self.scores = {key: generator.exponential(size=units) * generator.uniform(0.2, 5) for key in self.keys}
        sizes = generator.integers(1, 9, groups + 1).tolist()
        terms = [Term(3 * sizes[0], (self.keys[0],))]
        pairs = itertools.pairwise(self.keys)
        terms += [Term(size, pair) for size, pair in zip(sizes[1:-1], pairs, strict=True)]
        terms.append(Term(5 * sizes[-1], (self.keys[-1],)))
        whole = sum(term.coefficient * units ** len(term.groups) for term in terms)
        self.costs = Costs(
            whole + 7, whole + 7, dict.fromkeys(self.keys, units), {"macs": tuple(terms), "params": tuple(terms)}
        )
        # Losses that fall ever more slowly as units come back, as measured ones do.
        steps = {key: np.sort(generator.exponential(size=units))[::-1] for key in self.keys}
        losses = {key: np.concatenate([np.cumsum(step[::-1])[::-1], [0.0]]) for key, step in steps.items()}
        points = sorted({0, 1, units // 3, units // 2, units})
        self.curves = {key: np.stack([points, losses[key][points]], 1) for key in self.keys}

    def best(self, fraction: float, value: dict[str, np.ndarray]) -> tuple[float, dict[str, int]]:
        """Brute force over all counts: the largest total value within the budget."""
        capacity, results = int(fraction * self.costs.macs), []
        for counts in itertools.product(*(range(1, self.costs.units[key] + 1) for key in self.keys)):
            kept = dict(zip(self.keys, counts, strict=True))
            if self.costs.of("macs", kept) <= capacity:
                results.append((sum(float(value[key][count]) for key, count in kept.items()), kept))
        return max(results, key=lambda pair: pair[0])


@pytest.mark.parametrize("fraction", [0.2, 0.35, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(12))
def test_coupled_costs_come_close_to_brute_force(seed: int, fraction: float) -> None:
    chain = Chain(seed, groups=3, units=9)
    plan = find_plan(chain.scores, chain.costs, Budget(macs=fraction), chain.align, chain.least)
    kept = {key: len(group.kept) for key, group in plan.groups.items()}
    assert min(kept.values()) >= 1
    assert plan.predicted.macs == chain.costs.of("macs", kept) <= fraction * chain.costs.macs
    value = {key: np.concatenate([[0.0], np.cumsum(np.sort(one)[::-1])]) for key, one in chain.scores.items()}
    best, _ = chain.best(fraction, value)
    assert sum(value[key][count] for key, count in kept.items()) >= 0.95 * best
    assert plan.optimality_gap is None  # linearised: no bound is known


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_coupled_costs_spend_the_budget(kind: str, fraction: float) -> None:
    """With every unit worth something, little of the budget is left: less than the cheapest step more."""
    for seed in range(6):
        chain = Chain(seed, groups=8, units=64)
        align = dict.fromkeys(chain.keys, 4)
        plan = find_plan(chain.scores, chain.costs, Budget(**{kind: fraction}), align, chain.least)
        assert 0.9 * fraction * chain.costs.macs <= plan.predicted.macs <= fraction * chain.costs.macs
        kept = {key: len(group.kept) for key, group in plan.groups.items()}
        assert all(count % 4 == 0 for count in kept.values())
        for key, count in kept.items():
            if count < 64:
                assert chain.costs.of("macs", {**kept, key: count + 4}) > fraction * chain.costs.macs


@pytest.mark.parametrize("seed", range(8))
def test_a_budget_just_above_the_smallest_plan_is_met(seed: int) -> None:
    """The fewest units that alignment allows, and not one MAC more than the budget."""
    chain = Chain(seed, groups=4, units=20)
    align = dict.fromkeys(chain.keys, 8)
    smallest = chain.costs.of("macs", dict.fromkeys(chain.keys, 8))
    fraction = (smallest + 0.5) / chain.costs.macs
    plan = find_plan(chain.scores, chain.costs, Budget(macs=fraction), align, chain.least)
    assert plan.predicted.macs == smallest
    with pytest.raises(InputError, match="no plan meets"):
        find_plan(chain.scores, chain.costs, Budget(macs=(smallest - 0.5) / chain.costs.macs), align, chain.least)


def random_curves(seed: int) -> tuple[Costs, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Four groups of up to seven units with linear costs, scores, and curves that need not fall everywhere."""
    generator = np.random.default_rng(seed)
    units = {f"block{block:02d}.neurons": int(generator.integers(3, 8)) for block in range(4)}
    scores = {key: generator.random(count) for key, count in units.items()}
    curves = {}
    for key, count in units.items():
        points = np.unique([0, *generator.integers(0, count + 1, 3), count])
        losses = np.concatenate([generator.random(len(points) - 1) * 3, [0.0]])
        curves[key] = np.stack([points, losses], 1)
    terms = tuple(Term(int(generator.integers(1, 30)), (key,)) for key in units)
    whole = 20 + sum(term.coefficient * units[term.groups[0]] for term in terms)
    return Costs(whole, whole, units, {"macs": terms, "params": terms}), scores, curves


@pytest.mark.parametrize("seed", range(20))
def test_with_curves_the_plan_has_the_least_loss(seed: int) -> None:
    """Brute force over all counts; between the points of a curve its loss is interpolated."""
    costs, scores, curves = random_curves(seed)
    for fraction in (0.3, 0.6, 0.9):
        plan = find_plan(scores, costs, Budget(macs=fraction), dict.fromkeys(scores, 1), None, curves)
        best = np.inf
        for counts in itertools.product(*(range(count + 1) for count in costs.units.values())):
            kept = dict(zip(costs.units, counts, strict=True))
            if costs.of("macs", kept) <= fraction * costs.macs:
                best = min(best, sum(np.interp(kept[key], *curves[key].T) for key in kept))
        assert plan.predicted_loss == pytest.approx(best)
        assert plan.predicted.macs <= fraction * costs.macs
        assert plan.optimality_gap == pytest.approx(0.0)
        # Which units stay is still the scores' choice.
        for key, group in plan.groups.items():
            assert set(group.kept) == set(np.argsort(-scores[key])[: len(group.kept)].tolist())


@pytest.mark.parametrize("fraction", [0.3, 0.6])
@pytest.mark.parametrize("seed", range(8))
def test_with_curves_and_coupled_costs_the_loss_is_close_to_the_least(seed: int, fraction: float) -> None:
    chain = Chain(seed, groups=3, units=9)
    plan = find_plan(chain.scores, chain.costs, Budget(macs=fraction), chain.align, chain.least, chain.curves)
    values = {key: -np.interp(np.arange(10), *curve.T) for key, curve in chain.curves.items()}
    best, _ = chain.best(fraction, values)
    whole = -sum(float(value[0]) for value in values.values())
    assert plan.predicted.macs <= fraction * chain.costs.macs
    assert plan.predicted_loss is not None
    assert plan.predicted_loss <= -best + 0.05 * whole


def test_more_units_are_not_taken_where_they_lose_more() -> None:
    """A curve that rises: the budget would allow all units, the least loss is with half of them."""
    keys = ["block00.channels", "block01.channels"]
    terms = (Term(1, tuple(keys)), Term(4, (keys[0],)))
    costs = Costs(400, 400, dict.fromkeys(keys, 16), {"macs": terms, "params": terms})
    curves = {key: np.array([[0.0, 5.0], [8.0, 0.5], [16.0, 1.0]]) for key in keys}
    scores = {key: np.ones(16) for key in keys}
    plan = find_plan(scores, costs, Budget(macs=1.0), dict.fromkeys(keys, 1), dict.fromkeys(keys, 1), curves)
    assert [len(group.kept) for group in plan.groups.values()] == [8, 8]
    assert plan.predicted_loss == pytest.approx(1.0)


def test_the_smallest_count_of_a_group_is_respected_with_curves() -> None:
    """Even where a curve says that nothing would be lost without it."""
    curves = {key: np.array([[0.0, 0.0], [len(values), 0.0]]) for key, values in SCORES.items()}
    least = {"block00.heads": 2, "block00.neurons": 1}
    plan = find_plan(SCORES, COSTS, Budget(macs=0.7), ALIGN, least, curves)
    assert len(plan.groups["block00.heads"].kept) >= 2
    assert len(plan.groups["block00.neurons"].kept) >= 8


def test_costs_of_a_product() -> None:
    """A layer between two groups costs the product of what they keep."""
    terms = {"macs": (Term(3, ("a",)), Term(2, ("a", "b"))), "params": (Term(1, ("b",)),)}
    costs = Costs(1000, 100, {"a": 10, "b": 5}, terms)
    assert costs.of("macs", {"a": 4, "b": 2}) == 1000 - 3 * 6 - 2 * (50 - 8)
    assert costs.of("macs", {"b": 5}) == 1000
    assert costs.of("params", {"b": 1}) == 96
    assert costs.per_unit("macs", {"a": 4, "b": 2}) == {"a": 3 + 2 * 2, "b": 2 * 4}
    assert not costs.is_linear("macs") and costs.is_linear("params")
