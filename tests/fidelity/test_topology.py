"""Whole runs of models whose blocks are no chain: nothing is lost before pruning, and little after the repair."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optin_export import units
from optin_export.cli import main
from tests.units import topologies

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("short_measurement", "own_family")
FILE = Path(topologies.__file__)


@pytest.fixture
def own_family() -> Iterator[None]:
    """The family that the models register is forgotten after the run."""
    known = dict(units._registered)
    yield
    units._registered.clear()
    units._registered.update(known)


def run(folder: Path, function: str, args: dict[str, Any], capsys: Any) -> tuple[int, dict[str, Any], str]:
    """The command on this model, with labels that the model itself gives; exit code, report and what was said."""
    model = getattr(topologies, function)(**args)
    generator = np.random.default_rng(0)
    colours, noise = generator.integers(0, 200, (64, 1, 1, 3)), generator.integers(0, 56, (64, 32, 32, 3))
    images = (colours + noise).astype(np.uint8)
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        labels = model((pixels - 0.5) / 0.5).argmax(1).numpy()
    assert len(set(labels.tolist())) > 1
    np.savez(folder / "images.npz", images=images, labels=labels)
    source = {"source": f"npz:{folder / 'images.npz'}"}
    recipe = {
        "recipe": 1,
        "name": "topology",
        "model": {
            "source": f"py:{FILE}:{function}",
            "task": "image-classification",
            "args": args,
            "preprocess": {"size": [32, 32], "mean": [0.5], "std": [0.5]},
        },
        "data": {"calibration": {**source, "samples": 48}, "evaluation": {**source, "metric": "accuracy"}},
        "prune": {
            "budget": {"macs": 0.85},
            "probes": 8,
            "rows": 64,
            "score_samples": 16,
            "curve_samples": 16,
            "align": 2,
        },
        "export": {"batch": [1]},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    code = main([str(folder / "recipe.yaml"), "--out", str(folder / "run")])
    said = capsys.readouterr().err
    assert code in (0, 4), said
    return code, json.loads((folder / "run" / "report.json").read_text(encoding="utf-8")), said


@pytest.mark.parametrize(
    ("function", "args", "why"),
    [
        ("unet", {}, None),
        ("recurrent", {}, "'model.again.conv2' runs 2 times"),
        ("tower", {"kind": "state"}, "'model.blocks.2' cannot run without the blocks before it"),
        ("tower", {"kind": "auxiliary"}, None),
    ],
)
def test_runs_of_models_that_are_no_chain(
    function: str, args: dict[str, Any], why: str | None, tmp_path: Path, capsys: Any
) -> None:
    _, report, said = run(tmp_path, function, args, capsys)
    assert report["accuracy"]["base"] == 100.0
    assert report["parity"]["passed"] and report["pruning"]["masked_difference"] <= 1e-5
    assert report["macs"]["ratio"] <= 0.85
    told = re.findall("every pass runs the whole model, which is right but slower: (.*)", said.replace("\n", " "))
    assert bool(told) == (why is not None) and (why is None or why in told[0])
    assert any("slower" in text for text in report["warnings"]) == (why is not None)
    for group in report["pruning"]["groups"]:
        if group["error_after"] is not None:
            assert group["error_after"] <= group["error_before"] * 1.001 + 1e-9, group
