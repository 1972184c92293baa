"""Every family through one path: score -> plan -> masked equals dense -> repair -> save and rebuild -> ONNX parity."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from optin_export.engines import build, load
from optin_export.errors import InputError
from optin_export.export import export_onnx
from optin_export.models.tasks import TaskModel, wrap
from optin_export.pruning import load_model, save_model
from optin_export.pruning.rebuild import rebuild
from optin_export.recipe import Budget, PruneSection, Target
from optin_export.repair import apply_plan
from optin_export.scoring import score
from optin_export.scoring.activation import activation_scores
from optin_export.search import GroupPlan, Plan, find_plan
from optin_export.units import Structure, count_macs, count_params, find_structure, measure_costs, supported
from tests.conftest import VIT_ARGS
from tests.units import rtx
from tests.units.builders import IMAGES, RESNET
from tests.units.models import CONVOLUTIONAL, MODELS, RECTIFIED, UNITS, batches_for, inputs_for, small_model


class Case:
    """One model taken once through scoring, search, surgery and saving."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.family, self.task, _ = MODELS[name]
        self.model, self.architecture = small_model(name)
        self.structure: Structure = find_structure(self.model)
        self.batches = batches_for(self.model, 4)
        # A narrow ResNet's stem and projections are a large part of it, and stay.
        budget = Budget(macs=0.7 if self.family in CONVOLUTIONAL else 0.5)
        config = PruneSection(budget=budget, probes=10, rows=48, allocation="additive")
        self.scores = score(self.model, self.structure, self.batches[:2], config, seed=0)
        self.costs = measure_costs(self.model, self.structure, self.inputs(1, 0))
        self.budget = config.budget
        step = 4 if self.family in CONVOLUTIONAL else 8
        align = {group.key: group.step(step) for group in self.structure.groups}
        least = {group.key: 0 if group.sublayer is not None else 1 for group in self.structure.groups}
        self.plan: Plan = find_plan(self.scores.values, self.costs, config.budget, align, least)
        inputs = self.inputs(3, 5)
        self.plain = apply_plan(self.model, self.structure, self.plan, (), inputs, repair=False)
        self.repaired = apply_plan(self.model, self.structure, self.plan, self.batches, inputs, repair=True)
        save_model(folder, self.repaired.dense, self.architecture, self.structure, self.plan, inputs)

    def inputs(self, batch: int, seed: int) -> dict[str, torch.Tensor]:
        return inputs_for(self.model, batch, seed)

    def kept(self, groups: dict[str, tuple[int, ...]]) -> Plan:
        """The plan with other units kept in these groups."""
        changed = {key: self.plan.groups[key].model_copy(update={"kept": kept}) for key, kept in groups.items()}
        return self.plan.model_copy(update={"groups": {**self.plan.groups, **changed}})

    @cached_property
    def onnx(self) -> Path:
        """The repaired model as a graph, exported once for every engine."""
        path = self.folder / "pruned.onnx"
        self.export(self.repaired.dense, path)
        return path

    def export(self, model: TaskModel, path: Path) -> None:
        sequence = 16 if "input_ids" in self.inputs(1, 0) else None
        export_onnx(model, self.inputs(2, 5), path, max_batch=8, sequence=sequence)

    def check_onnx(self, model: TaskModel, path: Path, batches: tuple[int, ...]) -> None:
        """onnxruntime on the exported model gives what torch gives, for equal rows equal outputs."""
        # No engine for GPUs has it as onnx defines it (see export.sampling).
        assert "GridSample" not in {node.op_type for node in onnx.load(path).graph.node}
        target = Target()
        build(path, target, path.with_suffix(".engine.onnx"))
        engine = load(path.with_suffix(".engine.onnx"), target)
        for batch in batches:
            for identical in (False, True):
                data = self.inputs(batch, 11)
                if identical:
                    data = {key: value[:1].expand(batch, *value.shape[1:]).contiguous() for key, value in data.items()}
                got = engine.run({key: value.numpy() for key, value in data.items()})[model.output_name]
                np.testing.assert_allclose(got, output(model, data).numpy(), atol=1e-4, rtol=1e-4)
                if identical:
                    np.testing.assert_allclose(got, np.broadcast_to(got[:1], got.shape), atol=1e-6)


