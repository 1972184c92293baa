"""MPNet of transformers: BERT's layers with a relative position bias per head that all blocks share.

The bias [batch, heads, tokens, tokens] is computed once for the encoder, so no block may cut its table: each attention
holds the numbers of its heads (a buffer that `models` adds), and uses their part of the bias.
"""

from __future__ import annotations

from typing import Any

from optin_export.units.declare import Family, Producer, Table, UnitGroup, class_named


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention = block.attention.attn
    head_dim = attention.attention_head_size
    heads = UnitGroup(
        block=index,
        kind="heads",
        count=attention.num_attention_heads,
        width=head_dim,
        producers=tuple(Producer(f"{path}.attention.attn.{name}") for name in ("q", "k", "v")),
        consumer=f"{path}.attention.attn.o",
        residual=(f"{path}.attention", 0),
        sizes=(
            (f"{path}.attention.attn.num_attention_heads", 1),
            (f"{path}.attention.attn.all_head_size", head_dim),
        ),
        sublayer=f"{path}.attention.attn",
        returns_tuple=True,
        tables=(Table(f"{path}.attention.attn.heads"),),
    )
    neurons = UnitGroup(
        block=index,
        kind="neurons",
        count=block.intermediate.dense.out_features,
        width=1,
        producers=(Producer(f"{path}.intermediate.dense"),),
        consumer=f"{path}.output.dense",
        residual=(f"{path}.output", 1),
        sublayer=f"{path}.output.dense",
        bypass=((f"{path}.intermediate", False),),
    )
    return heads, neurons


FAMILY = Family(
    name="mpnet",
    library="transformers",
    examples="MPNet, all-mpnet-base",
    units=("heads", "neurons"),
    sublayers=("heads", "neurons"),
    parts=(
        "attention.attn.q",
        "attention.attn.k",
        "attention.attn.v",
        "attention.attn.o",
        "intermediate.dense",
        "output.dense",
    ),
    is_block=class_named("MPNetLayer"),
    groups=_groups,
)
