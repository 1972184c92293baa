"""Loss curves: the loss of keeping k units of one group, under the repair that the run will do.

Scores of single units do not add up: units replace each other, and the repair compensates most of the loss, more in
some sub-layers than in others. So every count has a loss of its own: the k units of one group with the best scores
are kept, and the layers that read them are repaired as in the run (refitted, rescaled, or unchanged). The loss of these
weights, how far they move trajectory and output, is computed to second order (`second_order`) and corrected by a few
measured points (`measured_points`). Curves under another repair would spend the budget in the wrong sub-layers.
The search receives these curves as data and spends its budget by them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel, block_inputs
from optin_export.objective import Reference, samples_of
from optin_export.progress import advance, phase, task
from optin_export.repair.few_rows import FewRows
from optin_export.repair.least_squares import Moments
from optin_export.repair.measured_points import corrected, is_measured, losses_of, measured_at, thinned
from optin_export.repair.paired_forward import Stream
from optin_export.repair.query_keys import changes_of
from optin_export.repair.read_steps import steps_of
from optin_export.repair.second_order import Tried, second_order_losses
from optin_export.repair.sensitivity import Weights, sensitivities
from optin_export.repair.settings import RepairSettings
from optin_export.units import (
    Point,
    Structure,
    Transposed,
    UnitGroup,
    columns_per_unit,
    columns_without,
    get_layer,
    get_weight,
    input_rows,
    measured,
    reads_rows,
    tensor_in,
)
from optin_export.workdir.disk_offload import OffloadedTensors
from optin_export.workdir.peak_memory import release_freed

#: Points of a curve; small groups have one per unit, and between points the search interpolates.
POINTS = 12
#: Calibration rows from which the refits' Gram matrices are computed.
CALIBRATION_ROWS = 512
DAMPING = 1e-2
#: `_refitted_without` is cheaper than `_refitted` while at most this share of a layer's inputs is removed.
REMOVED_SHARE = 1 / 3
#: Columns: units kept, trajectory loss, output loss (means over samples).
Curve = np.ndarray


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
    repair, of which the layers that read the units are refitted or rescaled, on those batches of `calibration` that are
    not in `scoring`, if there are any; without it, the curve of masking. least: the smallest count of each group.
    weights: the `sensitivities` of `model` on `calibration`, if they are known.
    """
    structure = measured(model, structure, (*calibration, *scoring)[0].inputs)
    structure = dataclasses.replace(structure, groups=structure.searched_groups)
    counts = {group.key: counts_of(group.count, least[group.key]) for group in structure.groups}
    tried, whole = Tried(), is_measured(structure)
    rows = sum(len(batch.rows) for batch in scoring)
    known = sum(len(batch.rows) for batch in calibration) or rows
    few = list(range(0, len(scoring), thinned(structure, counts, rows, known)))
    references = Reference(model, structure, [scoring[index] for index in few])
    groups, found = {group.key: group for group in structure.groups}, {}
    try:
        with task(2 * len(groups) + len(scoring)):
            phase("re-fitting layers to fewer units")
            fitted = not_judged(calibration, scoring, CALIBRATION_ROWS)
            order = list(_try_all(model, structure, scores, (calibration, fitted), settings, counts, weights, tried))
            phase("losses by backward passes")
            sums = second_order_losses(model, structure, () if whole else scoring, tried, settings)
            if whole:
                advance(len(scoring))
            references.observe()  # now, because the model's layers compute with other weights from here on
            phase("losses by measurement")
            for number, key in enumerate(order):
                at = measured_at(structure, counts[key])
                changes = tried.changes[number]
                passes = losses_of(model, structure, groups[key], references, settings.temperature, changes, at)
                if whole:
                    found[key] = passes / samples_of(references)
                else:
                    means, samples = sums[number].sum(0) / rows, samples_of(references)
                    predicted = sums[number][few][:, at].sum(0) / samples
                    found[key] = corrected(counts[key], means, at, passes / samples, predicted)
                advance()
    finally:
        tried.changes.close()
        references.close()
    # The last point is the unchanged model.
    return {
        key: np.concatenate([np.column_stack([some[:-1], found[key].reshape(-1, 2)]), [[some[-1], 0.0, 0.0]]])
        for key, some in counts.items()
    }


