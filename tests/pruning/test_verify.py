"""Units that were found are kept only if the rebuilt model is the masked one."""

from __future__ import annotations

from pathlib import Path

import torch

from optin_export.models import build
from optin_export.pruning import verified
from optin_export.units import find_structure
from tests.units.builders import from_python

NET = """
import torch
from torch import nn


class Windowed(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = self.window = 4  # the same by chance
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        rows = self.qkv(x).unflatten(1, (-1, self.window))  # [batch, windows, tokens, features]
        q, k, v = rows.unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        mixed = (q @ k.mT).softmax(-1) @ v
        return x + self.proj(mixed.transpose(2, 3).flatten(3).flatten(1, 2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(Windowed() for _ in range(2))

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def net():
    torch.manual_seed(0)
    return Net().eval()
"""


def test_an_attribute_that_equals_the_number_of_heads_by_chance_stays(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(NET)
    description = from_python(file, "net")()
    model = build({**description, "task": "image-classification", "pooling": None, "normalize": False}, True)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    structure = verified(model, find_structure(model, inputs=inputs), inputs)
    assert [(group.kind, group.count, group.sizes) for group in structure.groups] == [
        ("heads", 4, ((f"model.blocks.{number}.num_heads", 1),)) for number in (0, 1)
    ]
