"""WavLM's attention with its projections called as layers.

All layers share their position biases, and each head scales them by a gate that reads this head's part of the hidden
states. Both are given for all heads of the unpruned model to an attention of its own, which selects those of its heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optin_export.models.equivalents.adapted import adapt


class GatedAttention(nn.Module):
    """Self-attention of [batch, tokens, features] with gated biases; the number of heads is what the weights have.

    original: a WavLMAttention; its layers are reused.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.head_dim = original.head_dim
        self.q_proj, self.k_proj = original.q_proj, original.k_proj
        self.v_proj, self.out_proj = original.v_proj, original.out_proj
        self.gate, self.factor = original.gru_rel_pos_linear, original.gru_rel_pos_const

    def forward(
        self, hidden: torch.Tensor, parts: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """parts: float32 [batch, heads, tokens, width of a head]; bias: [batch, heads, tokens, tokens]; mask: [batch,
        tokens], 1 where a token is not padding."""
        q, k, v = (
            layer(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        reset, update = self.gate(parts).unflatten(-1, (2, 4)).sum(-1).sigmoid().split(1, dim=-1)
        gate = reset * (update * self.factor - 1.0) + 2.0
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1) + gate * bias
        if mask is not None:
            scores = scores.masked_fill(mask.ne(1)[:, None, None], float("-inf"))
        attended: torch.Tensor = self.out_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        return attended


def gated_biases(attention: Any) -> None:
    """Let a WavLMAttention give all heads' biases and parts to a `GatedAttention`, in place."""
    attention.gated = GatedAttention(attention)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj", "gru_rel_pos_linear", "gru_rel_pos_const"):
        delattr(attention, name)
    adapt(attention, _gated)


def _gated(base: Any) -> dict[str, Any]:
    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        index: int = 0,
        **unused: Any,
    ) -> tuple[torch.Tensor, None, torch.Tensor]:
        batch, tokens, _ = hidden_states.shape
        if position_bias is None:
            position_bias = self.compute_bias(tokens, tokens)[None].expand(batch, -1, -1, -1)
        parts = hidden_states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.gated(hidden_states, parts, position_bias, attention_mask), None, position_bias

    return {"forward": forward}
