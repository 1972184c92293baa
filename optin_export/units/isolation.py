"""Check that units found in a graph are independent: their values reach the output only through their readers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from optin_export.units.capture import SeeOutput, capture
from optin_export.units.declare import UnitGroup
from optin_export.units.hooks import masked
from optin_export.units.outputs import tensor_of

#: Difference of outputs, relative to the largest value, below which they are the same.
TOLERANCE = 1e-5


def isolated(model: nn.Module, inputs: Mapping[str, torch.Tensor], groups: Sequence[UnitGroup]) -> list[UnitGroup]:
    """The groups for which the output stays the same when half of the units, which are masked, are filled with noise.

    groups: units that are single channels of convolutions.
    """
    if not groups or _is_isolated(model, inputs, groups):
        return list(groups)
    return [group for group in groups if _is_isolated(model, inputs, [group])]


def _is_isolated(model: nn.Module, inputs: Mapping[str, torch.Tensor], groups: Sequence[UnitGroup]) -> bool:
    generator = torch.Generator().manual_seed(0)
    masks = {group.key + group.consumer: _half(group.count, generator) for group in groups}
    with contextlib.ExitStack() as stack:
        for group in groups:
            mask = masks[group.key + group.consumer]
            stack.enter_context(masked(model, [group], {group.key: mask}))
        with torch.no_grad():
            expected = tensor_of(model(**inputs))
            with _noise(model, groups, masks, generator):
                got = tensor_of(model(**inputs))
    return bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1e-12))


def _half(count: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(count, generator=generator) < 0.5).float()


@contextlib.contextmanager
def _noise(
    model: nn.Module, groups: Sequence[UnitGroup], masks: Mapping[str, torch.Tensor], generator: torch.Generator
) -> Iterator[None]:
    def hook_of(mask: torch.Tensor) -> SeeOutput:
        def hook(path: str, args: Any, output: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(output.shape, generator=generator).to(output)
            return output + noise * (1 - mask)[:, None, None].to(output)

        return hook

    with contextlib.ExitStack() as stack:
        for group in groups:
            hook = hook_of(masks[group.key + group.consumer])
            stack.enter_context(capture(model, outputs=dict.fromkeys((one.path for one in group.producers), hook)))
        yield
