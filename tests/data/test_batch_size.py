"""How many rows go through a model at once: by the bytes that a backward pass needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from optin_export.data import batch_size, load_sources
from optin_export.data.batch_size import rows_at_once, saved_bytes
from optin_export.recipe import validate
from tests.conftest import Make


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 20), nn.Linear(20, 5)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return result


def test_inputs_and_activations_are_counted_and_weights_are_not() -> None:
    """The first layer's input, and tanh's output, which the second layer reads as well."""
    model = Chain()
    assert saved_bytes(model, {"x": torch.randn(3, 10)}) == 3 * 4 * (10 + 20)  # type: ignore[arg-type]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_rows_are_halved_until_their_graph_fits(
    vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = load_sources(validate(vit_recipe(), tmp_path))
    model, processor, examples = sources.model, sources.processor, sources.calibration_examples
    assert rows_at_once(model, processor, examples) == 32 and len(sources.calibration[0].rows) == 32
    each = saved_bytes(model, {name: value[:1].clone() for name, value in sources.calibration[0].inputs.items()})
    for room, rows in ((32, 32), (31, 16), (9, 8), (5, 4), (1, 4)):
        monkeypatch.setattr(batch_size, "GRAPH_BYTES", room * each)
        assert rows_at_once(model, processor, examples) == rows
    fewer = load_sources(validate(vit_recipe(), tmp_path))
    assert {len(batch.rows) for batch in fewer.calibration} == {4}
