"""Loss curves: what it costs to keep k units of one group, under the repair that the run will do.

Scores of single units do not add up: units stand in for each other, and the repair makes up for most of what is lost,
more in some sub-layers than in others. So the loss of every count is measured: the best scored k units of one group
stay, their projection is repaired as the run repairs it (refitted, rescaled, or left as it is), and a forward pass says
how far trajectory and output move. Curves of another repair would spend the budget in the wrong sub-layers.
The search spends its budget by these curves; they flow back to it as data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.progress import report
from optin_export.repair.least_squares import Moments
from optin_export.repair.paired_forward import Stream
from optin_export.repair.sensitivity import ROWS, Weights, sensitivities
from optin_export.scoring.losses import Reference, observe, output_losses, trajectory_losses
from optin_export.units import (
    Structure,
    UnitGroup,
    block_outputs,
    get_layer,
    input_rows,
    measured,
    reads_rows,
    refitted,
    replayed,
    tensor_in,
)

#: Points of a curve; groups of few units have one per unit, and between points the search interpolates.
POINTS = 12
#: Calibration rows whose Gram matrices the refits are made from.
CALIBRATION_ROWS = 512
DAMPING = 1e-2
#: Columns: units kept, trajectory loss, output loss (means over samples).
Curve = np.ndarray
#: Weight of the trajectory's loss in a curve, when both terms are scaled to the same total; the rest is the output's.
#: A classifier's own divergence is what its accuracy depends on; an embedding has no such term.
TRAJECTORY_SHARE = {"logits": 0.0, "regression": 0.5, "embedding": 0.5}


def loss_curves(
    model: TaskModel,
    structure: Structure,
    scores: Mapping[str, np.ndarray],
    calibration: Sequence[Batch],
    scoring: Sequence[Batch],
    *,
    least: Mapping[str, int],
    temperature: float,
    repair: bool | Literal["rescale"] = True,
    weights: Weights | None = None,
    seed: int,
) -> dict[str, Curve]:
    """One curve per group: float64 [points, 3] with units kept (ascending, the last is all), trajectory, output loss.

    scores: what decides which units stay at each count. scoring: the rows on which losses are measured. least: the
    smallest count of each group. repair: what the run will do (`prune.compensate`): refit the layers that read the
    units by least squares, find one factor per kept unit, or nothing (the curve of masking). weights: the
    `sensitivities` of `model` on `calibration`, where they are known.
    """
    generator = torch.Generator().manual_seed(seed)
    structure = measured(model, structure, (*calibration, *scoring)[0].inputs)
    references = [observe(model, structure, batch, ROWS, generator) for batch in scoring]
    curves: dict[str, Curve] = {}
    moments: dict[str, Moments] = {}
    repaired = {group.key: _repaired(model, group, repair) for group in structure.groups}

    def measure(group: UnitGroup) -> None:
        order = np.argsort(-scores[group.key], kind="stable")
        grams = {path: moments.pop(path).gram for path in repaired[group.key] if path in moments}
        solve = _rescaled if repair == "rescale" else _refitted
        curves[group.key] = _curve(
            model, structure, group, order, grams, solve, references, least[group.key], temperature
        )
        report(len(curves), len(structure.groups))

    if not any(repaired.values()):
        for group in structure.groups:
            measure(group)
        return curves
    chosen = _thinned(calibration)
    if weights is None:
        weights = sensitivities(model, structure, calibration, seed)
    stream = Stream(model, structure, [calibration[index] for index in chosen])
    try:
        for block in structure.order:
            path, last = structure.blocks[block], block == structure.order[-1]
            groups = [group for group in structure.groups if group.block == block and not group.coupled]
            readers, until = [path for group in groups for path in repaired[group.key]], path
            for reader in (reader for group in structure.groups if group.coupled for reader in repaired[group.key]):
                inside = reader.startswith(path + ".")
                # What reads the last stream stands behind the last block.
                if inside or (last and reader not in moments):
                    readers.append(reader)
                    until = path if inside else reader
            moments |= _moments(stream, chosen, readers, weights, until)
            for group in groups:
                measure(group)
            if not last:
                stream.advance(block)
        for group in (group for group in structure.groups if group.coupled):
            measure(group)
    finally:
        stream.close()
    return curves


def combined(curves: Mapping[str, Curve], output_kind: str) -> dict[str, np.ndarray]:
    """One loss per point, [points, 2]: a share of the trajectory's and the rest of the output's, on one scale."""
    share = TRAJECTORY_SHARE[output_kind]
    totals = [sum(float(curve[:, column].mean()) for curve in curves.values()) for column in (1, 2)]
    if totals[1] <= 0:  # the output depends on no unit: the trajectory alone decides
        share, totals[1] = 1.0, 1.0
    weights = share / max(totals[0], 1e-30), (1 - share) / totals[1]
    return {
        key: np.stack([curve[:, 0], weights[0] * curve[:, 1] + weights[1] * curve[:, 2]], axis=1)
        for key, curve in curves.items()
    }


def _repaired(model: TaskModel, group: UnitGroup, repair: bool | Literal["rescale"]) -> tuple[str, ...]:
    """The layers that the repair adapts to the units that stay (see `compensate`)."""
    if repair is False or (repair == "rescale" and group.coupled):
        return ()
    paths = (group.consumer,) if repair == "rescale" else group.reads
    return tuple(path for path in paths if reads_rows(get_layer(model, path)))


def _thinned(batches: Sequence[Batch]) -> list[int]:
    """Indices of evenly spread batches (they are ordered by length) with about CALIBRATION_ROWS rows."""
    rows = sum(len(batch.rows) for batch in batches)
    return list(range(0, len(batches), max(1, rows // CALIBRATION_ROWS)))


def _moments(
    stream: Stream, chosen: Sequence[int], readers: Sequence[str], weights: Weights, until: str
) -> dict[str, Moments]:
    """Weighted Gram matrices of what these layers read in the original model."""
    found: dict[str, Moments] = {}
    for position, (index, batch) in enumerate(zip(chosen, stream.batches, strict=True)):
        seen = stream.see(position, [(path, 0) for path in readers], until) if readers else {}
        for path in (path for path in readers if (path, 0) in seen):
            design = input_rows(seen[(path, 0)], get_layer(stream.model, path), batch.inputs, index)
            moments = found.setdefault(path, Moments(design.shape[1], 0))
            moments.add(design, design.new_zeros(len(design), 0), weights.of(index, [path]))
    return found


def _curve(
    model: TaskModel,
    structure: Structure,
    group: UnitGroup,
    order: np.ndarray,
    grams: Mapping[str, torch.Tensor],
    solve: Callable[[torch.Tensor, torch.Tensor, np.ndarray, int], torch.Tensor],
    references: Sequence[Reference],
    least: int,
    temperature: float,
) -> Curve:
    layers = {path: get_layer(model, path) for path in group.reads}
    starts = {}
    for path, layer in layers.items():
        weight = tensor_in(layer, "weight")
        bias = torch.zeros(len(weight)) if layer.bias is None else tensor_in(layer, "bias")
        starts[path] = torch.cat([weight.flatten(1), bias[:, None]], 1).double().T
    points = []
    for count in _counts(group.count, least):
        if count == group.count:
            points.append((count, 0.0, 0.0))
            continue
        parameters = {}
        for path, layer in layers.items():
            start, kept = starts[path], order[:count]
            solution = solve(start, grams[path], kept, group.count) if path in grams else _cut(start, kept, group.count)
            solution = solution.to(layer.weight.dtype)
            parameters[path] = solution[:-1].T.contiguous().view(layer.weight.shape), solution[-1]
        with refitted(model, parameters):
            points.append((count, *_losses(model, structure, group, references, temperature)))
    return np.array(points, dtype=np.float64)


def _counts(units: int, least: int) -> list[int]:
    steps = range(units + 1) if units <= POINTS else (round(units * step / POINTS) for step in range(POINTS + 1))
    # The steep part of a curve is its beginning.
    early = (round(units * share) for share in (0.02, 0.08)) if units > POINTS else ()
    return sorted({max(count, least) for count in (*steps, *early)})


def _refitted(start: torch.Tensor, gram: torch.Tensor, kept: np.ndarray, units: int) -> torch.Tensor:
    """`start` [inputs + 1, outputs] refitted on the kept units' inputs, zero for the others."""
    columns = _columns(start, kept, units)
    inner = gram[columns][:, columns]
    rho = DAMPING * inner.diagonal().mean()
    damped = inner + rho * torch.eye(len(columns), dtype=inner.dtype)
    result = torch.zeros_like(start)
    factor, info = torch.linalg.cholesky_ex(damped)
    # Where the matrix is singular (constant activations) the projection stays as it is.
    if int(info):
        result[columns] = start[columns]
    else:
        result[columns] = torch.cholesky_solve(gram[columns] @ start + rho * start[columns], factor)
    return result


