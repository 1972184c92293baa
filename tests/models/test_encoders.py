"""Models of an encoder and a decoder: the encoder alone is the module of an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from optin_export.cli._guess import task_of
from optin_export.models import LoadedModel, build
from optin_export.models.loading import load_model
from optin_export.recipe import ModelSection
from tests.conftest import enlarge

TOKENS: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4, **TOKENS}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "bos_token_id": 2,
    "forced_eos_token_id": 1,
    **TOKENS,
}
CASES = {
    "t5": ("T5ForConditionalGeneration", T5),
    "umt5": ("UMT5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", BART),
    "marian": ("MarianMTModel", BART),
}
IDS = torch.tensor([[5, 6, 7, 8, 1], [9, 4, 1, 0, 0]])
MASK = (IDS != 0).long()


def loaded(folder: Path, case: str) -> tuple[Any, LoadedModel]:
    name, fields = CASES[case]
    model_class = getattr(transformers, name)
    enlarge(model_class(model_class.config_class(**fields))).save_pretrained(folder)
    original = model_class.from_pretrained(folder, attn_implementation="eager").eval()  # its sines are not saved
    return original, load_model(ModelSection(source=f"hf:{folder}", task="feature-extraction", pooling="mean"))


@pytest.mark.parametrize("case", CASES)
def test_the_embedding_is_the_mean_of_the_encoders_states(tmp_path: Path, case: str) -> None:
    original, found = loaded(tmp_path, case)
    with torch.no_grad():
        states = original.get_encoder()(input_ids=IDS, attention_mask=MASK).last_hidden_state
        wanted = (states * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
        given = found.model(input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(given, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    assert not any("decoder" in name for name in found.model.state_dict())
    rebuilt = build(found.architecture)
    rebuilt.load_state_dict(found.model.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(input_ids=IDS, attention_mask=MASK), given)


@pytest.mark.parametrize("case", ["bart", "marian"])
def test_the_user_hears_that_the_decoder_stays(tmp_path: Path, case: str) -> None:
    _, found = loaded(tmp_path, case)
    assert any("has an encoder and a decoder: the encoder is pruned" in note for note in found.notes)


@pytest.mark.parametrize("case", CASES)
def test_their_task_is_found_by_the_class(tmp_path: Path, case: str) -> None:
    loaded(tmp_path, case)
    assert task_of(str(tmp_path)) == "feature-extraction"
