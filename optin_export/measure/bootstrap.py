"""The bootstrap: a statistic of repeated draws with replacement, and the interval of its values.

The drawn items must be independent: rows of a data set, or blocks of calls (calls within a block share the machine's
state). Engines that were measured together are drawn together: a draw is one list of indices for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

#: Number of draws of rows, whose statistic is a metric, and of blocks.
ROW_DRAWS, BLOCK_DRAWS = 1000, 2000
#: Ends of the 95 % interval, in per cent.
ENDS = (2.5, 97.5)
#: Milliseconds of single calls, by block; blocks may differ in length.
Blocks = Sequence[Sequence[float]]
T = TypeVar("T")


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % interval."""

    median: float
    low: float
    high: float


def draws(count: int, number: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """`number` times the indices, [count], of `count` rows or blocks drawn with replacement."""
    return (generator.integers(0, count, count) for _ in range(number))


def resampled(
    statistic: Callable[[np.ndarray], T | None], count: int, number: int, generator: np.random.Generator
) -> list[T]:
    """The statistic of each draw.

    Args:
        statistic: indices [count] -> its value, or None for a draw that has none.
        count: rows or blocks.
        number: how often they are drawn.
    """
    values = (statistic(drawn) for drawn in draws(count, number, generator))
    return [value for value in values if value is not None]


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Lower and upper end of the interval that holds 95 % of the values."""
    low, high = np.percentile(values, ENDS)
    return float(low), float(high)


def median_of_calls(blocks: Blocks, seed: int = 0) -> Interval:
    """Median of all calls, by bootstrap over blocks."""
    return _over_blocks(median_of, [blocks], np.random.default_rng(seed))


def ratio_of_medians(above: Blocks, below: Blocks, generator: np.random.Generator) -> Interval:
    """median(above) / median(below), by bootstrap over blocks: block i of both was measured at the same time."""
    return _over_blocks(lambda one, other: median_of(one) / median_of(other), [above, below], generator)


def median_of(blocks: Blocks | Sequence[np.ndarray]) -> float:
    """Median of all calls."""
    return float(np.median(np.concatenate(blocks)))


def _over_blocks(statistic: Callable[..., float], arms: Sequence[Blocks], generator: np.random.Generator) -> Interval:
    """statistic: the blocks of each arm -> its value."""
    found = [[np.asarray(block, dtype=float) for block in blocks] for blocks in arms]

    def drawn(indices: np.ndarray) -> float:
        return statistic(*([blocks[index] for index in indices] for blocks in found))

    values = resampled(drawn, len(found[0]), BLOCK_DRAWS, generator)
    return Interval(statistic(*found), *interval(values))
