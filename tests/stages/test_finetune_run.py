"""Runs with a fine-tune, and of two-tower models: what lies in the run folder, what the report says, what is reused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import optin_export
from optin_export.cli.dry_run.work import planned_work
from optin_export.errors import InputError
from optin_export.recipe import load_recipe, validate
from optin_export.ship import check_manifest
from optin_export.stages.preflight import preflight
from optin_export.workdir.files import sha256_file
from tests.conftest import Make

pytest.importorskip("onnxruntime")
MODEL = ("model/architecture.json", "model/model.safetensors")


pytestmark = pytest.mark.usefixtures("short_measurement")


def run(recipe: dict[str, Any], folder: Path, stop_after: str | None = None) -> optin_export.Report | None:
    return optin_export.run(recipe, out=folder, stop_after=stop_after)


def test_a_run_with_a_fine_tune(vit_recipe: Make, tmp_path: Path) -> None:
    # With so few rows the least squares leave nothing to gain: one factor per unit does.
    plain = vit_recipe(prune={**vit_recipe()["prune"], "compensate": "rescale"})
    folder, section = tmp_path / "run", {"steps": 20, "learning_rate": 1e-3, "batch": 8}
    report = run({**plain, "finetune": section}, folder)
    assert report is not None and report.parity.passed
    tuned = report.pruning.finetuned
    assert tuned is not None and tuned.note is None and (tuned.by, tuned.steps) == ("distill", 20)
    assert tuned.before is not None and tuned.after is not None and tuned.after < tuned.before
    assert "repaired by distillation on your unlabelled rows for 20 steps" in report.verdict.summary
    assert (
        "The model was then repaired by distillation on your unlabelled rows (20 steps)"
        in (folder / "report.html").read_text()
    )
    assert check_manifest(folder) == []
    # The model of the run folder, loaded from it, is the one that was exported.
    repaired, model = (optin_export.load_model(folder / name) for name in ("repaired", "model"))
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.allclose(repaired(images), model(images))
        expected = model(images).numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "onnx" / "pruned.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"pixel_values": images.numpy()})[0], expected, atol=1e-4)

    again = run({**plain, "finetune": section}, folder)
    assert again is not None and again.pruning.finetuned == tuned
    assert all(stage.reused for stage in again.stages if stage.name in ("surgery", "export", "measure"))
    # Another learning rate tunes the same repaired model again; without the section there is none.
    before = {name: (sha256_file(folder / name), (folder / name).stat().st_mtime_ns) for name in _both()}
    run({**plain, "finetune": {**section, "learning_rate": 5e-4}}, folder, "surgery")
    after = {name: (sha256_file(folder / name), (folder / name).stat().st_mtime_ns) for name in _both()}
    assert before["repaired/model.safetensors"] == after["repaired/model.safetensors"]
    assert before[MODEL[1]][0] != after[MODEL[1]][0]
    report = run(plain, folder)
    assert report is not None and report.pruning.finetuned is None and "fine-tuned" not in report.verdict.summary
    assert "No weight was trained" in (folder / "report.html").read_text()
    assert not (folder / "repaired").exists()
    assert sha256_file(folder / MODEL[1]) == before["repaired/model.safetensors"][0]
    assert check_manifest(folder) == []


def _both() -> list[str]:
    return [*MODEL, "repaired/model.safetensors"]


def test_a_fine_tune_that_fails_leaves_the_repaired_model(vit_recipe: Make, tmp_path: Path) -> None:
    report = run(vit_recipe(finetune={"steps": 5, "learning_rate": 1e9}), tmp_path / "run")
    assert report is not None and report.pruning.finetuned is not None
    assert report.pruning.finetuned.note is not None and "fine-tuned" not in report.verdict.summary
    assert "tried and discarded" in (tmp_path / "run" / "report.html").read_text()
    files = [tmp_path / "run" / name / "model.safetensors" for name in ("repaired", "model")]
    assert sha256_file(files[0]) == sha256_file(files[1])


def test_labels_and_a_function_of_the_users(vit_recipe: Make, image_data: Path, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    body = "def tune(dense, original, batches):\n    for batch in batches:\n        assert len(batch.targets)\n"
    code.write_text(body + "    dense.model.head.bias.data += 0.25\n    return dense\n")
    source = {"source": f"npz:{image_data / 'images.npz'}", "samples": 40}
    section: dict[str, Any] = {"source": f"py:{code}:tune", "data": source}
    run(vit_recipe(finetune=section), tmp_path / "run", "surgery")
    models = [optin_export.load_model(tmp_path / "run" / name).state_dict() for name in ("repaired", "model")]
    changed = [name for name in models[0] if not torch.equal(models[0][name], models[1][name])]
    assert changed == ["model.head.bias"]
    # What the function says is part of what the step was made from.
    code.write_text(code.read_text().replace("0.25", "0.5"))
    run(vit_recipe(finetune=section), tmp_path / "run", "surgery")
    bias = [
        optin_export.load_model(tmp_path / "run" / n).state_dict()["model.head.bias"] for n in ("repaired", "model")
    ]
    torch.testing.assert_close(bias[1] - bias[0], torch.full_like(bias[0], 0.5))
    run(vit_recipe(finetune={"data": source, "steps": 4}), tmp_path / "labels", "surgery")
    assert (tmp_path / "labels" / "model" / "model.safetensors").exists()


def test_a_model_that_merges_tokens_is_tuned_as_it_is(vit_recipe: Make, tmp_path: Path) -> None:
    recipe = vit_recipe(tokens={"keep": 0.7}, finetune={"steps": 3})
    run(recipe, tmp_path / "run", "surgery")
    repaired, model = (tmp_path / "run" / name for name in ("repaired", "model"))
    assert (repaired / "architecture.json").read_bytes() == (model / "architecture.json").read_bytes()
    assert (model / "places.safetensors").exists()
    assert optin_export.load_model(model)(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"loss": "labels"}, "needs data with labels"),
        ({"steps": 0}, "finetune.steps"),
        ({"learning_rate": -1.0}, "finetune.learning_rate"),
        ({"epochs": 3}, "finetune.epochs: unknown field"),
        ({"source": "mine.py"}, "unknown source 'mine.py'"),
        ({"source": "py:mine.py"}, "names no function"),
    ],
)
def test_a_bad_section(vit_recipe: Make, section: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        validate(vit_recipe(finetune=section), Path("/"))
    assert says in f"{caught.value.what} {caught.value.why}" and str(caught.value).count("\n") == 2


def test_labels_are_for_classifiers(bert_recipe: Make) -> None:
    with pytest.raises(InputError, match="use distill"):
        validate(bert_recipe(finetune={"data": {"source": "csv:train.csv"}}), Path("/"))


def test_a_function_that_is_not_there_is_found_before_the_work(vit_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("value = 3\n")
    recipe = validate(vit_recipe(finetune={"source": f"py:{tmp_path / 'mine.py'}:value"}), Path("/"))
    with pytest.raises(InputError, match="is not a function"):
        optin_export.run(recipe, out=tmp_path / "run", stop_after="sources")
    missing = validate(vit_recipe(finetune={"source": f"py:{tmp_path / 'none.py'}:value"}), Path("/"))
    refusal = preflight(missing).refusal
    assert isinstance(refusal, InputError) and "No such file" in refusal.why


def test_a_dry_run_says_that_it_would_train(vit_recipe: Make, tmp_path: Path) -> None:
    lines = dict(planned_work(validate(vit_recipe(finetune={"steps": 7}), Path("/")), tmp_path))
    assert "then fine-tune (7 steps)" in lines["surgery"]
    assert "fine-tune" not in dict(planned_work(validate(vit_recipe(), Path("/")), tmp_path))["surgery"]


def test_a_zero_shot_run(zero_shot_recipe: Make, colour_data: Path, tmp_path: Path) -> None:
    """Accuracy is that of the ONNX file in plain onnxruntime; the run folder holds one tower and loads by itself."""
    import onnxruntime

    report = run(zero_shot_recipe(), tmp_path / "run")
    assert report is not None and report.parity.passed and report.pruning.family == "clip"
    assert report.accuracy is not None and report.accuracy.metric == "accuracy" and report.accuracy.rows == 60
    session = onnxruntime.InferenceSession(tmp_path / "run/onnx/pruned.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["pixel_values"]
    assert session.get_outputs()[0].shape[1] == 5
    mean, std = (np.array(v, dtype=np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    with np.load(colour_data / "images.npz") as data:
        pixels = (data["images"].transpose(0, 3, 1, 2).astype(np.float32) / 255 - mean) / std
        found = np.concatenate([session.run(None, {"pixel_values": rows})[0] for rows in np.split(pixels, 20)])
        assert report.accuracy.pruned == pytest.approx(100 * (found.argmax(-1) == data["labels"]).mean())
    model = optin_export.load_model(tmp_path / "run" / "model")
    assert not any("text" in name for name in model.state_dict())
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(pixels[:3])).numpy(), found[:3], atol=1e-3)
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert again.model.classes == ("man", "dogs", "grass", "house", "guitar")


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def test_classes_by_name_in_the_evaluation_data(zero_shot_recipe: Make, tmp_path: Path, colour_data: Path) -> None:
    names = ["man", "dogs", "grass", "house", "guitar"]
    code = "import numpy as np\ndef rows():\n"
    code += f"    data = np.load({str(colour_data / 'images.npz')!r})\n"
    code += f"    return {{'image': data['images'], 'label': [{names}[i] for i in data['labels']]}}\n"
    (tmp_path / "rows.py").write_text(code)
    recipe = zero_shot_recipe()
    recipe["data"]["evaluation"]["source"] = f"py:{tmp_path / 'rows.py'}:rows"
    assert run(recipe, tmp_path / "run", "sources") is None


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_run_of_the_text_tower(kind: str, bert_recipe: Make, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    model = {"source": str(folder), "task": "feature-extraction", "normalize": True}
    report = run(bert_recipe(model=model, export={"batch": [1, 3], "sequence": 12}), tmp_path / "run")
    assert report is not None and report.parity.passed and report.accuracy is not None
    assert report.macs.ratio <= 0.6
