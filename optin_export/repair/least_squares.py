"""Ridge regression from running sums, with the damping chosen on held-out rows.

Gram matrices are accumulated in float64, so memory depends on the width of a layer, not on the number of rows. Where a
layer is wide and rows are few, these are kept instead (`few_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from optin_export.models import work_device
from optin_export.repair.few_rows import FEW, WIDE, FewRows

#: Candidates for rho, as shares of the mean diagonal of the Gram matrix.
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: An error below this share of the target's power is not repaired: sums of float32 products are no more exact.
NEGLIGIBLE = 1e-7
#: Columns of a Gram matrix that are computed at once.
BLOCK = 384


class Moments:
    """Sums over weighted rows: Gram matrix of the design (its last column is 1), products with the target, power.

    few: the rows themselves, in place of Gram matrix and products, while there are few for a wide design.
    """

    def __init__(self, features: int, outputs: int) -> None:
        self.features, self.outputs = features, outputs
        self.few = FewRows() if features >= WIDE else None
        self.gram, self.cross = self._sums(0, 0) if self.few is not None else self._sums(features + 1, outputs)
        # The target's power and the weight of the rows stay on the device while rows are added.
        self.sums, self.rows = torch.zeros(2, dtype=torch.float64, device=work_device()), 0
        self.has_all_rows = False  # the Gram matrix already includes all rows
        self.inverses: dict[float, torch.Tensor | None] = {}

    def _sums(self, features: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        here: Any = {"dtype": torch.float64, "device": work_device()}
        return torch.zeros(features, features, **here), torch.zeros(features, outputs, **here)

    def add(self, design: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """design: [rows, features]; target: [rows, outputs]; weight: [rows], or None for equal weights."""
        if not len(design):
            return
        self.inverses.clear()
        # One batch's products in float32 are as exact as its activations; only the sums need more precision.
        augmented = torch.cat([design, design.new_ones(len(design), 1)], 1)
        weights = (design.new_ones(len(design)) if weight is None else weight.to(design))[:, None]
        if self.few is not None:
            root = weights.sqrt()
            self.few.add(augmented * root, target * root)
            if len(self.few) > FEW * self.features:
                self._sum_up(self.few)
        else:
            weighted = augmented * weights
            if not self.has_all_rows:
                self._add_gram(weighted, augmented)
            self.cross += (weighted.T @ target).double()
        self.sums += torch.stack([(target.double().square() * weights).sum(), weights.double().sum()])
        self.rows += len(design)

    def _sum_up(self, few: FewRows) -> None:
        """Go on with sums: the rows have become many."""
        self.gram, self.cross = self._sums(self.features + 1, self.outputs)
        for inputs, targets in zip(few.inputs, few.targets, strict=True):
            self._add_gram(inputs, inputs)
            self.cross += (inputs.T @ targets).double()
        self.few = None

    def _add_gram(self, weighted: torch.Tensor, augmented: torch.Tensor) -> None:
        """Half of the products are enough: what is right of a block of the diagonal is, transposed, what is below."""
        for start in range(0, len(self.gram), BLOCK):
            stop = min(start + BLOCK, len(self.gram))
            part = (weighted[:, start:stop].T @ augmented[:, start:]).double()
            self.gram[start:stop, start:] += part
            self.gram[stop:, start:stop] += part[:, stop - start :].T

    def again(self) -> Moments:
        """Moments for other targets of the same weighted rows, with this Gram matrix, which `add` does not change."""
        other = Moments(self.features, self.outputs)
        if self.few is None:
            other.few, other.has_all_rows = None, True
            other.gram, other.cross = self.gram, torch.zeros_like(self.cross)
        return other

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.features, self.outputs)
        if self.few is not None and other.few is not None:
            total.few = self.few + other.few
        else:
            for one in (self, other):
                if one.few is not None:
                    one._sum_up(one.few)
            total.few, total.gram, total.cross = None, self.gram + other.gram, self.cross + other.cross
        total.sums = self.sums + other.sums
        total.rows = self.rows + other.rows
        return total

    @property
    def power(self) -> float:
        return float(self.sums[0])

    @property
    def weight(self) -> float:
        return float(self.sums[1])

    def error(self, solution: torch.Tensor) -> float:
        """Weighted mean squared error per element of `solution`, [features + 1, outputs]."""
        if self.weight <= 0:
            return 0.0
        if self.few is not None:
            return self.few.squared_error(solution) / (self.weight * self.outputs)
        squared = self.power - 2 * float((solution * self.cross).sum())
        squared += float((solution * (self.gram @ solution)).sum())
        # The quadratic form cancels to rounding noise if nothing is left to repair.
        return max(squared, 0.0) / (self.weight * self.outputs)

    @property
    def full_gram(self) -> torch.Tensor:
        """The Gram matrix [features + 1, features + 1], also where only the rows are kept."""
        if self.few is None:
            return self.gram
        return torch.stack([rows.double().T @ rows.double() for rows in self.few.inputs]).sum(0)

    @property
    def mean_diagonal(self) -> float:
        """Of the Gram matrix."""
        return self.few.mean_diagonal if self.few is not None else float(self.gram.diagonal().mean())

    def inverse(self, rho: float) -> torch.Tensor | None:
        """(G + rho I)^-1, kept until rows are added; None if G + rho I is not positive definite."""
        if rho not in self.inverses:
            eye = torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
            factor, info = torch.linalg.cholesky_ex(self.gram + rho * eye)
            self.inverses[rho] = None if int(info) else torch.cholesky_inverse(factor)
        return self.inverses[rho]

    @property
    def scale(self) -> float:
        """The mean square of the target's elements."""
        return self.power / (self.weight * self.outputs) if self.weight > 0 else 0.0

    @property
    def is_finite(self) -> bool:
        if self.few is not None:
            return self.few.is_finite
        return bool(torch.isfinite(self.gram).all() and torch.isfinite(self.cross).all())


