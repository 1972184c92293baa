"""GPT-2 of transformers (pre-norm, causal, fused query, key and value). Its Conv1D layers arrive here as nn.Linear."""

from __future__ import annotations

from typing import Any

from optin_export.errors import InputError
from optin_export.units.declare import Family, Producer, UnitGroup, class_named


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    if hasattr(block, "crossattention"):
        raise InputError(
            f"'{path}' attends to an encoder",
            "the family gpt2 supports decoder-only models",
            "use a model without cross-attention",
        )
    attention, mlp = block.attn, block.mlp
    heads = UnitGroup(
        block=index,
        kind="heads",
        count=attention.num_heads,
        width=attention.head_dim,
        producers=(Producer(f"{path}.attn.c_attn", fused=3),),
        consumer=f"{path}.attn.c_proj",
        residual=(f"{path}.ln_1", 0),
        sizes=(
            (f"{path}.attn.num_heads", 1),
            (f"{path}.attn.split_size", attention.head_dim),
            (f"{path}.attn.embed_dim", attention.head_dim),
        ),
        sublayer=f"{path}.attn",
        returns_tuple=True,
        bypass=((f"{path}.ln_1", False),),
    )
    neurons = UnitGroup(
        block=index,
        kind="neurons",
        count=mlp.c_fc.out_features,
        width=1,
        producers=(Producer(f"{path}.mlp.c_fc"),),
        consumer=f"{path}.mlp.c_proj",
        residual=(f"{path}.ln_2", 0),
        sublayer=f"{path}.mlp",
        bypass=((f"{path}.ln_2", False),),
    )
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
