"""ConvNeXt: the neurons of the MLP after each depthwise convolution (timm, torchvision, transformers)."""

from __future__ import annotations

from typing import Any

from torch import nn

from optin_export.errors import InputError
from optin_export.units.declare import Family, UnitGroup
from optin_export.units.hooks import channels_last
from optin_export.units.inside import Inside

#: Block class -> depthwise convolution, both layers of the MLP, layer scale. Others have a norm between the layers.
_PARTS = {
    "ConvNeXtBlock": ("conv_dw", "mlp.fc1", "mlp.fc2", "gamma"),
    "CNBlock": ("block.0", "block.3", "block.5", "layer_scale"),
    "ConvNextLayer": ("dwconv", "pwconv1", "pwconv2", "layer_scale_parameter"),
    "ConvNextV2Layer": ("dwconv", "pwconv1", "pwconv2", ""),
}


def _is_block(module: nn.Module) -> bool:
    parts = _PARTS.get(type(module).__name__)
    return parts is not None and _has(module, parts[0])


def _has(module: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in module.named_modules())


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    depthwise, first, second, scale = _PARTS[type(block).__name__]
    grn = next((name for name, _ in block.named_modules() if name.split(".")[-1] == "grn"), None)
    norm = getattr(getattr(block, "mlp", None), "norm", nn.Identity())
    if grn is not None or not isinstance(norm, nn.Identity):
        raise InputError(
            f"'{path}' is a variant of block that the family convnext cannot prune",
            f"'{path}.{grn or 'mlp.norm'}' normalises each neuron over all neurons (ConvNeXt V2)",
            "use ConvNeXt V1",
        )
    consumer = block.get_submodule(second)
    shortcut = getattr(block, "shortcut", nn.Identity())
    neurons = Inside(block, path, index).neurons(
        [first],
        second,
        residual=(depthwise, 0) if isinstance(shortcut, nn.Identity) else ("shortcut", "output"),
        scale=f"{path}.{scale}" if getattr(block, scale, None) is not None else None,
        arrange=channels_last if isinstance(consumer, nn.Linear) else None,
    )
    return (neurons,)


FAMILY = Family(
    name="convnext",
    library="timm",
    examples="convnext_*; also torchvision's and transformers' (facebook/convnext-*)",
    units=("neurons",),
    parts=("conv_dw", "norm", "mlp.fc1", "mlp.fc2"),
    is_block=_is_block,
    groups=_groups,
    channels_first=True,
)
