"""The accuracy of engines on labelled data, in points (metric x 100), and the drop with a paired bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from optin_export.errors import InputError
from optin_export.measure.bootstrap import ROW_DRAWS, interval, resampled
from optin_export.measure.chance import Chance, warning
from optin_export.measure.metrics import metric_of
from optin_export.measure.own import shown
from optin_export.measure.retrieval import ranks
from optin_export.recipe.tasks import is_lower_better

if TYPE_CHECKING:
    from optin_export.data import Dataset


@dataclass(frozen=True)
class Accuracy:
    """base, pruned: points of the two engines on the same rows (perplexity: itself). drop: what was `lost`.
    drop_low, drop_high: its 95 % interval by bootstrap over rows (the variation between samples of the same size).
    engines: points of every engine by name; base is the fp32 engine, pruned the shipped one.
    base_low, base_high: 95 % interval of `base` by the same resamples. chance: points of guessing without the inputs;
    warning: a sentence if `base` is not significantly better than that."""

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
    metric = metric_of(data.metric)
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
    first, second = embeddings
    if metric.of_ranks is not None:
        return metric.of_ranks(
            ranks(lambda row: similarity(data.similarity, first[row : row + 1], second), data.labels)
        )
    return metric.statistic(similarity(data.similarity, first, second), list(data.labels), {})


def similarity(name: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[rows]: similarity of the rows of two arrays [rows, features]; a distance counts as its negative."""
    if name == "euclidean":
        return -np.linalg.norm(first - second, axis=-1)
    if name == "manhattan":
        return -np.abs(first - second).sum(-1)
    if name == "cosine":
        first, second = (one / np.linalg.norm(one, axis=-1, keepdims=True).clip(1e-12) for one in (first, second))
    return (first * second).sum(-1)


def lost(metric: str, base: float, pruned: float) -> float:
    """base - pruned, or pruned - base if lower is better."""
    return pruned - base if is_lower_better(metric) else base - pruned


def evaluate(base: np.ndarray, pruned: np.ndarray, metric: str, seed: int, guess: Chance | None = None) -> Accuracy:
    """Compare two engines by their statistics [rows, ...] on the same rows. guess: what the unpruned one must beat."""
    compute = metric_of(metric).value
    values = compute(base), compute(pruned)

    def of_rows(rows: np.ndarray) -> tuple[float, float] | None:
        try:
            before = compute(base[rows])
            return before, lost(metric, before, compute(pruned[rows]))
        except InputError:  # a resample of a tiny data set may hold only one label
            return None

    found = resampled(of_rows, len(base), ROW_DRAWS, np.random.default_rng(seed))
    drop = lost(metric, *values)
    below, above = interval([before for before, _ in found] or [values[0]])
    low, high = interval([one for _, one in found] or [drop])
    return Accuracy(
        shown(metric),
        len(base),
        *values,
        drop,
        low,
        high,
        base_low=below,
        base_high=above,
        chance=None if guess is None else guess.points,
        warning=None if guess is None else warning(metric, values[0], below, above, guess),
    )
