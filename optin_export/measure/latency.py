"""Measure the latency of engines in interleaved blocks; a speedup is claimed only by the lower end of its interval.

In every round the engines are loaded again and warmed up. Blocks follow in which base, a second instance of base (A/A:
the noise floor) and pruned run in random order, in one process on the same inputs. The interval is over rounds
(`rounds`). On CPU threads the process's CPU time is measured as well as wall time, because a short call that fits
between two time slices of a busy machine looks faster than it is. With a precision other than fp32, both engines of
the judged pair have this precision, and the fp32 pair is measured in the same blocks. See docs/method.md, section 6.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from optin_export.engines import CALL, Engine, Timed, Timer, modes
from optin_export.measure.neighbours import BUSY, Neighbours, Watch
from optin_export.measure.rounds import Speedup, median, p90, speedup_of
from optin_export.progress import phase, report
from optin_export.recipe import FULL_BLOCKS, MODELS, MOST_BLOCKS, engine_name

#: Minimum number of blocks; on a noisy machine more, in steps, until the interval is narrow or MAX_BLOCKS are done.
BLOCKS, MORE_BLOCKS, MAX_BLOCKS = FULL_BLOCKS, 12, MOST_BLOCKS
#: Blocks until the engines are loaded again; the second number is for engines that take SLOW_LOAD seconds to load.
PER_ROUND, PER_SLOW_ROUND = 3, 8
SLOW_LOAD = 2.0
#: Half the width of the 95 % interval, relative to the speedup, that is narrow enough.
NARROW = 0.02
#: Seconds per engine in one block; at least MIN_RUNS runs, so that a block has a median.
BLOCK_SECONDS = 0.12
MIN_RUNS, MAX_RUNS = 3, 400
#: Minimum seconds of warm-up in the first round and in the others; at most WARM_UP_LIMIT.
WARM_UP_SECONDS, WARM_UP_AGAIN, WARM_UP_LIMIT = 0.5, 0.15, 10.0
#: Maximum number of measurements on a machine that is busy with other work, and the pause between two in seconds.
ATTEMPTS, PAUSE_SECONDS = 3, 15.0
#: Two clocks disagree if their intervals do not overlap and their ratios differ by more than this share.
DISAGREE = 0.03
#: Loads an engine; every call returns a new instance.
Load = Callable[[], Engine]


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds per call."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Comparison:
    """How many times faster `engine` is than `against`, both measured in the same blocks."""

    engine: str
    against: str
    speedup: Speedup


@dataclass(frozen=True)
class Latency:
    """One measurement. base_ms, pruned_ms, speedup: both models in `precision`; the gate judges these.

    speedup: from the medians of the wall clock. by: the same from other clocks, each with its interval: `p90` (90th
    percentiles) and, for engines on CPU threads, `cpu` (CPU time of the process per call).
    noise_floor: how far base against a second instance of base deviates from 1, at the far end of its interval.
    rounds: the round of each block; engines were loaded again for every round.
    engines_ms: every engine by its name (`recipe.engine_names`). comparisons: the pairs other than the judged one;
    empty in fp32.
    mode: what one call includes (`engines.MODES`). judged: whether gates apply to it.
    memory, clocks, unmeasured: on a GPU, see `measure.gpu`: bytes by engine, readings by block, modes that failed.
    neighbours: other work that kept the CPUs busy meanwhile; None if the system does not report it.
    samples: milliseconds of every call by engine and block, for plots and other statistics.
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
    by: dict[str, Speedup] = field(default_factory=dict)
    rounds: tuple[int, ...] = ()
    attempts: int = 1

    @property
    def clock(self) -> str:
        """The clock that gates judge: `p50`, or one by which the speedup is significantly lower than by `p50`."""
        return lowest(self.speedup, self.by)

    @property
    def quick(self) -> bool:
        """Whether there are fewer blocks than in a full measurement."""
        return self.blocks < BLOCKS

    @property
    def judged_speedup(self) -> Speedup:
        return self.by.get(self.clock, self.speedup)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Latency:
        parts: dict[str, Any] = {name: Quantiles(**value[name]) for name in ("base_ms", "pruned_ms")}
        parts["engines_ms"] = {name: Quantiles(**one) for name, one in value.get("engines_ms", {}).items()}
        parts["comparisons"] = tuple(
            Comparison(one["engine"], one["against"], Speedup(**one["speedup"])) for one in value.get("comparisons", ())
        )
        parts["by"] = {name: Speedup(**one) for name, one in value.get("by", {}).items()}
        parts["rounds"] = tuple(value.get("rounds", ()))
        if value.get("neighbours") is not None:
            parts["neighbours"] = Neighbours(**value["neighbours"])
        return cls(
            **{**value, **parts, "speedup": Speedup(**value["speedup"]), "clocks": tuple(value.get("clocks", ()))}
        )


def lowest(speedup: Speedup, by: Mapping[str, Speedup]) -> str:
    """The clock that a speedup is judged by: `p50`, unless another one is significantly lower."""
    lower = {
        name: one
        for name, one in by.items()
        if one.ci_high < speedup.ci_low and one.median < (1 - DISAGREE) * speedup.median
    }
    return min(lower, key=lambda name: lower[name].ci_low, default="p50")


