"""Layers and what stands between them and the residual stream, as matrices that a least squares fit starts from."""

from __future__ import annotations

import torch
from torch import nn

from optin_export.families import UnitGroup, as_matrix, get_layer, get_module, get_scale, tensor_in
from optin_export.sources import TaskModel
from optin_export.surgery.least_squares import Fit
from optin_export.surgery.rebuild import Constant


def start_of(model: TaskModel, path: str) -> torch.Tensor:
    """[weights, bias] as they stand, [inputs + 1, outputs] in float64."""
    matrix, bias = as_matrix(model, path), get_layer(model, path).bias
    column = torch.zeros(len(matrix)) if bias is None else bias.detach()
    return torch.cat([matrix, column[:, None]], 1).double().T


def overwrite(model: TaskModel, path: str, fit: Fit) -> None:
    if fit.damping is None:
        return
    layer = get_layer(model, path)
    as_matrix(model, path).copy_(fit.solution[:-1].T)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(len(layer.weight)), requires_grad=False)
    layer.bias.detach().copy_(fit.solution[-1])


def constant_of(model: TaskModel, group: UnitGroup) -> torch.Tensor:
    assert group.sublayer is not None
    constant = get_module(model, group.sublayer)
    assert isinstance(constant, Constant)
    return constant.bias.detach()


def affine_of(model: TaskModel, group: UnitGroup) -> torch.Tensor | None:
    """Factor between the consumer's output and the residual stream, [features]; a single 1 without one.

    The shift of a batch norm is the same in both models and cancels. None for a batch norm without statistics: it
    depends on the batch.
    """
    if group.scale is None:
        return torch.ones(())
    scale = get_scale(model, group.scale)
    if isinstance(scale, torch.Tensor):
        return scale.detach().flatten()
    assert isinstance(scale, nn.BatchNorm2d), f"{group.scale} is a {type(scale).__name__}"
    if scale.running_var is None:
        return None
    gamma = torch.ones(len(scale.running_var)) if scale.weight is None else tensor_in(scale, "weight")
    return gamma / (tensor_in(scale, "running_var") + scale.eps).sqrt()
