"""Attention whose queries and keys have fewer dimensions per head than its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optin_export.errors import InputError
from optin_export.models import TaskModel
from optin_export.units import QueryKeys, get_layer, get_module, set_module


class NarrowAttention(nn.Module):
    """Self-attention of [batch, tokens, features]; one layer makes queries, keys and values, one after another.

    original: timm's attention, whose output layer and scale are kept. dimensions: of queries and keys, per head.
    """

    def __init__(self, original: Any, heads: int, dimensions: int) -> None:
        super().__init__()
        weight, self.num_heads, self.scale = original.qkv.weight, heads, float(original.scale)
        features, values = weight.shape[1], original.proj.in_features
        self.widths = (heads * dimensions, heads * dimensions, values)
        self.qkv = nn.Linear(features, sum(self.widths), device=weight.device, dtype=weight.dtype)
        self.attn_drop, self.proj, self.proj_drop = original.attn_drop, original.proj, original.proj_drop

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        parts = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        dropped = self.attn_drop.p if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask, dropped, is_causal, scale=self.scale)
        output: torch.Tensor = self.proj_drop(self.proj(seen.transpose(1, 2).flatten(2)))
        return output


@torch.no_grad()
def narrow(model: TaskModel, attentions: Sequence[QueryKeys], dimensions: Mapping[str, int]) -> None:
    """Give attentions so many dimensions of queries and keys per head, in place.

    dimensions: by `QueryKeys.name`. The model computes the same as before, if the products q k^T of its weights have no
    higher rank (see `repair.query_keys`); otherwise the nearest ones of that rank, for inputs of equal variance.
    """
    known = {one.name: one for one in attentions}
    for name, count in dimensions.items():
        one = known.get(name)
        if one is None or not 0 < count <= one.count:
            raise InputError(
                f"the plan is not for this model: {name} with {count} dimensions",
                "none of its attentions can have them" if one is None else f"the attention has {one.count}",
                "search again with this model",
            )
        original = get_module(model, one.path)
        query, key = (one.heads_of(rows_of(model, one, which)) for which in ("query", "key"))
        smaller = NarrowAttention(original, len(query), count)
        rows = torch.cat([*(part.flatten(0, 1) for part in factors(query, key, count)), values_of(model, one)])
        smaller.qkv.weight.copy_(rows[:, :-1])
        smaller.qkv.bias.copy_(rows[:, -1])
        set_module(model, one.path, smaller.requires_grad_(False).train(original.training), everywhere=True)


def rows_of(model: TaskModel, one: QueryKeys, which: str) -> torch.Tensor:
    """The weights and the bias of all heads' queries ("query") or keys ("key"): float64 [rows, inputs + 1]."""
    layer = get_layer(model, one.query if which == "query" else one.key)
    return with_bias(layer)[one.rows(len(layer.weight), which)]


def values_of(model: TaskModel, one: QueryKeys) -> torch.Tensor:
    layer = get_layer(model, one.query)
    return with_bias(layer)[one.rows(len(layer.weight), "key").stop :]


def with_bias(layer: Any) -> torch.Tensor:
    """Weights and bias of a linear layer, float64 [outputs, inputs + 1]."""
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    return torch.cat([layer.weight, bias[:, None]], 1).detach().double()


def factors(query: torch.Tensor, key: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest parts of q^T k, halved between both: query, key [heads, dimensions, inputs + 1] -> the same
    with `count` dimensions.

    With q^T = Q_1 R_1 and k^T = Q_2 R_2, the parts of R_1 R_2^T = U S V^T are those of q^T k.
    """
    (left, first), (right, second) = (torch.linalg.qr(one.mT) for one in (query, key))
    u, sizes, v = torch.linalg.svd(first @ second.mT)
    root = sizes[:, None, :count].sqrt()
    return (left @ u[:, :, :count] * root).mT, (right @ v.mT[:, :, :count] * root).mT
