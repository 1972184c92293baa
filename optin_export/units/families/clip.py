"""CLIP and SigLIP of transformers: both towers are built from the same pre-norm layers (separate query, key, value)."""

from __future__ import annotations

from typing import Any

from optin_export.units.declare import Family, UnitGroup, class_named
from optin_export.units.inside import Inside


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    inside = Inside(block, path, index)
    heads = inside.heads(
        [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")],
        "self_attn.out_proj",
        block.self_attn.num_heads,
        residual=("layer_norm1", 0),
        sizes=[("self_attn.num_heads", 1)],
        sublayer="self_attn",
        returns_tuple=True,
        bypass=[("layer_norm1", False)],
    )
    neurons = inside.neurons(
        ["mlp.fc1"], "mlp.fc2", residual=("layer_norm2", 0), sublayer="mlp", bypass=[("layer_norm2", False)]
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
