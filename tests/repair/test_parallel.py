"""Parallel sub-layers (h + attention + mlp): the later one corrects the stream and the error that the other left.

And parallel layers that read one input, each in its own way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from optin_export.data import Batch
from optin_export.models import build, wrap
from optin_export.models.tasks import TaskModel
from optin_export.pruning import verified
from optin_export.pruning.rebuild import rebuild
from optin_export.repair import RepairSettings, apply_plan, sequential
from optin_export.repair.layers import kept_rows
from optin_export.repair.least_squares import Fit
from optin_export.repair.model_pair import ConsumerRows, ModelPair
from optin_export.repair.paired_forward import Stream
from optin_export.repair.sensitivity import sensitivities
from optin_export.repair.sequential import compensate, refit_producers
from optin_export.units import Structure, find_structure
from tests.conftest import enlarge
from tests.repair.plans import halved, without
from tests.units.builders import from_transformers
from tests.units.models import batches_for, inputs_for

NETS: dict[str, tuple[dict[str, Any], str, str]] = {
    "GPTNeoXModel": ({"vocab_size": 64}, "attention.dense", "mlp.dense_4h_to_h"),
    "PhiModel": ({"vocab_size": 64}, "self_attn.dense", "mlp.fc2"),
}


def built(kind: str) -> tuple[TaskModel, Structure]:
    describe = from_transformers(kind, **NETS[kind][0])
    model = build({**describe(), "task": "feature-extraction", "pooling": "mean", "normalize": False})
    enlarge(model, 0)
    return model, find_structure(model, inputs=inputs_for(model, 2, 0))


@pytest.mark.parametrize("kind", NETS)
def test_the_stream_and_the_layers_added_before(kind: str) -> None:
    _, structure = built(kind)
    _, attention, mlp = NETS[kind]
    for number, block in enumerate(structure.blocks):
        heads, neurons = [group for group in structure.groups if group.block == number]
        assert (heads.consumer, neurons.consumer) == (f"{block}.{attention}", f"{block}.{mlp}")
        stream = (f"{block}.input_layernorm", 0)
        assert (heads.residual, heads.added) == (stream, ())
        assert (neurons.residual, neurons.added) == (stream, (f"{block}.{attention}",))


def test_the_target_is_what_makes_the_sum_right() -> None:
    model, structure = built("GPTNeoXModel")
    batches, plan = batches_for(model, 2), halved(structure)
    dense, _ = rebuild(model, structure, plan.groups, batches[0].inputs)
    weights = sensitivities(model, structure, batches, 0)
    source, target = (Stream(one, structure, batches) for one in (model, dense))
    pair = ModelPair(source, target, structure, batches, weights, {})
    neurons = next(group for group in structure.groups if group.kind == "neurons")
    rows = ConsumerRows(pair, neurons, torch.ones(()), None, None, None)(0)
    block, valid = structure.blocks[0], batches[0].inputs["attention_mask"].bool()

    def seen(one: Stream, path: str, what: Any) -> torch.Tensor:
        value = one.see(0, [(path, what)], block)[(path, what)]
        return (value[0] if isinstance(value, tuple) else value)[valid]

    own = seen(target, block, "output") - seen(target, neurons.consumer, "output")  # h' + o1'
    wanted = seen(source, block, "output") - own
    pair.close()
    torch.testing.assert_close(rows.target.to(wanted), wanted, rtol=1e-4, atol=1e-5)


def test_the_error_of_the_whole_block_shrinks_with_every_refit() -> None:
    model, structure = built("GPTNeoXModel")
    batches, plan = batches_for(model, 6), halved(structure)
    dense, smaller = rebuild(model, structure, plan.groups, batches[0].inputs)
    repairs = compensate(model, dense, structure, smaller, plan.groups, batches, RepairSettings())
    first, second = (repairs[group.key] for group in structure.groups[:2])
    assert first.before is not None and first.after is not None and second.before is not None
    assert second.after is not None and second.after < second.before


def test_rows_that_no_unit_has_stay_in_the_targets_of_a_fused_layer() -> None:
    """Queries of all heads and one key and value for all of them, in one layer (multi-query attention)."""
    describe = from_transformers("GPTBigCodeModel", vocab_size=64)
    model = build({**describe(), "task": "feature-extraction", "pooling": "mean", "normalize": False})
    enlarge(model, 0)
    batches = batches_for(model, 6)
    structure = verified(model, find_structure(model, inputs=batches[0].inputs), batches[0].inputs)
    plan = halved(structure)
    heads = next(group for group in structure.groups if group.kind == "heads")
    producer, width = heads.producers[0], heads.count * heads.width
    total = len(model.get_submodule(producer.path).weight)
    kept = kept_rows(model, heads, producer, plan.groups[heads.key]).tolist()
    assert total == width + 2 * heads.width and kept[-2 * heads.width :] == list(range(width, total))
    dense, smaller = rebuild(model, structure, plan.groups, batches[0].inputs)
    repairs = compensate(model, dense, structure, smaller, plan.groups, batches, RepairSettings())
    errors = repairs[heads.key]
    assert errors.before is not None and errors.after is not None and errors.after < errors.before


class Branches(torch.nn.Module):
    """Convolutions of several sizes, dilations and paddings read one image, and add to the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.one = torch.nn.Conv2d(6, 12, 1)
        self.three = torch.nn.Conv2d(6, 12, 3, padding=1)
        self.dilated = torch.nn.Conv2d(6, 12, 3, padding=2, dilation=2)
        self.mirrored = torch.nn.Conv2d(6, 12, 3, padding=1, padding_mode="reflect")
        self.again = torch.nn.Conv2d(6, 12, 3, padding=1)
        self.last = torch.nn.Conv2d(12, 6, 3, padding=1)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        image = self.stem(pixel_values)
        branches = [self.one(image), self.three(image), self.dilated(image), self.mirrored(image), self.again(image)]
        return self.head(self.last(torch.relu(sum(branches))).mean((2, 3)))


