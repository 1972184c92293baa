"""Second-order losses: those of measured passes with a small part of the same change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.objective import ROWS, observe, output_losses, trajectory_losses
from optin_export.repair import RepairSettings, curves, second_order
from optin_export.units import Structure, UnitGroup, block_outputs, find_structure, measured, refitted, tensor_in
from optin_export.units import get_layer as layer_of
from tests.units.models import batches_for, small_model

#: Share of the change that the measured passes have: their losses are quadratic in it.
PART = 1e-3


def precise(batches: list[Batch]) -> list[Batch]:
    """In float64, because the measured losses are small."""
    inputs = ({key: one.double() if one.is_floating_point() else one for key, one in b.inputs.items()} for b in batches)
    return [Batch(some, batch.rows) for some, batch in zip(inputs, batches, strict=True)]


def cut(model: TaskModel, group: UnitGroup, counts: list[int], part: float = 1.0) -> dict[str, Any]:
    """The changes of the layers that read the group's first units, and no others."""
    order = list(range(group.count))
    found = {path: curves._changes(model, group, path, order, counts, None, False) for path in group.reads}
    return {path: (part * weights, part * biases) for path, (weights, biases) in found.items()}


def of_passes(model: TaskModel, structure: Structure, changes: dict[str, Any], candidate: int) -> tuple[float, float]:
    """(trajectory, output) losses of a pass with these weights, means over samples."""
    (batch,) = precise(batches_for(model, 1, size=8, first_seed=50))
    reference = observe(model, structure, batch, ROWS, torch.Generator().manual_seed(0))
    layers = {}
    for path, (weights, biases) in changes.items():
        layer = layer_of(model, path)
        bias = 0 if layer.bias is None else tensor_in(layer, "bias")
        layers[path] = (tensor_in(layer, "weight") + weights[candidate], (bias + biases[candidate]).double())
    with torch.no_grad(), refitted(model, layers), block_outputs(model, structure.observed, structure.rewritten) as out:
        result = model(**batch.inputs)
    moved = trajectory_losses(reference, out, structure.observed, structure.channels_first)
    return float(moved.mean()), float(output_losses(model, reference, result, 1.0).mean())


@pytest.mark.parametrize(
    ("name", "coupled"), [("bert", False), ("vit", False), ("resnet-timm", True), ("vgg", False), ("distilbert", False)]
)
def test_losses_are_those_of_a_small_part_of_the_change(
    name: str, coupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many probes as classes the output's are exact, up to what is not quadratic in the part."""
    model = small_model(name)[0].double()
    batches = precise(batches_for(model, 1, size=8, first_seed=50))
    structure = measured(model, find_structure(model, coupled), batches[0].inputs)
    with torch.no_grad():
        classes = model(**batches[0].inputs).shape[-1]
    monkeypatch.setattr(second_order, "PROBES", classes * max(1, 64 // classes))
    groups = [structure.groups[0], structure.groups[1], structure.groups[-1]]
    tried, counts = second_order.Tried(), [[1, group.count // 2] for group in groups]
    for group, some in zip(groups, counts, strict=True):
        tried.add(cut(model, group, some), len(some), group.batch_dim)
    found = [
        sums.sum(0) / 8 for sums in second_order.second_order_losses(model, structure, batches, tried, RepairSettings())
    ]
    for group, some, losses in zip(groups, counts, found, strict=True):
        for candidate in range(2):
            changes = cut(model, group, some, PART)
            trajectory, output = np.array(of_passes(model, structure, changes, candidate)) / PART**2
            assert losses[candidate, 0] == pytest.approx(trajectory, rel=0.25)
            assert losses[candidate, 1] == pytest.approx(output, rel=0.08)


def test_an_empty_change_costs_nothing_and_twice_the_change_four_times_as_much() -> None:
    model, _ = small_model("vit")
    batches = batches_for(model, 2, size=4, first_seed=50)
    structure = measured(model, find_structure(model), batches[0].inputs)
    group, tried = structure.groups[1], second_order.Tried()
    whole = cut(model, group, [8])
    both = {path: tuple(torch.cat([0 * one, one, 2 * one]) for one in change) for path, change in whole.items()}
    tried.add(both, 3, group.batch_dim)
    (losses,) = second_order.second_order_losses(model, structure, batches, tried, RepairSettings())
    assert losses.shape == (2, 3, 2) and not losses[:, 0].any()
    np.testing.assert_allclose(losses[:, 2], 4 * losses[:, 1], rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("size", [1 << 30, 1])
def test_products_by_weight_gradients_are_those_of_passes(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples at once, and one after the other."""
    monkeypatch.setattr(second_order, "GRADIENT_BYTES", size)
    make = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    inputs, directions, weights, biases = draw(3, 7, 5), draw(2, 3, 7 * 4), draw(6, 4, 5), draw(6, 4)
    found = second_order._by_gradients(inputs, directions, (weights, biases))
    for candidate in range(6):
        moved = inputs @ weights[candidate].T + biases[candidate]
        torch.testing.assert_close(found[candidate], (directions.view(2, 3, 7, 4) * moved).sum((2, 3)))


def test_the_cheaper_of_both_products_is_taken() -> None:
    long, short = torch.zeros(4, 64, 8), torch.zeros(4, 1, 8)
    assert second_order._fewer_by_gradients(long, 13, 4, 4)
    assert not second_order._fewer_by_gradients(short, 13, 4, 4)
    assert not second_order._fewer_by_gradients(long, 3, 4, 4)
