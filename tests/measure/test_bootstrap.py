"""Intervals by bootstrap: of whole rows or blocks, the same draw for all arms, of a seed the same numbers as ever."""

from __future__ import annotations

import numpy as np
import pytest

from optin_export.measure.bootstrap import (
    BLOCK_DRAWS,
    Interval,
    draws,
    interval,
    median_of_calls,
    ratio_of_medians,
    resampled,
)


def test_draws_are_rows_of_one_table_of_random_indices() -> None:
    """However many are held at once: intervals that were measured before can be computed again."""
    table = np.random.default_rng(3).integers(0, 7, (50, 7))
    assert np.array_equal(np.stack(list(draws(7, 50, np.random.default_rng(3)))), table)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    rows = np.random.default_rng(0).normal(5.0, 2.0, 400)
    means = resampled(lambda drawn: float(rows[drawn].mean()), 400, 2000, np.random.default_rng(1))
    low, high = interval(means)
    wanted = 1.96 * rows.std() / 20
    assert low == pytest.approx(rows.mean() - wanted, abs=0.03) and high == pytest.approx(
        rows.mean() + wanted, abs=0.03
    )


def test_draws_without_a_value_are_left_out() -> None:
    values = resampled(lambda drawn: None if drawn[0] == 0 else int(drawn[0]), 3, 300, np.random.default_rng(0))
    assert set(values) == {1, 2} and 150 < len(values) < 250


def test_the_median_of_calls_has_the_interval_of_its_blocks() -> None:
    assert median_of_calls([[1.0, 1.0, 1.0]] * 10) == Interval(1.0, 1.0, 1.0)
    two = median_of_calls([[1.0] * 3] * 5 + [[2.0] * 3] * 5)
    assert two.low == 1.0 and two.high == 2.0


def test_the_interval_comes_from_blocks_not_from_calls() -> None:
    """Calls within a block are alike, blocks differ: many calls in few blocks must not make the interval narrow."""
    generator = np.random.default_rng(0)
    drift = generator.normal(1.0, 0.2, 10)
    slow = [[10.0 * d] * 300 for d in drift]
    fast = [[5.0 * d] * 300 for d in generator.permutation(drift)]
    result = ratio_of_medians(slow, fast, generator)
    assert result.high - result.low > 0.2


def test_blocks_of_one_moment_are_drawn_together() -> None:
    """A machine that is slower for whole blocks slows both arms: their ratio is known exactly."""
    slow = np.random.default_rng(0).uniform(1.0, 3.0, 20)
    found = ratio_of_medians([[2.0 * one] * 3 for one in slow], [[one] * 5 for one in slow], np.random.default_rng(0))
    assert found == Interval(2.0, 2.0, 2.0)


def test_ratios_of_a_seed_are_those_of_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    above, below = ([generator.normal(mean, 0.1, 9).tolist() for _ in range(12)] for mean in (2.0, 1.0))
    indices = np.random.default_rng(5).integers(0, 12, (BLOCK_DRAWS, 12))
    ratios = [np.median(np.asarray(above)[one]) / np.median(np.asarray(below)[one]) for one in indices]
    low, high = np.percentile(ratios, [2.5, 97.5])
    found = ratio_of_medians(above, below, np.random.default_rng(5))
    assert found == Interval(float(np.median(above) / np.median(below)), low, high)


def test_blocks_may_differ_in_length() -> None:
    generator = np.random.default_rng(0)
    above = [list(2 + 0.1 * generator.standard_normal(10 + block)) for block in range(12)]
    below = [list(1 + 0.05 * generator.standard_normal(15)) for _ in range(12)]
    found = ratio_of_medians(above, below, np.random.default_rng(1))
    assert found.low < 2 < found.high and found.low <= found.median <= found.high and found.high - found.low < 0.2
    assert ratio_of_medians(above, above, generator) == Interval(1.0, 1.0, 1.0)
