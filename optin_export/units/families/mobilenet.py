"""MobileNet V2 to V4, EfficientNet and relatives: the channels of inverted residual blocks (timm, torchvision)."""

from __future__ import annotations

from typing import Any

from torch import nn

from optin_export.units.declare import Family, UnitGroup
from optin_export.units.expansions import expansion

#: Block classes by module, and the part that holds the layers in the order in which they run; "": the block itself.
_BODIES = {
    ("timm.models._efficientnet_blocks", "InvertedResidual"): "",
    ("timm.models._efficientnet_blocks", "EdgeResidual"): "",
    ("timm.models._efficientnet_blocks", "UniversalInvertedResidual"): "",
    ("torchvision.models.mobilenetv2", "InvertedResidual"): "conv",
    ("torchvision.models.mobilenetv3", "InvertedResidual"): "block",
    ("torchvision.models.efficientnet", "MBConv"): "block",
    ("torchvision.models.efficientnet", "FusedMBConv"): "block",
}


def _body(module: nn.Module) -> str | None:
    return _BODIES.get((type(module).__module__, type(module).__name__))


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    """Blocks without an expansion (depthwise separable ones) are not pruned: their channels are the stream's.

    timm's CondConvResidual is not a block here, because its filters depend on the image.
    """
    body = _body(block)
    where = f"{path}.{body}" if body else path
    first = next(name for name, part in block.named_modules() if isinstance(part, nn.Conv2d))
    is_residual = getattr(block, "has_skip", False) or getattr(block, "use_res_connect", False)
    residual = (f"{path}.{first}", 0) if is_residual else None
    return expansion(block.get_submodule(body or ""), where, index, residual)


FAMILY = Family(
    name="mobilenet",
    library="timm",
    examples="mobilenetv2_*, mobilenetv3_*, mobilenetv4_conv_*, efficientnet_*, efficientnetv2_*, mnasnet_*; "
    "also torchvision's MobileNetV2, MobileNetV3 and EfficientNet",
    units=("channels",),
    parts=("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl"),
    is_block=lambda module: _body(module) is not None,
    groups=_groups,
    channels_first=True,
)
