"""Time many engines interleaved in one process, and compare each with the first, block by block.

The same machinery as `latency`: warm up, then blocks in which every engine runs once in random order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from optin_export.engines import CALL, Engine
from optin_export.measure import latency
from optin_export.measure.bootstrap import BLOCK_DRAWS, Interval, interval, median_of_calls, resampled
from optin_export.progress import track


@dataclass(frozen=True)
class Interleaved:
    """samples: milliseconds by engine, block and call. Blocks of one index were measured at the same time."""

    samples: dict[str, list[list[float]]]
    seed: int

    def saved(self, name: str, against: str, of: str) -> Interval:
        """Time that `name` saves against `against`, as a share of `of`: the median over blocks, each by its medians.

        Shares are taken within a block, because a machine that slows down for a while slows all engines equally.
        """
        slow, fast, whole = (np.array([np.median(block) for block in self.samples[one]]) for one in (against, name, of))
        shares = (slow - fast) / whole
        generator = np.random.default_rng(self.seed)
        values = resampled(lambda drawn: float(np.median(shares[drawn])), len(shares), BLOCK_DRAWS, generator)
        return Interval(float(np.median(shares)), *interval(values))

    def median(self, name: str) -> Interval:
        """Milliseconds of one call."""
        return median_of_calls(self.samples[name], self.seed)


def interleave(
    engines: Mapping[str, Engine], inputs: Mapping[str, np.ndarray], *, blocks: int, seed: int, mode: str = CALL
) -> Interleaved:
    """Time all engines on `inputs`. blocks: number of blocks, at most `latency.BLOCKS`."""
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
