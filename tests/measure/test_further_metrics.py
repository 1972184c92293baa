"""Metrics of classes, of retrieval and of the user's own, by the values of scikit-learn and torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import optin_export
from optin_export.data import Dataset
from optin_export.data.batches import Batch
from optin_export.data.fitness import check_metric
from optin_export.errors import InputError
from optin_export.measure.accuracy import evaluate, predict
from optin_export.measure.chance import chance
from optin_export.measure.metrics import metric_of
from optin_export.measure.own import shown
from optin_export.recipe import validate
from tests.conftest import Make

sklearn = pytest.importorskip("sklearn.metrics")


def drawn(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that have something to do with the labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, rows)
    return (generator.normal(size=(rows, classes)) + np.eye(classes)[labels]), labels


def points(name: str, outputs: np.ndarray, labels: Sequence[Any] | np.ndarray) -> float:
    metric = metric_of(name)
    return metric.value(metric.statistic(outputs, list(labels), {}))


@pytest.mark.parametrize("classes", [2, 4])
def test_mcc_and_auc(classes: int) -> None:
    outputs, labels = drawn(200, classes)
    expected = 100 * sklearn.matthews_corrcoef(labels, outputs.argmax(-1))
    assert points("mcc", outputs, labels) == pytest.approx(expected)
    scores = torch.from_numpy(outputs).softmax(-1).numpy()
    wanted = scores[:, 1] if classes == 2 else scores
    area = sklearn.roc_auc_score(labels, wanted, multi_class="ovr", average="macro")
    assert points("auc", outputs, labels) == pytest.approx(100 * area)


def test_equal_scores_count_half() -> None:
    scores, labels = np.array([0.1, 0.5, 0.5, 0.5, 0.9]), np.array([0, 1, 0, 1, 1])
    outputs = np.log(np.stack([1 - scores, scores], 1))
    assert points("auc", outputs, labels) == pytest.approx(100 * sklearn.roc_auc_score(labels, scores))


def test_binary_and_macro_f1() -> None:
    outputs, labels = drawn(200, 2)
    predicted = outputs.argmax(-1)
    assert points("f1_binary", outputs, labels) == pytest.approx(100 * sklearn.f1_score(labels, predicted))
    assert points("f1", outputs, labels) == pytest.approx(100 * sklearn.f1_score(labels, predicted, average="macro"))
    assert points("mcc", np.eye(2)[np.ones(4, int)], [0, 1, 0, 1]) == 0.0  # a constant answer


def test_top5() -> None:
    from torchmetrics.functional.classification import multiclass_accuracy

    outputs, labels = np.random.default_rng(1).normal(size=(100, 9)), np.random.default_rng(2).integers(0, 9, 100)
    expected = multiclass_accuracy(torch.from_numpy(outputs), torch.from_numpy(labels), 9, average="micro", top_k=5)
    assert points("top5", outputs, labels) == pytest.approx(100 * float(expected))


def pairs(rows: int, labels: np.ndarray, metric: str, similarity: str = "cosine") -> tuple[Dataset, np.ndarray, Any]:
    """Embeddings of queries and documents as data whose model is the identity."""
    generator = np.random.default_rng(3)
    queries = generator.normal(size=(rows, 6)).astype(np.float32)
    documents = queries + generator.normal(size=(rows, 6)).astype(np.float32)
    sides = tuple(
        tuple(
            Batch({"x": torch.from_numpy(one[at : at + 4])}, np.arange(at, min(at + 4, rows)))
            for at in range(0, rows, 4)
        )
        for one in (queries, documents)
    )
    return Dataset(sides, labels, metric, None, similarity), queries, documents


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize(
    ("metric", "function"), [("recall@5", "retrieval_recall"), ("ndcg@10", "retrieval_normalized_dcg")]
)
def test_retrieval_over_the_documents_of_all_rows(metric: str, function: str, similarity: str) -> None:
    import torchmetrics.functional.retrieval as library

    rows, k = 30, int(metric.partition("@")[2])
    labels = np.arange(rows) % 3 > 0  # every third row only adds a document
    data, queries, documents = pairs(rows, labels.astype(float), metric, similarity)
    found = predict(lambda inputs: inputs["x"], data)
    one, two = (torch.from_numpy(value) for value in (queries, documents))
    scores = {
        "cosine": torch.nn.functional.normalize(one) @ torch.nn.functional.normalize(two).T,
        "dot": one @ two.T,
        "euclidean": 10 - torch.cdist(one, two),
    }[similarity]
    expected = [
        float(getattr(library, function)(scores[row], torch.eye(rows)[row].bool(), top_k=k))
        for row in np.flatnonzero(labels)
    ]
    assert metric_of(metric).value(found) == pytest.approx(100 * np.mean(expected), abs=1e-4)


def test_embeddings_that_are_all_equal_find_nothing() -> None:
    data, _, _ = pairs(30, np.ones(30), "recall@1")
    found = predict(lambda inputs: np.ones_like(inputs["x"]), data)
    assert metric_of("recall@1").value(found) == 0.0


def test_chance_of_the_metrics() -> None:
    labels = np.array([1, 1, 1, 0])
    nothing = np.zeros((4, 3, 2))
    assert chance("f1_binary", nothing, labels, 2).points == pytest.approx(
        100 * sklearn.f1_score(labels, np.ones(4, int))
    )
    assert chance("auc", nothing, labels, 2).points == 50.0
    assert chance("mcc", nothing, labels, 2).points == 0.0
    assert chance("recall@5", nothing, np.ones(50), None).points == pytest.approx(10.0)
    assert chance("top5", nothing, np.arange(10), 10).points == pytest.approx(50.0)


@pytest.mark.parametrize(("metric", "outputs", "why"), [("f1_binary", 3, "needs two"), ("top5", 5, "more than five")])
def test_a_metric_of_other_classes_is_refused(metric: str, outputs: int, why: str) -> None:
    with pytest.raises(InputError) as error:
        check_metric(metric, "text-classification", outputs, False, None)
    assert why in error.value.why


# --- the user's own -------------------------------------------------------------------------------------------------

OWN = """
import numpy as np

