"""Swin Transformers of timm: attention in shifted windows, fused qkv, a table of relative positions per head."""

from __future__ import annotations

from typing import Any

from torch import nn

from optin_export.errors import InputError
from optin_export.units.declare import Family, Producer, Table, UnitGroup
from optin_export.units.hooks import reaching


def _is_block(module: nn.Module) -> bool:
    names = ("SwinTransformerBlock", "timm.models.swin_transformer")
    return (type(module).__name__, type(module).__module__) == names


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention, mlp = block.attn, block.mlp
    if type(mlp).__name__ != "Mlp" or not isinstance(mlp.norm, nn.Identity) or not isinstance(mlp.fc1, nn.Linear):
        raise InputError(
            f"'{path}.mlp' is a {type(mlp).__name__} that the family swin cannot prune",
            "only fc1 -> activation -> fc2 without a norm is supported",
            "prune only heads (prune.units: [heads]) or use a model with a plain MLP",
        )
    heads = UnitGroup(
        block=index,
        kind="heads",
        count=attention.num_heads,
        width=attention.proj.in_features // attention.num_heads,
        producers=(Producer(f"{path}.attn.qkv", fused=3),),
        consumer=f"{path}.attn.proj",
        residual=(path, "call"),
        arrange=reaching(path, f"{path}.norm1", f"{path}.attn"),
        sizes=((f"{path}.attn.num_heads", 1),),
        sublayer=f"{path}.attn",
        expands=True,
        bypass=((f"{path}.norm1", False),),
        tables=(Table(f"{path}.attn.relative_position_bias_table", dim=1),),
    )
    neurons = UnitGroup(
        block=index,
        kind="neurons",
        count=mlp.fc1.out_features,
        width=1,
        producers=(Producer(f"{path}.mlp.fc1"),),
        consumer=f"{path}.mlp.fc2",
        residual=(f"{path}.norm2", 0),
        sublayer=f"{path}.mlp",
        bypass=((f"{path}.norm2", False),),
    )
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
