"""MPNet of transformers: BERT's layers with a relative position bias per head that all blocks share.

The bias [batch, heads, tokens, tokens] is computed once for the encoder, so no block may cut its table: each attention
holds the numbers of its heads (a buffer that `models` adds), and uses their part of the bias.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from optin_export.units.declare import Family, Table, UnitGroup, class_named
from optin_export.units.inside import Inside


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention, inside = block.attention.attn, Inside(block, path, index)
    heads = inside.heads(
        [f"attention.attn.{name}" for name in ("q", "k", "v")],
        "attention.attn.o",
        attention.num_attention_heads,
        residual=("attention", 0),
        sizes=[
            ("attention.attn.num_attention_heads", 1),
            ("attention.attn.all_head_size", attention.attention_head_size),
        ],
        sublayer="attention.attn",
        returns_tuple=True,
    )
    neurons = inside.neurons(
        ["intermediate.dense"],
        "output.dense",
        residual=("output", 1),
        sublayer="output.dense",
        bypass=[("intermediate", False)],
    )
    return replace(heads, tables=(Table(inside.at("attention.attn.heads")),)), neurons


def _query_keys(block: Any, path: str) -> tuple[str, str, str]:
    where = f"{path}.attention.attn"
    return where, f"{where}.q", f"{where}.k"


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
    query_keys=_query_keys,
)
