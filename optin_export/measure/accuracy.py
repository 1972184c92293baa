"""Accuracy of an engine on labelled data, in points (metric x 100), and the drop with a paired bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from optin_export.data import Dataset
from optin_export.errors import InputError
from optin_export.measure.chance import Chance, warning
from optin_export.measure.metrics import METRICS

RESAMPLES = 1000


@dataclass(frozen=True)
class Accuracy:
    """base, pruned: points of the two engines on the same rows (perplexity: itself). drop: what was `lost`.
    drop_low, drop_high: its 95 % interval by bootstrap over rows (how far another sample of the same size could have
    moved it). engines: points of every engine by name; base is the fp32 one, pruned the one that is shipped.
    base_low, base_high: 95 % interval of `base` by the same resamples. chance: what a guess reaches that does not see
    the inputs; warning: a sentence where `base` is not surely better than that."""

    metric: str
    rows: int
    base: float
    pruned: float
    drop: float
    drop_low: float
    drop_high: float
    engines: dict[str, float] = field(default_factory=dict)
    base_low: float | None = None
    base_high: float | None = None
    chance: float | None = None
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


#: Named arrays in, the task's output [batch, ...] out: an engine, or a torch model.
Function = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def predict(function: Function, data: Dataset) -> np.ndarray:
    """The metric's statistic of every row of the data, [rows, ...]; for pairs, of their similarity."""
    metric = METRICS[data.metric]
    embeddings: list[np.ndarray] = []
    statistics: np.ndarray | None = None
    for side in data.sides:
        for batch in side:
            inputs = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
            result = function(inputs)
            if len(data.sides) == 1:
                labels = [data.labels[row] for row in batch.rows] if batch.targets is None else batch.targets
                result = metric.statistic(result, labels, inputs)
            if statistics is None:
                statistics = np.zeros((len(data.labels), *result.shape[1:]), result.dtype)
            statistics[batch.rows] = result
        assert statistics is not None
        embeddings.append(statistics)
        statistics = None
    if len(embeddings) == 1:
        return embeddings[0]
    return metric.statistic(similarity(data.similarity, *embeddings), list(data.labels), {})


def similarity(name: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[rows]: how alike the rows of two arrays [rows, features] are; a distance counts as its negative."""
    if name == "euclidean":
        return -np.linalg.norm(first - second, axis=-1)
    if name == "manhattan":
        return -np.abs(first - second).sum(-1)
    if name == "cosine":
        first, second = (one / np.linalg.norm(one, axis=-1, keepdims=True).clip(1e-12) for one in (first, second))
    return (first * second).sum(-1)


def lost(metric: str, base: float, pruned: float) -> float:
    """base - pruned, or the other way round where lower is better."""
    return pruned - base if METRICS[metric].lower_is_better else base - pruned


def evaluate(base: np.ndarray, pruned: np.ndarray, metric: str, seed: int, guess: Chance | None = None) -> Accuracy:
    """Compare two engines by their statistics [rows, ...] on the same rows. guess: what the unpruned one must beat."""
    compute = METRICS[metric].value
    values = compute(base), compute(pruned)
    generator = np.random.default_rng(seed)
    drops, bases = [], []
    for _ in range(RESAMPLES):
        rows = generator.integers(0, len(base), len(base))
        try:
            before = compute(base[rows])
            drops.append(lost(metric, before, compute(pruned[rows])))
            bases.append(before)
        except InputError:  # a resample of a tiny data set may hold one label only
            continue
    drop = lost(metric, *values)
    low, high = np.percentile(drops, [2.5, 97.5]) if drops else (drop, drop)
    own = np.percentile(bases, [2.5, 97.5]) if bases else (values[0], values[0])
    below, above = float(own[0]), float(own[1])
    return Accuracy(
        metric,
        len(base),
        *values,
        drop,
        float(low),
        float(high),
        base_low=below,
        base_high=above,
        chance=None if guess is None else guess.points,
        warning=None if guess is None else warning(metric, values[0], below, above, guess),
    )
