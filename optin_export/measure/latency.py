"""Latency of engines, interleaved: a speedup is claimed only by the lower end of its interval.

Blocks in random order of base, base again (A/A, the noise floor) and pruned, in one process on the same inputs; warm
up until the median is stable; bootstrap over blocks of the ratio of medians (docs/method.md, section 6). With a
precision other than fp32 that pair is in this precision, like with like, and the fp32 pair is in the same blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from optin_export.engines import CALL, Engine, Timed, Timer
from optin_export.measure.neighbours import Neighbours, Watch
from optin_export.recipe import MODELS, engine_name

#: Blocks measured at least; on a restless machine more, in steps, until the interval is narrow or MAX_BLOCKS are done.
BLOCKS, MORE_BLOCKS, MAX_BLOCKS = 24, 12, 96
#: Half the width of the 95 % interval, relative to the speedup, that is narrow enough.
NARROW = 0.02
#: Seconds of one arm of one block; at least MIN_RUNS runs, so that a block has a median.
BLOCK_SECONDS = 0.12
MIN_RUNS, MAX_RUNS = 3, 400
WARM_UP_SECONDS, WARM_UP_LIMIT = 0.5, 10.0
RESAMPLES = 2000


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds per call."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Speedup:
    """Ratio of median latencies, slower / faster if it gains, with its 95 % bootstrap interval over blocks."""

    median: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Comparison:
    """How many times faster `engine` is than `against`, both measured in the same blocks."""

    engine: str
    against: str
    speedup: Speedup


@dataclass(frozen=True)
class Latency:
    """One measurement. base_ms, pruned_ms, speedup: both models in `precision`, which is what the gate judges.

    noise_floor: how far base against itself strays from 1, at the far end of its interval.
    engines_ms: every engine by its name (`recipe.engine_names`). comparisons: the pairs beside the judged one; none if
    the precision is fp32.
    mode: what one call holds (`engines.MODES`). judged: whether gates are about it.
    memory, clocks, unmeasured: on a GPU, see `measure.gpu`: bytes by engine, readings by block, modes that failed.
    neighbours: what else kept the CPUs busy meanwhile; None where the system does not tell.
    samples: milliseconds of every call by arm and block, for plots and for whoever wants to compute it otherwise.
    """

    target: str
    batch: int
    sequence: int | None
    base_ms: Quantiles
    pruned_ms: Quantiles
    speedup: Speedup
    noise_floor: float
    blocks: int
    samples: dict[str, list[list[float]]]
    mode: str = CALL
    precision: str = "fp32"
    engines_ms: dict[str, Quantiles] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    judged: bool = True
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    clocks: tuple[dict[str, float], ...] = ()
    clocks_note: str | None = None
    unmeasured: dict[str, str] = field(default_factory=dict)
    neighbours: Neighbours | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Latency:
        parts: dict[str, Any] = {name: Quantiles(**value[name]) for name in ("base_ms", "pruned_ms")}
        parts["engines_ms"] = {name: Quantiles(**one) for name, one in value.get("engines_ms", {}).items()}
        parts["comparisons"] = tuple(
            Comparison(one["engine"], one["against"], Speedup(**one["speedup"])) for one in value.get("comparisons", ())
        )
        if value.get("neighbours") is not None:
            parts["neighbours"] = Neighbours(**value["neighbours"])
        return cls(
            **{**value, **parts, "speedup": Speedup(**value["speedup"]), "clocks": tuple(value.get("clocks", ()))}
        )


def measure_latency(
    base: Engine,
    pruned: Engine,
    inputs: Mapping[str, np.ndarray],
    *,
    target: str,
    batch: int,
    sequence: int | None,
    seed: int,
    mode: str = CALL,
    precision: str = "fp32",
    plain: Mapping[str, Engine] | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Latency:
    """Measure the engines on `inputs` in interleaved blocks.

    base, pruned: the pair that is judged, both in `precision`. plain: the fp32 pair by name, if `precision` is another.
    mode: what one call holds, one of the engines' modes.
    """
    generator = np.random.default_rng(seed)
    names = [engine_name(model, precision) for model in MODELS]
    judged, faster = names
    engines = {**(plain or {}), judged: base, faster: pruned}
    timers = {name: timer_of(engine, inputs, mode) for name, engine in engines.items()}
    typical = {name: warm_up(timer) for name, timer in timers.items()}
    arms = {**timers, "again": timers[judged]}
    runs = {
        name: int(np.clip(BLOCK_SECONDS * 1e3 / typical.get(name, typical[judged]), MIN_RUNS, MAX_RUNS))
        for name in arms
    }
    samples: dict[str, list[list[float]]] = {name: [] for name in arms}

    def blocks_of(name: str) -> list[list[float]]:
        """The judged base has two arms, which are the same engine: both count, block by block."""
        if name != judged:
            return samples[name]
        return [first + second for first, second in zip(samples[judged], samples["again"], strict=True)]

    planned, watch = BLOCKS, Watch()
    while True:
        while len(samples[faster]) < planned:
            for name in generator.permutation(list(arms)):
                samples[name].append([arms[name]() for _ in range(runs[name])])
            tick(len(samples[faster]), planned)
        speedup = ratio_of_medians(blocks_of(judged), samples[faster], generator)
        if speedup.ci_high - speedup.ci_low <= 2 * NARROW * speedup.median or planned >= MAX_BLOCKS:
            break
        planned += MORE_BLOCKS
    neighbours = watch.seen()
    again = ratio_of_medians(samples[judged], samples["again"], generator)
    quantiles = {name: _quantiles(blocks_of(name)) for name in engines}
    return Latency(
        target=target,
        batch=batch,
        sequence=sequence,
        base_ms=quantiles[judged],
        pruned_ms=quantiles[faster],
        speedup=speedup,
        noise_floor=max(abs(again.ci_low - 1), abs(again.ci_high - 1)),
        blocks=planned,
        samples=samples,
        mode=mode,
        precision=precision,
        engines_ms=quantiles,
        comparisons=tuple(
            Comparison(engine, against, ratio_of_medians(blocks_of(against), blocks_of(engine), generator))
            for engine, against in pairs(precision)
        ),
        neighbours=neighbours,
    )


def pairs(precision: str) -> list[tuple[str, str]]:
    """(engine, what it is compared with) beside the judged pair: in total, the precision's part, and fp32's pruning."""
    if precision == "fp32":
        return []
    base, pruned = (engine_name(model, precision) for model in MODELS)
    return [(pruned, "base"), (base, "base"), (pruned, "pruned"), ("pruned", "base")]


def ratio_of_medians(
    numerator: list[list[float]], denominator: list[list[float]], generator: np.random.Generator
) -> Speedup:
    """median(numerator) / median(denominator) with a 95 % interval by bootstrap over blocks.

    Blocks, not single calls, are drawn: calls within a block share the machine's state and are not independent. Block
    i of both arms was measured at the same time, so a draw takes both.
    """
    above, below = np.asarray(numerator), np.asarray(denominator)  # [blocks, runs]
    draws = generator.integers(0, len(above), (RESAMPLES, len(above)))
    ratios = [np.median(above[draw]) / np.median(below[draw]) for draw in draws]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Speedup(float(np.median(above) / np.median(below)), float(low), float(high))


def timer_of(engine: Engine, inputs: Mapping[str, np.ndarray], mode: str = CALL) -> Timer:
    """Runs the engine once per call and says how long that took: by the engine's own clock, if it brings one."""
    if isinstance(engine, Timed):
        return engine.timer(inputs, mode)

    def once() -> float:
        start = time.perf_counter_ns()
        engine.run(inputs)
        return (time.perf_counter_ns() - start) / 1e6

    return once


def warm_up(timer: Timer) -> float:
    """Run for a minimum time and until the medians of two successive windows agree within 5 %; returns ms."""
    start, previous = time.perf_counter(), float("inf")
    while True:
        window = [timer() for _ in range(5)]
        while sum(window) < WARM_UP_SECONDS * 1e3 / 2:
            window.append(timer())
        median = float(np.median(window))
        elapsed = time.perf_counter() - start
        if (abs(median - previous) <= 0.05 * median and elapsed >= WARM_UP_SECONDS) or elapsed >= WARM_UP_LIMIT:
            return median
        previous = median


def _quantiles(blocks: list[list[float]]) -> Quantiles:
    p50, p90, p99 = np.percentile(np.concatenate([np.asarray(block) for block in blocks]), [50, 90, 99])
    return Quantiles(float(p50), float(p90), float(p99))
