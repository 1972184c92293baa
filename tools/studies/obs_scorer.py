"""The scorer `obs`: units leave one by one, each time the one that the others can replace best in their readers.

Optimal brain surgeon on groups of weights (Hassibi & Stork 1993; Kurtic et al., ZipLM, 2023): with H the covariance of
what a layer with weights W reads, and the weights of what stays refitted by least squares, removing unit u adds

    tr(W_u [H^-1]_uu^-1 W_u^T)

to the squared error of that layer's output. W and H^-1 are updated after each removal. Means are left out of H, for the
repair refits the bias too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from optin_export.data import Batch
from optin_export.models import Placement, TaskModel
from optin_export.progress import advance
from optin_export.scoring import Request, Result, register
from optin_export.scoring.activation import activation_scores, inputs_of
from optin_export.scoring.registry import every_unit
from optin_export.units import UnitGroup, as_matrix, columns_per_unit, get_layer, get_module, input_rows, reads_rows

#: Added to H's diagonal, as a share of its mean: the smallest damping of the repair.
DAMPING = 1e-4
#: Groups are taken together in one pass over the batches as long as their covariances fit, bytes.
ROOM = 2**30


@register("obs", steps=every_unit)
def _scored(request: Request) -> Result:
    groups = request.structure.groups
    return elimination_scores(request.model, groups, request.batches, request.placement), {}


def elimination_scores(
    model: TaskModel,
    groups: Sequence[UnitGroup],
    batches: Sequence[Batch],
    placement: Placement | None = None,
) -> dict[str, np.ndarray]:
    """{group key: float64 [units]}: the error that a unit's removal added when it was its turn, never falling.

    Groups with a reader whose inputs cannot be seen as rows (grouped convolutions) are scored by `activation`. Time is
    cubic in a layer's inputs.
    """
    seen = [one for one in groups if all(reads_rows(get_module(model, path)) for path in one.reads)]
    placement = placement or Placement()
    found: dict[str, np.ndarray] = {}
    if rest := [one for one in groups if one not in seen]:
        with placement(model):
            found = activation_scores(model, rest, batches)
    for chunk in _chunks(model, seen):
        with placement(model):
            covariances = _covariances(model, sorted({path for group in chunk for path in group.reads}), batches)
        for group in chunk:
            reads = [path for path in group.reads if path in covariances]
            if not all(covariances[path].isfinite().all() for path in reads):
                found[group.key] = np.full(group.count, np.nan)
                continue
            readers = [_Reader.of(model, group, path, covariances[path]) for path in reads]
            found[group.key] = _eliminate(readers, group.count)
            advance(group.count)
    return {group.key: found[group.key] for group in groups}


@dataclass
class _Reader:
    """A layer that reads the units: weights [outputs, columns], H^-1 [columns, columns], columns per unit."""

    weight: torch.Tensor
    inverse: torch.Tensor
    width: int

    @staticmethod
    def of(model: TaskModel, group: UnitGroup, path: str, covariance: torch.Tensor) -> _Reader:
        weight, damped, failed = as_matrix(model, path).double().cpu().clone(), covariance.clone(), 1
        # A layer that reads nothing but constants needs no unit: any positive diagonal says so.
        damping = DAMPING * covariance.diagonal().mean().clamp(min=1e-30)
        while failed:
            # Where means are far larger than what varies, rounding leaves a covariance that is not quite positive.
            damped.diagonal().add_(damping)
            factor, failed = torch.linalg.cholesky_ex(damped)
            damping *= 10
        return _Reader(
            weight,
            torch.cholesky_inverse(factor),
            columns_per_unit(get_layer(model, path), group),
        )

    def losses(self) -> torch.Tensor:
        """[units]: what removing each one now would add."""
        units = self.inverse.shape[0] // self.width
        blocks = self.inverse.view(units, self.width, units, self.width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        weights = self.weight.view(len(self.weight), units, self.width).permute(1, 2, 0)
        return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))

    def remove(self, unit: int) -> None:
        """Refit the others, and forget the unit's columns."""
        own = slice(unit * self.width, (unit + 1) * self.width)
        rows = torch.linalg.solve(self.inverse[own, own], self.inverse[own])
        self.weight -= self.weight[:, own].clone() @ rows
        self.inverse -= self.inverse[:, own].clone() @ rows
        stay = torch.ones(len(self.inverse), dtype=torch.bool)
        stay[own] = False
        self.weight, self.inverse = self.weight[:, stay], self.inverse[stay][:, stay]


def _eliminate(readers: Sequence[_Reader], count: int) -> np.ndarray:
    left, scores, worst = list(range(count)), np.zeros(count), 0.0
    while left:
        losses = torch.stack([reader.losses() for reader in readers]).sum(0)
        unit = int(losses.argmin())
        # Scores have to tell the order of removal; rounding, and units that others came to need, may undercut it.
        worst = max(np.nextafter(worst, np.inf), float(losses[unit]))
        scores[left.pop(unit)] = worst
        for reader in readers:
            reader.remove(unit)
    return scores


def _chunks(model: TaskModel, groups: Sequence[UnitGroup]) -> Iterator[list[UnitGroup]]:
    chunk: list[UnitGroup] = []
    room = ROOM
    for group in groups:
        size = sum(8 * (group.count * columns_per_unit(get_layer(model, path), group)) ** 2 for path in group.reads)
        if chunk and size > room:
            yield chunk
            chunk, room = [], ROOM
        chunk.append(group)
        room -= size
    if chunk:
        yield chunk


@torch.no_grad()
def _covariances(model: TaskModel, paths: Sequence[str], batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """{layer: covariance of its inputs, float64 [columns, columns]}, padding left out."""
    sums: dict[str, torch.Tensor] = {}
    for index, batch in enumerate(batches):
        with inputs_of(model, paths) as seen:
            model(**batch.inputs)
        for path in (path for path in paths if path in seen):
            rows = input_rows(seen[path], get_layer(model, path), batch.inputs, index)
            augmented = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            product = (augmented.T @ augmented).double().cpu()
            sums[path] = sums[path] + product if path in sums else product
    return {path: _centred(total) for path, total in sums.items()}


def _centred(total: torch.Tensor) -> torch.Tensor:
    rows = total[-1, -1].clamp(min=1)
    mean = total[:-1, -1:] / rows
    return total[:-1, :-1] / rows - mean @ mean.T
