"""A model's own rounding: its output in float32 against float64, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from optin_export.models import rounding_of


class Cancelling(nn.Module):
    """(x + large) - large: float32 keeps few digits of x."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.tensor(large))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.large) - self.large


def test_the_largest_difference_of_a_row_relative_to_it() -> None:
    x = np.array([[0.3, 1.7], [0.1, 0.2]], np.float32)
    rounded = (x + np.float32(1000.0)) - np.float32(1000.0)
    expected = (np.abs(rounded.astype(np.float64) - x).max(1) / np.abs(x.astype(np.float64)).max(1)).max()
    assert rounding_of(Cancelling(1000.0))({"x": x}) == pytest.approx(expected, rel=1e-6)
    assert expected > 1e-5


def test_numbers_of_tokens_stay_whole() -> None:
    """And the model itself stays in float32."""
    model = nn.Embedding(5, 3)

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids).sum(1)

    assert rounding_of(Text())({"input_ids": np.array([[0, 4, 2]])}) < 1e-6
    assert model.weight.dtype == torch.float32


def test_code_that_names_its_type_has_no_other() -> None:
    class Fixed(Cancelling):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).float()

    class Mixed(Cancelling):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) @ torch.ones(2, 2)

    for kind in (Fixed, Mixed):
        assert rounding_of(kind(1.0))({"x": np.ones((1, 2), np.float32)}) is None
