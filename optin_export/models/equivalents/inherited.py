"""Subclasses of torch's nn.MultiheadAttention with a layer for each projection; their own methods stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from optin_export.models.equivalents.adapted import adapt
from optin_export.models.equivalents.multihead import MultiheadAttention, as_linear, separate_projections


class _Inherited(nn.MultiheadAttention):
    """`MultiheadAttention` for a subclass of nn.MultiheadAttention to inherit from.

    The weights and biases of its layers are also there as one tensor each, for code of the subclass that reads them.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    num_heads = MultiheadAttention.num_heads
    forward = MultiheadAttention.forward
    _heads = MultiheadAttention._heads

    @property
    def in_proj_weight(self) -> torch.Tensor:  # type: ignore[override]
        return torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))

    @property
    def in_proj_bias(self) -> torch.Tensor | None:  # type: ignore[override]
        if self.q_proj.bias is None:
            return None
        return torch.cat((self.q_proj.bias, self.k_proj.bias, self.v_proj.bias))

    q_proj_weight = property(lambda self: self.q_proj.weight)
    k_proj_weight = property(lambda self: self.k_proj.weight)
    v_proj_weight = property(lambda self: self.v_proj.weight)

    def _dropped(self, weights: torch.Tensor) -> torch.Tensor:
        return functional.dropout(weights, self.dropout, self.training)


def can_be_separate(attention: nn.MultiheadAttention) -> bool:
    """Whether a subclass of nn.MultiheadAttention has its weights, and no members of `_Inherited` of its own."""
    own = ("q_proj", "k_proj", "v_proj", "_heads", "_dropped")
    return "in_proj_weight" in attention._parameters and not any(hasattr(attention, name) for name in own)


def separate_inherited(attention: nn.MultiheadAttention) -> None:
    """Give a subclass of nn.MultiheadAttention a layer for each projection, in place; its own methods stay."""
    values: Any = attention
    layers = [*separate_projections(attention), as_linear(attention.out_proj.weight, attention.out_proj.bias)]
    values.head_dim, values._qkv_same_embed_dim = attention.head_dim, False  # no fused path in torch's layers
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "num_heads"):
        delattr(attention, name)
    for name, layer in zip(("q_proj", "k_proj", "v_proj", "out_proj"), layers, strict=True):
        setattr(attention, name, layer)
    adapt(attention, _no_members, _Inherited)


def _no_members(base: Any) -> dict[str, Any]:
    return {}
