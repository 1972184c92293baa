"""Own text models name what they take as they like, and need take no mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import optin_export as oe
from optin_export.models import wrap

IDS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.wide, self.head = nn.Embedding(20, 8), nn.Linear(8, 32), nn.Linear(32, 3)

    def of(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        states = self.wide(self.words(ids)).relu() * weights[..., None]
        return self.head(states.mean(1))  # type: ignore[no-any-return]


class WithoutMask(Words):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.of(tokens, torch.ones_like(tokens))


class WithMask(Words):
    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.of(x, attention_mask)


class AnyNames(Words):
    def forward(self, **given: Any) -> torch.Tensor:
        return self.of(given["input_ids"], given["attention_mask"])


@pytest.mark.parametrize("model", [WithoutMask(), WithMask(), AnyNames()])
def test_the_model_gets_what_it_takes(model: Words) -> None:
    wrapped: Any = wrap(model, "text-classification")
    weights = torch.ones_like(MASK) if isinstance(model, WithoutMask) else MASK
    given = {"input_ids": IDS} | ({"attention_mask": MASK} if wrapped.reads_mask else {})
    assert wrapped.reads_mask is not isinstance(model, WithoutMask)
    assert torch.equal(wrapped(**given), model.of(IDS, weights))


def test_a_model_without_a_mask_is_pruned_and_exported(tmp_path: Path) -> None:
    import onnxruntime

    batches = [
        {"input_ids": torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(i))} for i in range(4)
    ]
    small = oe.prune(WithoutMask().eval(), batches, macs=0.6, task="text-classification")
    small.to_onnx(tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["input_ids"]
    (found,) = session.run(None, {"input_ids": IDS[:, :4].numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, small.model(IDS[:, :4]).numpy(), rtol=1e-4, atol=1e-6)
