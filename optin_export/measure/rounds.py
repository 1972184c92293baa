"""The speedup: a ratio of latencies, with an interval that includes differences between loaded copies of an engine.

Calls within a block share the machine's state, and blocks share the loaded engine: the placement of its memory and
threads can make one loaded copy of a model several per cent slower than the next, in every block. So a measurement has
several rounds. In each, every engine is loaded again and timed in interleaved blocks:

    x_r = log(statistic of the slower arm in round r) - log(statistic of the faster arm in round r)
    log(speedup) = mean over rounds +- t * s / sqrt(R),   s^2 = sum over r of (x_r - mean)^2 / (R - 1)

with the 97.5 % quantile t of Student's distribution at R - 1 degrees of freedom. s includes both the differences
between loaded engines and the noise of the blocks. A bootstrap that draws rounds with replacement would be too narrow
for few rounds: it uses 1.96 for t and s^2 (R - 1) / R for s^2. The interval is never narrower than that of a bootstrap
over blocks within rounds, in case rounds agree by chance (`tools/studies/study_interval.py` measures how often the
intervals contain the true value).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from optin_export.measure.bootstrap import Blocks, Interval, draws

#: [draws, calls] -> [draws]
Statistic = Callable[[np.ndarray], np.ndarray]
#: Draws of the blocks within a round.
DRAWS = 500
LEVEL = 0.95


@dataclass(frozen=True)
class Speedup:
    """Ratio of latencies, slower / faster if it gains, with its 95 % interval over rounds of loaded engines."""

    median: float
    ci_low: float
    ci_high: float


def median(calls: np.ndarray) -> np.ndarray:
    return np.median(calls, axis=-1)


def p90(calls: np.ndarray) -> np.ndarray:
    return np.percentile(calls, 90, axis=-1)


def speedup_of(
    slower: Sequence[Blocks],
    faster: Blocks,
    rounds: Sequence[int],
    generator: np.random.Generator,
    statistic: Statistic = median,
) -> Speedup:
    """How many times faster the arm `faster` is than the arms `slower`.

    Args:
        slower: one or more arms that run the same model, each loaded separately; their logarithms are averaged.
        faster: the other arm. Block i of every arm was measured at the same time; blocks of an arm are equally long.
        rounds: the round of each block; engines are loaded again for every round.
        statistic: of all calls of an arm in a round.
    """
    arms = [np.asarray(arm, dtype=float) for arm in (*slower, faster)]  # [blocks, calls] each
    found = _over_rounds(lambda drawn: _log_ratios(arms, drawn, statistic), rounds, generator)
    return Speedup(found.median, found.low, found.high)


def latency_of(blocks: Blocks, rounds: Sequence[int], seed: int = 0) -> Interval:
    """Median of a call in milliseconds, as the geometric mean over rounds, with the same kind of interval.

    rounds: as for `speedup_of`; empty for a measurement that loaded its engines once.
    """
    calls = np.asarray(blocks, dtype=float)

    def logs(drawn: np.ndarray) -> np.ndarray:
        return np.log(median(calls[drawn].reshape(len(drawn), -1)))

    return _over_rounds(logs, rounds or [0] * len(blocks), np.random.default_rng(seed))


def _over_rounds(
    logs: Callable[[np.ndarray], np.ndarray], rounds: Sequence[int], generator: np.random.Generator
) -> Interval:
    """exp(mean) with its interval. logs: drawn blocks [draws, blocks] -> a logarithm each, [draws]."""
    number = np.asarray(rounds)
    values, within = [], []
    for one in np.unique(number):
        blocks = np.flatnonzero(number == one)
        values.append(float(logs(blocks[None])[0]))
        drawn = blocks[np.stack(list(draws(len(blocks), DRAWS, generator)))]
        within.append(float(np.var(logs(drawn), ddof=1)))
    middle, count = float(np.mean(values)), len(values)
    least = 1.96 * float(np.sqrt(np.mean(within) / count))
    between = 0.0 if count < 2 else _student(count - 1) * float(np.std(values, ddof=1)) / count**0.5
    low, high = np.exp([middle - max(least, between), middle + max(least, between)])
    return Interval(float(np.exp(middle)), float(low), float(high))


def _log_ratios(arms: Sequence[np.ndarray], drawn: np.ndarray, statistic: Statistic) -> np.ndarray:
    """log(slower / faster) of each draw of blocks, [draws, blocks] -> [draws]."""
    logs = [np.log(statistic(arm[drawn].reshape(len(drawn), -1))) for arm in arms]
    return np.mean(logs[:-1], axis=0) - logs[-1]


@functools.lru_cache
def _student(freedom: int) -> float:
    """Quantile of Student's t-distribution for a two-sided interval at LEVEL."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, freedom))
