"""The smallest model that keeps the accuracy: bisection over the budget with real evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from optin_export.errors import InputError
from optin_export.progress import track

#: Budgets are tried to this resolution, as shares of the unpruned model.
RESOLUTION = 0.02


@dataclass(frozen=True)
class Bisection:
    """The smallest budget found that keeps the drop within its limit, and every (budget, drop) that was tried."""

    fraction: float
    tried: tuple[tuple[float, float], ...]


def smallest_budget(drop_of: Callable[[float], float], limit: float, lowest: float) -> Bisection:
    """Bisect budgets in (lowest, 1) for the smallest whose `drop_of` is at most `limit`.

    Assumes that smaller models lose more; where they do not, the result still keeps the limit, but a smaller model
    might have, too. Raises InputError if none of the budgets tried does.
    """
    tried: list[tuple[float, float]] = []
    low, high = lowest, 1.0
    for _ in track(range(_steps(high - low))):
        middle = round((low + high) / 2, 4)
        drop = drop_of(middle)
        tried.append((middle, drop))
        low, high = (low, middle) if drop <= limit else (middle, high)
    if high == 1.0:
        raise InputError(
            f"no smaller model has an accuracy drop within {limit:g} points",
            f"at {tried[-1][0]:.0%} of the MACs it is still {tried[-1][1]:.2f}",
            "allow a larger drop in prune.budget.accuracy_drop, or give more calibration rows",
        )
    return Bisection(high, tuple(tried))


def _steps(width: float) -> int:
    steps = 1
    while width / 2**steps > RESOLUTION:
        steps += 1
    return steps
