"""What the image families refuse, and what is particular to them; the rest is in `test_families`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optin_export.data import Batch
from optin_export.errors import InputError
from optin_export.models import TaskModel, build
from optin_export.pruning import load_model, save_model
from optin_export.pruning.rebuild import rebuild
from optin_export.repair import RepairSettings, apply_plan, sequential
from optin_export.repair.least_squares import Fit
from optin_export.repair.model_pair import arranged
from optin_export.repair.paired_forward import Stream
from optin_export.repair.residual_branch import affine_of
from optin_export.search import GroupPlan
from optin_export.units import (
    Structure,
    find_structure,
    find_tokens,
    get_layer,
    get_scale,
    output_rows,
    reads_rows,
    supported,
    tensor_of,
)
from tests.conftest import VIT_ARGS
from tests.repair.plans import halved, plan_of
from tests.units.builders import IMAGE, IMAGES, RESNET, Architecture, from_timm, from_transformers
from tests.units.models import MODELS, batches_for, inputs_for, small_model
from tests.units.test_families import Case, output


def described(architecture: Architecture) -> Architecture:
    return {**architecture, "task": IMAGES, "pooling": None, "normalize": False}


def of_timm(name: str, **args: Any) -> nn.Module:
    return build(described(from_timm(name, **args)()))


SHARED_BIAS = {**VIT_ARGS, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
EFFICIENTNET = {"in_chans": 1, "num_classes": 5, "channel_multiplier": 0.25, "depth_multiplier": 0.3}


@pytest.mark.parametrize(
    ("name", "args", "where", "why", "fix", "other"),
    [
        ("beit_base_patch16_224", SHARED_BIAS, "model", "all blocks share it", "neurons", "neurons"),
        ("vit_small_patch16_rope_mixed_224", VIT_ARGS, "model", "different angles per head", "neurons", "neurons"),
        ("eva02_base_patch14_448", VIT_ARGS, "blocks.0.mlp", "norm across its neurons", "heads", "heads"),
        (
            "eva_giant_patch14_224",
            {**VIT_ARGS, "scale_attn_inner": True},
            "blocks.0.attn",
            "norm",
            "neurons",
            "neurons",
        ),
    ],
    ids=["beit-shared-bias", "rope-mixed", "eva02-norm-in-mlp", "eva-norm-in-attention"],
)
def test_one_kind_is_refused_and_the_other_goes(
    name: str, args: dict[str, Any], where: str, why: str, fix: str, other: str
) -> None:
    """The fix that the error names works."""
    model = of_timm(name, **args)
    refused = "neurons" if other == "heads" else "heads"
    for units in (None, (refused,), ("heads", "neurons", "channels")):
        with pytest.raises(InputError) as caught:
            find_structure(model, units=units)
        assert where in caught.value.what and why in caught.value.why and f"[{fix}]" in caught.value.fix
    structure = find_structure(model, units=(other,))
    assert {group.kind for group in structure.groups} == {other}
    plan = halved(structure, share=0.5)
    assert (
        apply_plan(model, structure, plan, (), inputs_for(model, 2, 3), RepairSettings(repair=False)).masked_difference
        <= 1e-5
    )


def test_a_model_pruned_of_one_kind_is_rebuilt_although_the_other_is_refused(tmp_path: Path) -> None:
    architecture = described(from_timm("eva02_base_patch14_448", **VIT_ARGS)())
    model = build(architecture)
    structure, inputs = find_structure(model, units=("heads",)), inputs_for(model, 2, 3)
    plan = halved(structure, share=0.5)
    dense = apply_plan(model, structure, plan, batches_for(model, 2), inputs, RepairSettings()).dense
    save_model(tmp_path, dense, architecture, structure, plan, inputs)
    assert torch.equal(output(load_model(tmp_path), inputs), output(dense, inputs))


def test_beit_of_transformers_with_a_shared_bias_gives_neurons_only() -> None:
    config = {"use_shared_relative_position_bias": True, **IMAGE}
    model = build(described(from_transformers("BeitForImageClassification", **config)()))
    with pytest.raises(InputError, match=r"BeitModel.*ties the heads"):
        find_structure(model)
    assert {group.kind for group in find_structure(model, units=("neurons",)).groups} == {"neurons"}


@pytest.mark.parametrize(
    ("name", "args", "where", "why"),
    [
        ("convnextv2_atto", {"in_chans": 1, "num_classes": 5}, "stages.0.blocks.0", "grn"),
        ("resnetblur50", RESNET, "layer2.0", "BlurPool"),
        ("efficientnet_b0", {"in_chans": 1, "aa_layer": "blur"}, "aa", "BlurPool"),
    ],
)
def test_a_convolutional_variant_is_refused(name: str, args: dict[str, Any], where: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        find_structure(of_timm(name, **args))
    assert where in str(caught.value) and why in caught.value.why and caught.value.fix


def test_blocks_whose_filters_depend_on_the_image_are_left_alone() -> None:
    model = of_timm("efficientnet_cc_b0_4e", in_chans=1)
    conditional = [path for path, part in model.named_modules() if type(part).__name__ == "CondConvResidual"]
    structure = find_structure(model)
    assert conditional and structure.groups
    assert not any(path.startswith(tuple(conditional)) for group in structure.groups for path in group.reads)


def test_convnext_v2_of_transformers_is_refused() -> None:
    sizes = {"hidden_sizes": [8, 16, 24], "depths": [1, 1, 1], "num_channels": 1, "image_size": 32}
    model = build(described(from_transformers("ConvNextV2ForImageClassification", **sizes)()))
    with pytest.raises(InputError, match=r"layers\.0"):
        find_structure(model)


def test_a_squeeze_and_excitation_gate_reads_and_makes_the_units() -> None:
    group = find_structure(small_model("mobilenet-timm")[0]).groups[1]
    where = group.consumer.removesuffix(".conv_pwl")
    assert group.readers == (f"{where}.se.conv_reduce",)
    assert [(one.path, one.norm) for one in group.producers] == [
        (f"{where}.conv_pw", f"{where}.bn1"),
        (f"{where}.conv_dw", f"{where}.bn2"),
        (f"{where}.se.conv_expand", None),
    ]
    assert group.residual == (f"{where}.conv_pw", 0) and group.scale == f"{where}.bn3"


def test_layers_around_a_gate_are_refitted_in_the_order_in_which_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each corrects what the layers before it got wrong; the depthwise convolution between them has to stay."""
    model = small_model("mobilenet-timm")[0]
    structure, refitted = find_structure(model), []
    overwrite = sequential.overwrite

    def seen(model: TaskModel, path: str, fit: Fit) -> None:
        refitted.append(path)
        overwrite(model, path, fit)

    monkeypatch.setattr(sequential, "overwrite", seen)
    plan = halved(structure, share=0.5)
    apply_plan(model, structure, plan, batches_for(model, 2), inputs_for(model, 2, 0), RepairSettings())
    where = structure.groups[1].consumer.removesuffix("conv_pwl")
    ours = [path.removeprefix(where) for path in refitted if path.startswith(where)]
    assert ours == ["conv_pw", "se.conv_reduce", "se.conv_expand", "conv_pwl"]


