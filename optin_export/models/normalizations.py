"""Replace synchronised and frozen batch norms by plain BatchNorm.

In eval mode all of them compute the same: (x - running mean) / sqrt(running variance + eps) * weight + bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from optin_export.errors import InputError

#: The layer that a batch norm follows -> the batch norm of its outputs.
_AFTER: tuple[tuple[type[nn.Module], type[_BatchNorm]], ...] = (
    (nn.Linear, nn.BatchNorm1d),
    (nn.Conv1d, nn.BatchNorm1d),
    (nn.Conv3d, nn.BatchNorm3d),
)


def plain_batch_norms(module: nn.Module) -> None:
    """Replace, in place, synchronised and frozen batch norms by torch's plain ones, under the same names.

    A batch norm that follows a linear layer or a convolution in its parent has that layer's dimensions, otherwise two.
    Raises InputError, which names it, for a batch norm that normalises with the statistics of the batch.
    """
    made: dict[int, nn.Module] = {}
    for path, parent in list(module.named_modules()):
        before: nn.Module | None = None
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if id(child) not in made:
                made[id(child)] = _plain(child, before)
            parent._modules[name] = made[id(child)]
            _refuse_batch_statistics(f"{path}.{name}".removeprefix("."), made[id(child)])
            before = child


def _plain(part: Any, before: nn.Module | None) -> nn.Module:
    if not (_is_synchronised(part) or _is_frozen(part)):
        return part
    kind = next((norm for layer, norm in _AFTER if isinstance(before, layer)), nn.BatchNorm2d)
    has_act = isinstance(getattr(part, "act", None), nn.Module)
    if has_act:  # timm: normalises, then drops and activates
        from timm.layers import BatchNormAct2d

        kind = BatchNormAct2d
    affine = getattr(part, "weight", None) is not None
    tracked = part.running_mean is not None
    count = len(part.running_mean) if tracked else part.num_features
    plain: Any = kind(count, eps=getattr(part, "eps", 1e-5), affine=affine, track_running_stats=tracked)
    if has_act:
        plain.act, plain.drop = part.act, getattr(part, "drop", nn.Identity())
    for name in ("weight", "bias"):
        value = getattr(part, name, None)
        if affine and isinstance(value, nn.Parameter):
            setattr(plain, name, value)  # a tied one stays tied
        elif affine and value is not None:
            setattr(plain, name, nn.Parameter(value.detach().clone(), requires_grad=False))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        value = getattr(part, name, None)
        if tracked and isinstance(value, torch.Tensor):
            setattr(plain, name, value)
    return plain.train(part.training)


def _is_synchronised(part: nn.Module) -> bool:
    """torch's, and those of libraries (apex, timm) that go by the same name. Subclasses of BatchNorm2d are plain."""
    is_plain = isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    named = "SyncBatchNorm" in type(part).__name__ and hasattr(part, "running_mean")
    return not is_plain and (isinstance(part, nn.SyncBatchNorm) or named)


def _is_frozen(part: nn.Module) -> bool:
    """torchvision's, timm's and transformers' FrozenBatchNorm2d: four buffers."""
    names = ("weight", "bias", "running_mean", "running_var")
    return "FrozenBatchNorm" in type(part).__name__ and all(name in part._buffers for name in names)


def _refuse_batch_statistics(path: str, part: nn.Module) -> None:
    if isinstance(part, _BatchNorm) and (part.running_mean is None or part.running_var is None):
        raise InputError(
            f"the output for one row depends on the other rows of its batch: '{path}'",
            f"this {type(part).__name__} has no running statistics (track_running_stats=False)",
            "train it with track_running_stats=True, or use GroupNorm",
        )
