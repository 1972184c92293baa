"""A finished run of the small ViT, made once; tests that change it take a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import optin_export
from tests.conftest import VIT_ARGS, measured_shortly


@pytest.fixture(scope="session")
def finished(vit_checkpoint: Path, image_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that passed: its gates are those it cannot miss."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tritonclient.grpc")
    source = {"source": f"npz:{image_data / 'images.npz'}"}
    recipe = {
        "recipe": 1,
        "name": "tiny",
        "model": {
            "source": "timm:vit_tiny_patch16_224",
            "task": "image-classification",
            "weights": str(vit_checkpoint),
            "args": VIT_ARGS,
            "preprocess": {"size": [32, 32], "mean": [0.5], "std": [0.5]},
        },
        "data": {"calibration": {**source, "samples": 48}},
        "prune": {"budget": {"macs": 0.6}, "probes": 12, "rows": 64, "score_samples": 16},
        "export": {"batch": [1, 3]},
    }
    folder = tmp_path_factory.mktemp("finished") / "tiny"
    with measured_shortly():
        report = optin_export.run(recipe, folder)
    assert report is not None and report.verdict.passed
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