def test_what_stands_behind_the_last_norm_takes_the_residual_from_the_repair() -> None:
    """A second depthwise convolution, or a gate, there: the sum follows from no fixed factor."""
    groups = find_structure(small_model("seresnet-timm")[0]).groups
    assert all(group.residual is None and group.scale is None for group in groups)
    groups = find_structure(small_model("mobilenetv4-timm")[0]).groups
    assert groups[0].residual is None and groups[1].residual is not None
    assert groups[3].residual == ("model.blocks.2.0.dw_start.conv", 0)  # the block's own input


def test_the_smallest_share_of_a_grouped_convolution_is_a_group() -> None:
    """align counts features: eight channels are two groups of four, and any number of groups of eight."""
    groups = find_structure(small_model("resnext-timm")[0]).groups
    assert [(group.width, group.step(8)) for group in groups[1:]] == [(4, 2), (8, 1), (12, 2), (16, 1)]
    model = small_model("eva02")[0]
    assert [group.step(8) for group in find_structure(model).groups[:2]] == [1, 8]


@pytest.mark.parametrize(
    "name",
    [name for name, (family, _, _) in MODELS.items() if family in ("vit", "vit-transformers", "convnext", "mobilenet")],
)
def test_a_block_adds_its_last_sub_layer_to_the_residual_stream_as_declared(name: str) -> None:
    """What the repair counts on: block output = residual + scale * consumer's output + a constant, row by row."""
    model = small_model(name)[0]
    structure, inputs = find_structure(model), inputs_for(model, 2, 0)
    last = {group.block: group for group in structure.groups}
    stream = Stream(model, structure, [Batch(inputs, np.arange(2))])
    checked = 0
    for block, group in last.items():
        if group.residual is None:
            continue
        path, layer = structure.blocks[block], get_layer(model, group.consumer)
        seen = stream.see(0, [group.residual, (group.consumer, "output"), (path, "output")], path)
        rows = [
            output_rows(arranged(group, model, tensor_of(seen[point])), layer, inputs, 0)
            for point in (group.residual, (path, "output"))
        ]
        own = output_rows(seen[(group.consumer, "output")], layer, inputs, 0)
        scale = affine_of(model, group)
        assert scale is not None and scale.shape in (torch.Size([]), torch.Size([own.shape[1]]))
        rest = rows[1] - rows[0] - scale * own
        assert float(rest.std(0).max()) <= 1e-4 * float(own.std())
        checked += 1
    assert checked


