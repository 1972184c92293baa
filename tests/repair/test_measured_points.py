"""Corrections of second-order losses: exact at the measured counts, and on whole curves closer to measured ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.objective import ROWS, observe, output_losses, trajectory_losses
from optin_export.recipe import Budget, PruneSection
from optin_export.repair import RepairSettings, loss_curves
from optin_export.repair.measured_points import corrected, measured_at, thinned
from optin_export.scoring import score
from optin_export.units import Structure, UnitGroup, Walk, block_outputs, find_structure, masked
from tests.units.models import batches_for, small_model


@pytest.mark.parametrize(
    ("counts", "two", "four"),
    [
        ([0, 1, 2, 4], [0, 1], [0, 1, 2]),
        ([1, 10, 20, 40], [0, 1], [0, 1, 2]),
        ([1, 8, 16, 24, 32, 40], [0, 1], [0, 1, 2, 4]),
        ([0, 2], [0], [0]),
        ([3], [], []),
        ([8, 8], [0], [0]),
    ],
)
def test_which_counts_are_measured(counts: list[int], two: list[int], four: list[int]) -> None:
    structures = [find_structure(small_model(name)[0]) for name in ("bert", "resnet-cifar")]
    assert [measured_at(structure, counts) for structure in structures] == [two, four]
    blind = replace(structures[1], walk=Walk(order=(), blind=("conv",)))
    assert measured_at(blind, counts) == list(range(len(counts) - 1))


def test_rows_are_left_out_of_convolutional_models_where_they_would_cost_too_much() -> None:
    transformer, network = (find_structure(small_model(name)[0]) for name in ("bert", "resnet-cifar"))
    counts = {group.key: [1, 8, 16, 24, 32, 40] for group in network.groups}
    # Four points per group, each a pass through the blocks that follow.
    passes = sum(4 * len(network.after(group)) / len(network.observed) for group in network.groups)
    for calibration, expected in (
        (10_000, 1),
        (int(passes * 64 / 6 / 1.5), 2),
        (int(passes * 64 / 6 / 2.5), 3),
        (1, 4),
    ):
        assert thinned(network, counts, 64, calibration) == expected
    assert thinned(transformer, {group.key: [1, 40] for group in transformer.groups}, 64, 10_000) == 4


def test_corrections_are_interpolated_and_end_at_the_unchanged_model() -> None:
    counts, losses = [0, 2, 4, 8], np.array([[8.0, 1.0], [4.0, 1.0], [2.0, 1.0]])
    found = corrected(counts, losses, [0, 1], np.array([[4.0, 0.0], [8.0, 3.0]]), np.array([[1.0, 0.0], [1.0, 1.0]]))
    # Ratios 4, 8 and, two thirds of the way from there to the end, 8 to the power of two thirds.
    np.testing.assert_allclose(found[:, 0], [32.0, 32.0, 2 * 8 ** (2 / 3)])
    # Without a loss at the smallest count, the ratio of the other one holds.
    np.testing.assert_allclose(found[:, 1], [3.0, 3.0, 3 ** (2 / 3)])
    assert losses[0, 0] == 8.0


def test_where_no_gradient_arrives_the_measured_points_stand_alone() -> None:
    """A curve of zeros would make the units free."""
    found = corrected([0, 2, 4, 8], np.zeros((3, 2)), [0, 1], np.array([[4.0, 0.0], [3.0, 0.0]]), np.zeros((2, 2)))
    np.testing.assert_allclose(found, [[4.0, 0.0], [3.0, 0.0], [2.0, 0.0]])


@pytest.mark.parametrize("name", ["bert", "vit", "resnext-torchvision", "vgg"])
def test_at_the_measured_counts_a_curve_is_the_loss_of_masking(name: str) -> None:
    """Without a repair, and with all rows measured: by a plain loop over groups, counts and batches."""
    model, _ = small_model(name)
    structure = find_structure(model)
    scores = score(model, structure, (), PruneSection(budget=Budget(macs=0.5), score="magnitude"), seed=0).values
    batches = batches_for(model, 1, size=8, first_seed=50)
    least = {group.key: 0 if group.sublayer else 1 for group in structure.groups}
    found = loss_curves(model, structure, scores, (), batches, RepairSettings(False), least=least)
    for group in structure.groups[:3]:
        order, curve = np.argsort(-scores[group.key], kind="stable"), found[group.key]
        for at in measured_at(structure, curve[:, 0].astype(int).tolist()):
            mask = torch.zeros(group.count)
            mask[order[: int(curve[at, 0])].copy()] = 1.0
            expected = _masked(model, structure, group, mask, batches[0])
            np.testing.assert_allclose(curve[at, 1:], expected, rtol=1e-3, atol=1e-6)


def _masked(
    model: TaskModel, structure: Structure, group: UnitGroup, mask: torch.Tensor, batch: Batch
) -> tuple[float, float]:
    reference = observe(model, structure, batch, ROWS, torch.Generator().manual_seed(0))
    with torch.no_grad(), masked(model, [group], {group.key: mask}), block_outputs(model, structure.blocks) as out:
        result = model(**batch.inputs)
        moved = trajectory_losses(reference, out, structure.blocks, structure.channels_first)
    return float(moved.mean()), float(output_losses(model, reference, result, 1.0).mean())