#: The first model of each family. The core suite checks it, the longer suites check all, a nightly exports all.
FIRST = {family: name for name, (family, _, _) in reversed(MODELS.items())}.values()


def by_tier(core: Collection[str], *names: str, others: pytest.MarkDecorator = pytest.mark.nightly) -> list[Any]:
    """Models as parameters: those of `core` for the core suite, the first of each family for the longer ones.

    others: the mark of all other models; an export takes seconds.
    """

    def marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
        return () if name in core else (pytest.mark.slow,) if name in FIRST else (others,)

    return [pytest.param(name, marks=marks(name)) for name in names]


@pytest.fixture(scope="module", params=by_tier(FIRST, *MODELS, others=pytest.mark.slow))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def output(model: TaskModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)


#: Units of the convolutional networks: group key -> how many, how many inputs of the consumer each of them is.
CHANNELS = {
    "resnet-timm": {f"block{block:02d}.channels": (count, 1) for block, count in enumerate((8, 8, 16, 24, 32))},
    "resnet-timm-bottleneck": {
        f"block{block:02d}.channels{part}": (count, 1)
        for block, count in enumerate((8, 8, 16, 24, 32))
        for part in ("", "2")
    },
    "resnet-torchvision": {f"block{block:02d}.channels": (count, 1) for block, count in enumerate((8, 8, 16, 32))},
    "resnet-cifar": {f"block{block:02d}.channels": (count, 1) for block, count in enumerate((16, 32, 64))},
}
CHANNELS["vgg"] = CHANNELS["vgg-bn"] = {
    "block01.channels": (8, 1),
    "block02.channels": (16, 1),
    "block03.channels": (24, 1),
    "block04.channels": (24, 4),
    "block05.neurons": (32, 1),
    "block06.neurons": (16, 1),
}


def test_family_and_units(case: Case) -> None:
    assert case.structure.family == case.family
    groups = case.structure.groups
    if case.name in UNITS:
        assert {group.key: (group.count, group.width) for group in groups} == UNITS[case.name]
    elif case.family not in CONVOLUTIONAL:
        assert len(case.structure.blocks) == 3
        assert [group.kind for group in groups] == ["heads", "neurons"] * 3
        assert {group.count for group in groups if group.kind == "heads"} == {4}
        assert not case.structure.channels_first
    else:
        assert {group.key: (group.count, group.width) for group in groups} == CHANNELS[case.name]
        assert case.structure.channels_first
        assert all(group.sublayer is None and group.rows == 1 for group in groups)


def test_scores_cover_every_unit(case: Case) -> None:
    activity = activation_scores(case.model, case.structure.groups, case.batches[:2])
    for group in case.structure.groups:
        values = case.scores.values[group.key]
        assert values.shape == (group.count,)
        # A unit behind a ReLU may happen to be zero on every image; no other unit is without effect.
        assert ((values > 0) == (activity[group.key] > 0)).all()
        assert case.family in CONVOLUTIONAL | RECTIFIED or (values > 0).all()


def test_masked_model_equals_dense_model(case: Case) -> None:
    assert case.plain.masked_difference <= 1e-5


def test_masked_equals_dense_when_every_group_loses_some_units(case: Case) -> None:
    """Whatever the search chose: the first unit of every group goes, and every third after it."""
    plan = case.kept(
        {key: tuple(unit for unit in range(one.count) if unit % 3) for key, one in case.plan.groups.items()}
    )
    operation = apply_plan(case.model, case.structure, plan, (), case.inputs(3, 7), repair=False)
    assert operation.masked_difference <= 1e-5


