"""Let an attention that lost heads take its part of tensors that hold all heads of the unpruned model.

Position biases that several layers share (T5) and slopes that the model computes (ALiBi) reach an attention as
arguments, so they are left whole: the attention holds the numbers of its heads, and selects their part.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from optin_export.units.capture import attach, attach_before, capture
from optin_export.units.declare import UnitGroup
from optin_export.units.outputs import map_tensors

#: The buffer with the numbers of the heads that stay. It is saved with the weights.
BUFFER = "selected_heads"
#: The dimension of the heads, by the number of dimensions.
HEADS = {4: 1, 5: 2}


def arguments_by_head(
    model: nn.Module, path: str, count: int, variants: Iterable[Mapping[str, torch.Tensor]]
) -> tuple[str, ...]:
    """Arguments of the module that are [batch, heads, ..., ...], [batch * heads, ..., ...] or, for attention within
    blocks of tokens, [batch, blocks, heads, ..., ...] for all these inputs.

    An argument is named as the model passes it: by its name, or by its position.
    """
    found: list[set[str]] = []

    def see(path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        named = {**{str(position): one for position, one in enumerate(args)}, **kwargs}
        found.append({name for name, one in named.items() if isinstance(one, torch.Tensor) and _has(one, count)})

    with torch.no_grad(), capture(model, {path: see}):
        for inputs in variants:
            model(**inputs)
    return tuple(sorted(set.intersection(*found))) if found else ()


def _has(tensor: torch.Tensor, heads: int) -> bool:
    if tensor.dim() == 3:
        return tensor.shape[0] % heads == 0
    return tensor.dim() in HEADS and tensor.shape[HEADS[tensor.dim()]] == heads


def select_heads(model: nn.Module, group: UnitGroup, removed: Collection[int]) -> None:
    """Let the group's module select the heads that stay, in the tensors of `UnitGroup.selects`, in place."""
    if group.selects is None:
        return
    path, arguments = group.selects
    module = model.get_submodule(path)
    if not hasattr(module, BUFFER):
        module.register_buffer(BUFFER, torch.arange(group.count))
        attach_before(module, functools.partial(select_part, arguments=arguments, count=group.count))
        attach(module, whole_arguments)
    heads = module.get_buffer(BUFFER)
    kept = [position for position in range(len(heads)) if position not in removed]
    setattr(module, BUFFER, heads[torch.tensor(kept, device=heads.device)])


def select_part(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Collection[str], count: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    heads = module.get_buffer(BUFFER)

    def of_heads(name: str, value: Any) -> Any:
        if name not in arguments or not isinstance(value, torch.Tensor):
            return value
        if value.dim() in HEADS:
            part = value.index_select(HEADS[value.dim()], heads)
        else:
            part = value.unflatten(0, (-1, count)).index_select(1, heads).flatten(0, 1)
        part.whole = value  # type: ignore[attr-defined]  # for `whole_arguments`
        return part

    return (
        tuple(of_heads(str(position), one) for position, one in enumerate(args)),
        {name: of_heads(name, one) for name, one in kwargs.items()},
    )


def whole_arguments(module: nn.Module, args: Any, output: Any) -> Any:
    """The output with an argument that the module passes on for the next one as it was given."""
    return map_tensors(output, lambda _, tensor: getattr(tensor, "whole", tensor))
