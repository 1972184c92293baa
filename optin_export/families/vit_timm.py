"""Vision Transformers of timm: ViT, DeiT, DeiT-III (pre-norm, fused qkv, optional layer scale)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from optin_export.errors import InputError
from optin_export.families._declare import Family, Producer, Tokens, UnitGroup


def _is_block(module: nn.Module) -> bool:
    return type(module).__name__ == "Block" and type(module).__module__ == "timm.models.vision_transformer"


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention, mlp = block.attn, block.mlp
    plain_attention = type(attention).__name__ == "Attention" and isinstance(attention.norm, nn.Identity)
    if not plain_attention or attention.gate is not None:
        raise InputError(
            f"'{path}.attn' is a variant of attention that the family vit cannot prune",
            f"{type(attention).__name__} with a norm or gate across heads",
            "prune only neurons (prune.units: [neurons]) or use a model with plain attention",
        )
    if type(mlp).__name__ != "Mlp" or not isinstance(mlp.norm, nn.Identity) or not isinstance(mlp.fc1, nn.Linear):
        raise InputError(
            f"'{path}.mlp' is a {type(mlp).__name__} that the family vit cannot prune",
            "only fc1 -> activation -> fc2 without a norm between is known",
            "prune only heads (prune.units: [heads]) or use a model with a plain MLP",
        )
    heads = UnitGroup(
        block=index,
        kind="heads",
        count=attention.num_heads,
        width=attention.head_dim,
        producers=(Producer(f"{path}.attn.qkv", fused=3),),
        consumer=f"{path}.attn.proj",
        residual=(f"{path}.norm1", 0),
        scale=_layer_scale(block.ls1, f"{path}.ls1"),
        sizes=((f"{path}.attn.num_heads", 1), (f"{path}.attn.attn_dim", attention.head_dim)),
        sublayer=f"{path}.attn",
        bypass=((f"{path}.norm1", False),),
    )
    neurons = UnitGroup(
        block=index,
        kind="neurons",
        count=mlp.fc1.out_features,
        width=1,
        producers=(Producer(f"{path}.mlp.fc1"),),
        consumer=f"{path}.mlp.fc2",
        residual=(f"{path}.norm2", 0),
        scale=_layer_scale(block.ls2, f"{path}.ls2"),
        sublayer=f"{path}.mlp",
        bypass=((f"{path}.norm2", False),),
    )
    return heads, neurons


def _layer_scale(module: nn.Module, path: str) -> str | None:
    return None if isinstance(module, nn.Identity) else path


def _attend(block: Any, stream: Any, mask: Any) -> Any:
    return stream + block.drop_path1(block.ls1(block.attn(block.norm1(stream), attn_mask=mask)))


def _feed(block: Any, stream: Any) -> Any:
    return stream + block.drop_path2(block.ls2(block.mlp(block.norm2(stream))))


def _tokens(model: nn.Module, found: Sequence[tuple[str, nn.Module]]) -> Tokens:
    path = found[0][0].rpartition("blocks.")[0].rstrip(".")
    whole: Any = model.get_submodule(path)
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
    examples="vit_*, deit_*, deit3_*",
    units=("heads", "neurons"),
    is_block=_is_block,
    groups=_groups,
    tokens=_tokens,
)
