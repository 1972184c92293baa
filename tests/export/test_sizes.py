"""A graph takes every batch and length, or the model is refused: the exporter itself fixes sizes without an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from optin_export.errors import OptinError
from optin_export.export import export_onnx, export_program

IDS = torch.tensor([[5, 6, 7, 8, 1], [9, 4, 1, 0, 0]])


class Doubled(torch.nn.Module):
    output_name = "logits"

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return 2.0 * input_ids


class OneByOne(Doubled):
    """Takes the rows, or the tokens, one by one: a graph holds as many as the example has."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([2.0 * part for part in input_ids.unbind(self.axis)], self.axis)


@pytest.mark.parametrize(("axis", "what"), [(0, "batches of 2"), (1, "sequences of 4")])
def test_a_graph_for_one_size_only_is_refused(axis: int, what: str, tmp_path: Path) -> None:
    """The exporter goes on with the example's size, without an error, where a model's code makes it a constant."""
    model: Any = OneByOne(axis)
    with pytest.raises(OptinError, match=f"the graph would take {what} only"):
        export_onnx(model, {"input_ids": IDS[:, :4]}, tmp_path / "a.onnx", max_batch=8, sequence=16)


class Query(Doubled):
    """Its output is read from one query, repeated `len(x)` times: Python makes a plain number of this size."""

    def __init__(self) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.tensor([[[1.0, 2.0]]]))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = torch.stack([input_ids, input_ids**2], -1) / 10.0
        query = self.query.expand(len(input_ids), -1, -1)
        return ((query @ states.transpose(1, 2)).softmax(-1) @ states).flatten(1)


@pytest.mark.parametrize("most", [2, 8])
def test_a_size_that_python_makes_a_number_stays_free(most: int, tmp_path: Path) -> None:
    import onnxruntime

    model: Any = Query()
    export_onnx(model, {"input_ids": IDS}, tmp_path / "a.onnx", max_batch=most, sequence=16)
    export_program(model, {"input_ids": IDS}, tmp_path / "a.pt2", max_batch=most, sequence=16)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(tmp_path / "a.pt2").module()
    for rows, length in ((1, 3), (2, 5), (most, 16)):
        given = torch.randint(1, 9, (rows, length), generator=torch.Generator().manual_seed(rows))
        (found,) = session.run(None, {"input_ids": given.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(given))
        torch.testing.assert_close(program(input_ids=given), model(given))


class Keeps(Doubled):
    """Computes a table in its first pass and keeps it, as timm's ConViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.table.shape[0] != 8:
            self.table = torch.arange(8.0)
        return input_ids[..., None] * self.table


def test_what_a_model_keeps_from_its_first_pass_is_no_obstacle(tmp_path: Path) -> None:
    model: Any = Keeps()
    export_onnx(model, {"input_ids": IDS}, tmp_path / "a.onnx", max_batch=8, sequence=16)
    [value] = onnx.load(tmp_path / "a.onnx").graph.input
    assert [dim.dim_param for dim in value.type.tensor_type.shape.dim] == ["batch", "sequence"]


class InWindows(Doubled):
    """Adds to every token the sum of its window of four, after padding to whole windows where that is needed."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        whole = input_ids
        if length % 4 != 0:
            whole = torch.nn.functional.pad(input_ids, (0, -length % 4))
        windows = whole.reshape(-1, whole.shape[1] // 4, 4)
        return (windows + windows.sum(2, keepdim=True)).flatten(1)[:, :length].float()


def test_a_model_that_pads_to_whole_windows_takes_every_length(tmp_path: Path) -> None:
    """Although the example has whole windows: the exporter would leave the padding out."""
    import onnxruntime

    model: Any = InWindows()
    example = torch.randint(1, 9, (2, 8), generator=torch.Generator().manual_seed(0))
    export_onnx(model, {"input_ids": example}, tmp_path / "a.onnx", max_batch=8, sequence=8)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for length in range(2, 9):
        given = example[:, :length]
        (found,) = session.run(None, {"input_ids": given.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(given))
