"""Probes change a model only as long as a question is asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optin_export.units.passes import few_rows
from optin_export.units.probes import without_zeros


def test_zeros_come_back_with_their_signs() -> None:
    model = nn.Linear(4, 3).requires_grad_(False)
    model.bias.zero_()
    model.weight[0] = torch.tensor([0.0, -0.0, 2.0, -3.0])
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with pytest.raises(ValueError, match="inside"), without_zeros(model):
        assert (model.weight != 0).all()
        assert (model.bias != 0).all()
        assert torch.equal(model.weight[0, 2:], torch.tensor([2.0, -3.0]))
        raise ValueError("inside")
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32))


class OneLength(nn.Module):
    def __init__(self, error: type[Exception], length: int) -> None:
        super().__init__()
        self.error, self.length = error, length

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] != self.length:
            raise self.error("of the model")
        return ids.float()


IDS = {"ids": torch.ones(2, 40, dtype=torch.long)}


def test_texts_are_shortened_if_the_model_takes_shorter_ones() -> None:
    assert few_rows(OneLength(RuntimeError, 40), IDS, rows=1)["ids"].shape == (1, 40)
    assert few_rows(OneLength(RuntimeError, 8), IDS, rows=2, tokens=8)["ids"].shape == (2, 8)


@pytest.mark.parametrize(("error", "length"), [(KeyError, 40), (RuntimeError, 41)])
def test_other_errors_are_not_taken_for_a_matter_of_length(error: type[Exception], length: int) -> None:
    with pytest.raises(error, match="of the model"):
        few_rows(OneLength(error, length), IDS, rows=1)
