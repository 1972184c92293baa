"""XLNet with separate projections computes what the library's does, and loses heads."""

from __future__ import annotations

import copy

import torch
import transformers

from optin_export.models import wrap
from optin_export.models.equivalents import use_equivalents
from optin_export.pruning import verified
from optin_export.units import find_structure
from tests.conftest import enlarge


def test_outputs_and_lost_heads_are_right() -> None:
    sizes = {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 24, "pad_token_id": 0}
    model = enlarge(transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**sizes))).eval()
    same = copy.deepcopy(model)
    use_equivalents(same)
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(5, 99, (2, 12), generator=generator)}
    inputs |= {"attention_mask": torch.ones(2, 12, dtype=torch.int64), "token_type_ids": inputs["input_ids"] % 2}
    inputs["attention_mask"][1, 7:] = 0
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        with torch.no_grad():
            wanted, found = model(**given, output_attentions=True), same(**given, output_attentions=True)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.attentions, wanted.attentions, rtol=1e-5, atol=1e-6)
    task = wrap(same, "text-classification")
    structure = verified(task, find_structure(task, inputs=inputs), inputs)
    heads = [group for group in structure.groups if group.kind == "heads"]
    assert [group.count for group in heads] == [4, 4] and not structure.refused