def balanced(outputs, labels):
    predicted, labels = outputs.argmax(-1), np.asarray(labels)
    return 100 * np.mean([(predicted[labels == one] == one).mean() for one in np.unique(labels)])

def nothing(outputs, labels):
    return float("nan")

def broken(outputs, labels):
    raise KeyError("no such class")
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    return tmp_path / "mine.py"


def test_an_own_metric_takes_all_rows_at_once(own: Path) -> None:
    outputs, labels = drawn(60, 3)
    expected = 100 * sklearn.balanced_accuracy_score(labels, outputs.argmax(-1))
    name = f"py:{own}:balanced"
    assert points(name, outputs, labels) == pytest.approx(expected)
    statistics = metric_of(name).statistic(outputs, list(labels), {})
    result = evaluate(statistics, statistics.copy(), name, 0)
    assert result.metric == shown(name) == "py:mine.py:balanced"
    assert result.drop == result.drop_low == result.drop_high == 0.0
    assert result.base_low is not None and result.base_low < expected < (result.base_high or 0)


@pytest.mark.parametrize(("function", "why"), [("nothing", "no finite number"), ("broken", "KeyError")])
def test_an_own_metric_that_fails_is_a_mistake_of_the_user(own: Path, function: str, why: str) -> None:
    outputs, labels = drawn(10, 3)
    with pytest.raises(InputError) as error:
        points(f"py:{own}:{function}", outputs, labels)
    assert why in error.value.why and str(own.parent) not in error.value.what


def test_a_recipe_names_it_relative_to_itself_or_is_refused(vit_recipe: Make, own: Path) -> None:
    raw = vit_recipe()
    raw["data"]["evaluation"] = {**raw["data"]["evaluation"], "metric": "py:mine.py:balanced"}
    evaluation = validate(raw, own.parent).data.evaluation
    assert evaluation is not None and evaluation.metric == f"py:{own}:balanced"
    raw["data"]["evaluation"]["metric"] = "acuracy"
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        validate(raw, own.parent)


@pytest.mark.usefixtures("short_measurement")
def test_a_run_is_judged_by_it(vit_recipe: Make, own: Path, tmp_path: Path) -> None:
    raw = vit_recipe()
    raw["data"]["evaluation"] = {**raw["data"]["evaluation"], "metric": f"py:{own}:balanced"}
    report = optin_export.run(raw, tmp_path / "run")
    assert report.accuracy is not None and report.accuracy.metric == "py:mine.py:balanced"
    assert report.accuracy.chance is None
    assert "py:mine.py:balanced" in report.verdict.summary


def test_a_missing_function_is_refused_before_the_work(vit_recipe: Make, own: Path, tmp_path: Path) -> None:
    raw = vit_recipe()
    raw["data"]["evaluation"] = {**raw["data"]["evaluation"], "metric": f"py:{own}:balancd"}
    with pytest.raises(InputError, match="cannot load"):
        optin_export.run(raw, tmp_path / "run", stop_after="sources")
