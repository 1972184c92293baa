"""Vision Transformers of transformers: ViT and DeiT (pre-norm, separate query, key and value)."""

from __future__ import annotations

from typing import Any

from optin_export.families._declare import Family, Producer, UnitGroup, class_named


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention = block.attention
    heads = UnitGroup(
        block=index,
        kind="heads",
        count=attention.num_attention_heads,
        width=attention.head_dim,
        producers=tuple(Producer(f"{path}.attention.{name}") for name in ("q_proj", "k_proj", "v_proj")),
        consumer=f"{path}.attention.o_proj",
        residual=(f"{path}.layernorm_before", 0),
        sizes=((f"{path}.attention.num_attention_heads", 1),),
        sublayer=f"{path}.attention",
        returns_tuple=True,
        bypass=((f"{path}.layernorm_before", False),),
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
    name="vit-transformers",
    library="transformers",
    examples="google/vit-*, facebook/deit-*",
    units=("heads", "neurons"),
    is_block=class_named("ViTLayer", "DeiTLayer"),
    groups=_groups,
)
