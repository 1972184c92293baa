"""Loss curves: the loss of keeping k units of one group, under the repair that the run will do.

Scores of single units do not add up: units replace each other, and the repair compensates most of the loss, more in
some sub-layers than in others. So the loss of every count is measured: the k units of one group with the best scores
are kept, their projection is repaired as in the run (refitted, rescaled, or unchanged), and a forward pass measures how
far trajectory and output move. Curves under another repair would spend the budget in the wrong sub-layers.
The search receives these curves as data and spends its budget by them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel, block_inputs
from optin_export.objective import Observation, Reference, output_losses, samples_of, trajectory_losses
from optin_export.progress import report
from optin_export.repair.least_squares import Moments
from optin_export.repair.paired_forward import Stream
from optin_export.repair.sensitivity import Weights, sensitivities
from optin_export.repair.settings import RepairSettings
from optin_export.units import (
    Structure,
    Transposed,
    UnitGroup,
    block_outputs,
    columns_per_unit,
    columns_without,
    get_layer,
    get_weight,
    input_rows,
    measured,
    reads_rows,
    refitted,
    replayed,
    tensor_in,
)

#: Points of a curve; small groups have one per unit, and between points the search interpolates.
POINTS = 12
#: Calibration rows from which the refits' Gram matrices are computed.
CALIBRATION_ROWS = 512
DAMPING = 1e-2
#: Columns: units kept, trajectory loss, output loss (means over samples).
Curve = np.ndarray
#: Weight of the trajectory's loss in a curve, with both terms scaled to the same total; the output has the rest. A
#: classifier's accuracy depends on the divergence of its output; an embedding has no such term.
TRAJECTORY_SHARE = {"logits": 0.0, "regression": 0.5, "embedding": 0.5}


def loss_curves(
    model: TaskModel,
    structure: Structure,
    scores: Mapping[str, np.ndarray],
    calibration: Sequence[Batch],
    scoring: Sequence[Batch],
    settings: RepairSettings,
    *,
    least: Mapping[str, int],
    weights: Weights | None = None,
) -> dict[str, Curve]:
    """One curve per group: float64 [points, 3] with units kept (ascending, the last is all), trajectory, output loss.

    scores: decide which units stay at each count. scoring: the rows on which losses are measured. settings: the run's
    repair, of which the layers that read the units are refitted or rescaled; without it, the curve of masking. least:
    the smallest count of each group. weights: the `sensitivities` of `model` on `calibration`, if they are known.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    structure = measured(model, structure, (*calibration, *scoring)[0].inputs)
    references = Reference(model, structure, scoring, draw=generator)
    references.observe()  # now, because the model's layers compute with other weights from here on
    curves: dict[str, Curve] = {}
    moments: dict[str, Moments] = {}
    repaired = {group.key: _repaired(model, group, settings.repair) for group in structure.groups}
    uses = Counter(path for paths in repaired.values() for path in paths)

    def measure(group: UnitGroup) -> None:
        order = np.argsort(-scores[group.key], kind="stable")
        grams = {path: moments[path].gram for path in repaired[group.key] if path in moments}
        for path in repaired[group.key]:
            uses[path] -= 1
            if not uses[path]:
                moments.pop(path, None)
        rescale = settings.repair == "rescale"
        losses = partial(_losses, model, structure, group, references, settings.temperature)
        curves[group.key] = _curve(_Candidates(model, group, order, grams, rescale), least[group.key], losses)
        report(len(curves), len(structure.groups))

    if not any(repaired.values()):
        for group in structure.groups:
            measure(group)
        return curves
    chosen = _thinned(calibration)
    if weights is None:
        weights = sensitivities(model, structure, calibration, settings.seed)
    stream = Stream(model, structure, [calibration[index] for index in chosen])
    try:
        for block in structure.order:
            path, last = structure.blocks[block], block == structure.order[-1]
            groups = [group for group in structure.groups if group.block == block and not group.coupled]
            readers, until = [path for group in groups for path in repaired[group.key]], path
            for reader in (reader for group in structure.groups if group.coupled for reader in repaired[group.key]):
                inside = reader.startswith(path + ".")
                # The last stream is read after the last block.
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
    """One loss per point, [points, 2]: the weighted sum of the trajectory's and the output's loss, on one scale."""
    share = TRAJECTORY_SHARE[output_kind]
    totals = [sum(float(curve[:, column].mean()) for curve in curves.values()) for column in (1, 2)]
    if totals[1] <= 0:  # the output depends on no unit: only the trajectory decides
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
    """Weighted Gram matrices of these layers' inputs in the original model."""
    found: dict[str, Moments] = {}
    for position, (index, batch) in enumerate(zip(chosen, stream.batches, strict=True)):
        seen = stream.see(position, [(path, 0) for path in readers], until) if readers else {}
        masked = block_inputs(stream.model, batch.inputs)
        for path in (path for path in readers if (path, 0) in seen):
            design = input_rows(seen[(path, 0)], get_layer(stream.model, path), masked, index)
            moments = found.setdefault(path, Moments(design.shape[1], 0))
            moments.add(design, design.new_zeros(len(design), 0), weights.of(index, [path]))
    return found


