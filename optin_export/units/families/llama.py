"""Llama and the decoders built from the same layers in transformers (pre-norm, rotary positions, gated FFN).

With grouped-query attention a unit of kind heads is a key and value head together with all query heads that share it.
"""

from __future__ import annotations

from typing import Any

from optin_export.units.declare import Family, UnitGroup, class_named
from optin_export.units.inside import Inside


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention, inside = block.self_attn, Inside(block, path, index)
    heads = inside.heads(
        [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")],
        "self_attn.o_proj",
        attention.k_proj.out_features // attention.head_dim,
        grouped=True,
        residual=("input_layernorm", 0),
        sublayer="self_attn",
        returns_tuple=True,
        bypass=[("input_layernorm", False)],
    )
    neurons = inside.neurons(
        ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down_proj",
        residual=("post_attention_layernorm", 0),
        sublayer="mlp",
        bypass=[("post_attention_layernorm", False)],
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
