"""The operation between a layer and the residual stream that it adds to."""

from __future__ import annotations

import torch
from torch import nn

from optin_export.models import TaskModel, gathered
from optin_export.units import UnitGroup, get_scale, tensor_in


def affine_of(model: TaskModel, group: UnitGroup) -> torch.Tensor | None:
    """Factor between the consumer's output and the residual stream, [features]; a single 1 without one.

    The shift of a batch norm is the same in both models and cancels. None for a batch norm without statistics: it
    depends on the batch.
    """
    if group.scale is None:
        return torch.ones(())
    scale = get_scale(model, group.scale)
    if isinstance(scale, torch.Tensor):
        return gathered(scale.detach()).flatten()
    assert isinstance(scale, nn.BatchNorm1d | nn.BatchNorm2d), f"{group.scale} is a {type(scale).__name__}"
    if scale.running_var is None:
        return None
    gamma = torch.ones_like(gathered(scale.running_var)) if scale.weight is None else tensor_in(scale, "weight")
    return gamma / (tensor_in(scale, "running_var") + scale.eps).sqrt()
