"""Metrics as sums over rows: each row of data gives a statistic, and the metric is computed from any set of them.

A bootstrap resamples the statistics, so that no metric needs the outputs of a whole data set at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from optin_export.errors import InputError
from optin_export.measure.classes import among_top, binary_f1, matthews, roc_area, scores_and_label
from optin_export.measure.own import is_own, kept, own_value
from optin_export.measure.retrieval import gain, recall
from optin_export.measure.transcripts import error_rate, word_errors
from optin_export.recipe import IGNORED

#: Longest answer to a question, in tokens, as in the evaluation of SQuAD models.
LONGEST_ANSWER = 30
Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """statistic: (outputs of one batch [rows, ...], its labels, one per row, its inputs) -> an array per row.
    value: (statistics [rows, ...]) -> points; raises InputError where the metric is not defined.
    of_ranks: of retrieval, instead of `statistic`: (ranks of the documents [rows]) -> an array per row.
    """

    statistic: Callable[[np.ndarray, Sequence[Any], Inputs], np.ndarray]
    value: Callable[[np.ndarray], float]
    of_ranks: Callable[[np.ndarray], np.ndarray] | None = None


def _predicted(outputs: np.ndarray) -> np.ndarray:
    return outputs.squeeze(-1) if outputs.shape[-1] == 1 else outputs.argmax(-1)


def _correct(outputs: np.ndarray, labels: Sequence[Any], inputs: Inputs) -> np.ndarray:
    """[rows, 2]: number of correct predictions and of all predictions; labels: a class, or one per token."""
    predictions = _predicted(outputs) if outputs.ndim == 2 else outputs.argmax(-1)
    if predictions.ndim == 1:
        return np.stack([predictions == np.asarray(labels), np.ones(len(labels))], 1).astype(np.float64)
    wanted = _padded(labels, predictions.shape[1])
    counted = wanted != IGNORED
    return np.stack([((predictions == wanted) & counted).sum(1), counted.sum(1)], 1).astype(np.float64)


def _confusion(outputs: np.ndarray, labels: Sequence[Any], inputs: Inputs) -> np.ndarray:
    """[rows, 3, classes]: true positives, false positives and false negatives; labels: a class, or one per token."""
    predictions, classes = outputs.argmax(-1).reshape(len(outputs), -1), outputs.shape[-1]
    wanted = np.asarray(labels, np.int64)[:, None] if outputs.ndim == 2 else _padded(labels, predictions.shape[1])
    if wanted.max(initial=0) >= classes:
        raise InputError(
            "the metric is not defined here",
            f"label {wanted.max()} is not one of the model's {classes} classes",
            "check columns.label",
        )
    counts = np.zeros((len(outputs), 3, classes))
    for row, (predicted, right) in enumerate(zip(predictions, wanted, strict=True)):
        predicted, right = predicted[right != IGNORED], right[right != IGNORED]
        hit = predicted == right
        for kind, found in enumerate((right[hit], predicted[~hit], right[~hit])):
            counts[row, kind] = np.bincount(found, minlength=classes)
    return counts


def _macro_f1(statistics: np.ndarray) -> float:
    """The mean F1 over the classes that occur in labels or predictions."""
    right, wrong, missed = statistics.sum(0)
    counted = 2 * right + wrong + missed
    if not counted.any():
        raise InputError("the metric f1 is not defined here", "no row has a label", "check columns.label")
    return 100.0 * float((2 * right[counted > 0] / counted[counted > 0]).mean())


def _surprise(outputs: np.ndarray, labels: Sequence[Any], inputs: Inputs) -> np.ndarray:
    """[rows, 2]: negative log-likelihood of the targets in nats, and the number of targets."""
    from scipy.special import logsumexp

    wanted = _padded(labels, outputs.shape[1])
    result = np.zeros((len(outputs), 2))
    for row, right in enumerate(wanted):
        at = np.flatnonzero(right != IGNORED)
        logits = outputs[row, at].astype(np.float64)  # a row at a time: a vocabulary is large
        result[row] = (logsumexp(logits, axis=-1) - logits[np.arange(len(at)), right[at]]).sum(), len(at)
    return result


def _perplexity(statistics: np.ndarray) -> float:
    surprise, counted = statistics.sum(0)
    if counted == 0:
        raise InputError("the metric perplexity is not defined here", "no row has a target", "give longer texts")
    return float(np.exp(surprise / counted))


def _squad(name: Literal["f1", "exact_match"]) -> Callable[[np.ndarray, Sequence[Any], Inputs], np.ndarray]:
    """[rows, 2]: SQuAD's score of the best answer, and 1. outputs: [rows, start and end, tokens]; labels: `Answer`s."""

    def statistic(outputs: np.ndarray, labels: Sequence[Any], inputs: Inputs) -> np.ndarray:
        from torchmetrics.functional.text import squad

        scores = []
        for row, answer in zip(outputs, labels, strict=True):
            predicted = [{"prediction_text": _best_span(row, answer), "id": "0"}]
            right = [{"answers": {"answer_start": [0], "text": list(answer.answers)}, "id": "0"}]
            scores.append([float(squad(predicted, right)[name]) / 100, 1.0])
        return np.array(scores)

    return statistic


