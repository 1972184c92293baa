"""A layer's inputs and outputs as rows of a matrix: one per token, or per position of a convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optin_export.units.declare import UnitGroup
from optin_export.units.hooks import get_layer, rows_of, valid_rows
from optin_export.units.outputs import Calls, tensor_of

#: Positions per sample of a convolution's output that are used; neighbouring positions are redundant.
POSITIONS = 64


def output_rows(value: Any, layer: nn.Module, inputs: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
    """[rows, features]: the output of `layer` (or of the residual stream next to it), on the CPU.

    Padding is left out; for a convolution, only the positions drawn for this batch are used. For a layer that runs
    several times, the rows of all its calls follow each other.
    """
    if isinstance(value, Calls):
        return torch.cat([output_rows(one, layer, inputs, batch) for one in value])
    tensor = tensor_of(value)
    if isinstance(layer, nn.Conv2d):
        flat = tensor.flatten(2)
        return flat[:, :, _positions(flat.shape[2], batch)].mT.flatten(0, 1).cpu()
    return rows_of(tensor, valid_rows(inputs, tensor)).cpu()


def input_rows(value: Any, layer: nn.Module, inputs: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
    """[rows, weights per output]: the input of `layer`, row for row as `output_rows`; patches for a convolution."""
    if isinstance(value, Calls):
        return torch.cat([input_rows(one, layer, inputs, batch) for one in value])
    tensor: torch.Tensor = value
    if isinstance(layer, nn.Conv2d):
        # Apply padding of any kind ("same", reflecting, ...) as the convolution does.
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(tensor, layer._reversed_padding_repeated_twice, mode=mode)
        # A view of all patches [batch, channels, height, width, kernel height, kernel width]; only drawn ones are read.
        for dim, (size, step, apart) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2):
            padded = padded.unfold(dim, (size - 1) * apart + 1, step)[..., ::apart]
        drawn = _positions(padded.shape[2] * padded.shape[3], batch)
        patches = padded[:, :, drawn // padded.shape[3], drawn % padded.shape[3]]
        return patches.transpose(1, 2).flatten(2).flatten(0, 1).cpu()
    return rows_of(tensor, valid_rows(inputs, tensor)).cpu()


def _positions(count: int, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randperm(count, generator=generator)[:POSITIONS].sort().values


def as_matrix(model: nn.Module, path: str) -> torch.Tensor:
    """A view of a layer's weight as [outputs, weights per output]."""
    weight = get_layer(model, path).weight
    return weight.detach().view(len(weight), -1)


def reads_rows(layer: nn.Module) -> bool:
    """Whether `input_rows` is what the layer reads: not for a grouped convolution, or one that does its own padding."""
    if not isinstance(layer, nn.Conv2d):
        return True
    return layer.groups == 1 and (type(layer).forward is nn.Conv2d.forward or layer.kernel_size == (1, 1))


def columns_per_unit(layer: nn.Module, group: UnitGroup) -> int:
    """Columns of `input_rows` that belong to one unit."""
    return group.width * (layer.kernel_size[0] * layer.kernel_size[1] if isinstance(layer, nn.Conv2d) else 1)