def _try_all(
    model: TaskModel,
    structure: Structure,
    scores: Mapping[str, np.ndarray],
    rows: tuple[Sequence[Batch], Sequence[int]],
    settings: RepairSettings,
    counts: Mapping[str, Sequence[int]],
    weights: Weights | None,
    tried: Tried,
) -> Iterator[str]:
    """Add the changes of every group's counts to `tried`, and yield the group's key.

    rows: calibration batches, and which of them the layers are refitted to.
    """
    calibration, fitted = rows
    attentions = {one.name: one for one in structure.attentions}
    repaired = {group.key: _repaired(model, group, settings.repair) for group in structure.groups}
    if any(repaired.values()) and weights is None:
        weights = sensitivities(model, structure, calibration, settings.seed, settings.autocast)
    for group, grams in _grams(model, structure, calibration, fitted, repaired, weights):
        smaller, rescale = counts[group.key][:-1], settings.repair == "rescale"
        if group.key in attentions:
            changes = {group.consumer: changes_of(model, attentions[group.key], grams[group.consumer], smaller)}
        else:
            order = np.argsort(-scores[group.key], kind="stable").tolist()
            changes = {
                path: _changes(model, group, path, order, smaller, grams.get(path), rescale) for path in group.reads
            }
        tried.add(changes, len(smaller), group.batch_dim)
        release_freed()
        advance()
        yield group.key


def _grams(
    model: TaskModel,
    structure: Structure,
    calibration: Sequence[Batch],
    chosen: Sequence[int],
    repaired: Mapping[str, Sequence[str]],
    weights: Weights | None,
) -> Iterator[tuple[UnitGroup, dict[str, Moments]]]:
    """Every group with the Gram matrices of what the layers read that are repaired for it, block by block."""
    if weights is None:
        yield from ((group, {}) for group in structure.groups)
        return
    moments: dict[str, Moments] = {}
    uses = Counter(path for paths in repaired.values() for path in paths)

    def of(group: UnitGroup) -> tuple[UnitGroup, dict[str, Moments]]:
        grams = {path: moments[path] for path in repaired[group.key] if path in moments}
        for path in repaired[group.key]:
            uses[path] -= 1
            if not uses[path]:
                moments.pop(path, None)
        return group, grams

    stream = Stream(model, structure, [calibration[index] for index in chosen])
    steps = steps_of(stream, repaired)
    try:
        for number, step in enumerate(steps):
            outputs = None
            if stream.kept and number + 1 < len(steps):
                outputs = OffloadedTensors("the loss curves", "use fewer data.calibration.samples")
            readers = [path for path in step.readers if path not in moments]
            moments |= _moments(stream, chosen, readers, weights, step.until, outputs)
            yield from map(of, step.groups)
            if outputs is not None:
                stream.advance(step.block, lambda index, *_, outputs=outputs: outputs[index])
                outputs.close()
        yield from (of(group) for group in structure.groups if group.coupled)
    finally:
        stream.close()


def _repaired(model: TaskModel, group: UnitGroup, repair: bool | Literal["rescale"]) -> tuple[str, ...]:
    """The layers that the repair adapts to the units that stay (see `compensate`)."""
    if repair is False or (repair == "rescale" and group.coupled):
        return ()
    paths = (group.consumer,) if repair == "rescale" else group.reads
    return tuple(path for path in paths if reads_rows(get_layer(model, path)))


