"""Vision Transformers of timm: ViT, DeiT, DINOv2, DINOv3, BEiT, EVA (an attention and an MLP, each with a norm)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from optin_export.errors import InputError
from optin_export.units.declare import Family, Refusal, Tokens, UnitGroup
from optin_export.units.inside import Inside

_BLOCKS = {
    ("timm.models.vision_transformer", "Block"),
    ("timm.models.beit", "Block"),
    ("timm.models.eva", "EvaBlock"),
}
#: Attentions whose forward counts heads rather than features; see also models/equivalents/.
_ATTENTIONS = ("Attention", "AttentionRope", "SelfAttention")


def _is_block(module: nn.Module) -> bool:
    return (type(module).__module__, type(module).__name__) in _BLOCKS


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup | Refusal, ...]:
    return _heads(block, path, index), _neurons(block, path, index)


def _heads(block: Any, path: str, index: int) -> UnitGroup | Refusal:
    attention, where = block.attn, f"{path}.attn"
    if not _counts_heads(attention):
        return Refusal(
            "heads",
            InputError(
                f"'{where}' is a variant of attention that the family vit cannot prune",
                f"{type(attention).__name__} with a norm, gate or position bias across heads",
                "prune only neurons (prune.units: [neurons]) or use a model with plain attention",
            ),
        )
    head_dim = attention.proj.in_features // attention.num_heads
    shared = getattr(attention, "num_kv_groups", 1)  # query heads per key and value head: they are removed together
    sizes = {"num_heads": shared, "attn_dim": shared * head_dim, "num_kv_heads": 1, "kv_dim": head_dim}
    is_biased = getattr(attention, "relative_position_bias_table", None) is not None
    is_fused = attention.qkv is not None
    return Inside(block, path, index).heads(
        ["attn.qkv"] if is_fused else [f"attn.{name}" for name in ("q_proj", "k_proj", "v_proj")],
        "attn.proj",
        attention.num_heads // shared,
        fused=3 if is_fused else 1,
        grouped=not is_fused,
        residual=("norm1", 0),
        scale=_layer_scale(block, path, 1),
        sizes=[(f"attn.{name}", size) for name, size in sizes.items() if hasattr(attention, name)],
        sublayer="attn",
        bypass=[("norm1", False)],
        tables=["attn.relative_position_bias_table"] if is_biased else [],
    )


def _query_keys(block: Any, path: str) -> tuple[str, str, str] | None:
    attention = block.attn
    has_norms = any(not isinstance(getattr(attention, name), nn.Identity) for name in ("q_norm", "k_norm"))
    if type(attention).__module__ != "timm.layers.attention" or type(attention).__name__ != "Attention" or has_norms:
        return None
    return (f"{path}.attn", *(f"{path}.attn.qkv",) * 2)


def _counts_heads(attention: Any) -> bool:
    own = type(attention).__module__ != "timm.models.beit"
    is_plain = isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity)
    return type(attention).__name__ in _ATTENTIONS and own and is_plain and getattr(attention, "gate", None) is None


def _neurons(block: Any, path: str, index: int) -> UnitGroup | Refusal:
    mlp, where = block.mlp, f"{path}.mlp"
    known = type(mlp).__name__ in ("Mlp", "GluMlp", "SwiGLU") and isinstance(mlp.norm, nn.Identity)
    if not known or not isinstance(mlp.fc2, nn.Linear):
        return Refusal(
            "neurons",
            InputError(
                f"'{where}' is a {type(mlp).__name__} that the family vit cannot prune",
                "a norm across its neurons, or another form than fc1 -> activation (or gate) -> fc2",
                "prune only heads (prune.units: [heads]) or use a model with a plain MLP",
            ),
        )
    return Inside(block, path, index).neurons(
        ["mlp.fc1_g", "mlp.fc1_x"] if type(mlp).__name__ == "SwiGLU" else ["mlp.fc1"],
        "mlp.fc2",
        fused=2 if type(mlp).__name__ == "GluMlp" else 1,
        residual=("norm2", 0),
        scale=_layer_scale(block, path, 2),
        sublayer="mlp",
        bypass=[("norm2", False)],
    )


def _layer_scale(block: Any, path: str, number: int) -> str | None:
    """A module with a `gamma`, or a parameter of the block itself."""
    if getattr(block, f"gamma_{number}", None) is not None:
        return f"{path}.gamma_{number}"
    module = getattr(block, f"ls{number}", None)
    return None if module is None or isinstance(module, nn.Identity) else f"{path}.ls{number}.gamma"


def _refusals(model: Any) -> list[Refusal]:
    """Refusals for shared tables: a table with entries per head, as BEiT can have, or angles per head."""
    for path, module in model.named_modules():
        for name, why in (
            ("rel_pos_bias", "its position bias has entries per head, and all blocks share it"),
            ("rope_mixed", "its rotary embedding has different angles per head"),
        ):
            if getattr(module, name, None):
                what = f"'{path}' ({type(module).__name__}) ties the heads of all blocks together"
                return [Refusal("heads", InputError(what, why, "prune only neurons (prune.units: [neurons])"))]
    return []


def _attend(block: Any, stream: Any, mask: Any) -> Any:
    return stream + block.drop_path1(block.ls1(block.attn(block.norm1(stream), attn_mask=mask)))


def _feed(block: Any, stream: Any) -> Any:
    return stream + block.drop_path2(block.ls2(block.mlp(block.norm2(stream))))


def _tokens(model: nn.Module, found: Sequence[tuple[str, nn.Module]]) -> Tokens:
    where = type(found[0][1]).__module__
    if where != "timm.models.vision_transformer":
        raise InputError(
            "the model's tokens cannot be merged",
            f"the attention in blocks of {where} depends on the position of each token",
            "set tokens.keep: 1.0",
        )
    path = found[0][0].rpartition("blocks.")[0].rstrip(".")
    whole: Any = model.get_submodule(path)
    if not any(one.__name__ == "VisionTransformer" for one in type(whole).__mro__):
        raise InputError(
            "the model's tokens cannot be merged",
            f"its blocks are in a {type(whole).__name__}, whose code may read each token",
            "set tokens.keep: 1.0",
        )
    prefix, pooling = whole.num_prefix_tokens, whole.global_pool
    if whole.attn_pool is not None or pooling not in ("token", "avg", ""):
        raise InputError(
            "the model's tokens cannot be merged",
            f"its output is pooled by {'attention' if whole.attn_pool is not None else pooling}",
            "set tokens.keep: 1.0",
        )
    if pooling != "avg":
        return Tokens(prefix, _attend, _feed)
    return Tokens(prefix, _attend, _feed, (f"{path}.norm", 0 if whole.pool_include_prefix else prefix))


FAMILY = Family(
    name="vit",
    library="timm",
    examples="vit_*, deit_*, deit3_*, vit_*_dinov2, vit_*_dinov3, beit_*, eva_*, eva02_tiny_*, eva02_small_*",
    units=("heads", "neurons"),
    sublayers=("heads", "neurons"),
    parts=("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"),
    is_block=_is_block,
    groups=_groups,
    refusals=_refusals,
    tokens=_tokens,
    query_keys=_query_keys,
)
