"""The metric of guessing without the inputs; an unpruned model that is no better probably has the wrong labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optin_export.measure.classes import TOP
from optin_export.measure.metrics import metric_of
from optin_export.recipe import IGNORED
from optin_export.recipe.tasks import is_lower_better

if TYPE_CHECKING:
    from optin_export.data import Dataset

#: Number of answers over which SQuAD's score of the whole context is averaged.
_ANSWERS = 500


@dataclass(frozen=True)
class Chance:
    """points: the result of guessing, in points of the metric (perplexity: itself). how: description of the guess."""

    points: float
    how: str


def chance(metric: str, statistics: np.ndarray, labels: Sequence[Any] | np.ndarray, classes: int | None) -> Chance:
    """The best guess that does not see the inputs.

    statistics: of any engine, [rows, ...], as `Metric.statistic` gives them: for f1 and mean_iou they hold the labels.
    labels: one per row, as the metric takes them. classes: outputs per row of the model.
    """
    if metric == "accuracy":
        return _most_frequent(labels)
    if metric == "f1":
        return _of_macro_f1(statistics[:, [0, 2]].sum((0, 1)))
    if metric == "f1_binary":
        share = float(np.mean(np.asarray(labels) == 1))
        return Chance(100.0 * 2 * share / (1 + share), "that of class 1 as every answer")
    if metric == "auc":
        return Chance(50.0, "that of scores that have nothing to do with the labels")
    if metric == "top5":
        return _most_frequent(labels, TOP)
    if metric.startswith(("recall@", "ndcg@")):
        return _of_ranks(metric, len(labels))
    if metric == "mean_iou":
        return _of_mean_iou(statistics[..., 1].sum(0))
    if metric == "perplexity":
        return Chance(float(classes or np.inf), "that of every token being as likely as any other")
    if metric == "squad_f1":
        return Chance(_whole_contexts(list(labels[:_ANSWERS])), "that of the whole context as every answer")
    if metric == "wer":
        return Chance(100.0, "that of an empty transcript")
    if metric == "exact_match":
        return Chance(0.0, "that of no right answer at all")
    return Chance(0.0, "that of outputs that have nothing to do with the labels")


def labels_of(data: Dataset) -> Sequence[Any] | np.ndarray:
    """One label per row, in the order of the rows, as the metric takes it."""
    if len(data.sides) > 1 or all(batch.targets is None for batch in data.sides[0]):
        return data.labels
    found: dict[int, Any] = {}
    for batch in data.sides[0]:
        assert batch.targets is not None
        found |= dict(zip(batch.rows.tolist(), batch.targets, strict=True))
    return [found[row] for row in sorted(found)]


def warning(metric: str, base: float, low: float, high: float, guess: Chance) -> str | None:
    """A sentence if the unpruned model is not significantly better than a guess; None if it is.

    low, high: 95 % interval of `base`.
    """
    worse = high >= guess.points if is_lower_better(metric) else low <= guess.points
    if not worse:
        return None
    return (
        f"the unpruned model's {metric} of {base:.4g} (95 % interval {low:.4g} to {high:.4g}) is not surely better "
        f"than {guess.points:.4g}, {guess.how}, so its loss by pruning means nothing. Check that the labels are those "
        "of the model's training, and that inputs are preprocessed as in its training"
    )


def _most_frequent(labels: Sequence[Any] | np.ndarray, count: int = 1) -> Chance:
    flat = labels if isinstance(labels, np.ndarray) else np.concatenate([np.asarray(one).reshape(-1) for one in labels])
    values = np.asarray(flat)
    values = values[values != IGNORED]
    _, counts = np.unique(values, return_counts=True)
    share = np.sort(counts)[::-1][:count].sum() / counts.sum() if len(counts) else 0.0
    what = "the most frequent label" if count == 1 else f"the {count} most frequent labels"
    return Chance(100.0 * float(share), f"that of {what} as every answer")


def _of_ranks(metric: str, documents: int) -> Chance:
    """The mean over all ranks of the one relevant document."""
    statistic = metric_of(metric).of_ranks
    assert statistic is not None
    points = 100.0 * float(statistic(np.arange(1.0, documents + 1))[:, 0].mean())
    return Chance(points, "that of documents in any order")


def _of_macro_f1(counts: np.ndarray) -> Chance:
    """counts: rows of each class. The better of one class for all rows, and of every class as often as any other."""
    shares = counts / max(counts.sum(), 1)
    labelled = shares[shares > 0]
    constant = 2 * shares.max() / (1 + shares.max()) / max(len(labelled), 1)
    even = 1 / len(shares)
    spread = (2 * shares * even / (shares + even)).mean()
    return Chance(100.0 * float(max(constant, spread)), "that of guessing")


def _of_mean_iou(counts: np.ndarray) -> Chance:
    """As `_of_macro_f1`. counts: pixels of each class."""
    shares = counts / max(counts.sum(), 1)
    constant = shares.max() / max((shares > 0).sum(), 1)
    even = 1 / len(shares)
    spread = (shares * even / (shares + even - shares * even)).mean()
    return Chance(100.0 * float(max(constant, spread)), "that of guessing")


def _whole_contexts(answers: Sequence[Any]) -> float:
    from torchmetrics.functional.text import squad

    predicted = [{"prediction_text": one.context, "id": str(row)} for row, one in enumerate(answers)]
    right = [
        {"answers": {"answer_start": [0], "text": list(one.answers)}, "id": str(row)} for row, one in enumerate(answers)
    ]
    return float(squad(predicted, right)["f1"])