def not_judged(calibration: Sequence[Batch], judged: Sequence[Batch], rows: int) -> list[int]:
    """Indices of evenly spread batches (they are ordered by length) with about so many rows, none of them `judged`.

    All batches, if there are no others: a refit with more inputs than rows that matter (a classifier reads one token of
    each sample) reproduces its own rows whatever is removed, and others not at all.
    """
    known = set(map(id, judged))
    others = [index for index, batch in enumerate(calibration) if id(batch) not in known] or range(len(calibration))
    whole = sum(len(calibration[index].rows) for index in others)
    return list(others[:: max(1, whole // rows)])


def _moments(
    stream: Stream,
    chosen: Sequence[int],
    readers: Sequence[str],
    weights: Weights,
    until: str,
    outputs: OffloadedTensors | None,
) -> dict[str, Moments]:
    """Weighted Gram matrices of these layers' inputs in the original model. outputs: receives those of `until`."""
    found: dict[str, Moments] = {}
    for position, (index, batch) in enumerate(zip(chosen, stream.batches, strict=True)):
        points: list[Point] = [(path, 0) for path in readers]
        points += [] if outputs is None else [(until, "output")]
        seen = stream.see(position, points, until) if points else {}
        if outputs is not None:
            outputs[position] = {(until, "output"): seen[until, "output"]}
        masked = block_inputs(stream.model, batch.inputs)
        for path in (path for path in readers if (path, 0) in seen):
            design = input_rows(seen[(path, 0)], get_layer(stream.model, path), masked, index)
            moments = found.setdefault(path, Moments(design.shape[1], 0))
            moments.add(design, design.new_zeros(len(design), 0), weights.of(index, [path]))
    return found


def _changes(
    model: TaskModel,
    group: UnitGroup,
    path: str,
    order: Sequence[int],
    counts: Sequence[int],
    moments: Moments | None,
    rescale: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes of a layer's weight [counts, ...] and bias [counts, outputs] when the first k units of `order` stay.

    moments: of the layer's inputs and 1, if the repair adapts the layer. rescale: only by a factor per unit.
    """
    layer, start = get_layer(model, path), _start(get_layer(model, path))
    columns = [columns_without(layer, group, path, order[count:]) for count in counts]
    if moments is None:
        changes: Iterable[torch.Tensor] = (_cut(start, _and_bias(one, start)) - start for one in columns)
    elif rescale:
        width = columns_per_unit(layer, group)
        changes = (_rescaled(start, moments, one, width) - start for one in columns)
    elif moments.few is not None:
        changes = _refitted_to_few(start, moments.few, columns, DAMPING * moments.mean_diagonal)
    elif columns and len(start) - 1 - min(map(len, columns)) <= REMOVED_SHARE * len(start):
        changes = _refitted_without(start, moments, columns)
    else:
        changes = (solution - start for solution in _refitted(start, moments, columns))
    weight, found = get_weight(layer), []
    for change in map(torch.Tensor.float, changes):
        matrix = change[:-1].T.reshape(weight.shape)
        found.append((matrix.transpose(0, 1) if isinstance(layer, Transposed) else matrix, change[-1]))
    if not found:
        return weight.new_zeros(0, *weight.shape), weight.new_zeros(0, len(start.T))
    return torch.stack([one for one, _ in found]), torch.stack([one for _, one in found])


def _start(layer: Any) -> torch.Tensor:
    """The layer's weight and bias, float64 [inputs + 1, outputs]."""
    weight = tensor_in(layer, "weight")
    weight = weight.transpose(0, 1) if isinstance(layer, Transposed) else weight
    bias = weight.new_zeros(len(weight)) if layer.bias is None else tensor_in(layer, "bias")
    return torch.cat([weight.flatten(1), bias[:, None]], 1).double().T


def counts_of(units: int, least: int) -> list[int]:
    steps = range(units + 1) if units <= POINTS else (round(units * step / POINTS) for step in range(POINTS + 1))
    # A curve is steepest at its beginning.
    early = (round(units * share) for share in (0.02, 0.08)) if units > POINTS else ()
    return sorted({max(count, least) for count in (*steps, *early)})


def _refitted(start: torch.Tensor, moments: Moments, columns: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """`start` [inputs + 1, outputs] refitted on these inputs, zero for the others; each set contains the one before.

    The inputs are arranged so that every set is a leading part of the matrix: one Cholesky factor G + rho I = L L^T and
    one solution of L y = (G + rho I) start serve all sets, of which each has its own L^T x = y.
    """
    rho, gram = DAMPING * moments.mean_diagonal, moments.gram
    arranged, known = [len(start) - 1], torch.zeros(len(start), dtype=torch.bool)
    for some in columns:
        arranged += some[~known[some]].tolist()
        known[some] = True
    index = torch.tensor(arranged)
    damped = gram[index][:, index] + rho * torch.eye(len(index), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(damped)
    usable = len(index) if not int(info) else int(info) - 1
    wanted = gram[index] @ start + rho * start[index]
    half = torch.linalg.solve_triangular(factor[:usable, :usable], wanted[:usable], upper=False)
    for some in columns:
        size = 1 + len(some)
        # If the matrix is singular (constant activations) the projection is not changed.
        if size > usable:
            yield _cut(start, index[:size])
            continue
        result = torch.zeros_like(start)
        result[index[:size]] = torch.linalg.solve_triangular(factor[:size, :size].T, half[:size], upper=True)
        yield result


def _refitted_without(start: torch.Tensor, moments: Moments, columns: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The changes of `_refitted` for a layer that keeps most of its inputs in every set.

    With all inputs, `start` is the solution. Without the inputs R it is start - P_R (P_RR)^-1 start_R, where P is the
    inverse of G + rho I, which is the same for all groups that the layer reads (Hassibi and Stork, "Second order
    derivatives for network pruning: Optimal Brain Surgeon", NeurIPS 1992, for several inputs at once).
    """
    inverse = moments.inverse(DAMPING * moments.mean_diagonal)
    if inverse is None:
        yield from (solution - start for solution in _refitted(start, moments, columns))
        return
    for some in columns:
        left = torch.ones(len(start), dtype=torch.bool)
        left[_and_bias(some, start)] = False
        gone = left.nonzero()[:, 0].to(start.device)
        change = -inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], start[gone])
        change[gone] = -start[gone]  # exactly
        yield change


def _refitted_to_few(
    start: torch.Tensor, few: FewRows, columns: Sequence[torch.Tensor], rho: float
) -> Iterator[torch.Tensor]:
    """As `_refitted`, from the rows themselves: the changes of `start`, float32."""
    masked = -start.float()
    for some, change in zip(columns, few.refitted(start, columns, rho), strict=True):
        result = masked.clone()
        result[_and_bias(some, start)] = 0.0 if change is None else change
        yield result


def _rescaled(start: torch.Tensor, moments: Moments, columns: torch.Tensor, width: int) -> torch.Tensor:
    """`start` with one least-squares factor on the weights of each `width` of these inputs, zero for the others."""
    result = _cut(start, _and_bias(columns, start))
    if not len(columns):
        return result
    weights, count = start[columns], len(columns) // width
    # The target is the output of all units together, without the bias.
    if moments.few is not None:
        system, wanted = moments.few.with_targets(start).of_units(columns, weights, width, start[-1])
    else:
        products = (weights @ weights.T) * moments.gram[columns][:, columns]
        wanted = (weights * (moments.gram[columns][:, :-1] @ start[:-1])).sum(1).view(count, -1).sum(1)
        system = products.view(count, width, count, width).sum((1, 3))
    rho = DAMPING * system.diagonal().mean()
    factor, info = torch.linalg.cholesky_ex(system + rho * torch.eye(count, dtype=system.dtype, device=system.device))
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
