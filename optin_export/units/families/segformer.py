"""SegFormer of transformers: attention with fewer keys than queries, an MLP with a depthwise convolution inside, and
the channels of the decode head between its fusing layer and its classifier."""

from __future__ import annotations

from typing import Any

from optin_export.units.declare import Family, Producer, UnitGroup, class_named
from optin_export.units.inside import Inside

_LAYER, _HEAD = "SegformerLayer", "SegformerDecodeHead"


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    if type(block).__name__ == _HEAD:
        return (_fused(block, path, index),)
    inside = Inside(block, path, index)
    heads = inside.heads(
        [f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj")],
        "attention.o_proj",
        block.attention.num_attention_heads,
        residual=("layernorm_before", 0),
        sizes=[("attention.num_attention_heads", 1)],
        sublayer="attention",
        returns_tuple=True,
        bypass=[("layernorm_before", False)],
    )
    neurons = inside.neurons(
        ["mlp.fc1", "mlp.dwconv.dwconv"],
        "mlp.fc2",
        residual=("layernorm_after", 0),
        sublayer="mlp",
        bypass=[("layernorm_after", False)],
    )
    return heads, neurons


def _fused(head: Any, path: str, index: int) -> UnitGroup:
    return UnitGroup(
        block=index,
        kind="channels",
        count=head.linear_fuse.out_channels,
        width=1,
        producers=(Producer(f"{path}.linear_fuse", norm=f"{path}.batch_norm"),),
        consumer=f"{path}.classifier",
        residual=None,
        sublayer=None,
    )


FAMILY = Family(
    name="segformer",
    library="transformers",
    examples="nvidia/segformer-*",
    units=("heads", "neurons", "channels"),
    sublayers=("heads", "neurons"),
    is_block=class_named(_LAYER, _HEAD),
    groups=_groups,
    channels_first=True,
)
