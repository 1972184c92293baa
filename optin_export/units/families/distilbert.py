"""DistilBERT of transformers (post-norm, separate query, key and value)."""

from __future__ import annotations

from typing import Any

from torch import nn

from optin_export.units.declare import Family, Producer, UnitGroup


def _is_block(module: nn.Module) -> bool:
    where = "transformers.models.distilbert.modeling_distilbert"  # other models use this name too
    return type(module).__name__ == "TransformerBlock" and type(module).__module__ == where


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention = block.attention
    heads = UnitGroup(
        block=index,
        kind="heads",
        count=attention.q_lin.out_features // attention.attention_head_size,
        width=attention.attention_head_size,
        producers=tuple(Producer(f"{path}.attention.{name}") for name in ("q_lin", "k_lin", "v_lin")),
        consumer=f"{path}.attention.out_lin",
        residual=(path, 0),
        sizes=((f"{path}.attention.n_heads", 1), (f"{path}.attention.dim", attention.attention_head_size)),
        sublayer=f"{path}.attention",
        returns_tuple=True,
    )
    neurons = UnitGroup(
        block=index,
        kind="neurons",
        count=block.ffn.lin1.out_features,
        width=1,
        producers=(Producer(f"{path}.ffn.lin1"),),
        consumer=f"{path}.ffn.lin2",
        residual=(f"{path}.ffn", 0),
        sublayer=f"{path}.ffn",
    )
    return heads, neurons


FAMILY = Family(
    name="distilbert",
    library="transformers",
    examples="DistilBERT",
    units=("heads", "neurons"),
    sublayers=("heads", "neurons"),
    parts=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    is_block=_is_block,
    groups=_groups,
)
