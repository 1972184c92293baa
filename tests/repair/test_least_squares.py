"""The solver against numpy: weighted moments, ridge regression near a starting point, one factor per unit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optin_export.repair import least_squares
from optin_export.repair.least_squares import DAMPINGS, Moments, rescale, ridge


def problem(
    rows: int = 200, features: int = 6, outputs: int = 3, noise: float = 0.1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Design, target, positive weights, and the solution behind the target, its last row the bias; in float64."""
    generator = torch.Generator().manual_seed(seed)
    design = torch.randn(rows, features, generator=generator, dtype=torch.float64) + 0.5
    truth = torch.randn(features + 1, outputs, generator=generator, dtype=torch.float64)
    error = noise * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    weight = torch.rand(rows, generator=generator, dtype=torch.float64) * 2
    return design, design @ truth[:-1] + truth[-1] + error, weight, truth


def moments(design: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> Moments:
    found = Moments(design.shape[1], target.shape[1])
    found.add(design, target, weight)
    return found


def error(design: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, solution: torch.Tensor) -> float:
    """Weighted mean squared error per element, from the rows themselves."""
    residual = target - design @ solution[:-1] - solution[-1]
    return float((residual.square().mean(1) * weight).sum() / weight.sum())


def solved(
    design: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, start: torch.Tensor, damping: float
) -> torch.Tensor:
    """min sum_i w_i |t_i - x_i B|^2 + rho |B - start|^2 as ordinary least squares over rows added to the problem."""
    augmented = torch.cat([design, torch.ones(len(design), 1, dtype=torch.float64)], 1)
    root = weight.sqrt()[:, None]
    rho = damping * float((augmented.square() * weight[:, None]).sum(0).mean())
    rows = torch.cat([augmented * root, rho**0.5 * torch.eye(augmented.shape[1], dtype=torch.float64)])
    wanted = torch.cat([target * root, rho**0.5 * start])
    return torch.from_numpy(np.linalg.lstsq(rows.numpy(), wanted.numpy(), rcond=None)[0])


def test_moments_are_sums_over_weighted_rows() -> None:
    design, target, weight, truth = problem()
    whole = moments(design, target, weight)
    augmented = torch.cat([design, torch.ones(len(design), 1)], 1)
    torch.testing.assert_close(whole.gram, augmented.T @ torch.diag(weight) @ augmented)
    torch.testing.assert_close(whole.cross, augmented.T @ torch.diag(weight) @ target)
    assert whole.rows == 200 and whole.weight == pytest.approx(float(weight.sum()))
    solution = truth + 0.1
    assert whole.error(solution) == pytest.approx(error(design, target, weight, solution))
    assert whole.scale == pytest.approx(float((target.square().mean(1) * weight).sum() / weight.sum()))


def test_a_gram_matrix_of_several_blocks_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "BLOCK", 3)
    design, target, weight, _ = problem(features=7)
    found = moments(design, target, weight).gram
    augmented = torch.cat([design, torch.ones(len(design), 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(found, augmented.T @ (augmented * weight[:, None]))


def test_moments_add_up_and_no_weights_are_equal_weights() -> None:
    design, target, weight, truth = problem()
    parts = moments(design[:70], target[:70], weight[:70]) + moments(design[70:], target[70:], weight[70:])
    whole = moments(design, target, weight)
    torch.testing.assert_close(parts.gram, whole.gram)
    torch.testing.assert_close(parts.cross, whole.cross)
    assert (parts.rows, parts.error(truth)) == (200, pytest.approx(whole.error(truth)))
    plain, ones = moments(design, target), moments(design, target, torch.ones(200))
    assert torch.equal(plain.gram, ones.gram) and plain.weight == 200
    plain.add(design[:0], target[:0])
    assert plain.rows == 200


def test_moments_of_the_same_rows_again_are_those_of_their_new_targets() -> None:
    design, target, weight, _ = problem()
    other = target.relu()
    first = moments(design, target, weight)
    again, whole = first.again(), moments(design, other, weight)
    again.add(design, other, weight)
    assert torch.equal(again.gram, whole.gram) and torch.equal(again.cross, whole.cross)
    assert (again.power, again.weight, again.rows) == (whole.power, whole.weight, whole.rows)
    assert torch.equal(first.cross, moments(design, target, weight).cross)


@pytest.mark.parametrize("noise", [0.01, 1.0, 10.0])
def test_ridge_is_numpys_least_squares_with_the_damping_that_predicts_best(noise: float) -> None:
    """Each damping is fitted on some rows and judged on the others; the best is then fitted on all of them."""
    design, target, weight, truth = problem(rows=40, noise=noise)
    start = truth + 0.3 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(5))
    train, held = slice(0, 25), slice(25, 40)
    judged = {
        damping: error(
            design[held], target[held], weight[held],
            solved(design[train], target[train], weight[train], start, damping),
        )
        for damping in DAMPINGS
    }  # fmt: skip
    best = min(judged, key=lambda damping: judged[damping])
    assert judged[best] < error(design[held], target[held], weight[held], start)
    fit = ridge(
        moments(design[train], target[train], weight[train]), moments(design[held], target[held], weight[held]), start
    )
    assert fit.damping == best and fit.fallback is None
    torch.testing.assert_close(fit.solution, solved(design, target, weight, start, best))
    assert fit.before == pytest.approx(error(design, target, weight, start))
    assert fit.after == pytest.approx(error(design, target, weight, fit.solution))


def test_more_noise_asks_for_more_damping() -> None:
    chosen = []
    for noise in (0.01, 3.0):
        design, target, _weight, truth = problem(rows=20, features=12, noise=noise)
        start = truth + 0.3
        fit = ridge(moments(design[:15], target[:15]), moments(design[15:], target[15:]), start)
        chosen.append(fit.damping or float("inf"))
    assert chosen[0] < chosen[1]


def test_ridge_keeps_what_stands_where_rows_are_too_few_to_do_better() -> None:
    """Pure noise: whatever is fitted to three rows is worse on the others than the start."""
    design, _, _weight, truth = problem(rows=8, features=20)
    start = torch.zeros_like(truth)
    target = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fit = ridge(moments(design[:3], target[:3]), moments(design[3:], target[3:]), start)
    assert fit.damping is None and fit.solution is start and fit.before == fit.after > 0
    assert fit.fallback == "no refit was better on held-out rows (3 rows for 21 unknowns)"
    # With rows enough it is not their number.
    design, _, _, _ = problem(rows=60, features=2, seed=4)
    target = torch.randn(60, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    start = solved(design[50:], target[50:], torch.ones(10, dtype=torch.float64), torch.zeros(3, 1), 0.0)
    fit = ridge(moments(design[:50], target[:50]), moments(design[50:], target[50:]), start)
    assert fit.fallback == "no refit was better on held-out rows"


def test_ridge_without_rows_or_without_error_keeps_what_stands() -> None:
    design, target, weight, truth = problem(noise=0.0)
    nothing = ridge(Moments(6, 3), Moments(6, 3), truth)
    assert nothing.fallback == "no calibration rows reach it" and nothing.solution is truth
    unread = ridge(moments(design, target, torch.zeros(200)), Moments(6, 3), truth)
    assert unread.fallback == "no calibration rows reach it"
    exact = ridge(moments(design, target, weight), Moments(6, 3), truth)
    assert exact.damping is None and exact.fallback is None and exact.after < 1e-10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_not_fitted(value: float) -> None:
    design, target, _, truth = problem()
    design[3, 2] = value
    fit = ridge(moments(design[:100], target[:100]), moments(design[100:], target[100:]), truth)
    assert fit.fallback == "activations are not finite" and fit.solution is truth
    assert rescale(moments(design, target), Moments(6, 3), truth, 1).solution is truth


def test_without_held_out_rows_the_damping_is_judged_on_all() -> None:
    design, target, weight, truth = problem()
    fit = ridge(moments(design, target, weight), Moments(6, 3), truth + 0.5)
    assert fit.damping == DAMPINGS[0]
    assert fit.after < 0.011 < fit.before


@pytest.mark.parametrize("width", [1, 3])
def test_rescale_is_numpys_least_squares_over_factors(width: int) -> None:
    """Every factor multiplies the weights of `width` inputs; weights among themselves and the bias stay."""
    design, _, weight, start = problem()
    factors = torch.tensor([0.5, 2.0, 1.3, 1.0, 0.7, -1.0], dtype=torch.float64)[: 6 // width]
    each = factors.repeat_interleave(width)[:, None]
    target = design @ (start[:-1] * each) + start[-1]
    target = target + 0.01 * torch.randn(target.shape, generator=torch.Generator().manual_seed(3))
    fit = rescale(
        moments(design[:150], target[:150], weight[:150]), moments(design[150:], target[150:], weight[150:]),
        start, width,
    )  # fmt: skip
    assert fit.damping is not None
    units = 6 // width
    columns = torch.stack(
        [(design[:, u * width : (u + 1) * width] @ start[u * width : (u + 1) * width]).flatten() for u in range(units)],
        1,
    )
    root = weight.repeat_interleave(3).sqrt()
    wanted = (target - start[-1]).flatten() * root
    rho = fit.damping * float((columns.square() * root[:, None].square()).sum(0).mean())
    rows = torch.cat([columns * root[:, None], rho**0.5 * torch.eye(units, dtype=torch.float64)])
    expected = np.linalg.lstsq(rows.numpy(), torch.cat([wanted, rho**0.5 * torch.ones(units)]).numpy(), rcond=None)[0]
    torch.testing.assert_close(
        fit.solution[:-1], start[:-1] * torch.from_numpy(expected).repeat_interleave(width)[:, None]
    )
    assert torch.equal(fit.solution[-1], start[-1])
    np.testing.assert_allclose(expected, factors, atol=0.02)
    assert fit.after < 0.01 * fit.before


def test_rescale_of_nothing_is_nothing() -> None:
    """A sub-layer without units has no factors."""
    start = torch.ones(1, 3, dtype=torch.float64)
    fit = rescale(moments(torch.zeros(5, 0), torch.zeros(5, 3)), Moments(0, 3), start, 8)
    assert fit.solution is start and fit.damping is None