@dataclass(frozen=True)
class _Candidates:
    """The layers that read a group's units, refitted for the best k of them.

    order: units, the best first. grams: Gram matrices of the inputs of the layers that the repair adapts. rescale:
    only by a factor per unit.
    """

    model: TaskModel
    group: UnitGroup
    order: np.ndarray
    grams: Mapping[str, torch.Tensor]
    rescale: bool

    def keeping(self, count: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Weight and bias of each layer."""
        found, group = {}, self.group
        for path, start in self._starts.items():
            layer, gram = get_layer(self.model, path), self.grams.get(path)
            columns = columns_without(layer, group, path, self.order[count:].tolist())
            if gram is None:
                solution = _cut(start, _and_bias(columns, start))
            elif self.rescale:
                solution = _rescaled(start, gram, columns, columns_per_unit(layer, group))
            else:
                solution = _refitted(start, gram, _and_bias(columns, start))
            weight, solution = get_weight(layer), solution.to(layer.weight.dtype)
            matrix = solution[:-1].T.contiguous().view(weight.shape)
            found[path] = matrix.transpose(0, 1) if isinstance(layer, Transposed) else matrix, solution[-1]
        return found

    @cached_property
    def _starts(self) -> dict[str, torch.Tensor]:
        starts = {}
        for path in self.group.reads:
            layer = get_layer(self.model, path)
            weight = tensor_in(layer, "weight")
            weight = weight.transpose(0, 1) if isinstance(layer, Transposed) else weight
            bias = torch.zeros(len(weight)) if layer.bias is None else tensor_in(layer, "bias")
            starts[path] = torch.cat([weight.flatten(1), bias[:, None]], 1).double().T
        return starts


def _curve(candidates: _Candidates, least: int, losses: Callable[[], tuple[float, float]]) -> Curve:
    """The curve of one group. losses: the losses of the unchanged model."""
    points, units = [], candidates.group.count
    for count in _counts(units, least):
        if count == units:
            points.append((count, 0.0, 0.0))
            continue
        with refitted(candidates.model, candidates.keeping(count)):
            points.append((count, *losses()))
    return np.array(points, dtype=np.float64)


def _counts(units: int, least: int) -> list[int]:
    steps = range(units + 1) if units <= POINTS else (round(units * step / POINTS) for step in range(POINTS + 1))
    # A curve is steepest at its beginning.
    early = (round(units * share) for share in (0.02, 0.08)) if units > POINTS else ()
    return sorted({max(count, least) for count in (*steps, *early)})


def _refitted(start: torch.Tensor, gram: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`start` [inputs + 1, outputs] refitted on these inputs, zero for the others."""
    inner = gram[columns][:, columns]
    rho = DAMPING * inner.diagonal().mean()
    damped = inner + rho * torch.eye(len(columns), dtype=inner.dtype)
    result = torch.zeros_like(start)
    factor, info = torch.linalg.cholesky_ex(damped)
    # If the matrix is singular (constant activations) the projection is not changed.
    if int(info):
        result[columns] = start[columns]
    else:
        result[columns] = torch.cholesky_solve(gram[columns] @ start + rho * start[columns], factor)
    return result


def _rescaled(start: torch.Tensor, gram: torch.Tensor, columns: torch.Tensor, width: int) -> torch.Tensor:
    """`start` with one least-squares factor on the weights of each `width` of these inputs, zero for the others."""
    result = _cut(start, _and_bias(columns, start))
    if not len(columns):
        return result
    weights, count = start[columns], len(columns) // width
    # The target is the output of all units together, without the bias.
    products = (weights @ weights.T) * gram[columns][:, columns]
    wanted = (weights * (gram[columns][:, :-1] @ start[:-1])).sum(1).view(count, -1).sum(1)
    system = products.view(count, width, count, width).sum((1, 3))
    rho = DAMPING * system.diagonal().mean()
    factor, info = torch.linalg.cholesky_ex(system + rho * torch.eye(count, dtype=system.dtype))
    if not int(info):
        factors = torch.cholesky_solve((wanted + rho)[:, None], factor)[:, 0]
        result[columns] = weights * factors.repeat_interleave(width)[:, None]
    return result


def _cut(start: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`start` on these inputs, zero for the others, which is equivalent to masking them."""
    result = torch.zeros_like(start)
    result[columns] = start[columns]
    return result


def _and_bias(columns: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    return torch.cat([columns, torch.tensor([len(start) - 1])])


def _losses(
    model: TaskModel, structure: Structure, group: UnitGroup, references: Sequence[Observation], temperature: float
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
    samples = samples_of(references)
    return trajectory / samples, output / samples
