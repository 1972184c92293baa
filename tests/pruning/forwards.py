"""Attentions as users write them, whose code takes sizes from the input's width, from constants or from attributes."""

from __future__ import annotations

import torch
from torch import nn

HEADS, WIDTH, HEAD = 4, 16, 4


class Attention(nn.Module):
    """One projection for queries, keys and values; sizes are what the code of `forward` says."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.embed_dim, self.qkv = HEADS, WIDTH, nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * HEAD**-0.5).softmax(-1) @ v


class InputWidth(Attention):
    """`B, N, C = x.shape`, and heads of C / heads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(rows, tokens, width))


class Constants(Attention):
    """As many heads as q, k, v, and no attribute or input that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 36), nn.Linear(12, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class InnerAndOuter(Attention):
    """`embed_dim` is the width of the input and that of the heads, and the code checks both."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.size()
        assert width == self.embed_dim
        parts = torch.split(self.qkv(x), [self.embed_dim, self.embed_dim, self.embed_dim], dim=-1)
        q, k, v = (part.view(rows, tokens, -1, HEAD).transpose(1, 2) for part in parts)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(rows, tokens, self.embed_dim))


class MergedBatch(Attention):
    """Heads are rows of the batch, and the code checks the size of the scores."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).split(self.embed_dim, dim=-1)
        q, k, v = (
            part.reshape(rows, tokens, self.num_heads, HEAD)
            .transpose(1, 2)
            .reshape(rows * self.num_heads, tokens, HEAD)
            for part in (q, k, v)
        )
        scores = torch.bmm(q, k.mT)
        if scores.size() != (rows * self.num_heads, tokens, tokens):
            raise ValueError(f"scores of size {scores.size()}")
        mixed = torch.bmm(scores.softmax(-1), v).view(rows, self.num_heads, tokens, HEAD)
        return self.proj(mixed.transpose(1, 2).reshape(rows, tokens, width))


class FewerKeys(Attention):
    """Keys and values of all tokens but the first, from another layer than the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.qkv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        q = self.q(x).reshape(rows, tokens, self.num_heads, width // self.num_heads).permute(0, 2, 1, 3)
        kv = self.kv(x[:, 1:]).reshape(rows, -1, 2, self.num_heads, width // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(rows, tokens, width))


class Scaled(Attention):
    """A factor per head, expanded to all rows and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        qkv = self.qkv(x).view([rows, tokens, 3, HEADS, HEAD])
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        factor = self.scale.expand(rows, HEADS, tokens, 1)
        return self.proj(torch.reshape((self.attend(q * factor, k, v)).transpose(1, 2), (rows, tokens, width)))


class OwnWidth(Attention):
    """A constant number of heads, whose width is computed from what the projections made."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, part.shape[-1] // HEADS)) for part in self.qkv(x).chunk(3, -1))
        mixed = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class KeepsIndices(Attention):
    """Computes the distances of tokens in its first pass, and keeps them (as timm's ConViT does)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.kept = nn.Linear(1, HEADS), torch.zeros(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        if not self.kept.numel():
            places = torch.arange(64.0).to(x)
            self.kept = (places.view(1, -1) - places.view(-1, 1)).reshape(64, 64, 1)
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT + self.bias(self.kept[:tokens, :tokens]).permute(2, 0, 1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, tokens, width))


class TwoParts(Attention):
    """Heads next to as many gated ones, as in ConvBERT: the code gives the width of both together."""

    def __init__(self) -> None:
        super().__init__()
        self.local, self.gate, self.proj = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, HEADS),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        local = self.local(x).unflatten(-1, (HEADS, HEAD)) * self.gate(x).softmax(1)[..., None]
        both = torch.cat([self.attend(q, k, v).transpose(1, 2), local], 2)
        return self.proj(both.reshape(rows, tokens, 2 * width))


KINDS = (TwoParts, KeepsIndices, InputWidth, Constants, InnerAndOuter, MergedBatch, FewerKeys, Scaled, OwnWidth)
FORWARDS = {kind.__name__: kind for kind in KINDS}


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Model(nn.Module):
    """Blocks with these attentions: random rows of tokens to three numbers per token."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block(FORWARDS[kind]()) for kind in kinds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model(*kinds: str) -> Model:
    return Model(*kinds).eval().requires_grad_(False)


def inputs(rows: int = 2, tokens: int = 6) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(1))}
