"""The loss of distillation: both terms by the right value, without padding, and through merged tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from optin_export.data import Batch
from optin_export.models import Inputs, TaskModel
from optin_export.pruning import rebuild
from optin_export.pruning.token_merging import insert_merging
from optin_export.repair.distillation import Distillation, relative_error
from optin_export.units import Structure, block_outputs, find_structure, find_tokens, tensor_of
from tests.repair.plans import halved
from tests.units.models import inputs_for, small_model


def pair(name: str, rows: int = 6) -> tuple[TaskModel, TaskModel, Structure, Inputs]:
    original, _ = small_model(name)
    inputs, structure = inputs_for(original, rows, 3), find_structure(original)
    smaller, _ = rebuild(original, structure, halved(structure).groups, inputs)
    return original, smaller, structure, inputs


def streams(model: TaskModel, structure: Structure, inputs: Inputs) -> dict[str, torch.Tensor]:
    with torch.no_grad(), block_outputs(model, structure.observed, structure.rewritten) as found:
        model(**inputs)
    return {path: tensor_of(value) for path, value in found.items()}


def terms(model: TaskModel, original: TaskModel, structure: Structure, inputs: Inputs) -> list[float]:
    batch = Batch(inputs, np.arange(len(next(iter(inputs.values())))))
    with torch.no_grad():
        return [float(one) for one in Distillation(original, structure, 1.0).terms(model, batch)]


def test_both_terms_of_images() -> None:
    original, smaller, structure, inputs = pair("vit")
    output, blocks = terms(smaller, original, structure, inputs)
    with torch.no_grad():
        log_p, log_q = (F.log_softmax(model(**inputs), -1) for model in (original, smaller))
    assert output == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    wanted, given = (streams(model, structure, inputs) for model in (original, smaller))
    by_hand = [float(((h - given[path]) ** 2).sum() / ((h - h.mean((0, 1))) ** 2).sum()) for path, h in wanted.items()]
    assert len(by_hand) == len(structure.observed) and blocks == pytest.approx(np.mean(by_hand), rel=1e-4)
    assert terms(original, original, structure, inputs) == pytest.approx([0.0, 0.0], abs=1e-6)


def test_padding_does_not_count() -> None:
    original, smaller, structure, inputs = pair("bert-embedding")
    mask = torch.ones_like(inputs["attention_mask"])
    mask[:, -2:] = 0
    padded = {**inputs, "attention_mask": mask}
    other = {**padded, "input_ids": padded["input_ids"].clone()}
    other["input_ids"][:, -2:] = 5
    first, second = (terms(smaller, original, structure, one) for one in (padded, other))
    assert first == pytest.approx(second, rel=1e-4) and first[1] > 0


def test_channels_first() -> None:
    wanted = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    given = wanted + 0.1
    moved = [one.movedim(1, -1) for one in (wanted, given)]
    expected = float(((moved[0] - moved[1]) ** 2).sum() / ((moved[0] - moved[0].mean((0, 1, 2))) ** 2).sum())
    assert float(relative_error(wanted, given, None, True)) == pytest.approx(expected, rel=1e-5)


def test_merged_tokens_stand_for_their_members() -> None:
    original, _ = small_model("vit")
    inputs, structure = inputs_for(original, 3, 3), find_structure(original)
    # Equal patches: the class token, and one token for all patches, say the same as all tokens do.
    inputs["pixel_values"][:] = 0.5
    body = original.model
    torch.nn.init.zeros_(body.pos_embed)
    merged = insert_merging(original, structure, find_tokens(original), [4, 2, 0])
    output, blocks = terms(merged, original, structure, inputs)
    assert output == pytest.approx(0.0, abs=1e-5) and blocks == pytest.approx(0.0, abs=1e-5)
    inputs = inputs_for(original, 3, 4)
    assert terms(merged, original, structure, inputs)[1] > 1e-4


def test_both_terms_begin_at_one() -> None:
    original, smaller, structure, inputs = pair("vit")
    batch, loss = Batch(inputs, np.arange(6)), Distillation(original, structure, 1.0)
    loss.begin(smaller, [batch])
    assert float(loss(smaller, batch)) == pytest.approx(2.0, rel=1e-4)
    loss(smaller.requires_grad_(True), batch).backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())
