"""The same recipe, seed and machine give the same bytes: in other folders, other processes, under other hash seeds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from optin_export.pruning import load_model
from optin_export.search import Plan
from optin_export.workdir.files import sha256_file
from tests.robust import forked
from tests.robust.test_resume import ENVIRONMENT

pytest.importorskip("onnxruntime")
#: Everything before the first clock is read.
SAME = (
    "scores/scores.safetensors",
    "scores/curves.safetensors",
    "plan/plan.json",
    "model/architecture.json",
    "model/model.safetensors",
    "onnx/base.onnx",
    "onnx/pruned.onnx",
)
#: Of the quickstart's data: as many as say the same of replaying.
LESS = [
    word
    for field in ("data.calibration.samples=96", "prune.score_samples=32", "prune.curve_samples=32", "prune.probes=8")
    for word in ("--set", field)
]


def replayed(
    recipe: Path, out: Path, *words: str, threads: int = 1, hash_seed: str = "0", **more: str
) -> dict[str, str]:
    """Hashes of what the recipe gives up to the export. more: of the environment."""
    out.parent.mkdir(exist_ok=True)
    environment = {
        **ENVIRONMENT,
        **more,
        "PYTHONHASHSEED": hash_seed,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
    }
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "optin_export", str(recipe), "--out", str(out), "--stop-after", "export", *words]
    done = subprocess.run(
        command, cwd=out.parent, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: sha256_file(out / name) for name in SAME}


@pytest.mark.slow
def test_runs_are_replayed_byte_for_byte(tmp_path: Path) -> None:
    recipe = forked.write_recipe(tmp_path)
    first = replayed(recipe, tmp_path / "first" / "run", hash_seed="0")
    assert replayed(recipe, tmp_path / "another place" / "other", hash_seed="12345") == first
    assert replayed(tmp_path / "first" / "run" / "recipe.yaml", tmp_path / "third", hash_seed="random") == first
    other = replayed(recipe, tmp_path / "fourth" / "run", "--set", "seed=1")
    assert other["model/model.safetensors"] != first["model/model.safetensors"]  # the test can tell


#: Take the instructions of younger processors away from torch and its libraries.
OLDER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def assert_near(first: Path, other: Path) -> None:
    """The bounds of docs/determinism.md: kept units, MACs, and what the smaller models answer."""
    plans = [Plan.model_validate_json((run / "plan" / "plan.json").read_text()) for run in (first, other)]
    kept = [{(key, unit) for key, group in plan.groups.items() for unit in group.kept} for plan in plans]
    assert len(kept[0] ^ kept[1]) <= 0.04 * len(kept[0])
    assert plans[0].predicted.macs == pytest.approx(plans[1].predicted.macs, rel=0.01)
    if kept[0] != kept[1]:  # a choice between equals: two models, and no rounding of one
        return
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(32, 1, 32, 32)).astype(np.float32))
    with torch.no_grad():
        answers = [load_model(run / "model")(pixel_values=images) for run in (first, other)]
    assert (answers[1] - answers[0]).abs().max() <= 1e-3 * answers[0].abs().max()


@pytest.mark.slow
def test_the_quickstart_is_replayed_with_one_and_with_two_threads(tmp_path: Path) -> None:
    """Real weights. Threads split sums otherwise, and older processors round otherwise: the bounds have to hold."""
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    first = replayed(recipe, tmp_path / "first", *LESS)
    assert replayed(recipe, tmp_path / "second", *LESS, hash_seed="7") == first
    two = replayed(recipe, tmp_path / "two", *LESS, threads=2)
    same = [name for name in SAME if two[name] == first[name]]
    print(f"\n1 and 2 threads agree in {', '.join(same)}", file=sys.__stdout__)
    assert_near(tmp_path / "first", tmp_path / "two")
    assert replayed(recipe, tmp_path / "two again", *LESS, threads=2, hash_seed="9") == two
    older = replayed(recipe, tmp_path / "older", *LESS, **OLDER)
    assert_near(tmp_path / "first", tmp_path / "older")
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert older != first  # the test can tell
