"""CoaT's attention, whose positions are convolutions over its values, with as many heads as its weights have.

Blocks of a stage share the convolutions, of which each filters the values of some of the heads.
"""

from __future__ import annotations

from typing import Any

import torch

from optin_export.models.equivalents.adapted import adapt


def heads_of_weights(attention: Any) -> None:
    """Let a FactorAttnConvRelPosEnc of timm, and its convolutions, follow their weights, in place."""
    attention.head_dim = len(attention.qkv.weight) // 3 // attention.num_heads
    del attention.num_heads
    adapt(attention, _attention)
    if "channel_splits" in vars(attention.crpe):  # not yet, for another block
        del attention.crpe.channel_splits, attention.crpe.head_splits
        adapt(attention.crpe, _convolutions)


def _attention(base: Any) -> dict[str, Any]:
    def forward(self: Any, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """x: [batch, 1 + height * width, features]; size: (height, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        factors = q @ (k.softmax(dim=2).transpose(-1, -2) @ v)
        attended = self.scale * factors + self.crpe(q, v, size=size)
        output: torch.Tensor = self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))
        return output

    return {"forward": forward}


def _convolutions(base: Any) -> dict[str, Any]:
    return {"channel_splits": property(lambda self: [conv.in_channels for conv in self.conv_list])}
