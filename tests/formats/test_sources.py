"""The Python file of an exported folder has all that its code calls."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.formats.changes import EQUIVALENTS
from optin_export.formats.sources import modeling_file, timm_file


def test_the_sizes_in_code_are_replaced_by_the_file_alone() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(len(x), 4, 2).sum(1)

    names: dict[str, Any] = {"__name__": "modeling_pruned"}
    exec(modeling_file("BertModel", list(EQUIVALENTS)), names)
    module, x = Halves(), torch.randn(3, 4)
    names["replace_size"](module, "(reshape 0 1)", 1, 2)
    torch.testing.assert_close(module(x), x[:, :2] + x[:, 2:])


@pytest.mark.parametrize("source", [modeling_file("BertModel", EQUIVALENTS), timm_file(EQUIVALENTS)])
def test_every_name_of_the_python_file_is_defined(source: str) -> None:
    """The file is put together from functions of several modules, whose constants it needs as well."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    done = subprocess.run(command, input=source, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
