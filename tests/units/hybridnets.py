"""Small networks of a user's own file: blocks of several families in one model, and parts that are used twice."""

from __future__ import annotations

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class ResidualThenAttention(nn.Module):
    """A residual backbone, a transformer neck and a convolutional head; the neck is defined before the backbone.

    gate: the blocks of the neck have a norm across heads, which refuses them.
    """

    def __init__(self, norm_of_heads: bool = False) -> None:
        super().__init__()
        self.neck = nn.Sequential(Block(16, 4, mlp_ratio=2.0), Block(16, 4, mlp_ratio=2.0))
        if norm_of_heads:
            for block in self.neck:
                block.attn.norm = nn.LayerNorm(16)
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 4, 4), BasicBlock(16), BasicBlock(16))
        self.head = nn.Sequential(
            nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 5, 1)
        )
        self.idle = BasicBlock(16)  # a head for training: it never runs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.backbone(x)
        tokens = self.neck(x.flatten(2).mT)
        return self.head(tokens.mT.unflatten(2, x.shape[2:])).mean((2, 3))


class Residual(nn.Module):
    """Three residual blocks. share: what of them is used in two places."""

    def __init__(self, share: str = "") -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
        blocks = [BasicBlock(16) for _ in range(3)]
        if share == "block":
            blocks[2] = blocks[0]
        if share == "all":
            blocks = [blocks[0]] * 3
        if share == "layer":
            blocks[2].conv2 = blocks[0].conv2
        if share == "norm":
            blocks[2].bn1 = blocks[0].bn1
        if share == "parameter":
            blocks[2].conv1.weight = blocks[0].conv1.weight
        if share == "storage":
            blocks[2].conv1.weight.data = blocks[0].conv1.weight.data
        self.blocks = nn.Sequential(*blocks)
        self.times = 2 if share == "recurrent" else 1
        self.siamese = share == "siamese"
        if share == "alias":
            self.first, self.encoder = self.blocks[0], self.blocks

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = self.blocks(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.siamese:
            return self.head((self.encode(x) - self.encode(x.flip(3))).abs().mean((2, 3)))
        return self.head(self.encode(x).mean((2, 3)))


class Attention(nn.Module):
    """Three transformer blocks, called by names other than those under which they are found first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
        self.blocks = nn.Sequential(*[Block(16, 4, mlp_ratio=2.0) for _ in range(3)])
        self.steps = nn.ModuleList([part for block in self.blocks for part in (block.norm1, block.attn)])
        self.again = self.blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.stem(x).flatten(2).mT).mean(1))


def lively(model: nn.Module) -> nn.Module:
    """Statistics that a batch norm has after training, so that no channel is dead."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    return model


def hybrid(**args: bool) -> nn.Module:
    torch.manual_seed(0)
    return lively(ResidualThenAttention(**args))


def residual(share: str = "") -> nn.Module:
    torch.manual_seed(0)
    return lively(Residual(share))


def attention() -> nn.Module:
    torch.manual_seed(0)
    return lively(Attention())


def images() -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).integers(0, 255, (48, 16, 16, 3), dtype=np.uint8)}
