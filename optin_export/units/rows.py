"""A layer's inputs and outputs as rows of a matrix: one per token, or per position of a convolution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optin_export.models import gathered
from optin_export.units.declare import UnitGroup
from optin_export.units.hooks import Convolution, Layer, Transposed, get_layer, get_weight, rows_of, valid_rows
from optin_export.units.outputs import Calls, tensor_of

#: Positions per sample of a convolution's output that are used; neighbouring positions are redundant.
POSITIONS = 64


def output_rows(value: Any, layer: nn.Module, inputs: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
    """[rows, features]: the output of `layer` (or of the residual stream next to it), on the work device.

    Padding is left out; for a convolution, only the positions drawn for this batch are used. For a layer that runs
    several times, the rows of all its calls follow each other.
    """
    if isinstance(value, Calls):
        return torch.cat([output_rows(one, layer, inputs, batch) for one in value])
    tensor = tensor_of(value)
    if isinstance(layer, Convolution):
        flat = tensor.flatten(2)
        drawn = _positions(flat.shape[2], batch)
        return gathered(rows_of(flat[:, :, drawn].mT, _valid_positions(inputs, (len(flat), flat.shape[2]), drawn)))
    return gathered(rows_of(tensor, valid_rows(inputs, tensor)))


def input_rows(value: Any, layer: nn.Module, inputs: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
    """[rows, weights per output]: the input of `layer`, row for row as `output_rows`; patches for a convolution."""
    if isinstance(value, Calls):
        return torch.cat([input_rows(one, layer, inputs, batch) for one in value])
    tensor: torch.Tensor = value
    if isinstance(layer, Convolution):
        # Apply padding of any kind ("same", reflecting, ...) as the convolution does.
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(tensor, layer._reversed_padding_repeated_twice, mode=mode)
        # A view of all patches [batch, channels, positions, ..., kernel, ...]; only drawn ones are read.
        for dim, (size, step, apart) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2):
            padded = padded.unfold(dim, (size - 1) * apart + 1, step)[..., ::apart]
        shape = padded.shape[2 : tensor.dim()]
        drawn = _positions(math.prod(shape), batch)
        at: Any = (slice(None), slice(None), *torch.unravel_index(drawn, shape))
        patches = padded[at].transpose(1, 2).flatten(2)
        return gathered(rows_of(patches, _valid_positions(inputs, (len(padded), math.prod(shape)), drawn)))
    return gathered(rows_of(tensor, valid_rows(inputs, tensor)))


def patches_of(layer: nn.Module) -> tuple[Any, ...]:
    """Which part of a tensor each row of `input_rows` is: layers with the same one have the same rows of one tensor."""
    if not isinstance(layer, Convolution):
        return ()
    padding = layer.padding_mode, tuple(layer._reversed_padding_repeated_twice)
    return layer.kernel_size, layer.stride, layer.dilation, padding


def _positions(count: int, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randperm(count, generator=generator)[:POSITIONS].sort().values


def _valid_positions(
    inputs: Mapping[str, torch.Tensor], shape: tuple[int, int], drawn: torch.Tensor
) -> torch.Tensor | None:
    """bool [rows]: drawn positions that are tokens, not padding; None if all count. shape: samples and positions."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != shape:
        return None
    return mask.bool()[:, drawn].reshape(-1)


def as_matrix(model: nn.Module, path: str) -> torch.Tensor:
    """A view of a layer's weight as [outputs, weights per output]; of a transposed convolution, a copy."""
    return get_weight(get_layer(model, path)).flatten(1)


def reads_rows(layer: nn.Module) -> bool:
    """Whether `input_rows` is what the layer reads: not for grouped or transposed convolutions, or own paddings."""
    if not isinstance(layer, Convolution):
        return True
    own = type(layer).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    if isinstance(layer, Transposed):
        return False
    reads_all = layer.groups == 1 and layer.weight.shape[1] == layer.in_channels  # see `Producer.keeps_inputs`
    return reads_all and (own or set(layer.kernel_size) == {1})


def columns_per_unit(layer: nn.Module, group: UnitGroup) -> int:
    """Consecutive columns of `input_rows` of the consumer that one factor can scale: those of a unit, or of a single
    feature where the layer reads other features as well."""
    return (group.width if group.features_in(group.consumer) is None else 1) * _area(layer)


def of_units(values: torch.Tensor, group: UnitGroup, path: str) -> torch.Tensor:
    """[features of all units, unit by unit, ...] of values [input features of a reader, ...]."""
    return values if group.features_in(path) is None else values[group.columns_of(path, range(group.count))]


def columns_without(layer: Layer, group: UnitGroup, path: str, removed: Iterable[int]) -> torch.Tensor:
    """Columns of `input_rows` of a reader, in ascending order, without those of these units."""
    area = _area(layer)
    left = torch.ones(get_weight(layer).shape[1], dtype=torch.bool)
    left[group.columns_of(path, removed)] = False
    return (left.nonzero() * area + torch.arange(area)).flatten()


def _area(layer: nn.Module) -> int:
    return math.prod(layer.kernel_size) if isinstance(layer, Convolution) else 1
