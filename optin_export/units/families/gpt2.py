"""GPT-2 of transformers (pre-norm, causal, fused query, key and value). Its Conv1D layers arrive here as nn.Linear."""

from __future__ import annotations

from typing import Any

from optin_export.errors import InputError
from optin_export.units.declare import Family, UnitGroup, class_named
from optin_export.units.inside import Inside


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    if hasattr(block, "crossattention"):
        raise InputError(
            f"'{path}' attends to an encoder",
            "the family gpt2 supports decoder-only models",
            "use a model without cross-attention",
        )
    attention, inside = block.attn, Inside(block, path, index)
    heads = inside.heads(
        ["attn.c_attn"],
        "attn.c_proj",
        attention.num_heads,
        fused=3,
        residual=("ln_1", 0),
        sizes=[
            ("attn.num_heads", 1),
            ("attn.split_size", attention.head_dim),
            ("attn.embed_dim", attention.head_dim),
        ],
        sublayer="attn",
        returns_tuple=True,
        bypass=[("ln_1", False)],
    )
    neurons = inside.neurons(["mlp.c_fc"], "mlp.c_proj", residual=("ln_2", 0), sublayer="mlp", bypass=[("ln_2", False)])
    return heads, neurons


FAMILY = Family(
    name="gpt2",
    library="transformers",
    examples="GPT-2, DistilGPT2",
    units=("heads", "neurons"),
    sublayers=("heads", "neurons"),
    parts=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    is_block=class_named("GPT2Block"),
    groups=_groups,
)
