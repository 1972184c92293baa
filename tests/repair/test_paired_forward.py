"""Walking a model block by block: rows are those of the layer, and nothing depends on where they are kept."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.errors import EnvironmentLacks
from optin_export.repair import RepairSettings, apply_plan, paired_forward
from optin_export.repair.paired_forward import Stream
from optin_export.units import (
    POSITIONS,
    as_matrix,
    block_outputs,
    find_structure,
    get_layer,
    get_module,
    input_rows,
    measured,
    output_rows,
    tensor_of,
)
from optin_export.workdir import disk_offload
from tests.repair.plans import halved
from tests.units.models import batches_for, small_model


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (1, 3), "padding": (0, 2), "dilation": 2},
        {"kernel_size": 1, "stride": 2, "bias": False},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 4, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "stride": 2},
    ],
)
def test_patches_times_weights_are_the_convolution(settings: dict[str, Any]) -> None:
    """Row for row, at the positions drawn for a batch, which are others for another batch."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, **settings).double().requires_grad_(False)
    images = torch.randn(2, 3, 14, 13, dtype=torch.float64)
    expected = layer(images)
    matrix, bias = as_matrix(layer, ""), layer.bias if layer.bias is not None else 0.0
    found = []
    for batch in (0, 1):
        design, output = (
            rows(value, layer, {}, batch) for rows, value in ((input_rows, images), (output_rows, expected))
        )
        count = min(POSITIONS, expected.shape[2] * expected.shape[3])
        assert design.shape == (2 * count, matrix.shape[1]) and output.shape == (2 * count, 5)
        torch.testing.assert_close(design @ matrix.T + bias, output)
        found.append(output)
    assert expected.shape[2] * expected.shape[3] <= POSITIONS or not torch.equal(*found)


def test_rows_of_a_linear_layer_leave_padding_out() -> None:
    layer, inputs = nn.Linear(4, 2), {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    hidden = torch.arange(24.0).view(2, 3, 4)
    assert input_rows(hidden, layer, inputs, 0).tolist() == [
        hidden[0, 0].tolist(),
        hidden[0, 1].tolist(),
        hidden[1, 0].tolist(),
    ]
    assert len(output_rows((layer(hidden), None), layer, inputs, 0)) == 3
    assert len(output_rows(torch.zeros(2, 4), layer, inputs, 0)) == 2  # one row per sample: a pooled output
    assert len(output_rows(hidden, layer, {}, 0)) == 6


@pytest.mark.parametrize("name", ["bert", "deit-transformers", "resnet-timm-bottleneck", "vgg"])
def test_a_layer_is_seen_as_in_a_whole_pass(name: str) -> None:
    """Behind blocks whose outputs are replayed, every layer reads what it reads in a plain forward pass."""
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 2, size=3)
    stream = Stream(model, structure, batches)
    for block, path in enumerate(structure.blocks):
        for group in (group for group in structure.groups if group.block == block):
            for index, batch in enumerate(batches):
                seen: dict[str, torch.Tensor] = {}

                def before(module: nn.Module, args: Any, seen: Any = seen) -> None:
                    seen["input"] = args[0].clone()

                def after(module: nn.Module, args: Any, output: Any, seen: Any = seen) -> None:
                    seen["output"] = output.clone()

                layer = get_layer(model, group.consumer)
                handles = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
                with torch.no_grad():
                    model(**batch.inputs)
                for handle in handles:
                    handle.remove()
                points: list[paired_forward.Point] = [(group.consumer, 0), (group.consumer, "output")]
                found = stream.see(index, points, group.consumer)
                torch.testing.assert_close(found[points[0]], seen["input"], rtol=0, atol=0)
                torch.testing.assert_close(found[points[1]], seen["output"], rtol=0, atol=0)
        stream.advance(block)
        for index, batch in enumerate(batches):
            with torch.no_grad(), block_outputs(model, [path]) as outputs:
                model(**batch.inputs)
            assert torch.equal(tensor_of(stream.store[index]), tensor_of(outputs[path]))
    stream.close()


def test_blocks_behind_are_not_computed_again() -> None:
    model, _ = small_model("bert")
    structure, batches = find_structure(model), batches_for(model, 2, size=3)
    stream, calls = Stream(model, structure, batches), []
    get_module(model, structure.groups[1].consumer).register_forward_hook(lambda *args: calls.append(1))
    stream.advance(0)
    assert len(calls) == 2
    stream.advance(1)
    stream.see(0, [(structure.groups[-1].consumer, 0)], structure.groups[-1].consumer)
    assert len(calls) == 2
    stream.close()


def test_without_replay_a_pass_stops_where_everything_was_seen() -> None:
    """Points behind the module where it may stop are seen all the same."""
    model, _ = small_model("vit")
    structure, batches = find_structure(model), batches_for(model, 1, size=3)
    structure = measured(model, structure, batches[0].inputs)
    assert structure.walk is not None
    whole = dataclasses.replace(structure, walk=dataclasses.replace(structure.walk, whole="for this test"))
    stream, calls = Stream(model, whole, batches), []
    first, last = structure.groups[0].consumer, structure.groups[-1].consumer
    get_module(model, last).register_forward_hook(lambda *args: calls.append(1))
    points: list[paired_forward.Point] = [(first, 0), (last, "output")]
    (early,) = stream.see(0, points[:1], first).values()
    assert not calls
    found = stream.see(0, points, first)
    assert len(calls) == 1 and torch.equal(found[points[0]], early)
    with torch.no_grad(), block_outputs(model, [last]) as outputs:
        model(**batches[0].inputs)
    assert torch.equal(found[points[1]], outputs[last])
    stream.close()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("limit", [0, 5000])
def test_activations_beyond_the_limit_lie_in_files(
    limit: int, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same values from files and from memory, and no file is left."""
    model, _ = small_model("bert")
    structure, batches = find_structure(model), batches_for(model, 4, size=3)
    monkeypatch.setattr(disk_offload, "IN_MEMORY", limit)  # one block's output for a batch is 3 * 12 * 32 * 4 bytes
    stream = Stream(model, structure, batches)
    for block, path in enumerate(structure.blocks):
        stream.advance(block)
        assert len(list(temporary.rglob("*.pt"))) == (4 if limit == 0 else 3)
        for index, batch in enumerate(batches):
            with torch.no_grad(), block_outputs(model, [path]) as outputs:
                model(**batch.inputs)
            assert torch.equal(tensor_of(stream.store[index]), tensor_of(outputs[path]))
    stream.close()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["vit-transformers", "resnet-torchvision"])
def test_the_repair_is_the_same_from_files(name: str, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 3, size=3)
    results = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(disk_offload, "IN_MEMORY", limit)
        results.append(apply_plan(model, structure, halved(structure), batches, batches[0].inputs, RepairSettings()))
    states = [result.dense.state_dict() for result in results]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert results[0].repairs == results[1].repairs
    assert list(temporary.iterdir()) == []


def test_a_full_disk_says_where_to_make_room(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the files written until then are removed."""
    model, _ = small_model("bert")
    structure, batches = find_structure(model), batches_for(model, 3, size=2)
    monkeypatch.setattr(disk_offload, "IN_MEMORY", 0)
    save, calls = torch.save, []

    def full(value: Any, file: Any) -> None:
        calls.append(file)
        if len(calls) == 3:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        save(value, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(EnvironmentLacks, match="TMPDIR"):
        apply_plan(model, structure, halved(structure), batches, batches[0].inputs, RepairSettings())
    assert list(temporary.iterdir()) == []
