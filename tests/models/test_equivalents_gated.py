"""WavLM with a gated attention computes what the library's does, and loses heads."""

from __future__ import annotations

import copy

import torch
import transformers

from optin_export.models import wrap
from optin_export.models.equivalents import use_equivalents
from optin_export.pruning import verified
from optin_export.units import find_structure
from tests.conftest import enlarge
from tests.models.audio_folders import MASKED, RAW


def wavlm() -> torch.nn.Module:
    fields = {**RAW, **MASKED, "num_buckets": 16, "max_distance": 20}
    return enlarge(transformers.WavLMForSequenceClassification(transformers.WavLMConfig(**fields))).eval()


def test_outputs_and_lost_heads_are_right() -> None:
    model = wavlm()
    for layer in model.wavlm.encoder.layers:  # gates that differ by head
        torch.nn.init.uniform_(layer.attention.gru_rel_pos_const, 0.5, 2.0)
    same = copy.deepcopy(model)
    use_equivalents(same)
    inputs = {"input_values": torch.randn(3, 1600), "attention_mask": torch.ones(3, 1600, dtype=torch.int64)}
    inputs["attention_mask"][1, 900:] = 0
    for given in (inputs, {"input_values": inputs["input_values"]}):
        with torch.no_grad():
            torch.testing.assert_close(same(**given).logits, model(**given).logits, rtol=1e-5, atol=1e-6)
    task = wrap(same, "audio-classification")
    structure = verified(task, find_structure(task, inputs=inputs), inputs)
    heads = [group for group in structure.groups if group.kind == "heads"]
    assert [group.count for group in heads] == [4, 4] and not structure.refused
