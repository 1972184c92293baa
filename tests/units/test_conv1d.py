"""Convolutions over one dimension: their channels are found, cut, repaired and counted like those over two."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optin_export.data import Batch
from optin_export.models import build
from optin_export.models.tasks import TaskModel
from optin_export.pruning import load_model, save_model, verified
from optin_export.pruning.rebuild import rebuild
from optin_export.repair import RepairSettings, apply_plan, masked_difference
from optin_export.scoring.activation import contributions
from optin_export.units import (
    Structure,
    count_macs,
    count_params,
    find_structure,
    get_layer,
    input_rows,
    masked,
    measure_costs,
    output_rows,
)
from tests.conftest import enlarge
from tests.repair.plans import halved
from tests.units.builders import from_python, from_transformers
from tests.units.models import batches_for, inputs_for

NETS = Path(__file__).parent / "conv1d_nets.py"
ONE_GROUP = [f"{name}_groups" for name in ("q", "k", "v", "post_attention", "intermediate", "output")]


def images(batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def built() -> tuple[TaskModel, dict[str, Any], Structure]:
    description = from_python(NETS, "signals")()
    architecture = {**description, "task": "image-classification", "pooling": None, "normalize": False}
    model = build(architecture, trust_python=True)
    return model, architecture, verified(model, find_structure(model, inputs=images(2)), images(2))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(6, 4, 3, padding=1, stride=2),
        nn.Conv1d(6, 4, 5, padding="same", dilation=2, padding_mode="reflect"),
        nn.Conv1d(6, 4, 1),
        nn.Conv2d(6, 4, (3, 1), padding=(1, 0), stride=2),
    ],
    ids=str,
)
def test_rows_times_weights_are_the_output_row_for_row(layer: nn.Conv1d | nn.Conv2d) -> None:
    values = torch.randn(3, 6, *[14] * (layer.weight.dim() - 2))
    output = layer(values).detach()
    read, made = (rows(one, layer, {}, 7) for rows, one in ((input_rows, values), (output_rows, output)))
    assert layer.bias is not None
    torch.testing.assert_close(read @ layer.weight.detach().flatten(1).T + layer.bias.detach(), made)


def test_padding_of_a_text_is_no_row() -> None:
    layer, values = nn.Conv1d(6, 4, 1), torch.randn(2, 6, 5)
    inputs = {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}
    valid = inputs["attention_mask"].bool()
    assert torch.equal(input_rows(values, layer, inputs, 0), values.mT[valid])
    assert torch.equal(output_rows(layer(values).detach(), layer, inputs, 0), layer(values).detach().mT[valid])


def test_channels_of_one_dimension_go_exactly(tmp_path: Path) -> None:
    model, architecture, structure = built()
    found = {group.consumer: (group.kind, group.count, group.producers[0].norm) for group in structure.groups}
    assert found == {
        **{f"model.blocks.{n}.reduce": ("channels", 24, f"model.blocks.{n}.norm") for n in (0, 1)},
        "model.head": ("neurons", 32, "model.norm"),
    }
    assert structure.channels_first >= {"model.blocks.0", "model.blocks.1"}
    assert [group.residual for group in structure.groups][:2] == [(f"model.blocks.{n}.expand", 0) for n in (0, 1)]
    plan = halved(structure)
    plain = apply_plan(model, structure, plan, (), images(2), RepairSettings(repair=False)).dense
    assert max(masked_difference(model, plain, structure, plan, images(size, size)) for size in (1, 2, 5)) < 1e-5
    batches = [Batch(images(8, seed), np.arange(8)) for seed in range(1, 6)]
    repaired = apply_plan(model, structure, plan, batches, images(2), RepairSettings()).dense
    errors = [float((dense(**images(64, 9)) - model(**images(64, 9))).norm()) for dense in (plain, repaired)]
    assert errors[1] < 0.8 * errors[0]
    save_model(tmp_path, repaired, architecture, structure, plan, images(2))
    assert torch.equal(load_model(tmp_path, trust_python=True)(**images(5)), repaired(**images(5)))


def test_costs_are_those_of_the_rebuilt_model() -> None:
    model, _, structure = built()
    plan = halved(structure, share=0.25)
    costs = measure_costs(model, structure, images(1))
    dense, _ = rebuild(model, structure, plan.groups, images(2))
    kept = {key: len(one.kept) for key, one in plan.groups.items()}
    assert (costs.of("macs", kept), costs.of("params", kept)) == (count_macs(dense, images(1)), count_params(dense))


def test_contributions_are_those_of_each_channel() -> None:
    model, _, structure = built()
    group = structure.groups[0]
    energy = contributions(model, [group], [Batch(images(4), np.arange(4))])[group.key].energy
    layer = get_layer(model, group.consumer)
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**images(4))
    handle.remove()
    square = layer.weight.detach()[:, 3].square().sum() * seen[0][:, 3].square().mean()
    assert math.isclose(energy[3], float(square), rel_tol=1e-4)


def test_a_mask_per_sample_reaches_every_position() -> None:
    model, _, structure = built()
    group = structure.groups[0]
    masks = torch.ones(2, group.count)
    masks[1] = 0
    with masked(model, [group], {group.key: masks}):
        both = model(**images(2))
    with masked(model, [group], {group.key: torch.zeros(group.count)}):
        none = model(**images(2))
    torch.testing.assert_close(both[0], model(**images(2))[0])
    torch.testing.assert_close(both[1], none[1])


def test_attention_of_convolutions_loses_heads() -> None:
    describe = from_transformers(
        "SqueezeBertForSequenceClassification",
        vocab_size=64,
        max_position_embeddings=40,
        embedding_size=32,
        **dict.fromkeys(ONE_GROUP, 1),
    )
    model = build({**describe(), "task": "text-classification", "pooling": None, "normalize": False})
    enlarge(model, 0)
    inputs = inputs_for(model, 2, 0)
    structure = verified(model, find_structure(model, inputs=inputs), inputs)
    assert [(group.kind, group.count, group.width) for group in structure.groups][:2] == [
        ("heads", 4, 8),
        ("channels", 64, 1),
    ]
    plan = halved(structure)
    plain = apply_plan(model, structure, plan, (), inputs, RepairSettings(repair=False)).dense
    assert masked_difference(model, plain, structure, plan, inputs_for(model, 5, 1)) < 1e-5
    repaired = apply_plan(model, structure, plan, batches_for(model, 6), inputs, RepairSettings()).dense
    other = inputs_for(model, 32, 99)
    errors = [float((dense(**other) - model(**other)).norm()) for dense in (plain, repaired)]
    assert errors[1] < 0.9 * errors[0]
    costs = measure_costs(model, structure, inputs_for(model, 1, 0))
    kept = {key: len(one.kept) for key, one in plan.groups.items()}
    assert costs.of("macs", kept) == count_macs(plain, inputs_for(model, 1, 0))
