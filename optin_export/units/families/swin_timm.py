"""Swin Transformers of timm: attention in shifted windows, fused qkv, a table of relative positions per head."""

from __future__ import annotations

from typing import Any

from torch import nn

from optin_export.errors import InputError
from optin_export.units.declare import Family, UnitGroup
from optin_export.units.hooks import reaching
from optin_export.units.inside import Inside


def _is_block(module: nn.Module) -> bool:
    names = ("SwinTransformerBlock", "timm.models.swin_transformer")
    return (type(module).__name__, type(module).__module__) == names


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    mlp = block.mlp
    if type(mlp).__name__ != "Mlp" or not isinstance(mlp.norm, nn.Identity) or not isinstance(mlp.fc1, nn.Linear):
        raise InputError(
            f"'{path}.mlp' is a {type(mlp).__name__} that the family swin cannot prune",
            "only fc1 -> activation -> fc2 without a norm is supported",
            "prune only heads (prune.units: [heads]) or use a model with a plain MLP",
        )
    inside = Inside(block, path, index)
    heads = inside.heads(
        ["attn.qkv"],
        "attn.proj",
        block.attn.num_heads,
        fused=3,
        residual=("", "call"),
        arrange=reaching(path, f"{path}.norm1", f"{path}.attn"),
        sizes=[("attn.num_heads", 1)],
        sublayer="attn",
        expands=True,
        bypass=[("norm1", False)],
        tables=["attn.relative_position_bias_table"],
    )
    neurons = inside.neurons(["mlp.fc1"], "mlp.fc2", residual=("norm2", 0), sublayer="mlp", bypass=[("norm2", False)])
    return heads, neurons


FAMILY = Family(
    name="swin",
    library="timm",
    examples="swin_*",
    units=("heads", "neurons"),
    sublayers=("heads", "neurons"),
    is_block=_is_block,
    groups=_groups,
)
