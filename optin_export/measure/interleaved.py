"""Many engines interleaved in one process: what each takes, and by how much it beats the first, block by block.

The same machinery as `latency`: warm up, then blocks in which every engine runs once in random order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from optin_export.engines import CALL, Engine
from optin_export.measure import latency
from optin_export.measure.rounds import Interval
from optin_export.progress import track


@dataclass(frozen=True)
class Interleaved:
    """samples: milliseconds by engine, block and call. Blocks of one index were measured at the same time."""

    samples: dict[str, list[list[float]]]
    seed: int

    def saved(self, name: str, against: str, of: str) -> Interval:
        """By how much `name` is faster than `against`, as a share of `of`: median over blocks, each by its medians.

        Shares within a block, because a machine that slows down for a while slows all engines alike.
        """
        slow, fast, whole = (np.array([np.median(block) for block in self.samples[one]]) for one in (against, name, of))
        return self._interval((slow - fast) / whole)

    def median(self, name: str) -> Interval:
        """Milliseconds of one call."""
        return median_call(self.samples[name], self.seed)

    def _interval(self, values: np.ndarray) -> Interval:
        draws = np.random.default_rng(self.seed).integers(0, len(values), (latency.RESAMPLES, len(values)))
        low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
        return Interval(float(np.median(values)), float(low), float(high))


def median_call(blocks: list[list[float]], seed: int = 0) -> Interval:
    """Median of all calls; the interval is that of blocks drawn again."""
    values = np.asarray(blocks)  # [blocks, calls]
    draws = np.random.default_rng(seed).integers(0, len(values), (latency.RESAMPLES, len(values)))
    low, high = np.percentile([np.median(values[draw]) for draw in draws], [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))


def interleave(
    engines: Mapping[str, Engine], inputs: Mapping[str, np.ndarray], *, blocks: int, seed: int, mode: str = CALL
) -> Interleaved:
    """Time all engines on `inputs`. blocks: at most `latency.BLOCKS`, where that is less (see there)."""
    generator = np.random.default_rng(seed)
    arms = {name: latency.timer_of(engine, inputs, mode) for name, engine in engines.items()}
    runs = {}
    for name, timer in arms.items():
        calls = latency.BLOCK_SECONDS * 1e3 / latency.warm_up(timer)
        runs[name] = int(np.clip(calls, latency.MIN_RUNS, latency.MAX_RUNS))
    samples: dict[str, list[list[float]]] = {name: [] for name in arms}
    planned = min(blocks, latency.BLOCKS)
    for _ in track(range(planned)):
        for name in generator.permutation(list(arms)):
            samples[name].append([arms[name]() for _ in range(runs[name])])
    return Interleaved(samples, seed)
