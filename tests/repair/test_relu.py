"""Where a ReLU follows, the least squares looks through it; where none does, it stays what it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.repair import RepairSettings, apply_plan, layer_problem
from optin_export.repair.paired_forward import Stream
from optin_export.repair.relu import ReluTarget, relu_of_units, shift_of_block_relu
from optin_export.repair.sequential import HEAD, output_layer
from optin_export.units import Producer, Structure, UnitGroup, find_structure, tensor_of
from tests.repair.plans import halved
from tests.units.models import batches_for, small_model


@pytest.mark.parametrize("shift_per_row", [False, True])
def test_the_target_majorises_the_error_behind_the_relu(shift_per_row: bool) -> None:
    """Never smaller for any other prediction, and equal to it at the present one."""
    generator = torch.Generator().manual_seed(0)
    wanted, present, other, shift = (torch.randn(500, 6, generator=generator).double() for _ in range(4))
    scale = torch.tensor([1.0, -1.0, 0.3, -2.0, 5.0, 0.01]).double()
    following = ReluTarget(scale, shift if shift_per_row else shift[0])

    def behind(x: torch.Tensor) -> torch.Tensor:
        return (scale * x + following.shift).relu() / scale.abs()

    target = following.target(wanted, present)
    assert ((target - other).square() >= (behind(wanted) - behind(other)).square() - 1e-9).all()
    # Where the original passes and the prediction is cut off, the bound is not tight; elsewhere it is.
    tight = ~((scale * wanted + following.shift > 0) & (scale * present + following.shift <= 0))
    difference = (target - present).square() - (behind(wanted) - behind(present)).square()
    assert difference[tight].abs().max() < 1e-9


def test_features_without_a_factor_keep_their_target() -> None:
    wanted, present = torch.ones(3, 2), torch.zeros(3, 2)
    target = ReluTarget(torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.0])).target(wanted, present)
    assert torch.equal(target, wanted)


def walked(name: str) -> tuple[Structure, Stream]:
    model, _ = small_model(name)
    structure = find_structure(model)
    return structure, Stream(model, structure, batches_for(model, 1))


@pytest.mark.parametrize(
    ("name", "units", "blocks"),
    [
        ("resnet-cifar", True, True),
        ("resnet-torchvision", True, True),
        ("resnet-timm-bottleneck", True, True),
        ("vgg-bn", True, False),
        ("vit", False, False),
        ("bert", False, False),
    ],
)
def test_a_relu_is_found_by_what_it_does(name: str, units: bool, blocks: bool) -> None:
    structure, stream = walked(name)
    found = [relu_of_units(stream, group, torch.arange(group.count * group.rows)) for group in structure.groups[:3]]
    assert any(relu is not None for relu in found) == units
    last = [group for group in structure.groups if group.residual is not None]
    assert any(shift_of_block_relu(stream, structure, group) is not None for group in last[:2]) == blocks
    stream.close()


def test_a_batch_norm_of_flattened_tokens_acts_on_features() -> None:
    """As in LeViT: the output of a linear layer is [batch, tokens, features], its norm reads [rows, features]."""

    class Flattened(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.norm(self.up(pixel_values).flatten(0, 1)).relu()
            return self.down(made.view(*pixel_values.shape[:2], 6))

    model: Any = Flattened().eval()
    with torch.no_grad():
        for one in (model.norm.running_mean, model.norm.weight, model.norm.bias):
            one.uniform_(-1, 1)
    group = UnitGroup(0, "neurons", 6, 1, (Producer("up", norm="norm"),), "down", None, None)
    inputs = {"pixel_values": torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))}
    stream = Stream(model, Structure("own", (), (group,)), [])
    stream.batches = [Batch(inputs, np.arange(2))]
    stream.placeholders = [{}]
    found = relu_of_units(stream, group, torch.arange(6))
    assert found is not None
    made = model.up(inputs["pixel_values"])
    wanted = model.norm(made.flatten(0, 1)).view_as(made)
    torch.testing.assert_close(found.scale * made + found.shift, wanted)


def error_of_blocks(model: TaskModel, dense: TaskModel, structure: Structure, batches: list[Batch]) -> float:
    total = 0.0
    for path in structure.blocks:
        outputs = []
        for one in (model, dense):
            values: list[torch.Tensor] = []
            handle = one.get_submodule(path).register_forward_hook(lambda m, a, out, v=values: v.append(tensor_of(out)))
            with torch.no_grad():
                for batch in batches:
                    one(**batch.inputs)
            handle.remove()
            outputs.append(torch.cat(values))
        total += float((outputs[0] - outputs[1]).square().sum() / outputs[0].square().sum())
    return total


@pytest.mark.parametrize("name", ["resnet-cifar", "resnet-torchvision"])
def test_looking_through_the_relu_helps_behind_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 6, size=24)
    plan, unseen = halved(structure, share=0.5), batches_for(model, 4, size=16, first_seed=100)
    errors = {}
    for rounds in (0, 2):
        monkeypatch.setattr(layer_problem, "ROUNDS", rounds)
        dense = apply_plan(model, structure, plan, batches, batches[0].inputs, RepairSettings()).dense
        errors[rounds] = error_of_blocks(model, dense, structure, unseen)
    assert errors[2] < errors[0]


@pytest.mark.parametrize(("name", "head"), [("bert", "classifier"), ("resnet-cifar", "fc"), ("bert-embedding", None)])
def test_the_output_layer_is_found_and_refitted(name: str, head: str | None) -> None:
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 6, size=24)
    path = output_layer(model, batches[0].inputs)
    assert (path is None) == (head is None)
    operation = apply_plan(model, structure, halved(structure, share=0.5), batches, batches[0].inputs, RepairSettings())
    if head is None:
        assert HEAD not in operation.repairs
        return
    assert path is not None
    repair = operation.repairs[HEAD]
    assert repair.before is not None and repair.after is not None and repair.after < repair.before
    before, after = (one.get_submodule(path).weight for one in (model, operation.dense))
    assert not torch.equal(before, after)


def test_rows_that_do_not_fit_into_memory_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model("resnet-cifar")
    structure, batches = find_structure(model), batches_for(model, 5, size=8)
    plan, states = halved(structure, share=0.5), []
    for room in (1 << 29, 0):
        monkeypatch.setattr(layer_problem, "ROWS_IN_MEMORY", room)
        states.append(
            apply_plan(model, structure, plan, batches, batches[0].inputs, RepairSettings()).dense.state_dict()
        )
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_error_behind_the_relu_never_grows() -> None:
    """Whatever is reported of a layer is what its refit did to the rows behind the ReLU."""
    for name in ("resnet-cifar", "resnet-torchvision", "resnet-timm", "vgg-bn"):
        model, _ = small_model(name)
        structure, batches = find_structure(model), batches_for(model, 5, size=6)
        plan = halved(structure, share=0.5)
        for repair in apply_plan(model, structure, plan, batches, batches[0].inputs, RepairSettings()).repairs.values():
            assert repair.before is not None and repair.after is not None
            assert repair.after <= repair.before * (1 + 1e-6)
