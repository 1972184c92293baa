"""What a guess reaches in each metric, and the sentence about a model that does no better."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optin_export.data import Batch, Dataset
from optin_export.measure.accuracy import evaluate
from optin_export.measure.chance import Chance, chance, labels_of, warning
from optin_export.measure.metrics import METRICS


def test_accuracy_is_that_of_the_most_frequent_label() -> None:
    guess = chance("accuracy", np.zeros((4, 2)), np.array([0, 1, 1, 1]), 3)
    assert guess.points == 75.0 and "most frequent" in guess.how
    words = [np.array([0, -100, 2]), np.array([2, 2])]
    assert chance("accuracy", np.zeros((2, 2)), words, 3).points == 75.0


def by_metric(metric: str, outputs: np.ndarray, labels: object) -> float:
    return METRICS[metric].value(METRICS[metric].statistic(outputs, labels, {}))  # type: ignore[arg-type]


def test_f1_and_mean_iou_are_those_of_the_better_guess() -> None:
    """Of one class for all rows, or of classes drawn evenly: compared with the metric of such guesses themselves."""
    generator = np.random.default_rng(0)
    for shares in ([0.9, 0.05, 0.05], [0.34, 0.33, 0.33]):
        labels = generator.choice(3, 20_000, p=shares)
        constant = by_metric("f1", np.tile([1.0, 0, 0], (20_000, 1)), labels)
        even = by_metric("f1", np.eye(3)[generator.integers(0, 3, 20_000)], labels)
        statistics = METRICS["f1"].statistic(np.eye(3)[generator.integers(0, 3, 20_000)], labels, {})
        assert chance("f1", statistics, labels, 3).points == pytest.approx(max(constant, even), abs=1.0)
    maps = generator.choice(3, (4, 64, 64), p=[0.5, 0.25, 0.25])
    drawn = np.eye(3)[generator.integers(0, 3, (4, 64, 64))].transpose(0, 3, 1, 2)
    statistics = METRICS["mean_iou"].statistic(drawn, list(maps), {})
    constant = by_metric("mean_iou", np.tile(np.eye(3)[0][None, :, None, None], (4, 1, 64, 64)), list(maps))
    expected = max(constant, METRICS["mean_iou"].value(statistics))
    assert chance("mean_iou", statistics, list(maps), 3).points == pytest.approx(expected, abs=1.0)


def test_the_other_metrics() -> None:
    assert chance("perplexity", np.zeros((2, 2)), [], 500).points == 500
    assert (
        chance("spearman", np.zeros((2, 2)), [], 1).points == chance("exact_match", np.zeros((2, 2)), [], 1).points == 0
    )


def test_the_sentence() -> None:
    half = Chance(50.0, "that of tossing a coin")
    assert warning("accuracy", 90.0, 85.0, 95.0, half) is None
    said = warning("accuracy", 55.0, 45.0, 65.0, half)
    assert said is not None and "accuracy of 55" in said and "50, that of tossing a coin" in said
    assert warning("accuracy", 0.0, 0.0, 0.0, half) is not None
    assert warning("perplexity", 20.0, 18.0, 22.0, Chance(500.0, "")) is None
    assert warning("perplexity", 600.0, 500.0, 700.0, Chance(500.0, "")) is not None
    assert warning("spearman", 5.0, -10.0, 20.0, Chance(0.0, "")) is not None


def test_an_evaluation_says_so() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 2
    for outputs, warned in ((np.eye(2)[labels], False), (np.eye(2)[generator.integers(0, 2, 200)], True)):
        statistics = METRICS["accuracy"].statistic(outputs, labels, {})
        found = evaluate(statistics, statistics, "accuracy", 0, chance("accuracy", statistics, labels, 2))
        assert (found.warning is not None) == warned and found.chance == 50
        assert found.base_low is not None and found.base_low <= found.base <= found.base_high  # type: ignore[operator]
    assert evaluate(statistics, statistics, "accuracy", 0).warning is None


def test_labels_are_put_back_in_the_order_of_the_rows() -> None:
    batches = tuple(
        Batch({"x": torch.zeros(2)}, np.array(rows), targets=[f"row {row}" for row in rows])
        for rows in ([3, 0], [1, 2])
    )
    assert labels_of(Dataset((batches,), np.zeros(4), "accuracy")) == ["row 0", "row 1", "row 2", "row 3"]
    plain = (Batch({"x": torch.zeros(2)}, np.array([1, 0])),)
    assert labels_of(Dataset((plain,), [5, 6], "accuracy")) == [5, 6]
