"""A task model in float64: exact where float32 is not, and no answer where its code has only one type."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from optin_export.models import in_float64


class Cancelling(nn.Module):
    """(x + large) - large: float32 keeps few digits of x."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.tensor(large))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.large) - self.large


def test_digits_that_float32_loses_are_kept() -> None:
    x = np.array([[0.3, 1.7], [0.1, 0.2]], np.float32)
    model = Cancelling(1000.0)
    np.testing.assert_allclose(in_float64(model)({"x": x}), x, rtol=1e-12)
    assert np.abs(model(torch.from_numpy(x)).detach().numpy() - x).max() > 1e-5


def test_numbers_of_tokens_stay_whole() -> None:
    """And the model itself stays in float32."""
    model = nn.Embedding(5, 3)

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids).sum(1)

    found = in_float64(Text())({"input_ids": np.array([[0, 4, 2]])})
    np.testing.assert_allclose(found, model.weight[[0, 4, 2]].detach().double().numpy().sum(0)[None])
    assert model.weight.dtype == torch.float32


def test_code_that_names_its_type_has_no_other() -> None:
    class Fixed(Cancelling):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).float()

    class Mixed(Cancelling):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) @ torch.ones(2, 2)

    for kind in (Fixed, Mixed):
        assert in_float64(kind(1.0))({"x": np.ones((1, 2), np.float32)}) is None
