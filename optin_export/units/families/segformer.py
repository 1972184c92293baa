"""SegFormer of transformers: attention with fewer keys than queries, an MLP with a depthwise convolution inside, and
the channels of the decode head between its fusing layer and its classifier."""

from __future__ import annotations

from typing import Any

from optin_export.units.declare import Family, Producer, UnitGroup, class_named

_LAYER, _HEAD = "SegformerLayer", "SegformerDecodeHead"


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    if type(block).__name__ == _HEAD:
        return (_fused(block, path, index),)
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
        producers=(Producer(f"{path}.mlp.fc1"), Producer(f"{path}.mlp.dwconv.dwconv")),
        consumer=f"{path}.mlp.fc2",
        residual=(f"{path}.layernorm_after", 0),
        sublayer=f"{path}.mlp",
        bypass=((f"{path}.layernorm_after", False),),
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
