"""The scorer `optin-reference`: the faults that it keeps on purpose."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.recipe import Budget, PruneSection
from optin_export.scoring import score
from optin_export.units import Structure, find_structure, get_layer, masked, tensor_of
from optin_export.units.hooks import block_outputs
from tests.test_docs import load_tool
from tests.units.models import batches_for, inputs_for, small_model

load_tool("comparison_scorers")
reference_scores = sys.modules["reference_scorer"].reference_scores


def all_rows(model: TaskModel, batch: Batch, structure: Structure, seed: int = 0) -> dict[str, np.ndarray]:
    """The reference with every token row compared, so that the rows it draws again each time are the same ones."""
    return reference_scores(model, structure, batch, 10**6, seed)


def test_the_reference_favours_units_by_their_index() -> None:
    """Neurons in another order get other scores: each is multiplied by a prior on its place, 100 down to 1."""
    model, _ = small_model("bert")
    structure, batch = find_structure(model), batches_for(model, 1, size=3)[0]
    group = structure.groups[1]
    first = all_rows(model, batch, structure.only(["neurons"]))[group.key]
    order = torch.randperm(group.count, generator=torch.Generator().manual_seed(1))
    up, down = get_layer(model, group.producers[0].path), get_layer(model, group.consumer)
    assert up.bias is not None
    up.weight.data, up.bias.data = up.weight.data[order], up.bias.data[order]
    down.weight.data = down.weight.data[:, order]
    second = all_rows(model, batch, structure.only(["neurons"]))[group.key]
    prior = np.geomspace(100, 1, group.count)
    same_neuron = first[order.numpy()]
    assert np.abs(second / same_neuron - 1).max() > 5
    kept = (second / prior) / (same_neuron / prior[order.numpy()])
    assert np.median(np.abs(kept - 1)) < 0.05  # without the prior they are the same, but for rounding of tiny losses


def test_the_reference_leaves_heads_of_earlier_blocks_masked() -> None:
    """A later unit is scored with the last head of every block up to its own missing as well."""
    model, _ = small_model("bert")
    structure, batch = find_structure(model), batches_for(model, 1, size=3)[0]
    scores = all_rows(model, batch, structure)
    heads, group = structure.groups[0], structure.groups[2]  # heads of the first and of the second block

    def loss(masks: dict[str, torch.Tensor], blocks: tuple[str, ...]) -> float:
        results = []
        for applied in ({}, masks):
            with torch.no_grad(), block_outputs(model, blocks) as found, masked(model, structure.groups, applied):
                logits = model(**batch.inputs)
            rows = [torch.nn.functional.normalize(tensor_of(found[path]).flatten(0, 1), dim=-1) for path in blocks]
            results.append(([one @ one.T for one in rows], torch.log_softmax(logits, -1)))
        (before, p), (after, q) = results
        distance = sum(float((a - b).square().sum()) for a, b in zip(before, after, strict=True))
        divergence = 16 * float((p.exp() * (p - q)).sum(-1).mean())
        return distance + 10.0 ** (np.floor(np.log10(distance)) - np.floor(np.log10(divergence))) * divergence

    without = torch.ones(4)
    without[-1] = 0
    unit = torch.ones(4)
    unit[1] = 0
    prior = np.geomspace(10, 1, 4)[1] * 0.5  # heads count half
    later = structure.blocks[2:]
    assert scores[group.key][1] == pytest.approx(prior * loss({heads.key: without, group.key: unit}, later), rel=1e-3)
    assert scores[group.key][1] != pytest.approx(prior * loss({group.key: unit}, later), rel=0.05)


def test_the_reference_draws_rows_anew_and_takes_padding_for_text() -> None:
    model, _ = small_model("bert")
    structure, batch = find_structure(model).only(["heads"]), batches_for(model, 1, size=3)[0]
    first, second = (reference_scores(model, structure, batch, 8, seed)["block00.heads"] for seed in (0, 1))
    assert not np.allclose(first, second, rtol=0.05)
    longer = Batch({key: torch.nn.functional.pad(value, (0, 6)) for key, value in batch.inputs.items()}, batch.rows)
    assert not np.allclose(
        all_rows(model, batch, structure)["block00.heads"],
        all_rows(model, longer, structure)["block00.heads"],
        rtol=0.05,
    )


def test_only_the_first_batch_is_the_references() -> None:
    model, _ = small_model("vgg")
    structure, batches = find_structure(model), batches_for(model, 1, size=3)
    settings = PruneSection(budget=Budget(macs=0.5), rows=128).model_copy(update={"score": "optin-reference"})
    one = score(model, structure, batches, settings, seed=0).values
    two = score(model, structure, [*batches, Batch(inputs_for(model, 2, 9), np.arange(2))], settings, seed=0).values
    assert all(np.array_equal(one[key], two[key]) for key in one)