def test_heads_take_their_entries_of_the_bias_table_along() -> None:
    model = small_model("beit")[0]
    structure = find_structure(model)
    groups = {group.key: GroupPlan(count=group.count, kept=tuple(range(group.count))) for group in structure.groups}
    groups["block01.heads"] = GroupPlan(count=4, kept=(1, 3))
    dense, _ = rebuild(model, structure, groups, inputs_for(model, 2, 0))
    path = structure.groups[2].tables[0].path
    assert torch.equal(dense.get_parameter(path), model.get_parameter(path)[:, [1, 3]])


@pytest.mark.parametrize("name", ["beit", "eva02", "eva-grouped-query", "dinov2-transformers-swiglu"])
def test_whole_sub_layers_may_vanish(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path)
    plan = case.kept({"block00.heads": (), "block01.neurons": ()})
    operation = apply_plan(case.model, case.structure, plan, case.batches, case.inputs(3, 5), RepairSettings())
    assert operation.masked_difference <= 1e-5
    assert operation.repairs["block00.heads"].after < operation.repairs["block00.heads"].before
    save_model(tmp_path, operation.dense, case.architecture, case.structure, plan, case.inputs(3, 5))
    assert torch.equal(output(load_model(tmp_path), case.inputs(4, 8)), output(operation.dense, case.inputs(4, 8)))
    path = tmp_path / "pruned.onnx"
    case.export(operation.dense, path)
    case.check_onnx(operation.dense, path, (4,))


@pytest.mark.parametrize("name", ["deit3-layer-scale", "beit", "dinov2-transformers"])
def test_a_sub_layer_goes_behind_its_layer_scale(name: str) -> None:
    """Its constant is scaled as its output was, with other factors for each feature and sub-layer, and some zero."""
    model, generator = small_model(name)[0], torch.Generator().manual_seed(0)
    structure, inputs = find_structure(model), inputs_for(model, 3, 0)
    scales = {group.scale: get_scale(model, group.scale) for group in structure.groups if group.scale is not None}
    assert len(scales) == len(structure.groups)
    for scale in scales.values():
        assert isinstance(scale, torch.Tensor)
        scale.copy_(
            torch.randn(scale.shape, generator=generator) * (torch.rand(scale.shape, generator=generator) > 0.2)
        )
    plan = plan_of(structure, {"block00.heads": (), "block01.neurons": (), "block02.heads": (1, 3)})
    plain = apply_plan(model, structure, plan, (), inputs, RepairSettings(repair=False))
    assert plain.masked_difference <= 1e-5
    repaired = apply_plan(model, structure, plan, batches_for(model, 4), inputs, RepairSettings())
    wanted = output(model, inputs)
    errors = [float((output(one.dense, inputs) - wanted).square().sum()) for one in (plain, repaired)]
    assert errors[1] < errors[0]
    assert output(plain.dense, inputs).sub(wanted).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted({next(n for n in MODELS if MODELS[n][0] == f.name) for f in supported()}))
