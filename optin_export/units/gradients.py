"""Check that gradients flow back through a model, as gradient scores and the weights of the repair require."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from optin_export.units.capture import capture
from optin_export.units.declare import Structure
from optin_export.units.execution_order import Walk
from optin_export.units.hooks import masked
from optin_export.units.passes import Inputs, Plain


@contextlib.contextmanager
def without_gradients(model: nn.Module, structure: Structure) -> Iterator[list[str]]:
    """Layers that run without requested gradients: under `no_grad`, or in a reentrant checkpoint."""
    found: list[str] = []

    def before(path: str, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            found.append(path)

    paths = (path for group in structure.groups for path in group.reads)
    with torch.enable_grad(), capture(model, dict.fromkeys(paths, before)):
        yield found


def mutates(model: nn.Module, structure: Structure, walk: Walk, plain: Plain, inputs: Inputs) -> bool:
    """Whether the model overwrites tensors in place that its own gradients need, as models for inference may."""
    if not plain.writes_over:
        return False
    samples = len(next(iter(inputs.values())))
    groups = [group for group in structure.groups if group.key not in walk.idle]
    masks = {group.key: torch.ones(group.count, requires_grad=True) for group in groups}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    try:
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(True)
        with torch.enable_grad(), masked(model, groups, masks):
            result = model(**inputs)
            if result.requires_grad:
                torch.autograd.grad(result.float().sum() / samples, list(masks.values()), allow_unused=True)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        return True
    finally:
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
    return False
