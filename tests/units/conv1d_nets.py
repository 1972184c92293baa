"""Small networks of a user's own file with convolutions over one dimension."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv1d(width, 24, 5, padding=2, bias=False), nn.BatchNorm1d(24)
        self.reduce = nn.Conv1d(24, width, 3, padding=2, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = x + self.reduce(torch.relu(self.norm(self.expand(x))))
        return output


class Signals(nn.Module):
    """Rows of an image as the channels of a signal: a stem, two residual blocks, and a mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(48, 16, 4, stride=1)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.hidden, self.norm, self.head = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.flatten(1, 2))
        for block in self.blocks:
            x = block(x)
        output: torch.Tensor = self.head(torch.relu(self.norm(self.hidden(x.mean(2)))))
        return output


def signals() -> nn.Module:
    torch.manual_seed(0)
    net = Signals()
    for norm in [part for part in net.modules() if isinstance(part, nn.BatchNorm1d)]:
        nn.init.normal_(norm.bias, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.running_mean, std=0.1)
    return net.eval()
