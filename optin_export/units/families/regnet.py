"""RegNet: whole groups of the grouped convolution in its bottlenecks (timm, torchvision)."""

from __future__ import annotations

from typing import Any

from torch import nn

from optin_export.units.declare import Family, UnitGroup
from optin_export.units.expansions import expansion

_BLOCKS = {("timm.models.regnet", "Bottleneck"), ("torchvision.models.regnet", "ResBottleneckBlock")}


def _is_block(module: nn.Module) -> bool:
    return (type(module).__module__, type(module).__name__) in _BLOCKS


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    """timm: conv1, conv2, se, conv3 and downsample; torchvision: the same layers in `f`, and proj."""
    names, body = (("proj",), "f") if hasattr(block, "f") else (("downsample",), "")
    shortcut = getattr(block, names[0])
    first = "f.a.0" if body else "conv1.conv"
    residual: Any = (f"{path}.{first}", 0)
    if shortcut is not None and not isinstance(shortcut, nn.Identity):
        residual = (f"{path}.{names[0]}", "output")
    elif not body and shortcut is None:
        residual = None  # timm's word for a block without a shortcut
    return expansion(block.get_submodule(body), f"{path}.{body}" if body else path, index, residual, names)


FAMILY = Family(
    name="regnet",
    library="timm",
    examples="regnetx_*, regnety_*; also torchvision's",
    units=("channels",),
    parts=("conv1.conv", "conv1.bn", "conv2.conv", "conv2.bn", "conv3.conv", "conv3.bn"),
    is_block=_is_block,
    groups=_groups,
    channels_first=True,
)
