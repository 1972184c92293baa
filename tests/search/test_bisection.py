"""The smallest budget that keeps an accuracy: found to the resolution, never one that broke the limit."""

from __future__ import annotations

import pytest

from optin_export.errors import InputError
from optin_export.progress import reporting
from optin_export.search import smallest_budget
from optin_export.search.bisection import RESOLUTION


@pytest.mark.parametrize("edge", [0.15, 0.37, 0.5, 0.81, 0.97])
def test_it_finds_where_the_drop_crosses_the_limit(edge: float) -> None:
    found = smallest_budget(lambda budget: 0.0 if budget >= edge else 9.0, limit=0.5, lowest=0.1)
    assert edge <= found.fraction <= edge + RESOLUTION
    assert found.fraction == min(budget for budget, drop in found.tried if drop <= 0.5)
    assert len(found.tried) <= 7  # every one of them is a repaired and evaluated model


def test_a_drop_equal_to_the_limit_is_kept() -> None:
    assert smallest_budget(lambda budget: 0.5, limit=0.5, lowest=0.0).fraction <= RESOLUTION


def test_a_noisy_drop_still_gives_a_model_that_keeps_the_limit() -> None:
    drops = iter([0.9, 0.1, 0.7, 0.2, 0.6, 0.3, 0.4])
    found = smallest_budget(lambda budget: next(drops), limit=0.5, lowest=0.2)
    assert dict(found.tried)[found.fraction] <= 0.5


def test_nothing_smaller_keeps_the_limit() -> None:
    with pytest.raises(InputError, match=r"no smaller model has an accuracy drop within 0\.5") as error:
        smallest_budget(lambda budget: 3.0, limit=0.5, lowest=0.2)
    assert "3.00" in error.value.why


def test_progress_counts_every_model() -> None:
    seen: list[tuple[int, int]] = []
    with reporting(lambda *step: seen.append(step)):
        smallest_budget(lambda budget: 0.0, 1.0, 0.2)
    assert seen[-1][0] == seen[-1][1] == len(seen)
