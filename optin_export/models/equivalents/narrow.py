"""Attention whose queries and keys may have fewer dimensions per head than its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class NarrowAttention(nn.Module):
    """timm's self-attention of [batch, tokens, features]; one layer makes queries, keys and values, one after another.

    original: timm's Attention without norms or a gate; its output layer and its scale are kept, and its weights are not
    copied. heads: their number; dimensions: of queries and keys, per head; default: as the original has them.
    """

    def __init__(self, original: Any, heads: int | None = None, dimensions: int | None = None) -> None:
        super().__init__()
        weight, values = original.qkv.weight, original.proj.in_features
        self.num_heads, self.scale = original.num_heads if heads is None else heads, float(original.scale)
        narrow = values if dimensions is None else self.num_heads * dimensions
        self.widths = (narrow, narrow, values)
        self.qkv = nn.Linear(weight.shape[1], sum(self.widths), device=weight.device, dtype=weight.dtype)
        self.attn_drop, self.proj, self.proj_drop = original.attn_drop, original.proj, original.proj_drop

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """attn_mask: as of torch's scaled_dot_product_attention."""
        parts = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        dropped = self.attn_drop.p if self.training else 0.0
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, dropped, is_causal, scale=self.scale)
        output: torch.Tensor = self.proj_drop(self.proj(seen.transpose(1, 2).flatten(2)))
        return output


class NarrowSelfAttention(nn.Module):
    """The self-attention of an encoder of transformers, with a layer each for queries, keys and values.

    original: that of BERT, MPNet, DistilBERT or ViT and models with the same code; layers keep their names, and it
    returns what the original returns, without the weights of the attention. heads, dimensions: as of NarrowAttention.
    """

    #: Names of the layers of queries, keys, values, and of the output, if that belongs to the module.
    NAMES: tuple[tuple[str, ...], ...] = (
        ("query", "key", "value"),
        ("q", "k", "v", "o"),
        ("q_lin", "k_lin", "v_lin", "out_lin"),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
    )

    def __init__(self, original: Any, heads: int | None = None, dimensions: int | None = None) -> None:
        super().__init__()
        self.names = next(names for names in self.NAMES if all(hasattr(original, name) for name in names))
        layers = [getattr(original, name) for name in self.names]
        width = getattr(original, "attention_head_size", None) or original.head_dim
        self.num_heads = layers[2].out_features // width if heads is None else heads
        self.scale = float(getattr(original, "scaling", width**-0.5))
        for name, layer in zip(self.names[:2], layers, strict=False):
            rows = layer.out_features if dimensions is None else self.num_heads * dimensions
            like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
            setattr(self, name, nn.Linear(layer.in_features, rows, **like))
        for name, layer in zip(self.names[2:], layers[2:], strict=True):
            setattr(self, name, layer)
        dropout = getattr(original, "dropout", None)
        self.dropped = float(original.attention_dropout if dropout is None else dropout.p)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        **unused: Any,
    ) -> Any:
        """attention_mask: boolean, or added to the scores, as is position_bias [batch, heads, tokens, tokens]."""
        made = [getattr(self, name)(hidden_states) for name in self.names[:3]]
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in made)
        added = attention_mask
        if position_bias is not None:
            added = position_bias if attention_mask is None else position_bias + attention_mask
        dropped = self.dropped if self.training else 0.0
        seen = nn.functional.scaled_dot_product_attention(q, k, v, added, dropped, scale=self.scale)
        output = seen.transpose(1, 2).flatten(2)
        if len(self.names) > 3:
            output = getattr(self, self.names[3])(output)
        return (output,) if self.names[0] == "q" else (output, None)