def _best_span(scores: np.ndarray, answer: Any) -> str:
    """The text of the context between the most likely start and end, at most LONGEST_ANSWER tokens apart."""
    length = min(len(answer.offsets), scores.shape[1])
    outside = np.where(answer.offsets[:length, 0] < 0, -np.inf, 0.0)
    start, end = scores[:, :length] + outside
    both = np.triu(np.full((length, length), 1.0)) * np.tril(np.ones((length, length)), LONGEST_ANSWER - 1)
    sums = np.where(both > 0, start[:, None] + end[None], -np.inf)
    if not np.isfinite(sums).any():  # the whole context was cut off
        return ""
    first, last = np.unravel_index(sums.argmax(), sums.shape)
    return answer.context[answer.offsets[first, 0] : answer.offsets[last, 1]]


def _padded(labels: Sequence[Any], length: int) -> np.ndarray:
    result = np.full((len(labels), length), IGNORED, dtype=np.int64)
    for row, values in zip(result, labels, strict=True):
        row[: min(len(values), length)] = np.asarray(values)[:length]
    return result


def _ratio(statistics: np.ndarray) -> float:
    correct, counted = statistics.sum(0)
    if counted == 0:
        raise InputError("the metric accuracy is not defined here", "no row has a label", "check columns.label")
    return 100.0 * float(correct / counted)


def _pairs(outputs: np.ndarray, labels: Sequence[Any], inputs: Inputs) -> np.ndarray:
    """[rows, 2]: prediction and label."""
    predictions = outputs if outputs.ndim == 1 else _predicted(outputs)
    return np.stack([predictions.astype(np.float64), np.asarray(labels, dtype=np.float64)], 1)


def _correlation(name: str, function: str) -> Callable[[np.ndarray], float]:
    """Metric from a correlation function of scipy.stats."""

    def value(statistics: np.ndarray) -> float:
        from scipy import stats

        predictions, labels = statistics.T
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            raise InputError(
                f"the metric {name} is not defined here", "labels or predictions are constant", "check columns.label"
            )
        return 100.0 * float(getattr(stats, function)(predictions, labels).statistic)

    return value


def _overlap(outputs: np.ndarray, labels: Sequence[Any], inputs: Inputs) -> np.ndarray:
    """[rows, classes, 3]: pixels of a class in both label and prediction, in the label, in the prediction.

    These are the parts of a confusion matrix that the mean IoU needs. outputs: [rows, classes, h, w], labels: [H, W]
    each. As in the libraries, logits are scaled bilinearly to the size of the label map before the argmax.
    """
    import torch
    from torch.nn import functional as F

    classes, rows = outputs.shape[1], []
    for output, label in zip(outputs, labels, strict=True):
        counted = label != IGNORED
        wanted = label[counted]
        if wanted.size and wanted.max() >= classes:
            raise InputError(
                f"a label map holds class {wanted.max()}",
                f"the model has {classes} classes, 0 to {classes - 1}",
                "set data.evaluation.ignore to the value of pixels that are not evaluated",
            )
        scaled = F.interpolate(torch.from_numpy(output)[None], label.shape, mode="bilinear", align_corners=False)
        predicted = scaled[0].argmax(0).numpy()[counted]
        sets = (wanted[wanted == predicted], wanted, predicted)
        rows.append(np.stack([np.bincount(one, minlength=classes) for one in sets], 1))
    return np.stack(rows)


def _mean_iou(statistics: np.ndarray) -> float:
    """Mean intersection over union of the classes that occur in labels or predictions."""
    hit, wanted, predicted = statistics.sum(0).T
    union = wanted + predicted - hit
    if not union.any():
        raise InputError("the metric mean_iou is not defined here", "no pixel has a label", "check data.evaluation")
    return 100.0 * float((hit[union > 0] / union[union > 0]).mean())


METRICS: dict[str, Metric] = {
    "accuracy": Metric(_correct, _ratio),
    "f1": Metric(_confusion, _macro_f1),
    "f1_binary": Metric(_confusion, binary_f1),
    "mcc": Metric(_confusion, matthews),
    "auc": Metric(scores_and_label, roc_area),
    "top5": Metric(among_top, _ratio),
    "squad_f1": Metric(_squad("f1"), _ratio),
    "exact_match": Metric(_squad("exact_match"), _ratio),
    "perplexity": Metric(_surprise, _perplexity),
    "spearman": Metric(_pairs, _correlation("spearman", "spearmanr")),
    "pearson": Metric(_pairs, _correlation("pearson", "pearsonr")),
    **{f"recall@{k}": Metric(_pairs, _ratio, of_ranks=recall(k)) for k in (1, 5, 10)},
    "ndcg@10": Metric(_pairs, _ratio, of_ranks=gain(10)),
    "mean_iou": Metric(_overlap, _mean_iou),
    "wer": Metric(word_errors, error_rate),
}


def metric_of(name: str) -> Metric:
    """The metric of this name, or the user's own (`py:FILE.py:FUNCTION`)."""
    return Metric(kept, partial(own_value, name)) if is_own(name) else METRICS[name]
