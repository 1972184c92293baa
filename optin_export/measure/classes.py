"""Metrics of one class per row: binary F1, Matthews' correlation, area under the ROC curve, top-5 accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optin_export.errors import InputError

Inputs = Mapping[str, np.ndarray]
#: How many classes count as an answer of `top5`.
TOP = 5


def binary_f1(statistics: np.ndarray) -> float:
    """100 times the F1 of class 1. statistics: [rows, 3, 2], true positives, false positives and false negatives."""
    right, wrong, missed = statistics.sum(0)[:, 1]
    if right + wrong + missed == 0:
        raise InputError("the metric f1_binary is not defined here", "no row has the class 1", "check columns.label")
    return 100.0 * float(2 * right / (2 * right + wrong + missed))


def matthews(statistics: np.ndarray) -> float:
    """100 times Matthews' correlation of labels and predictions, 0 if either is constant.

    statistics: [rows, 3, classes], true positives, false positives and false negatives.
    """
    right, wrong, missed = statistics.sum(0)
    labels, predictions, rows = right + missed, right + wrong, (right + missed).sum()
    spread = (rows**2 - labels @ labels) * (rows**2 - predictions @ predictions)
    return 0.0 if spread <= 0 else 100.0 * float((right.sum() * rows - labels @ predictions) / np.sqrt(spread))


def scores_and_label(outputs: np.ndarray, labels: Sequence[Any], inputs: Inputs) -> np.ndarray:
    """[rows, classes + 1]: the probability of every class, and the label."""
    from scipy.special import softmax

    return np.concatenate([softmax(outputs.astype(np.float64), -1), np.asarray(labels, np.float64)[:, None]], 1)


def roc_area(statistics: np.ndarray) -> float:
    """100 times the area under the ROC curve: of class 1 of two, else the mean of each class against the rest."""
    scores, labels = statistics[:, :-1], statistics[:, -1].astype(int)
    classes = [1] if scores.shape[1] == 2 else sorted(set(labels.tolist()))
    areas = [_area(scores[:, one], labels == one) for one in classes]
    found = [area for area in areas if area is not None]
    if not found:
        raise InputError("the metric auc is not defined here", "all rows have one label", "check columns.label")
    return 100.0 * float(np.mean(found))


def _area(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """The share of pairs of a positive and a negative row that the scores order rightly; equal scores count half."""
    from scipy.stats import rankdata

    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return None
    return float((rankdata(scores)[positive].sum() - count * (count + 1) / 2) / (count * others))


def among_top(outputs: np.ndarray, labels: Sequence[Any], inputs: Inputs) -> np.ndarray:
    """[rows, 2]: whether the label is one of the five likeliest classes, and 1."""
    best = np.argsort(-outputs, axis=-1, kind="stable")[:, :TOP]
    hit = (best == np.asarray(labels, np.int64)[:, None]).any(1)
    return np.stack([hit, np.ones(len(hit))], 1).astype(np.float64)
