"""CLIP and SigLIP of transformers: both towers are built from the same pre-norm layers (separate query, key, value)."""

from __future__ import annotations

from typing import Any

from optin_export.units.declare import Family, Producer, UnitGroup, class_named


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention = block.self_attn
    heads = UnitGroup(
        block=index,
        kind="heads",
        count=attention.num_heads,
        width=attention.head_dim,
        producers=tuple(Producer(f"{path}.self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")),
        consumer=f"{path}.self_attn.out_proj",
        residual=(f"{path}.layer_norm1", 0),
        sizes=((f"{path}.self_attn.num_heads", 1),),
        sublayer=f"{path}.self_attn",
        returns_tuple=True,
        bypass=((f"{path}.layer_norm1", False),),
    )
    neurons = UnitGroup(
        block=index,
        kind="neurons",
        count=block.mlp.fc1.out_features,
        width=1,
        producers=(Producer(f"{path}.mlp.fc1"),),
        consumer=f"{path}.mlp.fc2",
        residual=(f"{path}.layer_norm2", 0),
        sublayer=f"{path}.mlp",
        bypass=((f"{path}.layer_norm2", False),),
    )
    return heads, neurons


FAMILY = Family(
    name="clip",
    library="transformers",
    examples="CLIP, SigLIP, text tower of SigLIP 2",
    units=("heads", "neurons"),
    sublayers=("heads", "neurons"),
    parts=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
    is_block=class_named("CLIPEncoderLayer", "SiglipEncoderLayer", "Siglip2EncoderLayer"),
    groups=_groups,
)