def narrow(speedup: Speedup) -> bool:
    return speedup.ci_high - speedup.ci_low <= 2 * NARROW * speedup.median


@dataclass(frozen=True)
class LatencySettings:
    """One measurement. target, batch, sequence: of the engines and their inputs, as the result names them.

    seed: seed of the order of blocks and of intervals. mode: what one call includes, one of the engines' modes.
    precision: precision of the judged pair. other_work: share of the machine's CPU time that other work may take; above
    it the measurement is repeated after a pause, ATTEMPTS times at most, and the one with the least other work is
    returned. blocks, seconds: limits, see the recipe's section `measure`; with fewer blocks than BLOCKS nothing is
    repeated.
    """

    target: str
    batch: int
    sequence: int | None
    seed: int
    mode: str = CALL
    precision: str = "fp32"
    other_work: float = BUSY
    blocks: int | None = None
    seconds: float | None = None


def measure_latency(
    base: Load,
    pruned: Load,
    inputs: Mapping[str, np.ndarray],
    settings: LatencySettings,
    *,
    plain: Mapping[str, Load] | None = None,
    after_block: Callable[[], None] = lambda: None,
) -> Latency:
    """Measure engines on `inputs` in rounds of interleaved blocks.

    Args:
        base, pruned: load the pair that is judged, both in the settings' precision; called once or twice per round.
        plain: the same for the fp32 pair by name, if that precision is another.
        after_block: called after each block, outside of what is timed.
    """
    mode, precision = settings.mode, settings.precision
    names = [engine_name(model, precision) for model in MODELS]
    judged, faster = names
    loads = {**(plain or {}), judged: base, faster: pruned, AGAIN: base}
    best: tuple[_Arms, Neighbours | None] | None = None
    attempts = ATTEMPTS if settings.blocks is None or settings.blocks >= BLOCKS else 1
    for attempt in range(1, attempts + 1):
        arms = _Arms(loads, judged, faster, inputs, mode, np.random.default_rng(settings.seed))
        watch = Watch()
        arms.measure(after_block, settings.blocks, settings.seconds)
        seen = watch.seen()
        if best is None or best[1] is None or (seen is not None and seen.share < best[1].share):
            best = arms, seen
        if seen is None or seen.share <= settings.other_work:
            break
        if attempt < attempts:
            phase(f"waiting: other work takes {seen.share:.0%} of the CPU time")
            time.sleep(PAUSE_SECONDS)
            phase(f"latency on {settings.target} at batch {settings.batch}, attempt {attempt + 1}")
    assert best is not None
    arms, neighbours = best
    quantiles = {name: _quantiles(arms.blocks_of(name)) for name in loads if name != AGAIN}
    by = {"p90": arms.speedup(judged, faster, statistic=p90)}
    if arms.cpu and all(ms > 0 for blocks in arms.cpu.values() for (ms,) in blocks):
        by["cpu"] = arms.speedup(judged, faster, values=arms.cpu)
    again = speedup_of([arms.samples[judged]], arms.samples[AGAIN], arms.rounds, arms.generator)
    return Latency(
        target=settings.target,
        batch=settings.batch,
        sequence=settings.sequence,
        base_ms=quantiles[judged],
        pruned_ms=quantiles[faster],
        speedup=arms.speedup(judged, faster),
        noise_floor=max(abs(again.ci_low - 1), abs(again.ci_high - 1)),
        blocks=len(arms.rounds),
        samples=arms.samples,
        mode=mode,
        precision=precision,
        engines_ms=quantiles,
        comparisons=tuple(
            Comparison(engine, against, arms.speedup(against, engine)) for engine, against in pairs(precision)
        ),
        neighbours=neighbours,
        by=by,
        rounds=tuple(arms.rounds),
        attempts=attempt,
    )


#: Name of the second instance of base.
AGAIN = "again"