def test_layers_that_read_different_patches_of_one_image_are_refitted_apart() -> None:
    """What they read is unchanged, so that the right weights are those that they have."""
    torch.manual_seed(0)
    model = wrap(Branches().eval().requires_grad_(False), "image-classification")
    batches = [Batch({"pixel_values": torch.randn(8, 3, 12, 12)}, np.arange(8)) for _ in range(6)]
    structure = find_structure(model, inputs=batches[0].inputs)
    (group,) = [group for group in structure.groups if group.consumer == "model.last"]
    names = ["one", "three", "dilated", "mirrored", "again"]
    assert {producer.path for producer in group.producers} == {f"model.{name}" for name in names}
    structure = dataclasses.replace(structure, groups=(group,))
    plan = without(structure, {group.key: [1, 5, 6]})
    kept = list(plan.groups[group.key].kept)
    dense, _ = rebuild(model, structure, plan.groups, batches[0].inputs)
    weights = sensitivities(model, structure, batches, 0)
    left = {producer.path: torch.tensor(kept) for producer in group.producers}
    pair = ModelPair(*(Stream(one, structure, batches) for one in (model, dense)), structure, batches, weights, left)
    refit_producers(pair, group, (), {})
    for name in names:
        before, after = (one.get_submodule(f"model.{name}") for one in (model, dense))
        assert torch.allclose(after.weight, before.weight[kept], atol=1e-4), name
        assert torch.allclose(after.bias, before.bias[kept], atol=1e-4), name


class DenseBlock(torch.nn.Module):
    """Every layer reads what all layers before have made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(3 + 8 * index, 8, 3, padding=1) for index in range(4))
        self.last, self.head = torch.nn.Conv2d(35, 6, 1), torch.nn.Linear(6, 4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        seen = [pixel_values]
        for layer in self.layers:
            seen.append(torch.relu(layer(torch.cat(seen, 1))))
        return self.head(self.last(torch.cat(seen, 1)).mean((2, 3)))


def test_a_layer_that_reads_several_groups_is_refitted_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = wrap(DenseBlock().eval().requires_grad_(False), "image-classification")
    batches = [Batch({"pixel_values": torch.randn(8, 3, 10, 10)}, np.arange(8)) for _ in range(6)]
    structure = find_structure(model, inputs=batches[0].inputs)
    reading = [path for group in structure.groups for path in group.readers]
    assert len(reading) > len(set(reading))
    refit, refitted = sequential.refit_layer, list[str]()

    def counted(pair: ModelPair, path: str) -> Fit:
        refitted.append(path)
        return refit(pair, path)

    monkeypatch.setattr(sequential, "refit_layer", counted)
    plan = halved(structure, share=0.7)
    plain, repaired = (
        apply_plan(model, structure, plan, batches, batches[0].inputs, RepairSettings(repair=repair))
        for repair in (False, True)
    )
    assert sorted(path for path in refitted if path in reading) == sorted(set(reading))
    assert error_of(model, repaired.dense, batches) < 0.6 * error_of(model, plain.dense, batches)


def error_of(model: TaskModel, dense: TaskModel, batches: list[Batch]) -> float:
    with torch.no_grad():
        return sum(float((model(**one.inputs) - dense(**one.inputs)).square().sum()) for one in batches)
