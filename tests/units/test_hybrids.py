"""Models with blocks of several families: all are found, in the order in which they run, and go exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.models import build
from optin_export.models.tasks import TaskModel
from optin_export.pruning import load_model, save_model
from optin_export.recipe import Budget, PruneSection
from optin_export.repair import apply_plan, masked_difference
from optin_export.scoring import methods
from optin_export.units import Structure, count_macs, count_params, find_structure, find_tokens, measure_costs, measured
from tests.conftest import enlarge
from tests.repair.plans import halved, plan_of
from tests.units.builders import from_python
from tests.units.models import batches_for, inputs_for

HERE = Path(__file__).parent
HYBRID = HERE / "hybridnets.py"
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def upernet(backbone: str, channels: int, **config: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        import transformers

        inner = getattr(transformers, backbone)(**config, out_features=STAGES)
        sizes = {"num_labels": 5, "hidden_size": 16, "auxiliary_in_channels": channels, "pool_scales": [1, 2]}
        settings = transformers.UperNetConfig(backbone_config=inner, **sizes)
        return {"library": "transformers", "class": "UperNetForSemanticSegmentation", "config": settings.to_dict()}

    return make


def beit() -> dict[str, Any]:
    import transformers

    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
    settings = transformers.BeitConfig(**sizes, intermediate_size=32, num_labels=5, out_indices=[1, 2, 3, 4])
    return {"library": "transformers", "class": "BeitForSemanticSegmentation", "config": settings.to_dict()}


SEGMENTATION = "image-segmentation"
CONVNEXT = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1] * 4,
    "num_heads": [1, 2, 2, 4],
    "window_size": 2,
}
#: name -> (task, description, family, kinds).
CASES: dict[str, tuple[str, Any, str, set[str]]] = {
    "own": (
        "image-classification",
        from_python(HYBRID, "hybrid"),
        "resnet + vit + convolutions",
        {"channels", "heads", "neurons"},
    ),
    "lraspp": (SEGMENTATION, from_python(HERE / "convnets.py", "lraspp"), "mobilenet + convolutions", {"channels"}),
    "fcn": (SEGMENTATION, from_python(HERE / "convnets.py", "fcn"), "resnet + convolutions", {"channels"}),
    "deeplab": (SEGMENTATION, from_python(HERE / "convnets.py", "deeplab"), "mobilenet + convolutions", {"channels"}),
    "upernet-convnext": (
        SEGMENTATION,
        upernet("ConvNextConfig", 16, **CONVNEXT),
        "convnext + convolutions",
        {"channels", "neurons"},
    ),
    "upernet-swin": (
        SEGMENTATION,
        upernet("SwinConfig", 32, **SWIN),
        "swin-transformers + convolutions",
        {"channels", "heads", "neurons"},
    ),
    "beit": (SEGMENTATION, beit, "vit-transformers + convolutions", {"channels", "heads", "neurons"}),
}


def built(name: str) -> tuple[TaskModel, dict[str, Any]]:
    task, make, _, _ = CASES[name]
    architecture = {**make(), "task": task, "pooling": None, "normalize": False}
    model = build(architecture, trust_python=True)
    enlarge(model)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            generator = torch.Generator().manual_seed(part.num_features)
            part.running_mean.copy_(0.1 * torch.randn(part.num_features, generator=generator))
            part.running_var.copy_(0.5 + torch.rand(part.num_features, generator=generator))
    return model, architecture


def images(batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


def covered(model: TaskModel, structure: Structure) -> float:
    costs = measure_costs(model, structure, images(1))
    return 1 - costs.of("macs", dict.fromkeys(costs.units, 0)) / costs.macs


@pytest.mark.parametrize("name", list(CASES))
def test_all_kinds_of_blocks_go_exactly(name: str, tmp_path: Path) -> None:
    """A random half of everything: dense equals masked at several batch sizes, costs are exact, and it is rebuilt."""
    model, architecture = built(name)
    structure = find_structure(model, inputs=images(2))
    assert structure.family == CASES[name][2] and {group.kind for group in structure.groups} == CASES[name][3]
    assert len(structure.families) == len(structure.blocks) == len(set(structure.blocks))
    assert not structure.refused and covered(model, structure) > 0.5
    plan = halved(structure)
    dense = apply_plan(model, structure, plan, (), images(2), repair=False).dense
    output = model(**images(2))
    assert float((output[0] - output[1]).abs().max()) > 0.01 * float(output.abs().max())  # not a constant
    for batch in (1, 2, 5):
        assert masked_difference(model, dense, structure, plan, images(batch, batch)) <= 1e-5
    costs, kept = measure_costs(model, structure, images(1)), {key: len(one.kept) for key, one in plan.groups.items()}
    assert costs.of("macs", kept) == count_macs(dense, images(1))
    assert costs.of("params", kept) == count_params(dense)
    save_model(tmp_path, dense, architecture, structure, plan, images(2))
    assert torch.equal(load_model(tmp_path, trust_python=True)(**images(3)), dense(**images(3)))


@pytest.mark.parametrize("name", ["own", "upernet-convnext"])
def test_a_walk_over_the_blocks_sees_what_a_plain_pass_sees(name: str) -> None:
    """Repaired by block: with nothing removed, nothing changes; with a half removed, the error falls."""
    model, _ = built(name)
    structure = find_structure(model, inputs=images(2))
    batches = batches_for(model, 5, size=4)
    whole = plan_of(structure, {})
    same = apply_plan(model, structure, whole, batches, images(2), repair=True).dense
    torch.testing.assert_close(same(**images(3, 9)), model(**images(3, 9)), atol=1e-4, rtol=1e-3)
    plan = halved(structure)
    wanted = model(**images(16, 9))
    errors = [
        float(
            (
                apply_plan(model, structure, plan, batches, images(2), repair=repair).dense(**images(16, 9)) - wanted
            ).norm()
        )
        for repair in (False, True)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_blocks_are_in_the_order_in_which_they_run() -> None:
    model, _ = built("own")
    structure = find_structure(model, inputs=images(2))
    assert structure.blocks == (
        "model.backbone.1",
        "model.backbone.2",
        "model.neck.0",
        "model.neck.1",
        "model.head.3",
    )
    assert structure.families == ("resnet", "resnet", "vit", "vit", "convolutions")
    assert structure.channels_first == {"model.backbone.1", "model.backbone.2", "model.head.3"}
    walk = measured(model, structure, images(2)).walk
    assert walk is not None and walk.whole is None
    assert [walk.last_reader(path) for path in structure.blocks] == [1, 2, 3, 4, 5]  # each is read by the next alone
    # Without a pass the order of definition is all that is known, and the part that never runs counts as well.
    assert find_structure(model).blocks[:2] == ("model.neck.0", "model.neck.1")
    assert "model.idle" in find_structure(model).blocks


def test_what_a_pyramid_reads_again_is_kept() -> None:
    model, _ = built("upernet-swin")
    structure = find_structure(model, inputs=images(2))
    assert len(structure.blocks) == 5
    walk = measured(model, structure, images(2)).walk
    assert walk is not None and walk.whole is None
    # The stages are read again by the head, which is the fifth block.
    assert [walk.last_reader(path) for path in structure.blocks[:3]] == [4, 4, 4]


def test_a_head_for_training_has_no_units() -> None:
    """It runs, but the output does not depend on it: to cut it would save nothing of what is exported."""
    for name in ("fcn", "upernet-swin", "beit"):
        model, _ = built(name)
        layers = {path for group in find_structure(model, inputs=images(2)).groups for path in group.reads}
        auxiliary = {path for path, _ in model.named_modules() if "aux" in path}
        assert auxiliary and not layers & auxiliary


def test_each_family_is_scored_in_its_own_way() -> None:
    """`auto` is magnitude for channels of a convolutional part, as in a convolutional network, and optin elsewhere."""
    model, _ = built("own")
    structure = find_structure(model, inputs=images(2))
    chosen = methods(structure, PruneSection(budget=Budget(macs=0.5)))
    assert {group.kind: chosen[group.key] for group in structure.groups} == {
        "channels": "magnitude",
        "heads": "optin",
        "neurons": "optin",
    }
    assert not structure.convolutional


def test_what_one_family_refuses_leaves_the_others() -> None:
    architecture = {
        **from_python(HYBRID, "hybrid", norm_of_heads=True)(),
        "task": "image-classification",
        "pooling": None,
        "normalize": False,
    }
    model = build(architecture, trust_python=True)
    structure = find_structure(model, inputs=images(2))
    assert {group.kind for group in structure.groups} == {"channels", "neurons"}
    assert [one.kind for one in structure.refused] == ["heads", "heads"]
    assert "model.neck.0.attn" in structure.refused[0].error.what
    with pytest.raises(InputError, match=r"model\.neck\.0\.attn"):  # asked for by name, and there is no other
        find_structure(model, inputs=images(2), units=("heads",))
    assert {group.kind for group in find_structure(model, inputs=images(2), units=("neurons",)).groups} == {"neurons"}
    plan = halved(structure)
    assert apply_plan(model, structure, plan, (), images(2), repair=False).masked_difference <= 1e-5


def test_tokens_and_streams_of_a_hybrid_are_left_alone() -> None:
    model, _ = built("own")
    with pytest.raises(InputError, match=r"(?s)tokens cannot be merged.*several families"):
        find_tokens(model)
    with pytest.raises(InputError, match=r"(?s)residual stream.*several families"):
        find_structure(model, coupled=True, inputs=images(2))
    # One family, but a head beside the blocks reads a stream that may not be cut.
    with pytest.raises(InputError, match=r"(?s)residual stream"):
        find_structure(built("fcn")[0], coupled=True, inputs=images(2))


def test_channels_that_are_read_in_another_way_are_no_units() -> None:
    """A sum, a concatenation, a norm across channels, a detached copy, the output itself: each keeps its channels."""

    class Net(nn.Module):
        def __init__(self, way: str) -> None:
            super().__init__()
            self.way = way
            self.block = _block()
            self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16 + 16 * (way == "cat"), 5, 1)
            self.norm = nn.GroupNorm(4, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.block(x)
            y = self.first(x)
            if self.way == "sum":
                return self.second(x + y)
            if self.way == "cat":
                return self.second(torch.cat([x, y], 1))
            if self.way == "norm":
                return self.second(self.norm(y))
            if self.way == "detached":
                return self.second(torch.relu(y)) + y.detach().mean()
            if self.way == "output":
                return self.second(torch.relu(y)).mean() + y
            return self.second(nn.functional.interpolate(torch.relu(y), scale_factor=2, mode="bilinear"))

    def families_of(way: str) -> str:
        torch.manual_seed(0)
        inputs = {"x": torch.randn(2, 16, 8, 8)}
        return find_structure(Net(way).eval(), inputs=inputs).family

    assert families_of("plain") == "resnet + convolutions"
    assert {families_of(way) for way in ("sum", "cat", "norm", "detached", "output")} == {"resnet"}


def _block() -> nn.Module:
    from tests.units.hybridnets import BasicBlock

    return BasicBlock(16)


def test_a_saved_model_of_one_family_is_still_rebuilt(tmp_path: Path) -> None:
    """Its architecture.json names the family, and no others are looked for."""
    model, architecture = built("lraspp")
    structure = find_structure(model)
    assert structure.family == "mobilenet"
    plan = halved(structure)
    dense = apply_plan(model, structure, plan, (), images(2), repair=False).dense
    save_model(tmp_path, dense, architecture, structure, plan, images(2))
    assert torch.equal(
        load_model(tmp_path, trust_python=True)(**inputs_for(model, 2, 3)), dense(**inputs_for(model, 2, 3))
    )
