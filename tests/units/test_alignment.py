"""Steps of units: what kernels want, as far as a group is large enough."""

from __future__ import annotations

from dataclasses import replace

import pytest

from optin_export.recipe import Alignment
from optin_export.units import UnitGroup, find_structure, reduced, steps_of
from tests.units.models import small_model

HEADS, NEURONS = find_structure(small_model("vit")[0]).groups[:2]


def sized(group: UnitGroup, count: int, width: int = 1) -> UnitGroup:
    return replace(group, count=count, width=width)


def auto(features: int) -> Alignment:
    return Alignment(features, False, "")


@pytest.mark.parametrize(
    ("count", "features", "step"),
    [(3072, 32, 32), (128, 32, 32), (127, 32, 16), (64, 32, 16), (32, 32, 8), (16, 32, 8), (12, 32, 8), (64, 16, 16),
     (63, 16, 8), (3072, 8, 8), (5, 8, 8)],
)  # fmt: skip
def test_a_group_has_the_largest_step_that_leaves_it_four(count: int, features: int, step: int) -> None:
    group = sized(NEURONS, count)
    assert steps_of([group], auto(features)) == {group.key: step}
    assert reduced([group], auto(features)) == (step < features)


@pytest.mark.parametrize(
    ("count", "width", "features", "step"),
    [
        (12, 64, 32, 1),  # any number of heads of 64 is a multiple of 32
        (12, 32, 32, 1),
        (12, 16, 32, 2),
        (12, 24, 32, 2),  # four heads of 24 are 96, but 12 heads are only three times that: 16 features then
        (16, 24, 32, 4),
        (3, 24, 32, 1),
        (6, 8, 16, 1),
        (8, 8, 16, 2),
        (12, 20, 8, 1),  # as in fp32
    ],
)
def test_heads_count_with_their_width(count: int, width: int, features: int, step: int) -> None:
    group = sized(HEADS, count, width)
    assert steps_of([group], auto(features)) == {group.key: step}
    if step > 1 and not reduced([group], auto(features)):
        assert step * width % features == 0


@pytest.mark.parametrize("align", [1, 8, 48])
def test_a_users_number_holds_for_every_group_but_heads(align: int) -> None:
    groups = [sized(HEADS, 12, 24), sized(NEURONS, 32)]
    fixed = Alignment(align, True, "")
    assert steps_of(groups, fixed) == {HEADS.key: 1, NEURONS.key: align}
    assert reduced(groups, fixed) == 0
