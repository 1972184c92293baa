"""Scores and curves of units that are some of the features that a layer reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optin_export.data import Batch
from optin_export.pruning import verified
from optin_export.repair import curves
from optin_export.repair.least_squares import Moments
from optin_export.scoring.activation import activation_scores
from optin_export.scoring.magnitude import magnitude_scores
from optin_export.units import Structure, UnitGroup
from optin_export.units.discovery import found_structure
from optin_export.units.trace import observe_pass
from tests.units.discover import branches, nets


@pytest.fixture(scope="module")
def dense() -> tuple[nets.Net, Structure]:
    model, inputs = branches.dense(), nets.images()
    return model, verified(model, found_structure(model, inputs, observe_pass(model, inputs), None), inputs)


def group_of(structure: Structure, maker: str) -> UnitGroup:
    return next(group for group in structure.groups if group.producers[0].path == maker)


def test_weights_are_those_of_the_units_alone(dense: tuple[nets.Net, Structure]) -> None:
    model, structure = dense
    group = group_of(structure, "conv1")
    found = magnitude_scores(model, structure)[group.key]
    for unit in range(6):
        own = model.conv1.weight[unit].square().sum()
        read = model.conv2.weight[:, 4 + unit].square().sum() + model.head.weight[:, 4 + unit].square().sum()
        assert found[unit] == pytest.approx(float(own + read), rel=1e-5)


def test_contributions_are_those_of_the_units_alone(dense: tuple[nets.Net, Structure]) -> None:
    model, structure = dense
    inputs = nets.images(4)
    group = group_of(structure, "conv2")
    seen: list[torch.Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = Batch(inputs, np.arange(4))
    found = activation_scores(model, structure.groups, [batch])[group.key]
    handle.remove()
    for unit in range(5):
        each = seen[0][:, 10 + unit, None] * model.head.weight[:, 10 + unit]
        assert found[unit] == pytest.approx(float(each.square().sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize("refits", [False, True])
def test_a_curve_cuts_the_units_and_keeps_what_else_the_layer_reads(
    dense: tuple[nets.Net, Structure], refits: bool
) -> None:
    model, structure = dense
    group, sums = group_of(structure, "conv1"), Moments(15, 0)
    sums.gram = torch.eye(16, dtype=torch.float64)
    assert set(group.reads) == {"conv2", "head"}
    changes, _ = curves._changes(model, group, "head", [4, 1, 5, 0, 2, 3], [1, 2], sums if refits else None, False)
    weight = model.head.weight + changes[1]
    assert weight.abs().sum(0).nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 8, 10, 11, 12, 13, 14]
    left = [0, 1, 2, 3, 5, 8, 10, 11, 12, 13, 14]
    torch.testing.assert_close(weight[:, left], model.head.weight[:, left])  # equal inputs: nothing to compensate
