"""`sweep`: every combination, named, and checked before anything is done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from optin_export.errors import InputError
from optin_export.recipe import expand, load_recipe, validate


def recipe(**sections: Any) -> dict[str, Any]:
    return {
        "recipe": 1,
        "name": "swept",
        "model": {"source": "hf:some/model", "task": "feature-extraction"},
        "data": {"calibration": {"source": "csv:x.csv", "columns": {"text": 0}}},
        "prune": {"budget": {"macs": 0.6}},
        "targets": [{"engine": "onnxruntime"}],
        **sections,
    }


def test_every_combination_is_a_run_of_its_own(tmp_path: Path) -> None:
    swept = {"prune.budget.macs": [0.7, 0.5], "export.precision": ["fp32", "fp16"], "targets.0.threads": [2]}
    found = expand(validate(recipe(sweep=swept), tmp_path))
    assert [one.label for one in found] == [
        "macs-0.7_precision-fp32_threads-2",
        "macs-0.7_precision-fp16_threads-2",
        "macs-0.5_precision-fp32_threads-2",
        "macs-0.5_precision-fp16_threads-2",
    ]
    last = found[-1]
    assert last.settings == {"prune.budget.macs": 0.5, "export.precision": "fp16", "targets.0.threads": 2}
    assert (last.recipe.prune.budget.macs, last.recipe.export.precision, last.recipe.targets[0].threads) == (
        0.5,
        "fp16",
        2,
    )
    assert last.recipe.sweep == {} and last.recipe.name == f"swept-{last.label}"
    assert last.recipe.data.calibration.source == f"csv:{tmp_path / 'x.csv'}"


def test_whole_sections_can_be_swept(tmp_path: Path) -> None:
    budgets = [{"macs": 0.5}, {"params": 0.5}]
    found = expand(validate(recipe(sweep={"prune.budget": budgets}), tmp_path))
    assert [one.recipe.prune.budget.named for one in found] == budgets
    assert len({one.label for one in found}) == 2


def test_fields_of_one_name_keep_their_paths(tmp_path: Path) -> None:
    swept = {"data.calibration.samples": [8], "prune.score_samples": [4, 8], "export.calibration_rows": [3]}
    assert len(expand(validate(recipe(sweep=swept), tmp_path))) == 2
    swept = {"data.calibration.split": ["a"], "data.evaluation.split": ["b"]}
    evaluation = {"source": "csv:x.csv", "columns": {"text": 0, "text_pair": 1, "label": 2}, "metric": "spearman"}
    data = {"calibration": recipe()["data"]["calibration"], "evaluation": evaluation}
    (one,) = expand(validate(recipe(sweep=swept, data=data), tmp_path))
    assert one.label == "data.calibration.split-a_data.evaluation.split-b"


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"prune.budget.macs": [0.7, 1.5]}, "prune.budget.macs=1.5.*less than or equal to 1"),
        ({"export.precision": ["fp32", "fp12"]}, "export.precision=fp12"),
        ({"export.precison": ["fp32"]}, "unknown field.*precision"),
        ({"targets.3.threads": [1]}, "targets.3.threads=1 cannot be set"),
        ({"prune.budget.macs": []}, "at least 1"),
        ({"prune.budget.macs": [0.5, 0.5]}, "0.5 twice"),
        ({"name": ["a"]}, "cannot be swept"),
        ({"seed": list(range(1001))}, "1001 runs"),
        ({"prune.budget.macs": [0.5], "prune.budget.params": [0.5]}, "exactly one of"),
        ({"prune.budget.macs": 0.5}, "sweep"),
    ],
)
def test_a_bad_value_is_named_before_anything_is_done(tmp_path: Path, sweep: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        validate(recipe(sweep=sweep), tmp_path)
    assert re.search(message, str(error.value), re.DOTALL), str(error.value)


def test_from_a_file(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(sweep={"prune.budget.macs": [0.7, 0.5]})), encoding="utf-8")
    found = expand(load_recipe(path, ["sweep={seed: [1, 2, 3]}"]))
    assert [one.recipe.seed for one in found] == [1, 2, 3]


def test_targets_with_resources_are_told_apart(tmp_path: Path) -> None:
    targets = [{}, {"resources": {"accelerator_type:L4": 1}}, {"resources": {"accelerator_type:H100": 1}}]
    found = validate(recipe(targets=targets), tmp_path)
    names = ["onnxruntime-cpu-1t", "onnxruntime-cpu-1t-accelerator-type-l4", "onnxruntime-cpu-1t-accelerator-type-h100"]
    assert [one.name for one in found.targets] == names
    assert [one.name for one in found.here] == names[:1] and [one.name for one in found.fleet] == names[1:]


def test_a_latency_budget_needs_its_clock_here(tmp_path: Path) -> None:
    sections = {"prune": {"budget": {"speedup": 1.5}}, "targets": [{"resources": {"a": 1}}]}
    with pytest.raises(InputError, match="not valid") as error:
        validate(recipe(**sections), tmp_path)
    assert "measures on this machine" in str(error.value)
