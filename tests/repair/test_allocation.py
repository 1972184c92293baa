"""What the search adds up: both terms of a curve on one scale."""

from __future__ import annotations

import numpy as np
import pytest

from optin_export.repair import allocation, combined

EXAMPLE = {
    "a": np.array([[0.0, 4.0, 1.0], [2.0, 2.0, 0.5], [4.0, 0.0, 0.0]]),
    "b": np.array([[0.0, 8.0, 3.0], [4.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize(("kind", "share"), [*sorted(allocation.TRAJECTORY_SHARE.items()), ("logits", 0.25)])
def test_terms_of_a_curve_are_combined_on_one_scale(kind: str, share: float) -> None:
    own = share == allocation.TRAJECTORY_SHARE[kind]
    found = combined(EXAMPLE, kind, None if own else share)
    totals = (2.0 + 4.0, 0.5 + 1.5)  # means over the points, summed over the groups
    for key, curve in EXAMPLE.items():
        expected = share * curve[:, 1] / totals[0] + (1 - share) * curve[:, 2] / totals[1]
        np.testing.assert_allclose(found[key], np.stack([curve[:, 0], expected], 1))
        assert found[key][-1, 1] == 0.0


def test_without_an_output_loss_the_trajectory_decides() -> None:
    silent = {key: curve * np.array([1.0, 1.0, 0.0]) for key, curve in EXAMPLE.items()}
    for curve in combined(silent, "logits").values():
        assert curve[0, 1] > 0 and np.isfinite(curve).all()
