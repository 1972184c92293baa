"""Vision Transformers of transformers: ViT and DeiT (pre-norm, separate query, key and value)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from optin_export.families._declare import Family, Producer, Tokens, UnitGroup, class_named


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


def _attend(block: Any, stream: Any, mask: Any) -> Any:
    return block.dropout(block.attention(block.layernorm_before(stream), mask)[0]) + stream


def _feed(block: Any, stream: Any) -> Any:
    return block.dropout(block.mlp(block.layernorm_after(stream))) + stream


def _tokens(model: nn.Module, found: Sequence[tuple[str, nn.Module]]) -> Tokens:
    # DeiT has a distillation token beside the class token; its classifiers read only these.
    return Tokens(2 if type(found[0][1]).__name__ == "DeiTLayer" else 1, _attend, _feed)


FAMILY = Family(
    name="vit-transformers",
    library="transformers",
    examples="google/vit-*, facebook/deit-*",
    units=("heads", "neurons"),
    is_block=class_named("ViTLayer", "DeiTLayer"),
    groups=_groups,
    tokens=_tokens,
)
