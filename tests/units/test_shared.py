"""Modules and parameters that are used in several places: their units stay, by name; all others go exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optin_export.models import build
from optin_export.models.tasks import TaskModel
from optin_export.pruning import load_model, save_model
from optin_export.repair import RepairSettings, apply_plan, masked_difference
from optin_export.units import find_structure
from tests.repair.plans import halved, plan_of
from tests.units.builders import from_python
from tests.units.models import batches_for

NETS = Path(__file__).parent / "hybridnets.py"


def built(function: str, **args: str) -> tuple[TaskModel, dict[str, object]]:
    description = from_python(NETS, function, **args)()
    architecture = {**description, "task": "image-classification", "pooling": None, "normalize": False}
    return build(architecture, trust_python=True), architecture


def images(batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


#: What is shared -> the blocks that still lose channels, and what the refusals say. Blocks that run several times are
#: found by measurement, and lose their channels in every call.
SHARED = {
    "block": ([0, 1], []),
    "layer": ([1], ["blocks.0.conv2", "blocks.2.conv2"]),
    "norm": ([1], ["blocks.0.bn1", "blocks.2.bn1"]),
    "parameter": ([1], ["'model.blocks.0.conv1.weight' and 'model.blocks.2.conv1.weight'"]),
    "storage": ([0, 1, 2], []),
    "alias": ([0, 1, 2], []),
    "": ([0, 1, 2], []),
}


@pytest.mark.parametrize("share", list(SHARED))
def test_units_around_what_is_used_twice_stay(share: str, tmp_path: Path) -> None:
    model, architecture = built("residual", share=share)
    before = model(**images(3))
    structure = find_structure(model, inputs=images(2))
    blocks, words = SHARED[share]
    assert [group.consumer for group in structure.groups] == [f"model.blocks.{index}.conv2" for index in blocks]
    told = " ".join(f"{one.error.what} {one.error.why}" for one in structure.refused)
    assert all(word in told for word in words) and bool(words) == bool(structure.refused)
    plan, batches = halved(structure), batches_for(model, 5, size=4)
    plain = apply_plan(model, structure, plan, (), images(2), RepairSettings(repair=False)).dense
    assert max(masked_difference(model, plain, structure, plan, images(size, size)) for size in (1, 2, 5)) <= 1e-5
    repaired = apply_plan(model, structure, plan, batches, images(2), RepairSettings()).dense
    errors = [float((dense(**images(20, 9)) - model(**images(20, 9))).norm()) for dense in (plain, repaired)]
    assert errors[1] < 0.5 * errors[0]
    assert torch.equal(model(**images(3)), before)
    save_model(tmp_path, repaired, architecture, structure, plan, images(2))
    assert torch.equal(load_model(tmp_path, trust_python=True)(**images(3)), repaired(**images(3)))


@pytest.mark.parametrize(("share", "blocks"), [("all", 1), ("siamese", 3), ("recurrent", 3)])
def test_blocks_that_all_run_several_times_lose_their_units_in_every_call(share: str, blocks: int) -> None:
    model, _ = built("residual", share=share)
    structure = find_structure(model, inputs=images(2))
    assert [group.consumer for group in structure.groups] == [f"model.blocks.{index}.conv2" for index in range(blocks)]
    assert not structure.refused
    plan = halved(structure)
    dense = apply_plan(model, structure, plan, batches_for(model, 3, size=4), images(2), RepairSettings())
    assert dense.masked_difference <= 1e-5


def test_without_a_pass_several_names_count_as_several_calls() -> None:
    model, _ = built("residual", share="block")
    structure = find_structure(model)
    assert structure.blocks == ("model.blocks.1",)


def test_a_sublayer_that_goes_as_a_whole_goes_under_all_its_names(tmp_path: Path) -> None:
    """The forward pass uses other names than those found first; all heads of one block and neurons of another go."""
    model, architecture = built("attention")
    structure = find_structure(model, inputs=images(2))
    assert len(structure.groups) == 6
    plan = plan_of(structure, {"block00.heads": (), "block01.neurons": (), "block02.heads": (1, 3)})
    dense = apply_plan(model, structure, plan, (), images(2), RepairSettings(repair=False)).dense
    assert max(masked_difference(model, dense, structure, plan, images(size, size)) for size in (1, 2, 5)) <= 1e-5
    save_model(tmp_path, dense, architecture, structure, plan, images(2))
    assert torch.equal(load_model(tmp_path, trust_python=True)(**images(3)), dense(**images(3)))


def test_a_tie_that_touches_no_units_stays() -> None:
    """The embedding of GPT-2 is its output layer as well."""
    from tests.units.models import inputs_for, small_model

    model, _ = small_model("gpt2")
    structure = find_structure(model, inputs=inputs_for(model, 2, 0))
    assert len(structure.groups) == 6 and not structure.refused
