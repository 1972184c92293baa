"""Every text task with a label per token, from recipe to report, and its metrics by hand on the shipped ONNX file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import optin_export
from optin_export.data import load_sources
from optin_export.measure import accuracy_of
from optin_export.models import IGNORED, as_function
from optin_export.recipe import validate
from optin_export.search import Plan
from optin_export.workdir.files import read_json
from tests.textmodels import TASKS, recipe_for, save_small, spoken

pytest.importorskip("onnxruntime")


pytestmark = pytest.mark.usefixtures("short_measurement")


def by_hand(task: str, outputs: np.ndarray, target: object) -> tuple[list[float], list[float]]:
    """What both metrics of the task are made of, for one row of logits: two lists of values to be averaged."""
    if task == "question-answering":
        start, end = outputs
        spans = [
            (start[i] + end[j], target.context[target.offsets[i, 0] : target.offsets[j, 1]])  # type: ignore[attr-defined]
            for i in range(len(start))
            for j in range(i, min(i + 30, len(start)))
            if i < len(target.offsets) and j < len(target.offsets)  # type: ignore[attr-defined]
            if min(target.offsets[i, 0], target.offsets[j, 0]) >= 0  # type: ignore[attr-defined]
        ]
        words = [word for word in max(spans)[1].split() if word not in ("a", "an", "the")]
        right = [word for word in target.answers[0].split() if word not in ("a", "an", "the")]  # type: ignore[attr-defined]
        shared = sum(min(words.count(word), right.count(word)) for word in set(words))
        f1 = 2 * shared / (len(words) + len(right)) if shared else float(not words and not right)
        return [100 * f1], [100.0 * (words == right)]
    wanted = np.full(len(outputs), IGNORED)
    wanted[: len(target)] = target  # type: ignore[arg-type]
    at = np.flatnonzero(wanted != IGNORED)
    logits = outputs[at].astype(np.float64)
    likely = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    surprise = -np.log(likely[np.arange(len(at)), wanted[at]])
    return list(100.0 * (logits.argmax(-1) == wanted[at])), list(surprise)


@pytest.mark.parametrize("task", list(TASKS))
def test_a_run_from_recipe_to_report(task: str, tmp_path: Path) -> None:
    import onnxruntime

    class_name, config, _, metrics = TASKS[task]
    (tmp_path / "model").mkdir()
    folder, rows = save_small(tmp_path / "model", class_name, **config), spoken(tmp_path)
    recipe = recipe_for(task, folder, rows, gates={"accuracy_drop": 100.0})
    reports = []
    for metric in metrics:
        recipe["data"]["evaluation"]["metric"] = metric
        report = optin_export.run(recipe, out=tmp_path / "run")
        assert report is not None and report.accuracy is not None and report.accuracy.metric == metric
        assert report.macs.ratio <= 0.7 and len(report.parity.cases) == 12
        assert all(case.passed for case in report.parity.cases)
        reports.append(report)
    assert reports[0].verdict.passed
    assert reports[0].pruning.masked_difference <= 1e-5

    data = load_sources(validate(recipe, Path("/"))).evaluation()
    assert data is not None
    session = onnxruntime.InferenceSession(
        tmp_path / "run" / "onnx" / "pruned.onnx", providers=["CPUExecutionProvider"]
    )
    first: list[float] = []
    second: list[float] = []
    for batch in data.sides[0]:
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in batch.inputs.items()})[0]
        assert batch.targets is not None
        for output, target in zip(outputs, batch.targets, strict=True):
            for total, values in zip((first, second), by_hand(task, output, target), strict=True):
                total.extend(values)
    assert reports[0].accuracy.pruned == pytest.approx(np.mean(first))
    if metrics[1] == "exact_match":
        assert reports[1].accuracy.pruned == pytest.approx(np.mean(second))
    elif metrics[1] == "perplexity":
        assert reports[1].accuracy.pruned == pytest.approx(np.exp(np.mean(second)), rel=1e-5)
        assert reports[1].accuracy.drop == pytest.approx(reports[1].accuracy.pruned - reports[1].accuracy.base)
        assert "lower is better" in reports[1].verdict.summary


def test_the_smallest_model_by_perplexity(tmp_path: Path) -> None:
    """A metric of which less is better decides the size: what it rises by is what is lost."""
    class_name, config, _, _ = TASKS["text-generation"]
    (tmp_path / "model").mkdir()
    folder, rows = save_small(tmp_path / "model", class_name, **config), spoken(tmp_path, 24)
    budget = {"accuracy_drop": 1e6}
    prune = {"budget": budget, "probes": 4, "rows": 32, "score_samples": 8, "allocation": "additive"}
    recipe = recipe_for("text-generation", folder, rows, prune=prune)
    recipe["data"]["evaluation"]["metric"] = "perplexity"
    optin_export.run(recipe, out=tmp_path / "run", stop_after="surgery")
    sources = load_sources(validate(recipe, Path("/")))
    models = (sources.model, optin_export.load_model(tmp_path / "run" / "model"))
    base, pruned = (accuracy_of(as_function(model), sources.selection()) for model in models)
    tried = read_json(tmp_path / "run" / ".stages" / "search.accuracy.json")["result"]["tried"]
    chosen = Plan.model_validate(read_json(tmp_path / "run" / "plan" / "plan.json")).budget["macs"]
    found = [drop for macs, drop in tried if macs == chosen]
    assert found == [pytest.approx(pruned - base, rel=1e-4)] and abs(pruned - base) > 1