def _rescaled(start: torch.Tensor, gram: torch.Tensor, kept: np.ndarray, units: int) -> torch.Tensor:
    """`start` with one least-squares factor on the weights of each kept unit, zero for the others."""
    columns = _columns(start, kept, units)[:-1]
    result = _cut(start, kept, units)
    if not len(columns):
        return result
    weights, count = start[columns], len(kept)
    # The target is what all units together output, without the bias.
    products = (weights @ weights.T) * gram[columns][:, columns]
    wanted = (weights * (gram[columns][:, :-1] @ start[:-1])).sum(1).view(count, -1).sum(1)
    system = products.view(count, len(columns) // count, count, -1).sum((1, 3))
    rho = DAMPING * system.diagonal().mean()
    factor, info = torch.linalg.cholesky_ex(system + rho * torch.eye(count, dtype=system.dtype))
    if not int(info):
        factors = torch.cholesky_solve((wanted + rho)[:, None], factor)[:, 0]
        result[columns] = weights * factors.repeat_interleave(len(columns) // count)[:, None]
    return result


def _cut(start: torch.Tensor, kept: np.ndarray, units: int) -> torch.Tensor:
    """`start` as it is on the kept units' inputs, zero for the others: what masking them does."""
    columns, result = _columns(start, kept, units), torch.zeros_like(start)
    result[columns] = start[columns]
    return result


def _columns(start: torch.Tensor, kept: np.ndarray, units: int) -> torch.Tensor:
    """Indices in ascending order of the kept units' inputs, and of the bias, among the rows of `start`."""
    per_unit = (len(start) - 1) // units
    columns = (torch.from_numpy(np.sort(kept))[:, None] * per_unit + torch.arange(per_unit)).flatten()
    return torch.cat([columns, torch.tensor([len(start) - 1])])


def _losses(
    model: TaskModel, structure: Structure, group: UnitGroup, references: Sequence[Reference], temperature: float
) -> tuple[float, float]:
    later = structure.after(group)
    trajectory = output = 0.0
    for reference in references:
        prefix, rewritten = {path: reference.hidden[path] for path in structure.before(group)}, structure.rewritten
        with (
            torch.no_grad(),
            replayed(model, prefix, rewritten),
            block_outputs(model, later, rewritten) as outputs,
        ):
            result = model(**reference.inputs)
            trajectory += float(trajectory_losses(reference, outputs, later, structure.channels_first).sum())
            changed = output_losses(model, reference, result, temperature)
            output += float(changed.sum())
    samples = sum(len(reference) for reference in references)
    return trajectory / samples, output / samples
