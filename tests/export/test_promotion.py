"""A float minus integers exports, and gives what torch gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch

from optin_export.export import export_onnx
from optin_export.export.promotion import differences_of_floats


class Inverted(torch.nn.Module):
    """XLNet computes its mask of padding so."""

    output_name = "logits"

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return (1.5 - input_ids) + (7 - input_ids) + (0.5 - input_ids.float())


def test_a_float_minus_integers_is_exported(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 1], [9, 4, 1, 0, 0]])
    model: Any = Inverted()
    export_onnx(model, {"input_ids": ids}, tmp_path / "a.onnx", max_batch=8, sequence=16)
    [found] = onnxruntime.InferenceSession(tmp_path / "a.onnx").run(None, {"input_ids": ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(ids))


def test_results_and_types_are_torchs_and_nothing_stays_changed() -> None:
    before = torch.Tensor.__rsub__
    for tensor in (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.uint8), torch.rand(2).double()):
        for number in (1.5, 3):
            expected = number - tensor
            with differences_of_floats():
                found = number - tensor
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
    assert torch.Tensor.__rsub__ is before
