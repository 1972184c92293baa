"""Through the real command: labels that sentence-transformers made are met exactly by the unpruned engine."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optin_export import cli, load_model
from tests.conftest import enlarge, measured_shortly, sentences
from tests.sentence_folders import LONGEST, SIZES, bert, build, decoder, save_tokenizer

pytest.importorskip("sentence_transformers")
pytest.importorskip("onnxruntime")
#: 3 to 30 words: some texts are longer than the models take.
FIRST = sentences(40, 21)
SECOND = [" ".join(three) for three in zip(*(sentences(40, seed) for seed in (22, 23, 24)), strict=True)]
FEW = (
    "prune.score_samples=8",
    "prune.curve_samples=8",
    "prune.probes=4",
    "gates.speedup=0.01",
    "gates.accuracy_drop=100",
)


@pytest.fixture(autouse=True)
def quickly() -> Any:
    with measured_shortly():
        yield


def run(folder: Path, place: Path, labels: Sequence[float], *options: str) -> dict[str, Any]:
    """What a user does: init, then the recipe that it wrote. Returns the report."""
    data = place / "pairs.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(zip(FIRST, SECOND, [repr(float(label)) for label in labels], strict=True))
    recipe, columns = place / "recipe.yaml", "text=0,text_pair=1"
    words = ["--model", str(folder), "--data", f"csv:{data}", "--evaluation", f"csv:{data}", "--columns", columns]
    words += ["--evaluation-columns", f"{columns},label=2", "--goal", "macs=0.9", "--out", str(recipe), "--yes"]
    assert cli.main(["init", *words]) == 0
    settings = [word for setting in (*FEW, *options) for word in ("--set", setting)]
    assert cli.main([str(recipe), "--out", str(place / "run"), "--quiet", *settings]) in (0, 4)
    return json.loads((place / "run" / "report.json").read_text())


def engine(path: Path, texts: dict[str, list[str]], folder: Path) -> np.ndarray:
    """The graph on texts as the served tokenizer encodes them."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    columns = list(texts.values())
    prompt = (folder / "prompt.txt").read_text() if (folder / "prompt.txt").exists() else ""
    columns[0] = [prompt + text for text in columns[0]]
    encoded = tokenizer.encode_batch(columns[0] if len(columns) == 1 else list(zip(*columns, strict=True)))
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    session = onnxruntime.InferenceSession(str(path))
    inputs = {
        one.name: np.array([getattr(row, fields[one.name]) for row in encoded], np.int64)
        for one in session.get_inputs()
    }
    return session.run(None, inputs)[0]


@pytest.mark.parametrize("kind", ["bert", pytest.param("decoder", marks=pytest.mark.slow)])
def test_embeddings(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    if kind == "bert":  # everything at once
        poolings = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
        steps = [modules.Pooling(32, poolings, include_prompt=False), modules.Dense(192, 24), modules.LayerNorm(24)]
        options = {"prompts": {"ask": "query : "}, "default_prompt_name": "ask", "truncate_dim": 20}
        folder = build(tmp_path / "st", bert(tmp_path / "base"), steps, **options, similarity_fn_name="dot")
    else:
        steps = [modules.Pooling(32, "lasttoken"), modules.Normalize()]
        base = decoder(tmp_path / "base")
        folder = build(tmp_path / "st", base, steps, longest=LONGEST, similarity_fn_name="manhattan")
    model = SentenceTransformer(str(folder), device="cpu")
    first, second = (model.encode(texts, show_progress_bar=False, convert_to_tensor=True) for texts in (FIRST, SECOND))
    report = run(folder, tmp_path, model.similarity_pairwise(first, second).tolist())
    assert report["accuracy"]["base"] == 100.0
    place = tmp_path / "run"
    got = engine(place / "onnx" / "base.onnx", {"text": SECOND[:8]}, place / "preprocess")
    np.testing.assert_allclose(got, second[:8].numpy(), atol=1e-5, rtol=1e-4)
    pruned = engine(place / "onnx" / "pruned.onnx", {"text": SECOND[:8]}, place / "preprocess")
    assert pruned.shape == got.shape and np.abs(pruned - got).max() > 1e-5
    written = (tmp_path / "recipe.yaml").read_text()
    assert f"sequence: {LONGEST}" in written and "modules.json of sentence-transformers says" in written
    assert ("pooling: last" in written and "normalize: true" in written) or kind == "bert"
    # The folder model/ is that graph again, without any file of sentence-transformers.
    again = load_model(place / "model")
    ids = {"input_ids": torch.tensor([[2, 7, 8, 9, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    import onnxruntime

    session = onnxruntime.InferenceSession(str(place / "onnx" / "pruned.onnx"))
    wanted = session.run(None, {name: tensor.numpy() for name, tensor in ids.items()})[0]
    np.testing.assert_allclose(again(**ids).detach().numpy(), wanted, atol=1e-5, rtol=1e-4)


def test_scores_of_pairs(tmp_path: Path) -> None:
    import transformers
    from sentence_transformers import CrossEncoder

    save_tokenizer(tmp_path / "base")
    shape = {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    config = transformers.BertConfig(**SIZES, **shape, num_labels=1)
    enlarge(transformers.BertForSequenceClassification(config)).save_pretrained(tmp_path / "base")
    CrossEncoder(str(tmp_path / "base"), max_length=14, device="cpu").save_pretrained(str(tmp_path / "ce"))
    scores = CrossEncoder(str(tmp_path / "ce"), device="cpu").predict(list(zip(FIRST, SECOND, strict=True)))
    report = run(tmp_path / "ce", tmp_path, scores.tolist(), "data.evaluation.metric=spearman")
    assert report["accuracy"]["base"] == 100.0
    place = tmp_path / "run"
    pairs = {"text": FIRST[:8], "text_pair": SECOND[:8]}
    got = engine(place / "onnx" / "base.onnx", pairs, place / "preprocess")
    np.testing.assert_allclose(got[:, 0], scores[:8], atol=1e-5, rtol=1e-4)
    assert "sequence: 14" in (tmp_path / "recipe.yaml").read_text()
