"""A model whose parts are kept elsewhere: the same scores, curves and repair, and the model is as it was afterwards."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from optin_export.errors import EnvironmentLacks, InputError
from optin_export.models import Placement, TaskModel, placement
from optin_export.recipe import Budget, PruneSection, validate
from optin_export.repair import RepairSettings, apply_plan, loss_curves, sensitivities
from optin_export.scoring import score
from optin_export.units import find_query_keys, find_structure
from tests.conftest import Make
from tests.repair.plans import halved
from tests.units.models import batches_for, small_model

pytest.importorskip("accelerate", reason="pip install 'optin-export[large]'")
#: What is kept on disk, of models of three kinds; all that a block holds, and some of what is outside blocks.
MAPS: dict[str, Mapping[str, int | str]] = {
    "bert": {"": "cpu", "bert.encoder.layer.0": "disk", "bert.encoder.layer.2": "disk", "classifier": "disk"},
    "vit": {"": "disk"},
    "deit3-layer-scale": {"": "cpu", "blocks.1": "disk"},
    "resnet-timm": {"": "disk"},
    "llama-tied": {"": "disk"},
}


def placed(model: TaskModel, device_map: Any, **more: Any) -> Placement:
    return Placement(device_map, blocks=find_structure(model).blocks, **more)


@pytest.mark.parametrize("name", list(MAPS))
def test_scores_curves_and_repair_are_the_same_to_the_last_bit(name: str) -> None:
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 2, size=4)
    structure = dataclasses.replace(structure, attentions=find_query_keys(model, structure))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    settings = PruneSection(budget=Budget(macs=0.5), probes=4)
    least = {group.key: 0 if group.sublayer else 1 for group in structure.searched_groups}
    fewer = {one.name: one.count // 2 for one in structure.attentions}
    plan, inputs = halved(structure).model_copy(update={"dimensions": fewer}), batches[0].inputs
    results = []
    for where in (Placement(), placed(model, MAPS[name])):
        scores = score(model, structure, batches, settings, 0, placement=where)
        with where(model):
            assert (where.device_map is not None) == any(one.is_meta for one in model.parameters())
            weights = sensitivities(model, structure, batches, 0)
            curves = loss_curves(
                model, structure, scores.values, batches, batches, RepairSettings(), least=least, weights=weights
            )
        repaired = apply_plan(model, structure, plan, batches, inputs, RepairSettings(), at_work=where)
        results.append((scores.values, curves, repaired.dense.state_dict()))
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
        assert not any("forward" in vars(part) or hasattr(part, "_hf_hook") for part in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    for alone, elsewhere in zip(*results, strict=True):
        assert alone.keys() == elsewhere.keys()
        for key in alone:
            assert np.array_equal(np.asarray(alone[key]), np.asarray(elsewhere[key])), key


def test_the_graph_holds_no_weights_of_blocks() -> None:
    """They are fetched again on the way back, one block after another: all at once they might not fit."""
    model, _ = small_model("vit")
    structure = find_structure(model)
    (batch,) = batches_for(model, 1, size=4)
    weight = tuple(model.get_parameter("model.blocks.0.mlp.fc1.weight").shape)
    assert weight[0] != weight[1]

    def run(where: Placement) -> tuple[int, int, torch.Tensor]:
        images, saved, runs = batch.inputs["pixel_values"].clone().requires_grad_(True), [], []
        handles = [
            model.get_submodule(f"{block}.mlp.fc1").register_forward_pre_hook(lambda *_: runs.append(1))
            for block in structure.blocks
        ]
        with where(model):
            with torch.autograd.graph.saved_tensors_hooks(
                lambda one: (saved.append(one.shape), one)[1], lambda one: one
            ):
                output = model(pixel_values=images).sum()
            output.backward()
        for handle in handles:
            handle.remove()
        assert images.grad is not None
        return sum(tuple(shape) in (weight, weight[::-1]) for shape in saved), len(runs), images.grad

    here, away = run(Placement()), run(placed(model, {"": "disk"}))
    assert here[:2] == (6, 3) and away[:2] == (0, 6) and torch.equal(here[2], away[2])


def test_a_map_by_name_keeps_blocks_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model("vit")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    where = placed(model, "auto", max_memory={"cpu": size // 2})
    places = where.places(model)
    assert set(places.values()) == {"cpu", "disk"}
    assert not any(path.startswith(f"{block}.") for path in places for block in ("blocks.0", "blocks.1", "blocks.2"))
    where.check(model, batches_for(model, 1, size=2)[0].inputs)
    monkeypatch.setattr(placement, "ROUNDING", -1.0)
    with pytest.raises(InputError, match="its output differs"):
        where.check(model, batches_for(model, 1, size=2)[0].inputs)


@pytest.mark.parametrize(
    ("device_map", "kind", "why"),
    [
        ({"": "cpu", "blocks.9": "disk"}, InputError, "the model has no 'blocks.9'"),
        ({"blocks": "cpu"}, InputError, "has no place"),
        ({"": "cpu", "blocks.0.attn": "disk"}, InputError, "lies in several places"),
        ({"": "cuda:99"}, EnvironmentLacks, "torch sees"),
        ({"": 99}, EnvironmentLacks, "needs GPU 99"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(device_map: Any, kind: type[Exception], why: str) -> None:
    model, _ = small_model("vit")
    with pytest.raises(kind, match=why), placed(model, device_map)(model):
        pass
    assert not any(one.is_meta for one in model.parameters())


def test_what_memory_is_asked_for_has_to_be_a_size() -> None:
    model, _ = small_model("vit")
    with pytest.raises(InputError, match="does not fit"):
        placed(model, "auto", max_memory={"cpu": "much"}).places(model)
    with pytest.raises(EnvironmentLacks, match="needs GPU 77"):
        placed(model, "auto", max_memory={"77": "1GiB"}).places(model)


def test_a_full_disk_and_a_missing_package_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model("vit")
    where = placed(model, {"": "disk"})
    monkeypatch.setattr(placement.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(InputError, match="no space for the weights"), where(model):
        pass
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(EnvironmentLacks, match="'accelerate'") as error, where(model):
        pass
    assert "optin-export[large]" in str(error.value)


def test_the_recipe_takes_maps_and_refuses_others(vit_recipe: Make, tmp_path: Any) -> None:
    def of(**fields: Any) -> Any:
        recipe = vit_recipe()
        recipe["model"] |= fields
        return validate(recipe, tmp_path).model

    assert of(device_map="auto", max_memory={0: "2GiB", "cpu": "1GiB"}).max_memory == {"0": "2GiB", "cpu": "1GiB"}
    assert of(device_map={"": 0, "blocks": "cuda:1", "head": "cuda:0"}).gpus == 2
    assert [of().gpus, of(device_map="auto").gpus, of(device_map={"": "disk"}).gpus] == [0, 1, 0]
    assert of(device_map="auto", max_memory={"cpu": "1GiB"}).gpus == 0
    for wrong in ({"device_map": "somewhere"}, {"device_map": {"": "tape"}}, {"max_memory": {"cpu": 5}}):
        with pytest.raises(InputError):
            of(**wrong)
