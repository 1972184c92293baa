"""Attention in shifted windows of torchvision's Swin and Swin V2, whose layers are called as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

_MOST = 4.605170185988092  # log(100): the largest scale of the cosines


class WindowAttention(nn.Module):
    """Self-attention in the windows of [batch, height, width, features].

    original: a ShiftedWindowAttention(V2) of torchvision; its layers, parameters and buffers are reused. The keys' bias
    of version 2, which is replaced by zero there, is zero here. The width of a head is fixed, and their number is what
    the weights have.
    """

    relative_coords_table: torch.Tensor
    relative_position_index: torch.Tensor

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.window_size, self.shift_size = tuple(original.window_size), tuple(original.shift_size)
        self.head_dim = original.proj.in_features // original.num_heads
        self.is_cosine = hasattr(original, "logit_scale")
        self.qkv, self.proj = original.qkv, original.proj
        if self.is_cosine:
            self.logit_scale, self.cpb_mlp = original.logit_scale, original.cpb_mlp
            self.register_buffer("relative_coords_table", original.relative_coords_table)
            if self.qkv.bias is not None:
                with torch.no_grad():
                    self.qkv.bias.chunk(3)[1].zero_()
        else:
            self.relative_position_bias_table = original.relative_position_bias_table
        self.register_buffer("relative_position_index", original.relative_position_index)
        self.attention_dropout, self.dropout = nn.Dropout(original.attention_dropout), nn.Dropout(original.dropout)
        self.train(original.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        padding = [-size % window for size, window in zip((height, width), self.window_size, strict=True)]
        x = functional.pad(x, (0, 0, 0, padding[1], 0, padding[0]))
        padded = (height + padding[0], width + padding[1])
        both = zip(self.shift_size, self.window_size, padded, strict=True)
        shift = [0 if window >= size else shift for shift, window, size in both]
        x = torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))
        x = self._merged(self._attended(self._windows(x), shift, padded), padded)
        return torch.roll(x, (shift[0], shift[1]), dims=(1, 2))[:, :height, :width].contiguous()

    def _attended(self, x: torch.Tensor, shift: list[int], padded: tuple[int, int]) -> torch.Tensor:
        """x: [batch, windows, tokens of a window, features]"""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        if self.is_cosine:
            cosines = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
            scores = cosines * self.logit_scale.clamp(max=_MOST).exp()
        else:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        scores = scores + self._position_bias()
        if any(shift):
            scores = scores + self._mask(x, shift, padded)
        attended = self.attention_dropout(scores.softmax(dim=-1)) @ v
        return self.dropout(self.proj(attended.transpose(2, 3).flatten(3)))

    def _position_bias(self) -> torch.Tensor:
        """[heads, tokens of a window, tokens of a window]"""
        tokens = self.window_size[0] * self.window_size[1]
        if not self.is_cosine:
            table = self.relative_position_bias_table
            return table[self.relative_position_index].unflatten(0, (tokens, tokens)).permute(2, 0, 1)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        bias = table[self.relative_position_index].unflatten(0, (tokens, tokens)).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias)

    def _mask(self, x: torch.Tensor, shift: list[int], padded: tuple[int, int]) -> torch.Tensor:
        """[windows, 1, tokens of a window, tokens of a window]: -100 between parts that are no neighbours."""
        parts = []
        for size, window, moved in zip(padded, self.window_size, shift, strict=True):
            # An axis that is not shifted is one part, as in torchvision: its last slice is the whole axis.
            position = torch.arange(size, device=x.device)
            parts.append(
                (position >= size - window).int() + (position >= size - moved).int() if moved else 0 * position
            )
        label = (3 * parts[0][:, None] + parts[1][None, :])[None, :, :, None]
        label = self._windows(label)[0, :, :, 0]
        return (label[:, None, :, None] != label[:, None, None, :]).to(x.dtype) * -100.0

    def _windows(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, height, width, features] as [batch, windows, tokens of a window, features]"""
        x = x.unflatten(2, (-1, self.window_size[1])).unflatten(1, (-1, self.window_size[0]))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _merged(self, x: torch.Tensor, padded: tuple[int, int]) -> torch.Tensor:
        rows, columns = (size // window for size, window in zip(padded, self.window_size, strict=True))
        x = x.unflatten(2, self.window_size).unflatten(1, (rows, columns))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
