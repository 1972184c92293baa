"""Llama and the decoders built from the same layers in transformers (pre-norm, rotary positions, gated FFN).

With grouped-query attention a unit of kind heads is a key and value head together with all query heads that share it.
"""

from __future__ import annotations

from typing import Any

from optin_export.units.declare import Family, Producer, UnitGroup, class_named


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention, mlp = block.self_attn, block.mlp
    head_dim, shared = attention.head_dim, attention.num_key_value_groups
    heads = UnitGroup(
        block=index,
        kind="heads",
        count=attention.k_proj.out_features // head_dim,
        width=shared * head_dim,
        producers=(
            Producer(f"{path}.self_attn.q_proj", rows=shared * head_dim),
            Producer(f"{path}.self_attn.k_proj", rows=head_dim),
            Producer(f"{path}.self_attn.v_proj", rows=head_dim),
        ),
        consumer=f"{path}.self_attn.o_proj",
        residual=(f"{path}.input_layernorm", 0),
        sublayer=f"{path}.self_attn",
        returns_tuple=True,
        bypass=((f"{path}.input_layernorm", False),),
    )
    neurons = UnitGroup(
        block=index,
        kind="neurons",
        count=mlp.up_proj.out_features,
        width=1,
        producers=(Producer(f"{path}.mlp.gate_proj"), Producer(f"{path}.mlp.up_proj")),
        consumer=f"{path}.mlp.down_proj",
        residual=(f"{path}.post_attention_layernorm", 0),
        sublayer=f"{path}.mlp",
        bypass=((f"{path}.post_attention_layernorm", False),),
    )
    return heads, neurons


FAMILY = Family(
    name="llama",
    library="transformers",
    examples="Llama, TinyLlama, SmolLM, Mistral, Qwen2, Qwen3, Gemma (the first)",
    units=("heads", "neurons"),
    sublayers=("heads", "neurons"),
    parts=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    is_block=class_named(
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "SmolLM3DecoderLayer",
        "GemmaDecoderLayer",
    ),
    groups=_groups,
)
