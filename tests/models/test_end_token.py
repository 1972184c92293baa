"""Classifiers that read the end token of a text, and models that pool themselves: what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import transformers

from optin_export.export import export_onnx
from optin_export.models import wrap
from tests.conftest import enlarge
from tests.models.test_encoders import BART, IDS, MASK, T5

CLASSIFIERS = {
    "BartForSequenceClassification": BART,
    "MBartForSequenceClassification": BART,
    "MvpForSequenceClassification": BART,
    "T5ForSequenceClassification": T5,
}
DPR = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_are_those_of_the_library_for_padded_texts(name: str) -> None:
    original = made(name, CLASSIFIERS[name] | {"num_labels": 3})
    with torch.no_grad():
        wanted = original(input_ids=IDS, attention_mask=MASK).logits
        given = wrap(original, "text-classification")(input_ids=IDS, attention_mask=MASK)
    assert wanted.std() > 0.01
    torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_graph_takes_any_batch_and_length(attention: str, tmp_path: Path) -> None:
    """In eager mode the mask of the decoder is traceable for three tokens or more only."""
    original: Any = made("BartForSequenceClassification", BART | {"num_labels": 3})
    original.set_attn_implementation(attention)
    model = wrap(original, "text-classification")
    export_onnx(model, {"input_ids": IDS, "attention_mask": MASK}, tmp_path / "a.onnx", max_batch=8, sequence=16)
    shapes = [value.type.tensor_type.shape.dim for value in onnx.load(tmp_path / "a.onnx").graph.input]
    assert [[dim.dim_param for dim in shape] for shape in shapes] == [["batch", "sequence"]] * 2
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    for ids in (torch.tensor([[5, 1]]), torch.tensor([[5, 6, 7, 8, 9, 4, 1], [9, 4, 1, 0, 0, 0, 0], [1] * 7])):
        given = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        [logits] = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(**given), rtol=1e-4, atol=1e-5)


def test_a_text_without_an_end_token_is_refused() -> None:
    model = wrap(made("T5ForSequenceClassification", T5), "text-classification")
    with pytest.raises(ValueError, match="a text has no end token"):
        model(input_ids=torch.full((1, 4), 5), attention_mask=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_model_that_pools_itself(normalize: bool) -> None:
    original = made("DPRQuestionEncoder", DPR)
    ids, mask = IDS.clamp(max=30), MASK
    with torch.no_grad():
        wanted = original(input_ids=ids, attention_mask=mask).pooler_output
        given = wrap(original, "feature-extraction", None, normalize)(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(given, torch.nn.functional.normalize(wanted, dim=-1) if normalize else wanted)


def test_another_pooling_of_it_is_refused() -> None:
    model = wrap(made("DPRQuestionEncoder", DPR), "feature-extraction", "mean")
    with pytest.raises(ValueError, match=r"model\.pooling is mean"):
        model(input_ids=IDS, attention_mask=MASK)


def test_the_embedding_of_a_text_encoder_with_a_projection() -> None:
    fields = {**DPR, "projection_dim": 16, "bos_token_id": 2, "eos_token_id": 1, "max_position_embeddings": 16}
    original = made("CLIPTextModelWithProjection", fields)
    with torch.no_grad():
        wanted = original(input_ids=IDS, attention_mask=MASK).text_embeds
        given = wrap(original, "feature-extraction")(input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(given, wanted)


def made(name: str, fields: dict[str, object]) -> torch.nn.Module:
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model: torch.nn.Module = enlarge(model_class(model_class.config_class(**fields))).eval()
    return model
