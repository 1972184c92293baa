"""What a folder's own Python file needs to build a pruned model: it is copied there, with all that it calls.

It uses torch alone. `sources` collects it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from optin_export.models.adapt import pass_position_bias, take_bias_of_heads
from optin_export.pruning.code_sizes import replace_size
from optin_export.pruning.rebuild import Constant, Passthrough, set_size
from optin_export.units.selected_heads import select_part, whole_arguments

#: Hooks that a pruned module may need, by the names in `changes`: (function, runs before the module, takes keywords).
HOOKS: dict[str, tuple[Any, bool, bool]] = {
    "select_part": (select_part, True, True),
    "whole_arguments": (whole_arguments, False, False),
    "take_bias_of_heads": (take_bias_of_heads, True, False),
    "pass_position_bias": (pass_position_bias, True, True),
}


def shrink(model: nn.Module, changes: Mapping[str, Any], classes: Mapping[str, Any]) -> None:
    """Give a model, as its library builds it, the layers and sizes of the pruned one, in place.

    changes: what `pruned` in config.json holds, by module path. classes: those that replace the library's, by name. The
    weights are to be loaded afterwards.
    """
    for path, name in changes.get("replaced", {}).items():
        _set(model, path, classes[name](model.get_submodule(path)))
    for path in changes.get("removed", ()):
        _set(model, path, None)
    for path, (width, returns_tuple, expands) in changes.get("constants", {}).items():
        _set(model, path, Constant(torch.zeros(width), returns_tuple, expands).requires_grad_(True))
    for path, returns_tuple in changes.get("passthroughs", {}).items():
        _set(model, path, Passthrough(returns_tuple))
    for name, shape in changes.get("shapes", {}).items():
        _resize(model, name, shape)
    for name, length in changes.get("buffers", {}).items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path).register_buffer(leaf, torch.arange(length))
    for attribute, value in changes.get("attributes", {}).items():
        set_size(model, attribute, value)
    for name, value in changes.get("code", {}).items():
        replace_size(model, name, value, 0)
    for path, hook, options in changes.get("hooks", ()):
        function, before, keywords = HOOKS[hook]
        module, bound = model.get_submodule(path), functools.partial(function, **options)
        if before:
            module.register_forward_pre_hook(bound, with_kwargs=keywords)
        else:
            module.register_forward_hook(bound)


def _set(model: nn.Module, path: str, value: Any) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, value)


def _resize(model: nn.Module, name: str, shape: list[int]) -> None:
    """Cut a parameter or buffer, or add a bias."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if old is None:
        weight = next(module.parameters(recurse=False))
        new = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    else:
        new = old.detach()[tuple(map(slice, shape))].clone()
    if leaf in module._buffers:
        module._buffers[leaf] = new
    else:
        setattr(module, leaf, nn.Parameter(new, requires_grad=new.is_floating_point()))
