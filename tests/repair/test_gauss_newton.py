"""Gauss-Newton on the output: the system is the exact one, steps are judged on rows held out, nothing else changes."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.objective import OutputNoise, observe, output_losses
from optin_export.repair import RepairSettings, apply_plan, gauss_newton, refine
from optin_export.repair.gauss_newton import OUTPUT, outputs_of
from optin_export.units import find_structure
from tests.repair.plans import halved
from tests.units.models import batches_for, inputs_for, small_model

#: Models of each kind of output and of layer, of batches with padding, and with a weight that two layers share.
NAMES = [
    "resnet-cifar",
    "vgg-bn",
    "vit",
    "bert-tokens",
    "gpt2",
    "swin",
    "bert-embedding",
    "bert-regression",
    "segformer",
]


@pytest.fixture(autouse=True)
def few_rows_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauss_newton, "LEAST_HELD", 6)


def operated(name: str) -> tuple:  # type: ignore[type-arg]
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 6)
    dense = apply_plan(
        model, structure, halved(structure, 0.7), batches[:1], inputs_for(model, 3, 5), RepairSettings(repair=False)
    ).dense
    return model, structure, batches, dense


@pytest.mark.parametrize("name", NAMES)
def test_the_output_of_rows_held_out_comes_closer(name: str) -> None:
    model, structure, batches, dense = operated(name)
    before = copy.deepcopy(dense.state_dict())
    repair = refine(dense, outputs_of(model, structure, batches, 0))
    assert repair.fallback is None
    assert repair.before is not None and repair.after is not None and repair.after < 0.95 * repair.before
    generator = torch.Generator().manual_seed(0)
    held = [observe(model, structure, batch, 8, generator) for batch in batches[4:5]]
    assert gauss_newton.mean_output_loss(dense, held, 1.0) == pytest.approx(repair.after, rel=0.3)
    norms = {path for path, module in dense.named_modules() if "norm" in type(module).__name__.lower()}
    for key, value in dense.state_dict().items():
        if key.rpartition(".")[0] in norms:
            assert torch.equal(value, before[key]), key
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in dense.parameters())


def test_it_is_the_same_from_the_same_seed() -> None:
    results = []
    for _ in range(2):
        model, structure, batches, dense = operated("resnet-cifar")
        refine(dense, outputs_of(model, structure, batches, 3))
        results.append(torch.cat([one.flatten() for one in dense.parameters()]))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["resnet-cifar", "vit"])
def test_gradient_and_matrix_are_those_of_the_divergence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many orthogonal probes as classes the matrix is the exact Gauss-Newton matrix; both by finite steps."""
    model, structure, batches, dense = operated(name)
    monkeypatch.setattr(gauss_newton, "PROBES", 5)
    dense, model = dense.double(), model.double()
    inputs = {key: value.double() for key, value in batches[0].inputs.items()}
    reference = observe(model, structure, type(batches[0])(inputs, batches[0].rows), 8, torch.Generator())
    paths = gauss_newton._layers(dense, reference)
    system = gauss_newton._System(dense, paths)
    system.add(0, reference, OutputNoise(torch.Generator().manual_seed(0)), 1.0)
    assert system.matrix is not None and system.unknowns == len(system.gradient)
    direction = torch.randn(system.unknowns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    small = 1e-6  # a kink of a ReLU within the step would be an error of its own

    def outputs(scale: float) -> tuple[torch.Tensor, float]:
        moved = copy.deepcopy(dense)
        apply_in_double(moved, paths, scale * direction)
        with torch.no_grad():
            logits = moved(**inputs)
            return logits, float(output_losses(moved, reference, logits, 1.0).sum())

    (ahead, more), (behind, less) = outputs(small), outputs(-small)
    assert float(direction @ system.gradient) == pytest.approx((more - less) / (2 * small), rel=1e-3)
    change = (ahead - behind) / (2 * small)
    with torch.no_grad():
        chances = dense(**inputs).softmax(-1)
    exact = float((chances * change.square()).sum() - (chances * change).sum(-1).square().sum())
    assert float(direction @ (system.matrix @ direction)) == pytest.approx(exact, rel=1e-3)


def apply_in_double(model: nn.Module, paths: list[str], delta: torch.Tensor) -> None:
    gains, biases = delta.chunk(2)
    at = 0
    for path in paths:
        layer = model.get_submodule(path)
        width = len(layer.weight)  # type: ignore[arg-type]
        gain, bias = gains[at : at + width], biases[at : at + width]
        layer.register_forward_hook(
            lambda _, __, output, g=gain, b=bias: (
                output * (1 + g[:, None, None]) + b[:, None, None] if output.dim() == 4 else output * (1 + g) + b
            )
        )
        at += width


def test_many_unknowns_are_solved_by_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, structure, batches, dense = operated("resnet-cifar")
    steps = []
    for most in (10**6, 0):
        monkeypatch.setattr(gauss_newton, "MOST_UNKNOWNS", most)
        generator = torch.Generator().manual_seed(0)
        noise = OutputNoise(generator)
        references = [observe(model, structure, batch, 8, generator) for batch in batches[:2]]
        system = gauss_newton._System(dense, gauss_newton._layers(dense, references[0]))
        for index, reference in enumerate(references):
            system.add(index, reference, noise, 1.0)
        steps.append(system.steps()(0.5))
    assert steps[0].norm() > 0
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(gauss_newton, "FACTOR_BYTES", 4 * system.unknowns * gauss_newton.PROBES * 6)
    part = gauss_newton._System(dense, system.paths)
    for index, reference in enumerate(references):
        part.add(index, reference, noise, 1.0)
    assert (part.seen, part.samples) == (6, 12)
    assert torch.isfinite(part.steps()(0.5)).all()


@pytest.mark.parametrize("best", [0.1, 1.0, 30.0, 1e9])
def test_the_damping_is_looked_for_uphill_and_down(best: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest of the candidates, each tried once and not too many of them."""
    tried: list[float] = []

    def judged(model: nn.Module, held: object, temperature: float) -> float:
        tried.append(float(model["layer"](torch.ones(1, 1))) - 1)  # type: ignore[operator,index]
        return abs(math.log(tried[-1] / best))

    layer = nn.Linear(1, 1).requires_grad_(False)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    model: Any = nn.ModuleDict({"layer": layer})
    monkeypatch.setattr(gauss_newton, "mean_output_loss", judged)
    system: Any = SimpleNamespace(gradient=torch.ones(2), steps=lambda: lambda rho: torch.tensor([rho, 0.0]))
    found = gauss_newton._best_step(model, ["layer"], system, [], 1.0, 1.0)
    assert found is not None and len(tried) == len({round(one, 3) for one in tried}) <= gauss_newton.CANDIDATES
    assert abs(math.log(found[2] / best)) <= math.log(gauss_newton.STEP) / 2 + 1e-6 or len(tried) == 6
    assert found[0] == min(abs(math.log(one / best)) for one in tried) and float(layer.weight) == 1.0
    system.gradient = torch.zeros(2)
    assert gauss_newton._best_step(layer, ["layer"], system, [], 1.0, 1.0) is None  # type: ignore[arg-type]


def test_a_step_that_is_no_better_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, structure, batches, dense = operated("resnet-cifar")
    before = copy.deepcopy(dense.state_dict())
    real = gauss_newton._best_step
    monkeypatch.setattr(gauss_newton, "_best_step", lambda *args: (1e9, *real(*args)[1:]))  # type: ignore[index]
    assert "no step lowered" in (refine(dense, outputs_of(model, structure, batches, 0)).fallback or "")
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_biases_are_held_back_by_the_mean_square_of_what_they_add_to() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 2, 1), "linear": nn.Linear(3, 2)})
    values = torch.randn(5, 2, 4, 3)
    for path, output in (("conv", values), ("linear", values.permute(0, 2, 3, 1))):
        found = gauss_newton._mean_square(model, path, output)  # type: ignore[arg-type]
        torch.testing.assert_close(found, values.square().mean((0, 2, 3)))


def test_a_layer_that_is_shared_or_runs_twice_stays() -> None:
    model, structure, batches, dense = operated("gpt2")
    words = dense.get_submodule("model.lm_head").weight.clone()  # type: ignore[operator]
    refine(dense, outputs_of(model, structure, batches, 0))
    assert torch.equal(dense.get_submodule("model.lm_head").weight, words)  # type: ignore[arg-type]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.once = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.once(self.again(self.again(x)))

    reference = observe(model, structure, batches[0], 8, torch.Generator())
    assert gauss_newton._layers(Twice(), dataclasses.replace(reference, inputs={"x": torch.randn(3, 4)})) == ["once"]  # type: ignore[arg-type]


def test_nothing_changes_without_rows_to_judge_by_or_anything_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    model, structure, batches, dense = operated("resnet-cifar")
    before = copy.deepcopy(dense.state_dict())
    for few, told in ((1, "of 6 calibration rows 0"), (4, "of 24 calibration rows 0")):
        assert told in (refine(dense, outputs_of(model, structure, batches[:few], 0)).fallback or "")
    monkeypatch.setattr(gauss_newton, "LEAST_HELD", 7)
    assert "of 36 calibration rows 6 can be held out" in (
        refine(dense, outputs_of(model, structure, batches, 0)).fallback or ""
    )
    monkeypatch.setattr(gauss_newton, "LEAST_HELD", 6)
    with monkeypatch.context() as patch:
        patch.setattr(gauss_newton, "FACTOR_BYTES", 1000)
        assert "do not fit into 1,000 bytes" in (refine(dense, outputs_of(model, structure, batches, 0)).fallback or "")
    same = copy.deepcopy(model)
    repair = refine(same, outputs_of(model, structure, batches, 0))
    assert repair.fallback is not None and repair.damping is None
    for one, other in ((dense, before), (same, model.state_dict())):
        assert all(torch.equal(value, other[key]) for key, value in one.state_dict().items())


def test_values_that_are_not_finite_leave_the_model_alone() -> None:
    model, structure, batches, dense = operated("vit")
    batches[0].inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    before = copy.deepcopy(dense.state_dict())
    assert refine(dense, outputs_of(model, structure, batches, 0)).fallback is not None
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_operate_does_it_last_and_only_when_asked() -> None:
    model, _ = small_model("resnet-cifar")
    structure, batches, inputs = find_structure(model), batches_for(model, 6), inputs_for(model, 3, 5)
    plan = halved(structure)
    plain = apply_plan(model, structure, plan, batches, inputs, RepairSettings())
    refined = apply_plan(model, structure, plan, batches, inputs, RepairSettings(gauss_newton=True))
    assert OUTPUT not in plain.repairs and list(refined.repairs) == [*plain.repairs, OUTPUT]
    unrepaired = apply_plan(model, structure, plan, batches, inputs, RepairSettings(repair=False, gauss_newton=True))
    assert not unrepaired.repairs
