"""Name the module that mixes all units, such as a norm across their features: the reason why none of them can go."""

from __future__ import annotations

import posixpath

import torch
from torch import nn

from optin_export.models import Inputs
from optin_export.units import Layer, UnitGroup, capture, get_module


def module_that_mixes(model: nn.Module, group: UnitGroup, inputs: Inputs) -> str | None:
    """The first module next to the group's consumer that computes the features of one unit from those of others.

    It reads the output of another module there, or a part of it, and has a weight as wide as what it reads: a norm.
    None if there is no such module.
    """
    paths = [*(one.path for one in group.producers), *group.reads]
    around = posixpath.commonpath([f"/{one.rpartition('.')[0].replace('.', '/')}" for one in paths])
    prefix = f"{around[1:].replace('/', '.')}." if len(around) > 1 else ""
    made: list[torch.Tensor] = []
    read: dict[str, torch.Tensor] = {}

    def before(path: str, args: tuple[object, ...], kwargs: object) -> None:
        if args and isinstance(args[0], torch.Tensor) and any(_same(args[0], one) for one in made):
            read.setdefault(path, args[0].detach().clone())

    def after(path: str, args: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            made.append(output)

    inside = {name: module for name, module in model.named_modules() if name.startswith(prefix)}
    layers = [name for name, module in inside.items() if isinstance(module, Layer)]
    others = [
        name for name, module in inside.items() if name not in layers and not any(True for _ in module.children())
    ]
    layers = [name for name in layers if name != group.consumer]
    makers = dict.fromkeys([*layers, *others], after)
    with torch.no_grad(), capture(model, dict.fromkeys(others, before), makers, group.consumer):
        model(**inputs)
    return next((path for path, tensor in read.items() if _mixes(get_module(model, path), tensor, group.count)), None)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
        return True
    return one.shape == other.shape and torch.equal(one, other)


def _mixes(module: nn.Module, tensor: torch.Tensor, count: int) -> bool:
    size, rest = divmod(tensor.shape[-1], count)
    if rest or not any(one.shape[-1:] == tensor.shape[-1:] for one in module.parameters()):
        return False
    with torch.enable_grad():
        given = tensor.requires_grad_()
        try:
            result = module(given.clone())
            (gradient,) = torch.autograd.grad((result[..., :size] * torch.randn_like(result[..., :size])).sum(), given)
        except (RuntimeError, TypeError, AttributeError):  # it needs more arguments, or returns no such tensor
            return False
    return bool((gradient[..., size:] != 0).any())
