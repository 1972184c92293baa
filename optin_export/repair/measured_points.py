"""Correct second-order losses by measured ones: large changes cost more or less than their second order.

A few candidates of every group are measured by forward passes: the smallest count and a quarter of the units, of
convolutional models also a half and three quarters, because their curves depart more from the second order. The ratio
of both losses there, interpolated over the counts (its logarithm; 1 for the unchanged model), multiplies the curve.
These passes replay the blocks before the group, and are few: the rest of the work is linear in the depth of the model.
A quarter of the rows is measured; of convolutional models as many as MOST_PASSES allow.

Curves of models that let no gradients through are measured at every count on all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from optin_export.models import TaskModel, gathered, work_device
from optin_export.objective import Observation, output_losses, trajectory_losses
from optin_export.repair.second_order import Changes
from optin_export.units import (
    Structure,
    UnitGroup,
    block_outputs,
    get_layer,
    later_share,
    refitted,
    replayed,
    tensor_in,
)

#: Shares of the units at the measured points after the first, the smallest count; and of convolutional models.
SHARES, CONVOLUTIONAL_SHARES = (0.25,), (0.25, 0.5, 0.75)
#: One in THINNED batches is measured: of convolutional models fewer are left out, if the passes of all groups are no
#: more work than MOST_PASSES of all calibration rows.
THINNED, MOST_PASSES = 4, 6
#: Limits of the ratio: beyond them, one of both losses is rounding noise.
LIMITS = (0.05, 20.0)


def is_measured(structure: Structure) -> bool:
    """Whether curves are measured at every count, instead of to second order."""
    return bool(structure.walk is not None and structure.walk.blind)


def measured_at(structure: Structure, counts: Sequence[int]) -> list[int]:
    """Which of a group's counts (ascending, the last is all units) are measured."""
    if len(counts) < 2:
        return []
    if is_measured(structure):
        return list(range(len(counts) - 1))
    shares = CONVOLUTIONAL_SHARES if structure.convolutional else SHARES
    known = np.array(counts[:-1])
    return sorted({0, *(int(np.argmin(np.abs(known - share * counts[-1]))) for share in shares)})


def thinned(structure: Structure, counts: Mapping[str, Sequence[int]], judged: int, calibration: int) -> int:
    """One in how many batches is measured. judged: rows of all these batches; calibration: all rows; counts: of every
    group."""
    if is_measured(structure):
        return 1
    if not structure.convolutional:
        return THINNED
    groups = structure.groups
    passes = sum(len(measured_at(structure, counts[group.key])) * later_share(structure, group) for group in groups)
    fits = (one for one in range(1, THINNED) if passes * judged <= one * MOST_PASSES * calibration)
    return next(fits, THINNED)


def losses_of(
    model: TaskModel,
    structure: Structure,
    group: UnitGroup,
    references: Sequence[Observation],
    temperature: float,
    changes: Changes,
    candidates: Sequence[int],
) -> np.ndarray:
    """(trajectory, output) losses of forward passes, sums over samples: float64 [candidates, 2]."""
    return np.array([_passes(model, structure, group, references, temperature, changes, one) for one in candidates])


def corrected(
    counts: Sequence[int], losses: np.ndarray, candidates: Sequence[int], measured: np.ndarray, predicted: np.ndarray
) -> np.ndarray:
    """`losses` [counts - 1, 2] times the ratios of `measured` and `predicted`: means [candidates, 2], same rows."""
    result = losses.copy()
    for term in (0, 1):
        pairs = [(counts[at], measured[i, term], predicted[i, term]) for i, at in enumerate(candidates)]
        if any(real > 0 and not expected > 0 for _, real, expected in pairs):
            # No gradient reaches the group's layers: the measured points alone.
            places, values = [*(count for count, _, _ in pairs), counts[-1]], [*(real for _, real, _ in pairs), 0.0]
            result[:, term] = np.interp(counts[:-1], places, values)
            continue
        # A term that does not depend on the group has no ratio.
        usable = [(count, real / expected) for count, real, expected in pairs if real > 0]
        if usable:
            ratios = np.clip([ratio for _, ratio in usable], *LIMITS)
            places = [*(count for count, _ in usable), counts[-1]]
            result[:, term] *= np.exp(np.interp(counts[:-1], places, [*np.log(ratios), 0.0]))
    return result


def _passes(
    model: TaskModel,
    structure: Structure,
    group: UnitGroup,
    references: Sequence[Observation],
    temperature: float,
    changes: Changes,
    candidate: int,
) -> tuple[float, float]:
    later, rewritten = structure.after(group), structure.rewritten
    sums = torch.zeros(2, dtype=torch.float64, device=work_device())  # read once: no pass waits for the one before
    with refitted(model, {path: _weights(model, path, changes, candidate) for path in changes}):
        for reference in references:
            prefix = {path: reference.hidden[path] for path in structure.before(group)}
            with (
                torch.no_grad(),
                replayed(model, prefix, rewritten),
                block_outputs(model, later, rewritten) as outputs,
            ):
                result = model(**reference.inputs)
                moved = trajectory_losses(reference, outputs, later, structure.channels_first)
                changed = output_losses(model, reference, result, temperature)
                sums += torch.stack([gathered(moved.sum()), gathered(changed.sum())])
    trajectory, output = sums.cpu().tolist()
    return trajectory, output


def _weights(model: TaskModel, path: str, changes: Changes, candidate: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer, (weights, biases) = get_layer(model, path), changes[path]
    weight = tensor_in(layer, "weight")
    bias = weight.new_zeros(len(biases[candidate])) if layer.bias is None else tensor_in(layer, "bias")
    return weight + weights[candidate].to(weight), bias.to(weight) + biases[candidate].to(weight)
