"""One layer's least squares over the calibration batches:

    min over X of  sum over rows of  w || [a 1] X - y ||^2  +  rho || X - X0 ||^2

a: the layer's input in the smaller model; y: its desired output; w: the row's sensitivity; X = [W b]^T, X0 the current
weights. rho is chosen on held-out rows (`least_squares.ridge`). If a ReLU follows the layer, only the ReLU's output
matters: a few more rounds solve for adjusted targets (`relu`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from optin_export.models import work_device
from optin_export.repair.least_squares import Fit, Moments, rescale, ridge
from optin_export.repair.relu import ROUNDS, ReluTarget

#: One batch in HOLD_OUT is held out to choose the damping; with fewer batches, one row in HOLD_OUT.
HOLD_OUT = 5
#: Bytes of rows kept from one round to the next; rows that do not fit are computed again.
ROWS_IN_MEMORY = 1 << 31


@dataclass(frozen=True)
class Rows:
    """One batch. inputs: [rows, inputs]; target: [rows, outputs]; weight: [rows], None for equal weights; relu: the
    ReLU that follows the layer, if any."""

    inputs: torch.Tensor
    target: torch.Tensor
    relu: ReluTarget | None
    weight: torch.Tensor | None

    @property
    def size(self) -> int:
        """In bytes."""
        shift = 0 if self.relu is None else self.relu.shift.numel()
        return 4 * (self.inputs.numel() + self.target.numel() + shift)


@dataclass
class LayerProblem:
    """start: X0, [inputs + 1, outputs] in float64; rows: batch number -> its rows; batches: number of batches.

    has_relu: whether the rows have a ReLU. read: sums over what the layer reads, after `solve`.
    """

    start: torch.Tensor
    rows: Callable[[int], Rows]
    batches: int
    has_relu: bool = False
    kept: dict[int, Rows] = field(default_factory=dict)
    read: Moments | None = None

    def solve(self) -> Fit:
        """Solve by ridge regression; if a ReLU follows, in several rounds, with errors measured after the ReLU."""
        sums, before = self._pass(self.start)
        self.read = sums[0] + sums[1]
        fit = ridge(*sums, self.start)
        if not self.has_relu:
            return fit
        error = before
        for turn in range(ROUNDS + 1) if fit.damping is not None else ():
            sums, error = self._pass(fit.solution, sums, last=turn == ROUNDS)
            found = ridge(*sums, fit.solution) if turn < ROUNDS else None
            if found is None or found.damping is None:
                break
            fit = found
        if error > before:
            return Fit(self.start, None, before, before, "no refit was better behind the ReLU")
        return dataclasses.replace(fit, before=before, after=error)

    def rescale(self, width: int) -> Fit:
        """Find one factor per unit (`width` consecutive inputs) for the current weights."""
        sums, _ = self._pass(self.start)
        return rescale(*sums, self.start, width)

    def _pass(
        self, solution: torch.Tensor, before: tuple[Moments, Moments] | None = None, last: bool = False
    ) -> tuple[tuple[Moments, Moments], float]:
        """((sums of the rows to fit, of those held out), mean squared error per output of `solution` after the ReLU).

        before: sums of the same rows for other targets; then the targets are adjusted for the ReLU at the prediction of
        `solution`. last: only the error is needed.
        """
        if before is None:
            train, held = (Moments(len(self.start) - 1, self.start.shape[1]) for _ in range(2))
        else:
            train, held = (sums.again() for sums in before)
        sums = torch.zeros(2, dtype=torch.float64, device=work_device())  # squared error, weight of the rows
        for index in range(self.batches):
            rows, target = self._rows_of(index), None
            if rows.relu is not None:
                predicted = rows.inputs @ solution[:-1].to(rows.inputs) + solution[-1].to(rows.inputs)
                errors = rows.relu.error(rows.target, predicted)
                weights = torch.ones_like(errors) if rows.weight is None else rows.weight
                sums += torch.stack([(errors * weights).double().sum(), weights.double().sum()])
                target = None if before is None else rows.relu.target(rows.target, predicted)
            if not last:
                self._add(index, rows if target is None else dataclasses.replace(rows, target=target), train, held)
        error, weight = sums.cpu().tolist()
        return (train, held), error / max(weight * self.start.shape[1], 1e-30)

    def _rows_of(self, index: int) -> Rows:
        if index in self.kept:
            return self.kept[index]
        rows = self.rows(index)
        if rows.relu is not None and rows.size <= ROWS_IN_MEMORY - sum(one.size for one in self.kept.values()):
            self.kept[index] = rows
        return rows

    def _add(self, index: int, rows: Rows, train: Moments, held: Moments) -> None:
        if self.batches >= HOLD_OUT:
            (held if index % HOLD_OUT == HOLD_OUT - 1 else train).add(rows.inputs, rows.target, rows.weight)
            return
        chosen = torch.arange(len(rows.inputs)) % HOLD_OUT == HOLD_OUT - 1
        for sums, part in ((train, ~chosen), (held, chosen)):
            sums.add(rows.inputs[part], rows.target[part], None if rows.weight is None else rows.weight[part])
