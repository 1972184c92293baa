"""The Python file of an exported folder has all that its code calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optin_export.formats.changes import EQUIVALENTS
from optin_export.formats.sources import modeling_file


def test_the_sizes_in_code_are_replaced_by_the_file_alone() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(len(x), 4, 2).sum(1)

    names: dict[str, Any] = {"__name__": "modeling_pruned"}
    exec(modeling_file("BertModel", list(EQUIVALENTS)), names)
    module, x = Halves(), torch.randn(3, 4)
    names["replace_size"](module, "(reshape 0 1)", 1, 2)
    torch.testing.assert_close(module(x), x[:, :2] + x[:, 2:])
