"""Modules that keep tensors between passes, such as position biases, compute them in every pass instead.

What they keep is wrong as soon as their weights change. timm's and transformers' forget it when they are switched to
training, for which they override `train`.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def without_cache(module: nn.Module) -> None:
    """Let a module forget before every pass what it keeps in dictionaries, in place, if it overrides `train` and has
    weights of its own, from which that is computed."""
    overrides = type(module).train is not nn.Module.train and any(True for _ in module.parameters(recurse=False))
    if overrides and any(_caches(module)) and _forget not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_forget)


def _forget(module: nn.Module, args: Any) -> None:
    for name in _caches(module):
        setattr(module, name, {})


def _caches(module: nn.Module) -> list[str]:
    return [name for name, value in vars(module).items() if type(value) is dict and not name.startswith("_")]