def test_costs_predict_the_dense_model(case: Case) -> None:
    one = case.inputs(1, 0)
    assert count_macs(case.plain.dense, one) == case.plan.predicted.macs <= case.budget.fraction * case.costs.macs
    dropped = [group for group in case.structure.groups if not case.plan.groups[group.key].kept]
    if not dropped:  # a dropped sub-layer also loses its norm and biases, which no unit accounts for
        assert count_params(case.plain.dense) == case.plan.predicted.params


def test_costs_predict_any_number_of_units(case: Case) -> None:
    """MACs and parameters, exactly: also where units stand on both sides of a layer."""
    generator, one = np.random.default_rng(0), case.inputs(1, 0)
    kept = {group.key: int(generator.integers(1, group.count + 1)) for group in case.structure.groups}
    groups = {
        group.key: GroupPlan(count=group.count, kept=tuple(range(kept[group.key]))) for group in case.structure.groups
    }
    dense, smaller = rebuild(case.model, case.structure, groups, one)
    assert {group.key: group.count for group in smaller.groups} == kept
    assert case.costs.of("macs", kept) == count_macs(dense, one)
    assert case.costs.of("params", kept) == count_params(dense)
    assert case.costs.is_linear("macs") == ("bottleneck" not in case.name and case.family != "vgg")
    # One unit more or less costs what `per_unit` says, whatever the others keep.
    for key, price in case.costs.per_unit("macs", kept).items():
        assert case.costs.of("macs", kept) - case.costs.of("macs", {**kept, key: kept[key] - 1}) == price


def test_repair_lowers_the_error(case: Case) -> None:
    for key, repair in case.repaired.repairs.items():
        assert repair.after <= repair.before * 1.001 + 1e-12, key
    data = case.inputs(6, 1)
    reference = output(case.model, data)
    errors = [
        float((output(model, data) - reference).square().sum()) for model in (case.plain.dense, case.repaired.dense)
    ]
    assert errors[1] < errors[0]


def test_saved_model_is_rebuilt_exactly(case: Case) -> None:
    data = case.inputs(3, 9)
    rebuilt = load_model(case.folder, trust_python=True)
    assert torch.equal(output(rebuilt, data), output(case.repaired.dense, data))


@pytest.mark.parametrize("case", by_tier(("bert", "vit", "resnet-timm"), *MODELS), indirect=True)
def test_onnx_reproduces_the_model(case: Case) -> None:
    pytest.importorskip("onnxruntime")
    case.check_onnx(case.repaired.dense, case.onnx, (1, 5))


@pytest.mark.rtx
@pytest.mark.parametrize("case", by_tier(FIRST, *MODELS), indirect=True)
def test_tensorrt_parses_and_builds_the_model(case: Case) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'optin-export[rtx]'")
    sequence = "input_ids" in case.inputs(2, 5)
    shapes = {}
    for name, tensor in case.inputs(2, 5).items():
        sizes = tuple(tensor.shape[1:])
        least, most = ((2, *sizes[1:]), (16, *sizes[1:])) if sequence else (sizes, sizes)
        shapes[name] = ((1, *least), (2, *sizes), (8, *most))
    assert len(rtx.build(case.onnx, shapes)) > 1000


@pytest.mark.parametrize(
    "case",
    by_tier(
        ("bert", "vit"),
        *("bert", "distilbert", "mpnet", "gpt2", "llama", "vit", "deit3-layer-scale", "vit-transformers"),
        *("swin", "swin-transformers", "segformer"),
    ),
    indirect=True,
)
def test_whole_sub_layers_may_vanish(case: Case, tmp_path: Path) -> None:
    """Drop the heads of one block and the neurons of another: masked equals dense, repair works, ONNX has no trace."""
    plan = case.kept({"block00.heads": (), "block01.neurons": ()})
    inputs = case.inputs(3, 5)
    plain = apply_plan(case.model, case.structure, plan, (), inputs, repair=False)
    assert plain.masked_difference <= 1e-5
    repaired = apply_plan(case.model, case.structure, plan, case.batches, inputs, repair=True)
    assert repaired.repairs["block00.heads"].after < repaired.repairs["block00.heads"].before
    save_model(tmp_path, repaired.dense, case.architecture, case.structure, plan, inputs)
    data = case.inputs(4, 8)
    assert torch.equal(output(load_model(tmp_path), data), output(repaired.dense, data))
    path = tmp_path / "pruned.onnx"
    case.export(repaired.dense, path)
    case.check_onnx(repaired.dense, path, (4,))


