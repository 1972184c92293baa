"""The repair is exact where an exact repair exists, helps on rows it has not seen, and says where it could not."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from optin_export.data import Batch, Sources, load_sources
from optin_export.errors import InputError
from optin_export.models import TaskModel
from optin_export.pruning.rebuild import rebuild
from optin_export.recipe import validate
from optin_export.repair import PrunedModel, RepairSettings, apply_plan, layer_problem
from optin_export.repair.least_squares import DAMPINGS, Fit, Moments
from optin_export.repair.sensitivity import Weights
from optin_export.repair.sequential import HEAD, Repair
from optin_export.search import GroupPlan, Plan
from optin_export.units import find_structure, get_layer
from tests.conftest import Make
from tests.repair.plans import halved, without
from tests.units.models import batches_for, small_model

#: The module; in the package its name stands for the function.
repair_module = sys.modules[Repair.__module__]


@pytest.fixture
def sources(vit_recipe: Make, tmp_path: Path) -> Sources:
    return load_sources(validate(vit_recipe(), tmp_path))


def plan_without(sources: Sources, **removed: list[int]) -> Plan:
    return without(find_structure(sources.model), {key.replace("_", "."): units for key, units in removed.items()})


def test_a_duplicated_neuron_is_removed_without_loss(sources: Sources) -> None:
    """Neuron 1 computes what neuron 0 computes: least squares must move its weight over and leave no error."""
    structure = find_structure(sources.model)
    group = structure.groups[1]
    up = get_layer(sources.model, group.producers[0].path)
    up.weight.data[1], up.bias.data[1] = up.weight.data[0], up.bias.data[0]
    plan = plan_without(sources, block00_neurons=[1])
    inputs = sources.fixed(4)
    plain = apply_plan(sources.model, structure, plan, (), inputs, RepairSettings(repair=False))
    repaired = apply_plan(sources.model, structure, plan, sources.calibration, inputs, RepairSettings())
    with torch.no_grad():
        reference = sources.model(**inputs)
        errors = [float((one.dense(**inputs) - reference).abs().max()) for one in (plain, repaired)]
    assert errors[1] < 0.1 * errors[0]
    assert repaired.repairs[group.key].after < 0.05 * repaired.repairs[group.key].before


def test_a_constant_neuron_is_folded_into_the_bias(sources: Sources) -> None:
    structure = find_structure(sources.model)
    group = structure.groups[1]
    up = get_layer(sources.model, group.producers[0].path)
    up.weight.data[2], up.bias.data[2] = 0.0, 1.5
    plan = plan_without(sources, block00_neurons=[2])
    repaired = apply_plan(sources.model, structure, plan, sources.calibration, sources.fixed(2), RepairSettings())
    assert repaired.repairs[group.key].after < 0.05 * repaired.repairs[group.key].before


def test_the_original_model_is_left_alone(sources: Sources) -> None:
    before = {name: tensor.clone() for name, tensor in sources.model.state_dict().items()}
    structure = find_structure(sources.model)
    apply_plan(
        sources.model,
        structure,
        plan_without(sources, block01_heads=[0], block02_neurons=[3]),
        sources.calibration,
        sources.fixed(2),
        RepairSettings(),
    )
    after = sources.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sources.model.modules())


def test_a_plan_for_another_model_is_refused(sources: Sources) -> None:
    structure = find_structure(sources.model)
    groups = dict(plan_without(sources).groups)
    groups["block00.heads"] = GroupPlan(count=6, kept=(0, 1))
    with pytest.raises(InputError, match="plan"):
        rebuild(sources.model, structure, groups, sources.fixed(2))


def test_a_layer_scale_of_zero_is_survived(vit_recipe: Make, tmp_path: Path) -> None:
    """Where layer scale is zero nothing can be repaired, and nothing may become infinite."""
    model = vit_recipe()["model"]
    model = {**model, "weights": "random", "args": {**model["args"], "init_values": 0.5}}
    sources = load_sources(validate(vit_recipe(model=model), tmp_path))
    structure = find_structure(sources.model)
    assert structure.groups[0].scale is not None
    sources.model.get_parameter(structure.groups[0].scale).data[:5] = 0.0
    plan = plan_without(sources, block00_heads=[0], block00_neurons=[1, 2])
    operation = apply_plan(sources.model, structure, plan, sources.calibration, sources.fixed(2), RepairSettings())
    assert all(repair.after <= repair.before for repair in operation.repairs.values())


def error_of(model: TaskModel, dense: TaskModel, batches: list[Batch]) -> float:
    with torch.no_grad():
        return sum(float((dense(**b.inputs) - model(**b.inputs)).square().sum()) for b in batches)


@pytest.mark.parametrize("name", ["bert-embedding", "vit", "resnet-torchvision", "resnet-cifar"])
def test_the_repair_helps_on_rows_it_has_not_seen(name: str) -> None:
    """No repair, factors only, least squares: each is better than the one before."""
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 6, size=12)
    plan, unseen = halved(structure, share=0.6), batches_for(model, 2, size=16, first_seed=100)
    kinds: tuple[bool | Literal["rescale"], ...] = (False, "rescale", True)
    operations = [
        apply_plan(model, structure, plan, batches, batches[0].inputs, RepairSettings(repair=kind)) for kind in kinds
    ]
    nothing, factors, full = (error_of(model, operation.dense, unseen) for operation in operations)
    assert full < 0.8 * factors and factors < 0.9 * nothing
    assert operations[0].repairs == {}
    for operation in operations[1:]:
        assert [key for key in operation.repairs if key != HEAD] == [group.key for group in structure.groups]
        assert all(repair.damping in DAMPINGS for key, repair in operation.repairs.items() if key != HEAD)


@pytest.mark.parametrize(
    "name", ["bert", "vit", "vit-transformers", "resnet-timm", "resnet-timm-bottleneck", "vgg-bn", "vgg"]
)
def test_the_repair_lowers_the_error_of_every_architecture(name: str) -> None:
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 6, size=24)
    plan, unseen = halved(structure, share=0.8), batches_for(model, 4, size=16, first_seed=100)
    plain, repaired = (
        apply_plan(model, structure, plan, batches, batches[0].inputs, RepairSettings(repair=repair)).dense
        for repair in (False, True)
    )
    assert error_of(model, repaired, unseen) < 0.97 * error_of(model, plain, unseen)


def test_factors_only_leave_everything_else(sources: Sources) -> None:
    """`rescale` multiplies the columns that are left, nothing more."""
    structure = find_structure(sources.model)
    plan = halved(structure)
    plain, scaled = (
        apply_plan(
            sources.model, structure, plan, sources.calibration, sources.fixed(2), RepairSettings(repair=repair)
        ).dense
        for repair in (False, "rescale")  # type: ignore[arg-type]
    )
    consumers = {f"{group.consumer}.weight": group for group in structure.groups}
    changed = False
    for key, before in plain.state_dict().items():
        after = scaled.state_dict()[key]
        if key not in consumers:
            assert torch.equal(before, after)
            continue
        changed = changed or not torch.equal(before, after)
        factors = (after / before).view(len(after), -1, consumers[key].width)
        torch.testing.assert_close(factors, factors[:1, :, :1].expand_as(factors), rtol=1e-3, atol=1e-3)
    assert changed


def test_layers_that_lost_nothing_are_refitted_to_what_reaches_them() -> None:
    """They stand behind a sub-layer that is no longer what it was."""
    model, _ = small_model("bert")
    structure, batches = find_structure(model), batches_for(model, 6, size=8)
    plan = without(structure, {"block01.neurons": range(0, 64, 2)})
    repairs = apply_plan(model, structure, plan, batches, batches[0].inputs, RepairSettings()).repairs
    for key in ("block00.heads", "block00.neurons", "block01.heads"):  # there is nothing to do, which is no failure
        untouched = repairs[key]
        assert untouched.before == untouched.after and (untouched.damping, untouched.fallback) == (None, None)
    before, after = repairs["block02.neurons"].before, repairs["block02.neurons"].after
    assert before is not None and after is not None and after < 0.95 * before


@pytest.mark.parametrize("batches", [1, 6])
def test_the_damping_is_judged_on_rows_or_batches_held_out(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth: whole batches where there are five or more, rows of every batch where there are fewer."""
    model, _ = small_model("vit")
    structure, data = find_structure(model), batches_for(model, batches, size=4)
    seen: list[tuple[int, int]] = []
    solve = layer_problem.ridge

    def spy(train: Moments, held: Moments, start: torch.Tensor) -> Fit:
        seen.append((train.rows, held.rows))
        return solve(train, held, start)

    monkeypatch.setattr(layer_problem, "ridge", spy)
    apply_plan(model, structure, halved(structure), data, data[0].inputs, RepairSettings())
    rows = 4 * 17
    assert seen.pop() == ((4, 0) if batches == 1 else (20, 4))  # the output layer, one row per sample
    assert len(seen) == 2 * len(structure.groups)  # the layers that make the units, and the layer that reads them
    assert set(seen) == ({(rows - rows // 5, rows // 5)} if batches == 1 else {(5 * rows, rows)})


@pytest.mark.parametrize("name", ["bert", "bert-embedding"])
def test_padding_does_not_change_the_repair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what stands on padding nor how much of it there is."""
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 3, size=6)
    plan = halved(structure)

    def repaired(data: list[Batch]) -> dict[str, torch.Tensor]:
        return apply_plan(model, structure, plan, data, batches[0].inputs, RepairSettings()).dense.state_dict()

    def other_tokens(batch: Batch) -> Batch:
        mask = batch.inputs["attention_mask"]
        return Batch(
            {"input_ids": torch.where(mask.bool(), batch.inputs["input_ids"], 7), "attention_mask": mask}, batch.rows
        )

    def longer(batch: Batch) -> Batch:
        return Batch({key: torch.nn.functional.pad(value, (0, 9)) for key, value in batch.inputs.items()}, batch.rows)

    expected = repaired(batches)
    for key, value in repaired([other_tokens(batch) for batch in batches]).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    # The directions of the weights' probes are drawn by shape, so that here all rows weigh the same.
    monkeypatch.setattr(repair_module, "sensitivities", lambda *args: Weights([{} for _ in batches]))
    expected = repaired(batches)
    for key, value in repaired([longer(batch) for batch in batches]).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)


def test_rows_of_no_weight_are_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every second batch weighs nothing, the repair is that of the other batches; where all do, there is none."""
    model, _ = small_model("vit")
    structure, batches = find_structure(model), batches_for(model, 4, size=4)
    plan = halved(structure)
    paths = {group.consumer for group in structure.groups}
    paths |= {producer.path for group in structure.groups for producer in group.producers}

    def repaired(data: list[Batch], weights: Weights) -> PrunedModel:
        monkeypatch.setattr(repair_module, "sensitivities", lambda *args: weights)
        monkeypatch.setattr(repair_module, "output_layer", lambda *args: None)  # it has no weights
        return apply_plan(model, structure, plan, data, batches[0].inputs, RepairSettings())

    every_second = [dict.fromkeys(paths, torch.full((4 * 17,), float(index % 2))) for index in range(4)]
    states = [
        repaired(data, weights).dense.state_dict()
        for data, weights in ((batches, Weights(every_second)), (batches[1::2], Weights([{}, {}])))
    ]
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key])
    nothing = {structure.groups[3].consumer: torch.zeros(4 * 17)}
    repairs = repaired(batches, Weights([nothing] * 4)).repairs
    assert repairs["block01.neurons"].fallback == "no calibration rows reach it"
    assert repairs["block02.neurons"].damping is not None


def without_statistics(model: TaskModel) -> None:
    norm = model.get_submodule("model.layer1.1.bn2")
    assert isinstance(norm, torch.nn.BatchNorm2d)
    norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, None, None, None


def test_a_batch_norm_without_statistics_is_left_alone() -> None:
    """What it does depends on the batch: the layer before it is not refitted, and the reason is named."""
    model, _ = small_model("resnet-torchvision")
    without_statistics(model)
    structure, batches = find_structure(model), batches_for(model, 3, size=6)
    repairs = apply_plan(model, structure, halved(structure), batches, batches[0].inputs, RepairSettings()).repairs
    alone = repairs.pop("block01.channels")
    assert alone == Repair(None, None, None, "the batch norm behind it has no statistics")
    assert all(repair.fallback is None for repair in repairs.values())
    json.dumps([dataclasses.asdict(repair) for repair in (alone, *repairs.values())], allow_nan=False)


def test_activations_that_are_not_finite_leave_the_layers_alone() -> None:
    model, _ = small_model("vit")
    structure, batches = find_structure(model), batches_for(model, 2, size=3)
    batches[1].inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    operation = apply_plan(model, structure, halved(structure), batches, batches[0].inputs, RepairSettings())
    plain = apply_plan(model, structure, halved(structure), (), batches[0].inputs, RepairSettings(repair=False))
    assert {repair.fallback for repair in operation.repairs.values()} == {"activations are not finite"}
    assert all(repair.before is None and repair.after is None for repair in operation.repairs.values())
    assert all(torch.equal(value, plain.dense.state_dict()[key]) for key, value in operation.dense.state_dict().items())


class BasicBlock(torch.nn.Module):
    """A residual block in another hand: its projection is called `skip`."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        self.skip = block.downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.skip(x))


def test_a_projection_of_unknown_name_is_done_without() -> None:
    """The stream beside the sub-layer is not seen, so that the layer is fitted to its own output only."""
    model, _ = small_model("resnet-torchvision")
    sequence = model.get_submodule("model.layer2")
    sequence[0] = BasicBlock(sequence[0])  # type: ignore[index, operator]
    structure, batches = find_structure(model), batches_for(model, 6, size=12)
    assert [group.residual for group in structure.groups][1:3] == [("model.layer1.1.conv1", 0), None]
    plan = halved(structure)
    plain, repaired = (
        apply_plan(model, structure, plan, batches, batches[0].inputs, RepairSettings(repair=repair))
        for repair in (False, True)
    )
    assert error_of(model, repaired.dense, batches) < 0.8 * error_of(model, plain.dense, batches)


@pytest.mark.parametrize("padding", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_every_padding_is_repaired(padding: dict[str, Any]) -> None:
    """A duplicated channel goes without loss, whatever stands beyond the image's edge."""
    model, _ = small_model("resnet-cifar")
    block = model.get_submodule("model.layer1.0")
    for name in ("conv1", "conv2"):
        layer = torch.nn.Conv2d(16, 16, 3, bias=False, **padding).requires_grad_(False)
        layer.weight.copy_(get_layer(block, name).weight)
        setattr(block, name, layer)
    for tensor in (block.conv1.weight, *block.bn1.state_dict().values()):  # type: ignore[union-attr]
        if tensor.dim():  # type: ignore[operator]
            tensor[1] = tensor[0]  # type: ignore[index, operator]
    structure, batches = find_structure(model), batches_for(model, 3, size=6)
    plan = without(structure, {"block00.channels": [1]})
    plain, repaired = (
        apply_plan(model, structure, plan, batches, batches[0].inputs, RepairSettings(repair=repair))
        for repair in (False, True)
    )
    assert error_of(model, repaired.dense, batches) < 1e-3 * error_of(model, plain.dense, batches)
