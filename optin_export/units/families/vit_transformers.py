"""Vision Transformers of transformers: ViT, DeiT, BEiT, DINOv2 (pre-norm, separate query, key and value)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from optin_export.errors import InputError
from optin_export.units.declare import Family, Refusal, Tokens, UnitGroup, class_named
from optin_export.units.inside import Inside


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    norms = ("norm1", "norm2") if hasattr(block, "norm1") else ("layernorm_before", "layernorm_after")
    gated = hasattr(block.mlp, "gate_proj")
    inside, table = Inside(block, path, index), "relative_position_bias.relative_position_bias_table"
    heads = inside.heads(
        [f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj")],
        "attention.o_proj",
        block.attention.num_attention_heads,
        residual=(norms[0], 0),
        scale=_layer_scale(block, path, 1),
        sizes=[("attention.num_attention_heads", 1)],
        sublayer="attention",
        returns_tuple=True,
        bypass=[(norms[0], False)],
        tables=[table] if _is_biased(block) else [],
    )
    neurons = inside.neurons(
        ["mlp.gate_proj", "mlp.up_proj"] if gated else ["mlp.fc1"],
        "mlp.down_proj" if gated else "mlp.fc2",
        residual=(norms[1], 0),
        scale=_layer_scale(block, path, 2),
        sublayer="mlp",
        bypass=[(norms[1], False)],
    )
    return heads, neurons


def _query_keys(block: Any, path: str) -> tuple[str, str, str] | None:
    has_bias = _is_biased(block) or type(block).__name__ == "BeitLayer"
    return None if has_bias else (f"{path}.attention", f"{path}.attention.q_proj", f"{path}.attention.k_proj")


def _is_biased(block: Any) -> bool:
    return getattr(block, "relative_position_bias", None) is not None


def _layer_scale(block: Any, path: str, number: int) -> str | None:
    """DINOv2 has it in a module, BEiT in a parameter of the block or as the plain number 1."""
    if hasattr(block, f"layer_scale{number}"):
        return f"{path}.layer_scale{number}.lambda1"
    return f"{path}.lambda_{number}" if isinstance(getattr(block, f"lambda_{number}", None), nn.Parameter) else None


def _refusals(model: Any) -> list[Refusal]:
    for path, module in model.named_modules():
        if getattr(module, "shared_position_bias", None) is not None:
            what = f"'{path}' ({type(module).__name__}) ties the heads of all blocks together"
            why = "its position bias has entries per head, and all blocks share it"
            return [Refusal("heads", InputError(what, why, "prune only neurons (prune.units: [neurons])"))]
    return []


def _attend(block: Any, stream: Any, mask: Any) -> Any:
    return block.dropout(block.attention(block.layernorm_before(stream), mask)[0]) + stream


def _feed(block: Any, stream: Any) -> Any:
    return block.dropout(block.mlp(block.layernorm_after(stream))) + stream


def _tokens(model: nn.Module, found: Sequence[tuple[str, nn.Module]]) -> Tokens:
    name = type(found[0][1]).__name__
    if name not in ("ViTLayer", "DeiTLayer"):
        raise InputError(
            "the model's tokens cannot be merged", f"merging is not supported for a {name}", "set tokens.keep: 1.0"
        )
    # DeiT has a distillation token next to the class token; its classifiers read only these.
    return Tokens(2 if name == "DeiTLayer" else 1, _attend, _feed)


FAMILY = Family(
    name="vit-transformers",
    library="transformers",
    examples="google/vit-*, facebook/deit-*, facebook/dinov2-*, microsoft/beit-*",
    units=("heads", "neurons"),
    sublayers=("heads", "neurons"),
    parts=("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    is_block=class_named("ViTLayer", "DeiTLayer", "BeitLayer", "Dinov2Layer", "Dinov2WithRegistersLayer"),
    groups=_groups,
    refusals=_refusals,
    tokens=_tokens,
    query_keys=_query_keys,
)
