"""Hybrids and shared modules through the command itself: what is pruned, what is told, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from optin_export.cli import main
from optin_export.pruning import load_model

NETS = Path(__file__).parents[1] / "units" / "hybridnets.py"


def recipe(folder: Path, function: str, args: dict[str, Any], **prune: Any) -> Path:
    section = {"budget": {"macs": 0.6}, "probes": 4, "score_samples": 8, "curve_samples": 8, "align": 1, **prune}
    source = {"source": f"py:{NETS}:{function}", "task": "image-classification", "args": args}
    raw = {
        "recipe": 1,
        "name": "hybrid",
        "model": {**source, "preprocess": {"size": [16, 16]}},
        "data": {"calibration": {"source": f"py:{NETS}:images"}},
        "prune": section,
        "export": {"batch": [1, 2]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("compensate", [True, False, "rescale"])
def test_a_hybrid_goes_the_whole_way_to_its_graph(tmp_path: Path, compensate: bool | str) -> None:
    """All kinds lose units, and the exported graph computes what the rebuilt torch model computes."""
    import onnxruntime

    run = tmp_path / "run"
    path = recipe(tmp_path, "hybrid", {}, compensate=compensate)
    assert main([str(path), "--out", str(run), "--stop-after", "export", "-q"]) == 0
    plan = json.loads((run / "plan" / "plan.json").read_text())
    assert {key.split(".")[1] for key in plan["groups"]} == {"channels", "heads", "neurons"}
    assert plan["predicted"]["macs"] <= 0.6 * plan["base"]["macs"]
    pruned = load_model(run / "model", trust_python=True)
    session = onnxruntime.InferenceSession(run / "onnx" / "pruned.onnx")
    for batch in (1, 2):
        pixels = torch.randn(batch, 3, 16, 16)
        (got,) = session.run(None, {"pixel_values": pixels.numpy()})
        np.testing.assert_allclose(got, pruned(pixel_values=pixels).numpy(), atol=1e-4, rtol=1e-4)


def test_what_is_shared_loses_its_units_in_every_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A block that runs twice loses channels like the others: neither is reported as refused."""
    path = recipe(tmp_path, "residual", {"share": "block"}, budget={"macs": 0.6})
    assert main([str(path), "--out", str(tmp_path / "run"), "--stop-after", "surgery"]) == 0
    told = capsys.readouterr().err
    assert "runs 2 times in one forward pass" not in told and "cannot be removed" not in told


@pytest.mark.parametrize(
    ("share", "code", "words"),
    [
        ("block", 0, ()),
        ("parameter", 2, ("'model.blocks.0.conv1.weight'", "'model.blocks.2.conv1.weight'", "no plan meets")),
        ("all", 0, ()),
        ("siamese", 0, ()),
        ("storage", 0, ()),
        ("alias", 0, ()),
    ],
)
def test_shared_parts_end_in_a_plan_or_in_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str, code: int, words: tuple[str, ...]
) -> None:
    path = recipe(tmp_path, "residual", {"share": share})
    assert main([str(path), "--out", str(tmp_path / "run"), "--stop-after", "surgery", "-q"]) == code
    told = capsys.readouterr().err
    assert all(word in told for word in words) and "Traceback" not in told


def test_another_repair_measures_its_own_curves(tmp_path: Path) -> None:
    """The curves of a run with least squares are not taken for one without."""
    from safetensors.numpy import load_file

    found = []
    for compensate in (True, False):
        path = recipe(tmp_path, "residual", {}, compensate=compensate)
        assert main([str(path), "--out", str(tmp_path / "run"), "--stop-after", "curves", "-q"]) == 0
        found.append(load_file(tmp_path / "run" / "scores" / "curves.safetensors"))
    refitted, masked = (np.mean([curve[:, 1].mean() for curve in one.values()]) for one in found)
    # On random weights a refit need not help other rows; curves that were reused would be equal.
    assert refitted != masked