def test_sub_layers_that_may_vanish_are_those_that_the_family_names(name: str) -> None:
    structure: Structure = find_structure(small_model(name)[0])
    family = next(one for one in supported() if one.name == structure.family)
    assert {group.kind for group in structure.groups if group.sublayer} == set(family.sublayers)
    assert {group.kind for group in structure.groups} <= set(family.units)


def test_channels_of_residual_streams_go_from_a_resnext_too() -> None:
    model = small_model("resnext-torchvision")[0]
    structure, inputs = find_structure(model, coupled=True), inputs_for(model, 2, 0)
    assert any(group.coupled for group in structure.groups) and any(group.width > 1 for group in structure.groups)
    plan = halved(structure, share=0.6)
    assert apply_plan(model, structure, plan, batches_for(model, 2), inputs, RepairSettings()).masked_difference <= 1e-5


def test_a_gate_on_a_residual_stream_keeps_its_channels() -> None:
    with pytest.raises(InputError, match="residual stream") as caught:
        find_structure(small_model("seresnet-timm")[0], coupled=True)
    assert "layer1.0.se" in caught.value.why and "prune.coupled" in caught.value.fix


def test_a_layer_that_pads_by_itself_is_not_refitted() -> None:
    """timm's "same" padding is not the convolution's own: its patches are not what `input_rows` takes out."""
    model = of_timm("tf_efficientnetv2_b0", **EFFICIENTNET)
    structure, inputs = find_structure(model), inputs_for(model, 2, 0)
    fused = next(group for group in structure.groups if "conv_exp" in group.producers[0].path)
    assert not reads_rows(get_layer(model, fused.producers[0].path)) and reads_rows(get_layer(model, fused.consumer))
    operation = apply_plan(model, structure, halved(structure, 0.5), batches_for(model, 2), inputs, RepairSettings())
    assert operation.masked_difference <= 1e-5


@pytest.mark.parametrize("name", ["beit", "eva02", "dinov3", "beit-transformers", "dinov2-transformers"])
def test_tokens_that_have_a_place_or_another_pooling_are_not_merged(name: str) -> None:
    with pytest.raises(InputError, match="tokens cannot be merged") as caught:
        find_tokens(small_model(name)[0])
    assert "tokens.keep" in caught.value.fix


def test_tokens_of_a_dinov2_of_timm_can_be_merged() -> None:
    """Its registers stand for themselves, as the class token does."""
    assert find_tokens(small_model("dinov2")[0]).prefix == 1
    assert find_tokens(small_model("dinov2-registers")[0]).prefix == 3


# --- architectures that no family knows -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("pvt_v2_b0", "vit (Block 'stages.0.blocks.0' has norm1, attn.proj, norm2, mlp.fc1, mlp.fc2, but no attn.qkv)"),
        (
            "cait_xxs24_224",
            "vit (LayerScaleBlock 'blocks.0' has norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2, but",
        ),
        ("dla34", "resnet (DlaBasic 'level2.tree1' has conv1, bn1, conv2, bn2, but is of another class or kind)"),
    ],
)
def test_an_unknown_architecture_is_told_the_nearest_family(name: str, nearest: str) -> None:
    import timm

    with pytest.raises(InputError) as caught:
        find_structure(timm.create_model(name))
    assert f"nearest: {nearest}" in caught.value.why
    assert f"is_block for {nearest.split()[1][1:]}, and groups that say which layers make its" in caught.value.fix


def test_an_architecture_like_no_other_is_told_where_the_list_is() -> None:
    with pytest.raises(InputError) as caught:
        find_structure(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
    assert "nearest" not in caught.value.why and "optin-export families" in caught.value.fix
    assert "declare FAMILY in optin_export/units/families/NAME.py" in caught.value.fix


def test_a_copy_of_a_known_block_is_recognised_by_its_parts() -> None:
    """The user's own class with the library's names: nearest is its pattern, nothing is missing but the name."""

    class MyBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_pw, self.bn1, self.conv_dw = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4)
            self.bn2, self.conv_pwl = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    with pytest.raises(InputError) as caught:
        find_structure(nn.Sequential(MyBlock()))
    assert (
        "nearest: mobilenet (MyBlock '0'" in caught.value.why and "but is of another class or kind" in caught.value.why
    )
