"""Swin Transformers of transformers: attention in shifted windows, a table of relative positions per head."""

from __future__ import annotations

from typing import Any

from optin_export.units.declare import Family, Producer, Table, UnitGroup, class_named
from optin_export.units.hooks import reaching


def groups_of_layer(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    """Heads and neurons of a SwinLayer; also of the backbones of other models."""
    attention = block.attention
    heads = UnitGroup(
        block=index,
        kind="heads",
        count=attention.num_attention_heads,
        width=attention.head_dim,
        producers=tuple(Producer(f"{path}.attention.{name}") for name in ("q_proj", "k_proj", "v_proj")),
        consumer=f"{path}.attention.o_proj",
        residual=(path, "call"),
        arrange=reaching(path, f"{path}.layernorm_before", f"{path}.attention"),
        sizes=((f"{path}.attention.num_attention_heads", 1),),
        sublayer=f"{path}.attention",
        returns_tuple=True,
        expands=True,
        bypass=((f"{path}.layernorm_before", False),),
        tables=(Table(f"{path}.attention.relative_position_bias.relative_position_bias_table", dim=1),),
    )
    neurons = UnitGroup(
        block=index,
        kind="neurons",
        count=block.mlp.fc1.out_features,
        width=1,
        producers=(Producer(f"{path}.mlp.fc1"),),
        consumer=f"{path}.mlp.fc2",
        residual=(f"{path}.layernorm_after", 0),
        sublayer=f"{path}.mlp",
        bypass=((f"{path}.layernorm_after", False),),
    )
    return heads, neurons


FAMILY = Family(
    name="swin-transformers",
    library="transformers",
    examples="microsoft/swin-*",
    units=("heads", "neurons"),
    sublayers=("heads", "neurons"),
    is_block=class_named("SwinLayer"),
    groups=groups_of_layer,
)
