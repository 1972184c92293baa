"""The layers that least squares refit: their initial weights, their kept rows, and writing a solution back."""

from __future__ import annotations

import torch
from torch import nn

from optin_export.models import TaskModel
from optin_export.pruning.rebuild import Constant
from optin_export.repair.least_squares import Fit
from optin_export.search import GroupPlan
from optin_export.units import Producer, UnitGroup, as_matrix, get_layer, get_module, get_weight


def kept_rows(model: TaskModel, group: UnitGroup, producer: Producer, plan: GroupPlan) -> torch.Tensor:
    """The output rows of the unpruned producer that stay, in the order of the smaller one; also those of no unit, such
    as keys that all heads share."""
    removed = set(group.rows_of(producer, set(range(group.count)) - set(plan.kept)))
    rows = len(get_weight(get_layer(model, producer.path)))
    return torch.tensor([row for row in range(rows) if row not in removed], dtype=torch.long)


def start_of(model: TaskModel, path: str) -> torch.Tensor:
    """The current [weights, bias], [inputs + 1, outputs] in float64."""
    matrix, bias = as_matrix(model, path), get_layer(model, path).bias
    column = matrix.new_zeros(len(matrix)) if bias is None else bias.detach()
    return torch.cat([matrix, column[:, None]], 1).double().T


def overwrite(model: TaskModel, path: str, fit: Fit) -> None:
    if fit.damping is None:
        return
    layer = get_layer(model, path)
    as_matrix(model, path).copy_(fit.solution[:-1].T)
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), requires_grad=False)
    layer.bias.detach().copy_(fit.solution[-1])


def constant_of(model: TaskModel, group: UnitGroup) -> torch.Tensor:
    assert group.sublayer is not None
    constant = get_module(model, group.sublayer)
    assert isinstance(constant, Constant)
    return constant.bias.detach()
