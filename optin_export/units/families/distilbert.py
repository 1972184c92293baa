"""DistilBERT of transformers (post-norm, separate query, key and value)."""

from __future__ import annotations

from typing import Any

from torch import nn

from optin_export.units.declare import Family, UnitGroup
from optin_export.units.inside import Inside


def _is_block(module: nn.Module) -> bool:
    where = "transformers.models.distilbert.modeling_distilbert"  # other models use this name too
    return type(module).__name__ == "TransformerBlock" and type(module).__module__ == where


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention, inside = block.attention, Inside(block, path, index)
    head_dim = attention.attention_head_size
    heads = inside.heads(
        [f"attention.{name}" for name in ("q_lin", "k_lin", "v_lin")],
        "attention.out_lin",
        attention.q_lin.out_features // head_dim,
        residual=("", 0),
        sizes=[("attention.n_heads", 1), ("attention.dim", head_dim)],
        sublayer="attention",
        returns_tuple=True,
    )
    return heads, inside.neurons(["ffn.lin1"], "ffn.lin2", residual=("ffn", 0), sublayer="ffn")


def _query_keys(block: Any, path: str) -> tuple[str, str, str]:
    return f"{path}.attention", f"{path}.attention.q_lin", f"{path}.attention.k_lin"


FAMILY = Family(
    name="distilbert",
    library="transformers",
    examples="DistilBERT",
    units=("heads", "neurons"),
    sublayers=("heads", "neurons"),
    parts=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    is_block=_is_block,
    groups=_groups,
    query_keys=_query_keys,
)