class _Arms:
    """The timed engines. samples: ms of every call by engine and block. cpu: CPU ms per call by engine and block,
    [blocks][1]; empty for engines that do not work on CPU threads. rounds: the round of each block."""

    def __init__(
        self,
        loads: Mapping[str, Load],
        judged: str,
        faster: str,
        inputs: Mapping[str, np.ndarray],
        mode: str,
        generator: np.random.Generator,
    ) -> None:
        self.loads, self.judged, self.faster = loads, judged, faster
        self.inputs, self.mode, self.generator = inputs, mode, generator
        self.samples: dict[str, list[list[float]]] = {name: [] for name in loads}
        self.cpu: dict[str, list[list[float]]] = {}
        self.rounds: list[int] = []
        self.runs: dict[str, int] = {}

    def measure(self, after_block: Callable[[], None], blocks: int | None, seconds: float | None) -> None:
        """Measure rounds until the interval is narrow, `blocks` (default: MAX_BLOCKS) are done, or the time is over.

        There are at least two rounds, without which there is no interval.
        """
        most = blocks or MAX_BLOCKS
        planned, number, began = min(BLOCKS, most), 0, time.perf_counter()
        per_round = min(PER_ROUND, most // 2)
        while True:
            while len(self.rounds) < planned:
                start = time.perf_counter()
                engines = {name: load() for name, load in self.loads.items()}
                if number == 0 and time.perf_counter() - start > SLOW_LOAD * len(engines):
                    per_round = min(PER_SLOW_ROUND, most // 2)
                timers = {name: timer_of(engine, self.inputs, self.mode) for name, engine in engines.items()}
                counts_cpu = all(modes(engine) == (CALL,) for engine in engines.values())
                del engines  # the timers hold the engines until the next round loads new ones
                self._warm_up(timers, WARM_UP_AGAIN if number else WARM_UP_SECONDS)
                for _ in range(min(per_round, planned - len(self.rounds))):
                    self._block(timers, counts_cpu)
                    self.rounds.append(number)
                    after_block()
                    report(len(self.rounds), planned)
                number += 1
                timers.clear()
                if number >= 2 and seconds is not None and time.perf_counter() - began >= seconds:
                    return
            if narrow(self.speedup(self.judged, self.faster)) or planned >= most:
                return
            planned = min(planned + MORE_BLOCKS, most)

    def _warm_up(self, timers: Mapping[str, Timer], seconds: float) -> None:
        typical = {name: warm_up(timer, seconds) for name, timer in timers.items()}
        if not self.runs:  # the same number in every round: a block is a row of one array
            self.runs = {
                name: int(np.clip(BLOCK_SECONDS * 1e3 / max(ms, 1e-6), MIN_RUNS, MAX_RUNS))
                for name, ms in typical.items()
            }

    def _block(self, timers: Mapping[str, Timer], counts_cpu: bool) -> None:
        for name in self.generator.permutation(list(timers)):
            start = time.process_time_ns()
            self.samples[name].append([timers[name]() for _ in range(self.runs[name])])
            if counts_cpu:
                spent = (time.process_time_ns() - start) / 1e6 / self.runs[name]
                self.cpu.setdefault(name, []).append([spent])

    def arms_of(self, name: str) -> list[str]:
        """The names under which an engine is timed: the judged base is loaded twice, and both instances count."""
        return [name, AGAIN] if name == self.judged else [name]

    def blocks_of(self, name: str) -> list[list[float]]:
        arms = [self.samples[arm] for arm in self.arms_of(name)]
        return [[ms for block in blocks for ms in block] for blocks in zip(*arms, strict=True)]

    def speedup(
        self,
        slower: str,
        faster: str,
        statistic: Callable[[np.ndarray], np.ndarray] = median,
        values: Mapping[str, Sequence[Sequence[float]]] | None = None,
    ) -> Speedup:
        """How many times faster one engine is than another. values: of every block; default: milliseconds."""
        values = self.samples if values is None else values
        if faster == self.judged:  # against fp32: the second base is left out, as in the denominator
            return speedup_of([values[slower]], values[faster], self.rounds, self.generator, statistic)
        arms = [values[arm] for arm in self.arms_of(slower)]
        return speedup_of(arms, values[faster], self.rounds, self.generator, statistic)


def pairs(precision: str) -> list[tuple[str, str]]:
    """Other pairs (engine, reference) than the judged one: the total, the precision's part, and pruning in fp32."""
    if precision == "fp32":
        return []
    base, pruned = (engine_name(model, precision) for model in MODELS)
    return [(pruned, "base"), (base, "base"), (pruned, "pruned"), ("pruned", "base")]


def timer_of(engine: Engine, inputs: Mapping[str, np.ndarray], mode: str = CALL) -> Timer:
    """A function that runs the engine once and returns the duration, by the engine's own clock if it has one."""
    if isinstance(engine, Timed):
        return engine.timer(inputs, mode)

    def once() -> float:
        start = time.perf_counter_ns()
        engine.run(inputs)
        return (time.perf_counter_ns() - start) / 1e6

    return once


def warm_up(timer: Timer, seconds: float | None = None) -> float:
    """Run for at least `seconds` and until the medians of two successive windows agree within 5 %; returns ms.

    seconds: default: WARM_UP_SECONDS.
    """
    least = WARM_UP_SECONDS if seconds is None else min(seconds, WARM_UP_SECONDS)
    start, previous = time.perf_counter(), float("inf")
    while True:
        window = [timer() for _ in range(5)]
        while sum(window) < least * 1e3 / 2:
            window.append(timer())
        median = float(np.median(window))
        elapsed = time.perf_counter() - start
        if (abs(median - previous) <= 0.05 * median and elapsed >= least) or elapsed >= WARM_UP_LIMIT:
            return median
        previous = median


def _quantiles(blocks: list[list[float]]) -> Quantiles:
    p50, p90, p99 = np.percentile(np.concatenate([np.asarray(block) for block in blocks]), [50, 90, 99])
    return Quantiles(float(p50), float(p90), float(p99))
