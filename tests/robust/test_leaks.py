"""What must not reach a result: rows that judge it, and what was made from other weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import optin_export
from optin_export.data import Dataset, load_sources
from optin_export.recipe import validate
from optin_export.workdir.files import sha256_file
from tests.conftest import ROOT, Make

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("short_measurement")
#: The cheapest scores, allocation and repair: what these tests ask does not depend on them.
CHEAP: dict[str, Any] = {"score": "magnitude", "allocation": "additive", "compensate": False}


def rows_of(data: Dataset) -> set[bytes]:
    """The pictures of a dataset, each as its bytes."""
    return {row.numpy().tobytes() for batch in data.sides[0] for row in next(iter(batch.inputs.values()))}


def searched(recipe: dict[str, Any], images: Path, folder: Path) -> tuple[Any, bytes]:
    """What the search by accuracy tried, and the plan that it found, with this file of evaluation rows."""
    data = {**recipe["data"], "evaluation": {"source": f"npz:{images}", "metric": "accuracy"}}
    optin_export.run({**recipe, "data": data}, out=folder, stop_after="search")
    tried = json.loads((folder / ".stages" / "search.accuracy.json").read_text())["result"]["tried"]
    assert len(tried) >= 4
    return tried, (folder / "plan" / "plan.json").read_bytes()


def test_the_search_by_accuracy_never_sees_the_rows_that_judge_it(
    vit_recipe: Make, image_data: Path, tmp_path: Path
) -> None:
    recipe = vit_recipe(prune={**CHEAP, "budget": {"accuracy_drop": 60.0}})
    sources = load_sources(validate(recipe, ROOT))
    judged = sources.evaluation()
    assert judged is not None
    chosen, held = rows_of(sources.selection()), rows_of(judged)
    assert len(chosen) == len(held) == 40 and not chosen & held

    stored = dict(np.load(image_data / "images.npz"))
    pixels = [row.numpy().tobytes() for row in _as_the_model_sees(sources)]
    is_judged = np.array([pixel in held for pixel in pixels])
    assert is_judged.sum() == 40
    before = searched(recipe, image_data / "images.npz", tmp_path / "before")
    for name, changed in (("judged", is_judged), ("chosen", ~is_judged)):
        labels = np.where(changed, (stored["labels"] + 1) % 5, stored["labels"])
        np.savez(tmp_path / f"{name}.npz", images=stored["images"], labels=labels)
        found = searched(recipe, tmp_path / f"{name}.npz", tmp_path / name)
        # Other labels of rows that judge change nothing; of the rows that the search is evaluated on they do.
        assert (found == before) == (name == "judged"), name


def _as_the_model_sees(sources: Any) -> Any:
    """All evaluation rows in the order of their file, encoded by the recipe's own processor."""
    everything = sources._dataset(sources.evaluation_examples)
    pixels: dict[int, Any] = {}
    for batch in everything.sides[0]:
        pixels |= dict(zip(batch.rows.tolist(), next(iter(batch.inputs.values())), strict=True))
    return [pixels[row] for row in sorted(pixels)]


def test_other_weights_under_the_same_name_are_another_model(
    vit_recipe: Make, vit_checkpoint: Path, tmp_path: Path
) -> None:
    """Same path, same sizes, same time of change, same seed: only the values differ, and all is made again."""
    weights = tmp_path / "vit.safetensors"
    first = load_file(vit_checkpoint)
    save_file(first, weights)
    recipe = vit_recipe(prune={"budget": {"macs": 0.6}, "allocation": "additive", "probes": 4, "score_samples": 8})
    recipe["model"] = {**recipe["model"], "weights": str(weights)}
    optin_export.run(recipe, out=tmp_path / "run", stop_after="surgery")
    times = weights.stat()
    generator = np.random.default_rng(5)
    save_file({name: value[generator.permutation(len(value))] for name, value in first.items()}, weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    for folder in ("run", "fresh"):
        optin_export.run(recipe, out=tmp_path / folder, stop_after="surgery")
    for name in ("scores/scores.safetensors", "plan/plan.json", "model/model.safetensors"):
        assert sha256_file(tmp_path / "run" / name) == sha256_file(tmp_path / "fresh" / name), name
