"""One layer's least squares: the solution of the normal equations, and, where a ReLU follows, no worse behind it."""

from __future__ import annotations

import pytest
import torch

from optin_export.repair import layer_problem
from optin_export.repair.layer_problem import HOLD_OUT, LayerProblem, Rows
from optin_export.repair.relu import ReluTarget


def batches(count: int, relu: ReluTarget | None = None, weighted: bool = False) -> list[Rows]:
    """Noisy rows of y = x A + 1, with A [4, 3]."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4, 3, generator=generator)
    found = []
    for _ in range(count):
        inputs = torch.randn(40, 4, generator=generator)
        target = inputs @ truth + 1 + 0.1 * torch.randn(40, 3, generator=generator)
        weight = torch.rand(40, generator=generator) if weighted else None
        found.append(Rows(inputs, target, relu, weight))
    return found


def of(rows: list[Rows], start: torch.Tensor | None = None) -> LayerProblem:
    start = torch.zeros(5, 3, dtype=torch.float64) if start is None else start
    return LayerProblem(start, rows.__getitem__, len(rows), rows[0].relu is not None)


@pytest.mark.parametrize("count", [2, HOLD_OUT])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_solution_is_that_of_the_damped_normal_equations(count: int, weighted: bool) -> None:
    rows = batches(count, weighted=weighted)
    fit = of(rows).solve()
    design = torch.cat([torch.cat([one.inputs, torch.ones(40, 1)], 1) for one in rows]).double()
    target = torch.cat([one.target for one in rows]).double()
    weight = torch.cat([one.weight if one.weight is not None else torch.ones(40) for one in rows]).double()[:, None]
    gram = design.T @ (weight * design)
    assert fit.damping is not None
    damped = gram + fit.damping * gram.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    expected = torch.linalg.solve(damped, design.T @ (weight * target))
    torch.testing.assert_close(fit.solution, expected, rtol=1e-5, atol=1e-6)
    residual = (weight * (design @ fit.solution - target).square()).sum() / (3 * weight.sum())
    assert fit.after == pytest.approx(float(residual), rel=1e-3) and fit.after < 0.05 * fit.before


def test_one_factor_per_unit() -> None:
    """Columns 0 and 1 are one unit, 2 and 3 the other: what stands is half of the first, and three times the second."""
    rows = [Rows(one.inputs, one.inputs @ torch.ones(4, 2), None, None) for one in batches(3)]
    start = torch.ones(5, 2, dtype=torch.float64)
    start[:2], start[2:4], start[4] = 0.5, 3.0, 0.0
    solution = of(rows, start).rescale(2).solution
    torch.testing.assert_close(solution[:4], torch.ones(4, 2, dtype=torch.float64), rtol=1e-3, atol=1e-3)


RELU = ReluTarget(torch.ones(3), torch.zeros(3))


def behind(rows: list[Rows], solution: torch.Tensor) -> float:
    """By its definition."""
    errors = [
        ((one.inputs @ solution[:-1].float() + solution[-1].float()).relu() - one.target.relu()).square().mean()
        for one in rows
    ]
    return float(torch.stack(errors).mean())


def test_only_what_passes_the_relu_has_to_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets are not linear in the inputs below zero, where nobody sees it."""
    rows = [
        Rows(one.inputs, torch.where(one.target > 0, one.target, 9 * one.target), RELU, None)
        for one in batches(HOLD_OUT)
    ]
    fit = of(rows).solve()
    assert fit.after == pytest.approx(behind(rows, fit.solution), rel=1e-4)
    assert fit.before == pytest.approx(behind(rows, of(rows).start), rel=1e-4)
    monkeypatch.setattr(layer_problem, "ROUNDS", 0)
    assert fit.after < 0.7 * of(rows).solve().after


@pytest.mark.parametrize("memory", [0, 40 * 4 * (4 + 3) * 2 + 100])
def test_rows_are_made_again_only_if_they_do_not_fit(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, made = batches(3, RELU), []
    expected = of(rows).solve().solution
    monkeypatch.setattr(layer_problem, "ROWS_IN_MEMORY", memory)

    def make(index: int) -> Rows:
        made.append(index)
        return rows[index]

    problem = LayerProblem(torch.zeros(5, 3, dtype=torch.float64), make, 3, has_relu=True)
    assert torch.equal(problem.solve().solution, expected)
    passes = made.count(2)
    assert passes >= 2 and made == ([0, 1, 2] * passes if memory == 0 else [0, 1] + [2] * passes)
