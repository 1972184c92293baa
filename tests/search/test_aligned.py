"""What multiples cost, against counting: every unaligned plan, and the cheapest that is worth as much."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from optin_export.recipe import Budget
from optin_export.search import Plan, find_plan, lost_to_alignment
from optin_export.search.aligned import cheapest
from optin_export.search.knapsack import Options
from optin_export.units import Costs, Term
from tests.search.test_search import Chain, random_curves, random_groups


def counted(plan: Plan, costs: Costs, kind: str, least: int, values: dict[str, np.ndarray]) -> float:
    """The share by brute force over all counts."""
    kept = {key: len(group.kept) for key, group in plan.groups.items()}
    worth = sum(float(values[key][count]) for key, count in kept.items())
    prices = []
    for counts in itertools.product(*(range(least, costs.units[key] + 1) for key in kept)):
        other = dict(zip(kept, counts, strict=True))
        if sum(float(values[key][count]) for key, count in other.items()) >= worth - 1e-9:
            prices.append(costs.of(kind, other))  # type: ignore[arg-type]
    return (costs.of(kind, kept) - min(prices)) / costs.whole(kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("curved", [False, True], ids=["scores", "curves"])
@pytest.mark.parametrize("seed", range(3))
def test_the_share_is_what_counting_gives(seed: int, curved: bool, kind: str) -> None:
    costs, scores, curves = random_curves(seed)
    values = {key: np.concatenate([[0.0], np.cumsum(np.sort(one)[::-1])]) for key, one in scores.items()}
    if curved:
        values = {key: -np.interp(np.arange(len(scores[key]) + 1), *curve.T) for key, curve in curves.items()}
    given = curves if curved else None
    for fraction in (0.4, 0.6, 0.8):
        plan = find_plan(scores, costs, Budget(**{kind: fraction}), dict.fromkeys(scores, 4), None, given)
        lost = lost_to_alignment(plan, scores, costs, kind, {}, given)  # type: ignore[arg-type]
        assert lost == pytest.approx(counted(plan, costs, kind, 0, values))


def test_what_is_lost_by_hand() -> None:
    """Six of eight equal units are worth the score of the plan with eight, the two others being worth nothing."""
    key = "block00.neurons"
    costs = Costs(100, 100, {key: 16}, {"macs": (Term(5, (key,)),), "params": ()})
    scores = {key: np.array([1.0] * 6 + [0.0] * 10)}
    plan = find_plan(scores, costs, Budget(macs=0.7), {key: 8})
    assert len(plan.groups[key].kept) == 8
    assert lost_to_alignment(plan, scores, costs, "macs", {}, None) == pytest.approx(0.1)
    assert lost_to_alignment(plan, scores, costs, "macs", {key: 7}, None) == pytest.approx(0.05)


def test_nothing_is_lost_without_multiples() -> None:
    costs, scores, curves = random_curves(3)
    plan = find_plan(scores, costs, Budget(macs=0.6), dict.fromkeys(scores, 1), None, curves)
    assert lost_to_alignment(plan, scores, costs, "macs", {}, curves) == 0


@pytest.mark.parametrize("seed", range(4))
def test_of_coupled_layers_it_is_a_share_that_an_unaligned_plan_saves(seed: int) -> None:
    """Linearised: no more than the best plan saves, and a good part of it."""
    chain = Chain(seed, groups=3, units=12)
    plan = find_plan(chain.scores, chain.costs, Budget(macs=0.5), dict.fromkeys(chain.keys, 6), chain.least)
    values = {key: np.concatenate([[0.0], np.cumsum(np.sort(one)[::-1])]) for key, one in chain.scores.items()}
    most = counted(plan, chain.costs, "macs", 1, values)
    assert 0 <= lost_to_alignment(plan, chain.scores, chain.costs, "macs", chain.least, None) <= most + 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_choice_is_that_of_brute_force(seed: int) -> None:
    """Also where values fall and costs are equal, and with every choice as the one to match."""
    generator = np.random.default_rng(seed)
    groups = random_groups(generator)
    groups = [Options(one.costs, generator.permutation(one.values)) for one in groups]
    choices = list(itertools.product(*(range(len(one.costs)) for one in groups)))

    def sums(choice: tuple[int, ...]) -> tuple[float, int]:
        pairs = list(zip(groups, choice, strict=True))
        return sum(float(one.values[pick]) for one, pick in pairs), sum(int(one.costs[pick]) for one, pick in pairs)

    for known in choices[:: max(len(choices) // 10, 1)]:
        worth, found = sums(known)[0], cheapest(groups, known)
        assert sums(found)[0] >= worth - 1e-9
        assert sums(found)[1] == min(cost for value, cost in map(sums, choices) if value >= worth - 1e-9)
