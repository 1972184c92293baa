"""The output layer: found for every kind of output, refitted where it is its own, left alone where it is shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optin_export.pruning import load_model, save_model
from optin_export.repair import RepairSettings, apply_plan, output_layer
from optin_export.repair.sequential import HEAD
from optin_export.units import find_structure
from tests.repair.plans import halved
from tests.units.models import batches_for, inputs_for, small_model

#: Model -> (its output layer, the embeddings it may share its weight with).
TIED = {
    "gpt2": ("model.lm_head", "model.transformer.wte"),
    "llama-tied": ("model.lm_head", "model.model.embed_tokens"),
    "bert-masked": ("model.cls.predictions.decoder", "model.bert.embeddings.word_embeddings"),
    "distilbert-masked": ("model.vocab_projector", "model.distilbert.embeddings.word_embeddings"),
}


@pytest.mark.parametrize(
    ("name", "path"),
    [("bert-tokens", "model.classifier"), ("bert-spans", "model.qa_outputs"), ("llama", "model.lm_head")],
)
def test_a_layer_of_its_own_is_refitted(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 4)
    assert output_layer.output_layer(model, batches[0].inputs) == path
    plan = halved(structure)
    operation = apply_plan(model, structure, plan, batches, inputs_for(model, 3, 5), RepairSettings())
    repair = operation.repairs[HEAD]
    assert repair.before is not None and repair.after is not None and repair.after < repair.before
    monkeypatch.setattr(output_layer, "MOST_OUTPUTS", 1)
    assert output_layer.output_layer(model, batches[0].inputs) is None


@pytest.mark.parametrize("name", list(TIED))
def test_tied_weights_stay_one_tensor_and_are_saved_once(name: str, tmp_path: Path) -> None:
    model, architecture = small_model(name)
    layer, embedding = (model.get_submodule(path) for path in TIED[name])
    assert layer.weight is embedding.weight
    words = embedding.weight.clone()  # type: ignore[operator]
    structure, inputs = find_structure(model), inputs_for(model, 3, 5)
    plan = halved(structure)
    operation = apply_plan(model, structure, plan, batches_for(model, 4), inputs, RepairSettings())
    assert HEAD not in operation.repairs
    save_model(tmp_path, operation.dense, architecture, structure, plan, inputs)
    kept = load_file(tmp_path / "model.safetensors")
    assert sum(f"{path}.weight" in kept for path in TIED[name]) == 1
    loaded = load_model(tmp_path)
    for one in (operation.dense, loaded):
        layer, embedding = (one.get_submodule(path) for path in TIED[name])
        assert layer.weight is embedding.weight
        assert torch.equal(embedding.weight, words)  # type: ignore[arg-type]
    assert torch.equal(loaded(**inputs), operation.dense(**inputs))