@dataclass(frozen=True)
class Fit:
    """A solution [features + 1, outputs], its damping, the errors before and after, and why it was not refitted."""

    solution: torch.Tensor
    damping: float | None
    before: float
    after: float
    fallback: str | None = None


def ridge(train: Moments, held: Moments, start: torch.Tensor) -> Fit:
    """The solution near `start` that predicts held-out rows best, refitted on all rows.

    start: [features + 1, outputs], the current weights. Errors are weighted mean squares over all rows. Keeps `start`
    and states the reason if there is nothing to fit, sums are not finite, or no damping helps on the held-out rows.
    """
    whole = train + held

    def kept(reason: str | None) -> Fit:
        error = whole.error(start) if whole.is_finite else float("nan")
        return Fit(start, None, error, error, reason)

    if not whole.is_finite:
        return kept("activations are not finite")
    if whole.weight <= 0:
        return kept("no calibration rows reach it")
    before = whole.error(start)
    if before <= NEGLIGIBLE * whole.scale:
        return kept(None)
    judge = held if held.weight > 0 else train
    damping = _best(judge.error(start), _ridge_errors(train, judge, start))
    solution = _solve(whole, start, damping) if damping is not None else None
    if solution is None or damping is None:
        few = f" ({train.rows} rows for {len(start)} unknowns)" if train.rows < len(start) else ""
        return kept(f"no refit was better on held-out rows{few}")
    return Fit(solution, damping, before, whole.error(solution))


def rescale(train: Moments, held: Moments, start: torch.Tensor, width: int) -> Fit:
    """One least-squares factor per unit (`width` consecutive design columns) on the weights of `start`."""
    whole = train + held
    weights, bias = start[:-1], start[-1]

    def system(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
        if moments.few is not None:
            return moments.few.of_units(torch.arange(len(weights)), weights, width, bias)
        products = (weights @ weights.T) * moments.gram[:-1, :-1]
        wanted = (weights * (moments.cross[:-1] - moments.gram[:-1, -1:] * bias)).sum(1)
        units = len(weights) // width
        return products.view(units, width, units, width).sum((1, 3)), wanted.view(units, width).sum(1)

    def solve(moments: Moments, damping: float) -> torch.Tensor | None:
        gram, wanted = system(moments)
        rho = damping * gram.diagonal().mean()
        factor, info = torch.linalg.cholesky_ex(gram + rho * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        if int(info):
            return None
        factors = torch.cholesky_solve((wanted + rho)[:, None], factor)[:, 0]
        return torch.cat([weights * factors.repeat_interleave(width)[:, None], bias[None]])

    before = whole.error(start)
    if not whole.is_finite or whole.weight <= 0 or len(weights) == 0 or before <= NEGLIGIBLE * whole.scale:
        return Fit(start, None, before, before, None)
    judge = held if held.weight > 0 else train
    damping = _best(judge.error(start), _errors(judge, lambda candidate: solve(train, candidate)))
    solution = solve(whole, damping) if damping is not None else None
    if solution is None:
        return Fit(start, None, before, before, "no factor was better on held-out rows")
    return Fit(solution, damping, before, whole.error(solution))


def _best(before: float, errors: Iterable[float | None]) -> float | None:
    """The damping with the smallest error, if that is below the error `before`. errors: of each of DAMPINGS in turn;
    None where there is no solution.

    The error has one minimum: more damping fits less and generalises better. Behind it, no other damping is tried.
    """
    best, damping, last = before, None, float("inf")
    for candidate, error in zip(DAMPINGS, errors, strict=False):
        if error is None:
            continue
        if error < best:
            best, damping = error, candidate
        if error > last:
            break
        last = error
    return damping


def _errors(judge: Moments, solve: Callable[[float], torch.Tensor | None]) -> Iterator[float | None]:
    """The errors of the solutions for each of DAMPINGS."""
    for damping in DAMPINGS:
        solution = solve(damping)
        yield None if solution is None else judge.error(solution)


def _ridge_errors(train: Moments, judge: Moments, start: torch.Tensor) -> Iterator[float | None]:
    """As `_errors` of `_solve`, without the solutions where both are few rows of a wide layer."""
    if train.few is None or judge.few is None:
        yield from _errors(judge, lambda damping: _solve(train, start, damping))
        return
    rhos = (damping * train.mean_diagonal for damping in DAMPINGS)
    for squared in train.few.errors_on(judge.few, start, rhos):
        yield None if squared is None else squared / (judge.weight * judge.outputs)


def _solve(moments: Moments, start: torch.Tensor, damping: float) -> torch.Tensor | None:
    """(G + rho I)^-1 (C + rho start), or None if G + rho I is not positive definite."""
    rho = damping * moments.mean_diagonal
    if moments.few is not None:
        return moments.few.solve(start, rho)
    damped = moments.gram + rho * torch.eye(len(start), dtype=torch.float64, device=start.device)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        return None
    return torch.cholesky_solve(moments.cross + rho * start, factor)
