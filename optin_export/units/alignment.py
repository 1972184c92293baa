"""Steps in which each group's units are kept, from the number of features that kernels want."""

from __future__ import annotations

import math
from collections.abc import Iterable

from optin_export.recipe import Alignment
from optin_export.recipe.alignment import USUAL
from optin_export.units.declare import UnitGroup

#: Minimum number of steps in a group: in a smaller group the search could hardly choose, so its steps are halved.
FEWEST_STEPS = 4


def steps_of(groups: Iterable[UnitGroup], alignment: Alignment) -> dict[str, int]:
    """Group key -> number of units whose multiples may be kept.

    A user's number holds as it is, for neurons and channels. Otherwise a group has the largest of the wanted number of
    features, its half, ... down to 8 that leaves it four steps, and heads are counted by their features, too.
    """
    return {group.key: _step(group, alignment) for group in groups}


def reduced(groups: Iterable[UnitGroup], alignment: Alignment) -> int:
    """Number of groups that are too small for the wanted number of features."""
    return sum(
        not alignment.fixed and _step(group, alignment) < _whole_step(group, alignment.features) for group in groups
    )


def _step(group: UnitGroup, alignment: Alignment) -> int:
    features = alignment.features
    if alignment.fixed:
        return group.step(features)
    while features > USUAL:
        step = _whole_step(group, features)
        if step * FEWEST_STEPS <= group.count:
            return step
        features //= 2
    return group.step(features)


def _whole_step(group: UnitGroup, features: int) -> int:
    """The fewest units whose features in every layer that makes them are a multiple; heads are free up to 8."""
    if group.kind != "heads":
        return group.step(features)
    if features <= USUAL:
        return 1
    sizes = {group.width, *(group.rows_in(producer) for producer in group.producers)}
    return math.lcm(*(features // math.gcd(features, size) for size in sizes))
