"""Optimum, and sentence-transformers through it, give the run's own outputs.

Optimum needs an earlier transformers than this package: OPTIN_EXPORT_OPTIMUM names the Python of an environment with
optimum-onnx and sentence-transformers.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optin_export.export import export_onnx
from optin_export.formats import write_folder
from optin_export.formats.run import FinishedRun
from optin_export.report.schema import read_report
from tests.conftest import Make
from tests.formats.made import made_run, outputs_of

PYTHON = os.environ.get("OPTIN_EXPORT_OPTIMUM", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="OPTIN_EXPORT_OPTIMUM names no Python with optimum-onnx")
TEXT = "a man is playing the guitar"
CLASSIFY = """
import sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from safetensors.torch import load_file, save_file
model = ORTModelForSequenceClassification.from_pretrained(sys.argv[1])
save_file({"output": model(**load_file(sys.argv[2])).logits}, sys.argv[3])
"""
EMBED = f"""
import sys, torch
from sentence_transformers import SentenceTransformer
from safetensors.torch import save_file
model = SentenceTransformer(sys.argv[1], backend="onnx", trust_remote_code=True, device="cpu")
save_file({{"output": torch.from_numpy(model.encode(["{TEXT}"]))}}, sys.argv[3])
"""


def given(script: str, folder: Path, run: FinishedRun, place: Path) -> torch.Tensor:
    save_file(run.rows[0], place / "in.safetensors")
    command = [PYTHON, "-I", "-c", script, str(folder), str(place / "in.safetensors"), str(place / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(place / "home")})
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(place / "out.safetensors")["output"]


def made(raw: dict[str, object], finished: Path, place: Path) -> FinishedRun:
    (place / "run").mkdir()
    return made_run(raw, place / "run", read_report(finished))


def test_optimum_classifies_as_the_run(classifier_recipe: Make, finished_vit: Path, tmp_path: Path) -> None:
    run = made(classifier_recipe(), finished_vit, tmp_path)
    export_onnx(run.model, run.rows[0], run.origin.graph("pruned"), max_batch=8, sequence=16)
    found = given(CLASSIFY, write_folder(run, "optimum", tmp_path / "to"), run, tmp_path)
    torch.testing.assert_close(found, outputs_of(run.model, run), rtol=1e-4, atol=1e-5)


def test_sentence_transformers_embeds_by_the_graph(bert_recipe: Make, finished_vit: Path, tmp_path: Path) -> None:
    import transformers

    run = made(bert_recipe(), finished_vit, tmp_path)
    folder = write_folder(run, "sentence-transformers", tmp_path / "to")
    tokens = transformers.AutoTokenizer.from_pretrained(folder)([TEXT], return_tensors="pt")
    with torch.no_grad():
        expected = run.model(**{name: tokens[name] for name in run.rows[0]})
    torch.testing.assert_close(given(EMBED, folder, run, tmp_path), expected, rtol=1e-4, atol=1e-5)
