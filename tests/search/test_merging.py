"""Schedules of merged tokens: the share they keep, their limits, and where the loss says they should be."""

from __future__ import annotations

import numpy as np
import pytest

from optin_export.errors import InputError
from optin_export.search import allocate_merging, check_merging, kept_share, most, spread_merging
from optin_export.search.merging import tokens_left


def test_kept_share_is_the_average_of_what_is_left_behind_each_attention() -> None:
    assert tokens_left((4, 0, 3), 17, 4) == [13, 13, 10, 10]
    assert kept_share((4, 0, 3), 17, 4) == (13 + 13 + 10 + 10) / (4 * 17)
    assert kept_share((), 17, 4) == 1.0


@pytest.mark.parametrize("tokens", [17, 65, 197])
@pytest.mark.parametrize("keep", [0.95, 0.8, 0.7, 0.5, 0.35])
def test_a_share_is_met_by_the_fewest_merged_tokens_spread_evenly(tokens: int, keep: float) -> None:
    merged = spread_merging(keep, tokens, 1, 12)
    check_merging(merged, tokens, 1, 12)
    share = kept_share(merged, tokens, 12)
    assert keep - 8 / tokens < share <= keep
    limits = [most(entering, 1) for entering in (tokens, *tokens_left(merged, tokens, 12))]
    free = [count for count, limit in zip(merged, limits, strict=False) if count < limit]
    assert not free or max(free) - min(free) <= 1


def test_keeping_all_merges_nothing() -> None:
    assert spread_merging(1.0, 65, 1, 6) == (0,) * 6


def test_a_share_below_what_is_left_is_refused_with_the_smallest_possible() -> None:
    with pytest.raises(InputError, match=r"tokens\.keep is 0\.2") as error:
        spread_merging(0.2, 17, 1, 3)
    smallest = float(error.value.fix.split()[-1])
    assert kept_share(spread_merging(smallest + 1e-3, 17, 1, 3), 17, 3) <= smallest + 1e-3


@pytest.mark.parametrize(
    ("merged", "prefix", "message"),
    [
        ((1, 1, 1, 1), 1, "4 entries"),
        ((9,), 1, "9 tokens in block 0"),
        ((8, 5), 1, "5 tokens in block 1"),
        ((8, 4, 3), 1, "3 tokens in block 2"),
        ((8,), 3, "8 tokens in block 0"),
    ],
)
def test_schedules_that_cannot_be_are_refused(merged: tuple[int, ...], prefix: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_merging(merged, 17, prefix, 3)


def test_at_least_two_tokens_stay() -> None:
    assert [most(tokens, 1) for tokens in (5, 4, 3, 2, 1)] == [2, 1, 1, 0, 0]
    assert [most(tokens, 0) for tokens in (4, 3, 2, 1)] == [2, 1, 0, 0]
    with pytest.raises(InputError, match="at most 0"):
        check_merging((1,), 2, 1, 3)


def test_tokens_are_merged_where_it_costs_least() -> None:
    """Nearly free in the second block, dear in the others."""
    curves = [np.array([[0, 0], [10, slope], [20, 2 * slope]], dtype=float) for slope in (5.0, 0.01, 5.0)]
    (merged,) = allocate_merging(curves, 0.8, 65, 1)
    assert kept_share(merged, 65, 3) <= 0.8
    assert merged == (3, 15, 0)  # 3 x 3 + 15 x 2 of the 39 token-blocks to save
    check_merging(merged, 65, 1, 3)


def test_the_allocation_is_the_cheapest_of_all() -> None:
    generator = np.random.default_rng(0)
    losses = [np.concatenate([[0.0], np.sort(generator.random(4)).cumsum()]) for _ in range(3)]
    curves = [np.stack([np.arange(5.0), loss], 1) for loss in losses]
    (merged,) = allocate_merging(curves, 0.75, 17, 1)  # at most 4 per block
    every = [(a, b, c) for a in range(5) for b in range(5) for c in range(5)]
    cheapest = min(
        (one for one in every if kept_share(one, 17, 3) <= 0.75),
        key=lambda one: sum(loss[count] for loss, count in zip(losses, one, strict=True)),
    )
    assert merged == cheapest


def test_a_share_that_the_allocation_cannot_reach_has_none() -> None:
    assert allocate_merging([np.zeros((1, 3))] * 3, 0.3, 17, 1) == []
