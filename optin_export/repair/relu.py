"""Least squares for a layer that a ReLU follows, with the error measured after the ReLU.

To minimise the sum over rows of || relu(y) - relu(p) ||^2, where p is linear in the weights, use the target t = y where
y > 0 and min(p0, 0) elsewhere, with p0 the current prediction. || t - p ||^2 is an upper bound that is equal at p0, so
ordinary least squares for t can only lower the error after the ReLU; a few rounds are enough (majorisation: Hunter and
Lange 2004; Zhang et al. 2015 reconstruct such responses with auxiliary variables).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from optin_export.models import work_device
from optin_export.repair.paired_forward import Stream
from optin_export.units import (
    Calls,
    Convolution,
    Structure,
    UnitGroup,
    get_layer,
    get_module,
    get_scale,
    get_weight,
    tensor_in,
    tensor_of,
)

#: Rounds that follow the ordinary least squares; each reads the calibration rows once more.
ROUNDS = 2
#: Relative difference up to which an activation counts as the ReLU of its input.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ReluTarget:
    """relu(scale * x + shift) follows a layer's output x; scale: [features], shift: [features] or [rows, features]."""

    scale: torch.Tensor
    shift: torch.Tensor

    def target(self, wanted: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """[rows, features]: the target of the next least squares."""
        passes = self.scale * wanted + self.shift > 0
        cut = self.scale * predicted + self.shift <= 0
        edge = -self.shift / torch.where(self.scale == 0, 1.0, self.scale)
        return torch.where(passes | (self.scale == 0), wanted, torch.where(cut, predicted, edge))

    def error(self, wanted: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """[rows]: squared error after the ReLU, in units of x, summed over features."""
        edge = -self.shift / torch.where(self.scale == 0, 1.0, self.scale)
        seen = [
            torch.where(self.scale == 0, x, torch.where(self.scale * x + self.shift > 0, x, edge))
            for x in (wanted, predicted)
        ]
        return (seen[0] - seen[1]).square().sum(1)


def _is_rectified(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether `after` is relu(`before`), however the model computes it."""
    if before.shape != after.shape or not before.numel():
        return False
    wanted = before.relu()
    # Without negative values there is nothing to gain, and a ReLU cannot be detected.
    return bool((before < 0).any()) and bool((wanted - after).abs().max() <= TOLERANCE * wanted.abs().max())


def relu_of_units(original: Stream, group: UnitGroup, kept: torch.Tensor) -> ReluTarget | None:
    """The ReLU between a group's only producer and its consumer, if there is nothing else but a batch norm."""
    if len(group.producers) != 1 or not original.batches:
        return None
    producer, units = group.producers[0], (group.consumer, 0)
    if producer.index is not None:  # its rows are not the units, one by one
        return None
    seen = original.see(0, [(producer.path, "output"), units], group.consumer)
    output = seen.get((producer.path, "output"))
    if not isinstance(output, torch.Tensor) or not isinstance(seen.get(units), torch.Tensor):
        return None  # runs several times, or not in this pass
    layer = get_layer(original.model, producer.path)
    norm = None if producer.norm is None else get_module(original.model, producer.norm)
    form = _affine(norm, len(get_weight(layer)))
    if form is None:
        return None
    before = _affinely(form, output, layer)
    return ReluTarget(form[0][kept], form[1][kept]) if _is_rectified(before, seen[units]) else None


def shift_of_block_relu(original: Stream, structure: Structure, group: UnitGroup) -> torch.Tensor | None:
    """[features]: the batch norm's shift, if the block outputs relu(stream + norm(consumer)); else None."""
    if group.residual is None or group.scale is None or group.arrange is not None or not original.batches:
        return None
    norm, block = get_scale(original.model, group.scale), structure.blocks[group.block]
    form = _affine(norm, 0)
    if form is None:
        return None
    seen = original.see(0, [group.residual, (group.consumer, "output"), (block, "output")], block)
    if any(isinstance(value, Calls) for value in seen.values()):
        return None
    added = _affinely(form, seen[(group.consumer, "output")], get_layer(original.model, group.consumer))
    before = tensor_of(seen[group.residual]) + added
    return form[1] if _is_rectified(before, tensor_of(seen[(block, "output")])) else None


def _affinely(form: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """scale * output + shift per feature; a model may flatten the tokens of a linear layer for its batch norm."""
    spatial = layer.weight.dim() - 2 if isinstance(layer, Convolution) else 0
    scale, shift = (one.to(output).reshape(-1, *[1] * spatial) for one in form)
    return scale * output.detach() + shift


def _affine(norm: nn.Module | torch.Tensor | None, features: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scale and shift of a batch norm in eval mode, [features] each; (1, 0) for none, None for anything else."""
    if norm is None:
        return torch.ones(features, device=work_device()), torch.zeros(features, device=work_device())
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return None
    scale = (tensor_in(norm, "running_var") + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * tensor_in(norm, "weight")
    shift = -tensor_in(norm, "running_mean") * scale
    return scale, shift if norm.bias is None else shift + tensor_in(norm, "bias")
