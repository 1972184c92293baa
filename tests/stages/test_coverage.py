"""Which layers a note names when units cover little of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optin_export.stages.coverage import _largest
from optin_export.units import find_structure
from tests.units.models import inputs_for, small_model


class Router(nn.Linear):
    """A linear layer that returns more than its product, as routers of experts do."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


def test_layers_that_return_no_tensor_are_left_out() -> None:
    model, _ = small_model("vit")
    structure = find_structure(model)
    old = model.model.head
    router = Router(old.in_features, old.out_features)
    model.model.head = nn.Sequential(router, First())
    after = _largest(model, structure, inputs_for(model, 2, 0))
    assert list(dict(after)) == ["model.patch_embed.proj"]


class First(nn.Module):
    def forward(self, x: Any) -> torch.Tensor:
        return x[0]
