"""The repair is exact where an exact repair exists, and an architecture on disk is checked before it is believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optin_export.errors import InputError
from optin_export.families import find_structure, get_linear
from optin_export.recipe import validate
from optin_export.search import Cost, GroupPlan, Plan
from optin_export.sources import Sources, load_sources
from optin_export.surgery import load_model, operate, save_model
from optin_export.surgery.rebuild import rebuild
from tests.conftest import Make


@pytest.fixture
def sources(vit_recipe: Make, tmp_path: Path) -> Sources:
    return load_sources(validate(vit_recipe(), tmp_path))


def plan_without(sources: Sources, **removed: list[int]) -> Plan:
    groups = {}
    for group in find_structure(sources.model).groups:
        gone = removed.get(group.key.replace(".", "_"), [])
        kept = tuple(unit for unit in range(group.count) if unit not in gone)
        groups[group.key] = GroupPlan(count=group.count, kept=kept)
    cost = Cost(macs=1, params=1)
    return Plan(budget={"macs": 0.5}, base=cost, predicted=cost, score_kept=1.0, optimality_gap=0.0, groups=groups)


def test_a_duplicated_neuron_is_removed_without_loss(sources: Sources) -> None:
    """Neuron 1 computes what neuron 0 computes: least squares must move its weight over and leave no error."""
    structure = find_structure(sources.model)
    group = structure.groups[1]
    up = get_linear(sources.model, group.producers[0].path)
    up.weight.data[1], up.bias.data[1] = up.weight.data[0], up.bias.data[0]
    plan = plan_without(sources, block00_neurons=[1])
    inputs = sources.fixed(4)
    plain = operate(sources.model, structure, plan, (), inputs, repair=False)
    repaired = operate(sources.model, structure, plan, sources.calibration, inputs, repair=True)
    with torch.no_grad():
        reference = sources.model(**inputs)
        errors = [float((one.dense(**inputs) - reference).abs().max()) for one in (plain, repaired)]
    assert errors[1] < 0.1 * errors[0]
    assert repaired.repairs[group.key].after < 0.05 * repaired.repairs[group.key].before


def test_a_constant_neuron_is_folded_into_the_bias(sources: Sources) -> None:
    structure = find_structure(sources.model)
    group = structure.groups[1]
    up = get_linear(sources.model, group.producers[0].path)
    up.weight.data[2], up.bias.data[2] = 0.0, 1.5
    plan = plan_without(sources, block00_neurons=[2])
    repaired = operate(sources.model, structure, plan, sources.calibration, sources.fixed(2), repair=True)
    assert repaired.repairs[group.key].after < 0.05 * repaired.repairs[group.key].before


def test_the_original_model_is_left_alone(sources: Sources) -> None:
    before = {name: tensor.clone() for name, tensor in sources.model.state_dict().items()}
    structure = find_structure(sources.model)
    operate(
        sources.model,
        structure,
        plan_without(sources, block01_heads=[0], block02_neurons=[3]),
        sources.calibration,
        sources.fixed(2),
        repair=True,
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


@pytest.fixture
def saved(sources: Sources, tmp_path: Path) -> Path:
    structure = find_structure(sources.model)
    plan, inputs = plan_without(sources, block00_heads=[1, 2], block01_neurons=[0]), sources.fixed(2)
    dense, _ = rebuild(sources.model, structure, plan.groups, inputs)
    save_model(tmp_path / "model", dense, sources.loaded.architecture, structure.family, plan, inputs)
    return tmp_path / "model"


def test_saved_files_are_readable_by_all(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"architecture.json", "model.safetensors"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in saved.iterdir())
    assert load_model(saved)(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "something else"},
        {"version": 2},
        {"base": {"library": "timm", "name": "no_such_model", "args": {}}},
        {"base": {"library": "transformers", "class": "os", "config": {}}},
        {"base": {"library": "transformers", "class": "Trainer", "config": {}}},
        {"base": {}},
        {"groups": {"block00.heads": {"count": 4, "kept": 2}}},
        {"inputs": {"pixel_values": ["float32", [10**9, 10**9]]}},
        {"unknown": 1},
    ],
)
def test_a_damaged_architecture_is_refused(saved: Path, damage: dict) -> None:
    path = saved / "architecture.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(InputError):
        load_model(saved)


def test_truncated_weights_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError):
        load_model(saved)


def test_a_python_source_is_not_run_unless_trusted(saved: Path, tmp_path: Path) -> None:
    code = tmp_path / "evil.py"
    code.write_text(f"open({str(tmp_path / 'marker')!r}, 'w').write('ran')\ndef make(): ...\n")
    path = saved / "architecture.json"
    base = {"library": "python", "source": f"py:{code}:make", "args": {}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": base}))
    with pytest.raises(InputError, match="trust_python"):
        load_model(saved)
    assert not (tmp_path / "marker").exists()


def test_a_layer_scale_of_zero_is_survived(vit_recipe: Make, tmp_path: Path) -> None:
    """Where layer scale is zero nothing can be repaired, and nothing may become infinite."""
    model = vit_recipe()["model"]
    model = {**model, "weights": "random", "args": {**model["args"], "init_values": 0.5}}
    sources = load_sources(validate(vit_recipe(model=model), tmp_path))
    structure = find_structure(sources.model)
    assert structure.groups[0].scale is not None
    sources.model.get_submodule(structure.groups[0].scale).gamma.data[:5] = 0.0
    plan = plan_without(sources, block00_heads=[0], block00_neurons=[1, 2])
    operation = operate(sources.model, structure, plan, sources.calibration, sources.fixed(2), repair=True)
    assert all(repair.after <= repair.before for repair in operation.repairs.values())
