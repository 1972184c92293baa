"""What the search adds up: both terms on one scale, and powers that spread a removal."""

from __future__ import annotations

import numpy as np
import pytest

from optin_export.recipe import Budget
from optin_export.repair import RULES, Rule, allocation, combined
from optin_export.search import find_plan
from optin_export.units import Costs, Term

EXAMPLE = {
    "a": np.array([[0.0, 4.0, 1.0], [2.0, 2.0, 0.5], [4.0, 0.0, 0.0]]),
    "b": np.array([[0.0, 8.0, 3.0], [4.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize(("kind", "share"), [*sorted(allocation.TRAJECTORY_SHARE.items()), ("logits", 0.25)])
def test_terms_of_a_curve_are_combined_on_one_scale(kind: str, share: float, power: float) -> None:
    own = share == allocation.TRAJECTORY_SHARE[kind]
    found = combined(EXAMPLE, kind, Rule(None if own else share, power))
    totals = (2.0 + 4.0, 0.5 + 1.5)  # means over the points, summed over the groups
    for key, curve in EXAMPLE.items():
        expected = share * curve[:, 1] / totals[0] + (1 - share) * curve[:, 2] / totals[1]
        np.testing.assert_allclose(found[key], np.stack([curve[:, 0], expected**power], 1))
        assert found[key][-1, 1] == 0.0


def test_without_an_output_loss_the_trajectory_decides() -> None:
    silent = {key: curve * np.array([1.0, 1.0, 0.0]) for key, curve in EXAMPLE.items()}
    for curve in combined(silent, "logits").values():
        assert curve[0, 1] > 0 and np.isfinite(curve).all()


def test_a_loss_below_zero_by_rounding_has_powers_too() -> None:
    noisy = {"a": np.array([[0.0, 1.0, 1.0], [2.0, 0.0, -1e-9], [4.0, 0.0, 0.0]])}
    assert np.isfinite(combined(noisy, "logits", Rule(power=1.5))["a"]).all()


def test_squares_spread_what_the_sum_takes_from_one_group() -> None:
    # Curves that flatten out: once half is gone, the rest costs less, so a sum empties one group of the two.
    curve = np.array([[0.0, 0.0, 1.2], [4.0, 0.0, 0.7], [8.0, 0.0, 0.0]])
    keys = ("a", "b")
    terms = tuple(Term(1, (key,)) for key in keys)
    costs = Costs(macs=16, params=16, units=dict.fromkeys(keys, 8), terms={"macs": terms, "params": terms})
    kept = {}
    for name in ("sum", "squares"):
        curves = combined(dict.fromkeys(keys, curve), "logits", RULES[name])
        scores = {key: np.arange(8.0) for key in keys}
        plan = find_plan(scores, costs, Budget(macs=0.5), dict.fromkeys(keys, 1), curves=curves)
        kept[name] = sorted(len(plan.groups[key].kept) for key in keys)
    assert kept == {"sum": [0, 8], "squares": [4, 4]}
