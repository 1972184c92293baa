"""Swin Transformers of transformers: attention in shifted windows, a table of relative positions per head."""

from __future__ import annotations

from typing import Any

from optin_export.units.declare import Family, UnitGroup, class_named
from optin_export.units.hooks import reaching
from optin_export.units.inside import Inside


def groups_of_layer(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    """Heads and neurons of a SwinLayer; also of the backbones of other models."""
    inside = Inside(block, path, index)
    heads = inside.heads(
        [f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj")],
        "attention.o_proj",
        block.attention.num_attention_heads,
        residual=("", "call"),
        arrange=reaching(path, f"{path}.layernorm_before", f"{path}.attention"),
        sizes=[("attention.num_attention_heads", 1)],
        sublayer="attention",
        returns_tuple=True,
        expands=True,
        bypass=[("layernorm_before", False)],
        tables=["attention.relative_position_bias.relative_position_bias_table"],
    )
    neurons = inside.neurons(
        ["mlp.fc1"], "mlp.fc2", residual=("layernorm_after", 0), sublayer="mlp", bypass=[("layernorm_after", False)]
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
