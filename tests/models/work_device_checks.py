"""A model on another device: the same scores, curves and repair, computed there, with copies back only at the end.

The device is `tests.devices.elsewhere`, which a machine with a CPU alone has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from optin_export.errors import EnvironmentLacks, InputError
from optin_export.models import Placement, TaskModel, device_of, gathered, work_device
from optin_export.recipe import Budget, PruneSection, validate
from optin_export.repair import RepairSettings, apply_plan, gauss_newton, loss_curves, sensitivities
from optin_export.repair.least_squares import Moments, ridge
from optin_export.scoring import score
from optin_export.units import find_query_keys, find_structure
from tests.conftest import ROOT, Make
from tests.devices import elsewhere
from tests.repair.plans import halved
from tests.units.models import batches_for, small_model

#: Where values may come back, and how many numbers at once: results of a group, conditions of solves, and the model.
BACK = {
    "models/placement.py": 1 << 20,
    "scoring/sketch.py": 512,
    "scoring/exact.py": 512,
    "scoring/activation.py": 512,
    "repair/second_order.py": 512,
    "repair/measured_points.py": 2,
    "repair/layer_problem.py": 2,
    "repair/least_squares.py": 2,
    "repair/curves.py": 1,
    "repair/query_keys.py": 1,
    "repair/relu.py": 1,
    "repair/sensitivity.py": 1,
    "repair/gauss_newton.py": 1,
    "models/tasks.py": 1,  # conditions in the models themselves
}


@pytest.fixture
def device() -> torch.device:
    return elsewhere.register()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-spans", "deit3-layer-scale", "resnet-timm", "clip-text"])
def test_scores_curves_and_repair_are_computed_there(name: str, device: torch.device) -> None:
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 3, size=4)
    structure = dataclasses.replace(structure, attentions=find_query_keys(model, structure))
    fewer = {one.name: one.count // 2 for one in structure.attentions}
    plan = halved(structure).model_copy(update={"dimensions": fewer})
    settings = PruneSection(budget=Budget(macs=0.5), probes=4)
    least = {group.key: 1 for group in structure.searched_groups}
    results: list[dict[str, Any]] = []
    for where in (Placement(), Placement(device=str(device))):
        with elsewhere.counting() as copies:
            scores = score(model, structure, batches, settings, 0, placement=where)
            with where(model):
                weights = sensitivities(model, structure, batches, 0)
                curves = loss_curves(
                    model, structure, scores.values, batches, batches, RepairSettings(), least=least, weights=weights
                )
            there = apply_plan(model, structure, plan, batches, batches[0].inputs, RepairSettings(), at_work=where)
        moved = {key: max(sizes) for key, sizes in copies.items() if key != "tests"}
        assert {key: most for key, most in moved.items() if most > BACK.get(key.partition(":")[0], 0)} == {}
        results.append({**scores.values, **{f"curve {key}": one for key, one in curves.items()}})
        results[-1] |= there.dense.state_dict()
        assert all(
            one.device.type == "cpu" for one in (*model.state_dict().values(), *there.dense.state_dict().values())
        )
    here, away = results
    assert here.keys() == away.keys()
    for key in here:
        wanted = np.asarray(here[key])
        most = 1e-4 * max(float(np.abs(wanted).max()), 1e-6)
        np.testing.assert_allclose(np.asarray(away[key]), wanted, rtol=1e-3, atol=most, err_msg=key)


@pytest.mark.parametrize("unknowns", [0, 6144])
def test_gauss_newton_runs_there(device: torch.device, monkeypatch: pytest.MonkeyPatch, unknowns: int) -> None:
    monkeypatch.setattr(gauss_newton, "LEAST_HELD", 1)
    monkeypatch.setattr(gauss_newton, "MOST_UNKNOWNS", unknowns)  # the matrix, or its factor
    model, _ = small_model("vit")
    structure, batches = find_structure(model), batches_for(model, 5, size=2)
    inputs, results = batches[0].inputs, []
    for where in (Placement(), Placement(device=str(device))):
        settings = RepairSettings(gauss_newton=True)
        found = apply_plan(model, structure, halved(structure), batches, inputs, settings, at_work=where)
        assert found.repairs["output"].before is not None
        results.append((found.repairs["output"], found.dense.state_dict()))
    # Not bit by bit: kernels add up in an order that depends on where in memory a tensor lies.
    (here, weights), (there, others) = results
    assert (here.before, here.after) == pytest.approx((there.before, there.after), rel=1e-4)
    torch.testing.assert_close(weights, others, rtol=1e-3, atol=1e-5)


def test_gram_matrices_are_summed_and_solved_there_without_a_copy_per_batch(device: torch.device) -> None:
    rows = [torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    truth = torch.randn(7, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def solved(where: Placement) -> torch.Tensor:
        with where(_model()):
            train, held = Moments(6, 3), Moments(6, 3)
            with elsewhere.counting() as copies:
                for index, design in enumerate(rows):
                    design = gathered(design)
                    target = design @ gathered(truth[:-1].float()) + gathered(truth[-1].float())
                    (held if index == 3 else train).add(design, target)
                assert not copies
            return ridge(train, held, gathered(0.5 * truth)).solution.cpu()

    away = solved(Placement(device=str(device)))
    torch.testing.assert_close(solved(Placement()), away)
    assert torch.allclose(away, truth, atol=1e-3)
    assert work_device() == torch.device("cpu")


def test_tensors_of_both_devices_do_not_mix(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        torch.ones(3, device=device) + torch.ones(3)
    with elsewhere.counting() as copies:
        assert (torch.ones(3, device=device) + 1).sum().item() == 6.0
    assert dict(copies) == {"tests": [1]}


def test_the_model_follows_and_comes_back(device: torch.device) -> None:
    model = _model()
    rows = batches_for(model, 1, size=2)[0].inputs
    with torch.no_grad():
        expected = model(**rows)
        with Placement(device=str(device))(model):
            assert model(**rows).device == device == work_device()
        assert torch.equal(model(**rows), expected)
    Placement(device=str(device)).check(model, rows)


def test_a_model_that_computes_something_else_there_is_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optin_export.models import placement

    model = _model()
    monkeypatch.setattr(placement, "ROUNDING", -1.0)
    with pytest.raises(InputError, match=r"(?s)does not compute on elsewhere:0.*differs.*model.device: cpu"):
        Placement(device=str(device)).check(model, batches_for(model, 1, size=2)[0].inputs)


@pytest.mark.parametrize(
    ("name", "gpus", "found"), [("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda:1", 2, "cuda:1")]
)
def test_names_of_devices(monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, found: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert device_of(name) == torch.device(found)


def test_a_gpu_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, vit_recipe: Make) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(EnvironmentLacks, match=r"(?s)cuda:1 needs GPU 1.*torch sees 1"):
        device_of("cuda:1")
    recipe = vit_recipe()
    for model, why in (
        ({"device": "gpu"}, "device"),
        ({"device": "cpu", "device_map": "auto"}, "remove one of them"),
    ):
        with pytest.raises(InputError, match=why):
            validate({**recipe, "model": {**recipe["model"], **model}}, ROOT)


def _model() -> TaskModel:
    return small_model("vit")[0]
