"""torch's nn.MultiheadAttention with a layer for each projection, and its encoder and decoder stacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MultiheadAttention(nn.Module):
    """Attention with the interface of nn.MultiheadAttention; its masks and results have the same shapes.

    original: without biases as further keys and without a zero key. Its weights are copied. The width of a head is
    fixed, and their number is what the weights have. torch's layers take no fused path for it, because it has no
    `in_proj_bias`.
    """

    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.head_dim, self.batch_first = original.embed_dim, original.head_dim, original.batch_first
        self.q_proj, self.k_proj, self.v_proj = separate_projections(original)
        self.out_proj = as_linear(original.out_proj.weight, original.out_proj.bias)
        self.dropout = nn.Dropout(original.dropout)
        self.train(original.training)

    @property
    def num_heads(self) -> int:
        return len(self.q_proj.weight) // self.head_dim

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As nn.MultiheadAttention.forward. is_causal: a hint that attn_mask is causal; the mask itself is used."""
        assert attn_mask is not None or not is_causal, "is_causal needs the attn_mask that it describes"
        q, k, v = (self._heads(*one) for one in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value)))
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        if attn_mask is not None:
            mask = _additive(attn_mask, scores)
            scores = scores + (mask if mask.dim() == 2 else mask.reshape(len(scores), -1, *mask.shape[1:]))
        if key_padding_mask is not None:
            scores = scores + _additive(key_padding_mask, scores)[..., None, None, :]
        weights = self._dropped(scores.softmax(dim=-1))
        output = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        shown = (weights.mean(dim=1) if average_attn_weights else weights) if need_weights else None
        if query.dim() == 2:
            return output.squeeze(0), None if shown is None else shown.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), shown

    def _heads(self, projection: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """[batch, heads, tokens, width of a head]"""
        projected = projection(x)
        if x.dim() == 2:
            projected = projected.unsqueeze(0)
        elif not self.batch_first:
            projected = projected.transpose(0, 1)
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _dropped(self, weights: torch.Tensor) -> torch.Tensor:
        dropped: torch.Tensor = self.dropout(weights)
        return dropped


class Encoder(nn.TransformerEncoder):
    """Its layers in turn, without nested tensors, which would zero the outputs of padding."""

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
        return src if self.norm is None else self.norm(src)


class Decoder(nn.TransformerDecoder):
    """Its layers in turn, without a look at the values of a mask, which no exporter can follow."""

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=bool(tgt_is_causal),
                memory_is_causal=memory_is_causal,
            )
        return tgt if self.norm is None else self.norm(tgt)


def call_layers_in_turn(module: nn.Module) -> None:
    """Make torch's encoder and decoder stacks in a module call their layers and do nothing else, in place."""
    plain: dict[Any, Any] = {nn.TransformerEncoder: Encoder, nn.TransformerDecoder: Decoder}
    for part in module.modules():
        if type(part) in plain:
            part.__class__ = plain[type(part)]
        elif isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False


def _additive(mask: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A mask whose True means not to attend, as values to add; others are values to add already."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -torch.inf)


def separate_projections(original: nn.MultiheadAttention) -> list[nn.Linear]:
    """Layers for queries, keys and values with copies of its weights."""
    if original.in_proj_weight is not None:
        weights = list(original.in_proj_weight.chunk(3))
    else:
        weights = [original.q_proj_weight, original.k_proj_weight, original.v_proj_weight]
    biases = [None] * 3 if original.in_proj_bias is None else list(original.in_proj_bias.chunk(3))
    return [as_linear(*one) for one in zip(weights, biases, strict=True)]


def as_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