@pytest.mark.parametrize("name", ["resnet-timm", "vgg"])
def test_a_convolution_keeps_at_least_one_channel(name: str) -> None:
    model, _ = small_model(name)
    structure = find_structure(model)
    groups = {
        group.key: GroupPlan(count=group.count, kept=() if group.block == 1 else tuple(range(group.count)))
        for group in structure.groups
    }
    with pytest.raises(InputError, match=r"keeps nothing of block01\.channels"):
        rebuild(model, structure, groups, inputs_for(model, 2, 0))


def test_the_residual_stream_of_a_convolutional_block_is_seen_beside_it() -> None:
    """Behind the projection where there is one, else at the block's own input; only the last layer adds to it."""
    groups = find_structure(small_model("resnet-timm-bottleneck")[0]).groups
    assert [group.residual for group in groups[:4:2]] == [None, None]
    assert groups[1].residual == ("model.layer1.0.downsample", "output")
    assert groups[3].residual == ("model.layer1.1.conv1", 0)
    assert groups[3].scale == "model.layer1.1.bn3"
    groups = find_structure(small_model("resnet-cifar")[0]).groups
    assert groups[0].residual == ("model.layer1.0.conv1", 0)
    assert groups[1].residual == ("model.layer2.0.shortcut", "output")  # it only pads, but the shape is another
    assert groups[0].producers[0].norm == "model.layer1.0.bn1"


def test_every_family_is_tested() -> None:
    assert {family.name for family in supported()} == {family for family, _, _ in MODELS.values()}


def test_unsupported_architecture_names_the_supported_ones() -> None:
    with pytest.raises(InputError) as error:
        find_structure(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert "Sequential" in error.value.what
    assert all(family.name in error.value.why for family in supported())
    assert "families" in error.value.fix


def test_a_variant_the_family_cannot_prune_is_refused() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **VIT_ARGS)
    model.blocks[1].attn.norm = torch.nn.LayerNorm(32)
    with pytest.raises(InputError, match=r"blocks\.1\.attn"):
        find_structure(model)


def test_a_residual_block_with_something_between_its_convolutions_is_refused() -> None:
    import timm

    model = timm.create_model("resnetblur18", pretrained=False, **RESNET)
    with pytest.raises(InputError, match=r"layer2\.0") as caught:
        find_structure(model)
    assert "layer2.0.aa" in caught.value.why


def test_a_residual_block_with_norms_before_its_convolutions_is_refused() -> None:
    """Many a Wide ResNet: the same names in another order."""

    class BasicBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
            self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

    with pytest.raises(InputError, match="norms come before"):
        find_structure(nn.Sequential(BasicBlock()))


def test_channels_that_a_grouped_convolution_makes_from_the_stream_are_left_alone() -> None:
    """Groups go with the inputs that only they read; here those are the residual stream's."""

    class BasicBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    with pytest.raises(InputError, match="nothing to prune"):
        find_structure(nn.Sequential(BasicBlock()))


def test_a_chain_with_a_step_between_its_layers_is_refused() -> None:
    """Where the next layer does not read what the last one makes, channel by channel."""
    model = small_model("vgg")[0].model
    assert isinstance(model, nn.Module)
    model.features[3] = nn.Conv2d(4, 16, 3, padding=1, groups=2)
    with pytest.raises(InputError, match=r"features\.3"):
        find_structure(wrap(model, IMAGES, None, False))
