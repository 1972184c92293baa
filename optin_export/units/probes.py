"""Weights without zeros, for questions about a model's structure: a factor that is zero hides what it multiplies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from optin_export.units.capture import reset_caches

#: Mean size of the entries of a vector that holds only zeros (layer scales, response norms).
VECTOR = 0.5


@contextlib.contextmanager
def without_zeros(model: nn.Module) -> Iterator[None]:
    """Give random values, of the size of the others, to entries of parameters that are exactly zero.

    Afterwards every entry is what it was, to the last bit.
    """
    generator = torch.Generator().manual_seed(0)
    saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    try:
        for parameter in model.parameters():
            if parameter.is_meta or not parameter.is_floating_point():
                continue
            values = parameter.detach()
            zero = values == 0
            if bool(zero.any()):
                saved.append((values, zero, values[zero]))
                noise = torch.rand(int(zero.sum()), generator=generator) + 0.5
                signs = torch.randint(0, 2, noise.shape, generator=generator) * 2 - 1
                values[zero] = (noise * signs * _size(values, zero)).to(values)
        if saved:
            reset_caches(model)
        yield
    finally:
        for values, zero, before in saved:
            values[zero] = before
        if saved:
            reset_caches(model)


def _size(values: torch.Tensor, zero: torch.Tensor) -> float:
    if not bool(zero.all()):
        return float(values[~zero].abs().mean())
    return VECTOR if values.dim() < 2 else float(max(1, values[0].numel()) ** -0.5)
