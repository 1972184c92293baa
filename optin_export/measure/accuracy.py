"""Accuracy of an engine on labelled data, in points (metric x 100), and the drop with a paired bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from optin_export.errors import InputError
from optin_export.sources import Dataset

RESAMPLES = 1000


@dataclass(frozen=True)
class Accuracy:
    """base, pruned: points of the two engines on the same rows. drop = base - pruned; drop_low, drop_high: 95 %
    interval of the drop by bootstrap over rows (how far another sample of the same size could have moved it)."""

    metric: str
    rows: int
    base: float
    pruned: float
    drop: float
    drop_low: float
    drop_high: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


#: Named arrays in, the task's output [batch, ...] out: an engine, or a torch model.
Function = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def predict(
    function: Function, data: Dataset, tick: Callable[[int, int], None] = lambda done, total: None
) -> np.ndarray:
    """One prediction per row: class indices [rows] for logits, the value for one logit, cosine similarity for pairs."""
    outputs = []
    total, done = sum(len(side) for side in data.sides), 0
    for side in data.sides:
        collected: np.ndarray | None = None
        for batch in side:
            inputs = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
            result = function(inputs)
            if collected is None:
                collected = np.zeros((len(data.labels), *result.shape[1:]), result.dtype)
            collected[batch.rows] = result
            done += 1
            tick(done, total)
        assert collected is not None
        outputs.append(collected)
    if len(outputs) == 2:
        first, second = (output / np.linalg.norm(output, axis=-1, keepdims=True).clip(1e-12) for output in outputs)
        return (first * second).sum(-1)
    return outputs[0].squeeze(-1) if outputs[0].shape[-1] == 1 else outputs[0].argmax(-1)


def points(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """The metric x 100. Raises InputError where it is not defined (constant labels or predictions)."""
    if metric == "accuracy":
        return 100.0 * float((predictions == labels).mean())
    correlate = {"spearman": stats.spearmanr, "pearson": stats.pearsonr}[metric]
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        raise InputError(
            f"the metric {metric} is not defined here", "labels or predictions are constant", "check columns.label"
        )
    return 100.0 * float(correlate(predictions, labels).statistic)


def evaluate(base: np.ndarray, pruned: np.ndarray, labels: np.ndarray, metric: str, seed: int) -> Accuracy:
    """Compare two engines' predictions [rows] on the same labels."""
    values = points(metric, base, labels), points(metric, pruned, labels)
    generator = np.random.default_rng(seed)
    drops = []
    for _ in range(RESAMPLES):
        rows = generator.integers(0, len(labels), len(labels))
        try:
            drops.append(points(metric, base[rows], labels[rows]) - points(metric, pruned[rows], labels[rows]))
        except InputError:  # a resample of a tiny data set may hold one label only
            continue
    low, high = np.percentile(drops, [2.5, 97.5]) if drops else (values[0] - values[1],) * 2
    return Accuracy(metric, len(labels), *values, values[0] - values[1], float(low), float(high))
