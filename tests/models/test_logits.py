"""Which tensor of a classifier's output holds its logits."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from optin_export.errors import InputError
from optin_export.models import wrap
from optin_export.models.logits import logits_of

LOGITS, OTHER = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 3)
Named = namedtuple("Named", "aux logits")  # noqa: PYI024: as users write it


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        {"logits": LOGITS, "aux": OTHER},
        {"aux": OTHER, "out": LOGITS},
        {"classes": LOGITS, "loss": None},
        ImageClassifierOutput(logits=LOGITS, hidden_states=(OTHER,)),
        Named(OTHER, LOGITS),
        (LOGITS,),
        [LOGITS, None],
    ],
)
def test_what_is_named_or_alone_is_taken(output: Any) -> None:
    assert logits_of(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ((LOGITS, OTHER), "a tuple of 2 values"),
        ({"a": LOGITS, "b": OTHER}, "a dictionary with 'a', 'b'"),
        ({}, "a dictionary with nothing"),
        (None, "a NoneType"),
    ],
)
def test_what_could_be_several_is_refused(output: Any, why: str) -> None:
    with pytest.raises(InputError, match=f"forward returns {why}"):
        logits_of(output)


class Two(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.conv = name, nn.Conv2d(3, 4, 1)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        made = self.conv(pixel_values)
        return {"auxiliary": made.mean((1, 2, 3)), self.name: made}


@pytest.mark.parametrize("name", ["logits", "out"])
@pytest.mark.parametrize("task", ["image-classification", "image-segmentation"])
def test_own_models_may_return_a_dictionary(task: str, name: str) -> None:
    model, pixels = Two(name), torch.randn(2, 3, 4, 4)
    assert torch.equal(wrap(model, task)(pixel_values=pixels), model.conv(pixels))
