"""Attention of timm's BEiT and EVA, with its biases in the projection.

They reshape the attention's result to the width of its input, so no head can be removed, and they keep the biases of
the fused projection separately. Here both follow the weights. The same holds for the biases of timm's Swin V2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class SelfAttention(nn.Module):
    """Self-attention of [batch, tokens, features] with an optional rotary embedding and relative position bias.

    original: an attention of timm's BEiT or EVA; its layers are reused, and its biases moved into the projection. The
    keys' bias, which is zero there, is a parameter here.
    """

    relative_position_index: torch.Tensor

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = original.num_heads, original.scale
        self.qkv, self.proj = fused_projection(original), original.proj
        self.q_norm, self.k_norm = (getattr(original, name, nn.Identity()) for name in ("q_norm", "k_norm"))
        self.num_prefix_tokens = getattr(original, "num_prefix_tokens", 0)
        self.rotate_half = getattr(original, "rotate_half", False)
        self.relative_position_bias_table = getattr(original, "relative_position_bias_table", None)
        if self.relative_position_bias_table is not None:
            self.register_buffer("relative_position_index", original.relative_position_index, persistent=False)

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None = None, **unused: Any) -> torch.Tensor:
        given = [name for name, value in unused.items() if value is not None and value is not False]
        assert not given, f"attention with {given}"
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._turned(q, rope), self._turned(k, rope)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if self.relative_position_bias_table is not None:
            index = self.relative_position_index
            bias = self.relative_position_bias_table[index.reshape(-1)].reshape(*index.shape, -1)
            scores = scores + bias.permute(2, 0, 1)
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, -1))

    def _turned(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        from timm.layers import apply_rot_embed_cat

        first = self.num_prefix_tokens
        turned = apply_rot_embed_cat(x[:, :, first:], rope, half=self.rotate_half)
        return torch.cat([x[:, :, :first], turned], dim=2)


def fused_projection(original: Any) -> nn.Linear:
    """The projection to queries, keys and values, one after another, as one layer with its biases."""
    if original.qkv is not None:
        weight = original.qkv.weight
        biases = [getattr(original, name) for name in ("q_bias", "k_bias", "v_bias")]
    else:
        projections = (original.q_proj, original.k_proj, original.v_proj)
        weight = torch.cat([one.weight for one in projections])
        biases = [one.bias for one in projections]
    parts = weight.chunk(3)
    has_bias = any(bias is not None for bias in biases)
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        fused.weight.copy_(weight)
        if has_bias:
            rows = zip(parts, biases, strict=True)
            fused.bias.copy_(torch.cat([part.new_zeros(len(part)) if one is None else one for part, one in rows]))
    return fused
