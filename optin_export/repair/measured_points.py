"""Correct second-order losses by measured ones: large changes cost more or less than their second order.

Two candidates of every group are measured by forward passes of a few rows: the smallest count, and a quarter of the
units. The ratio of both losses there, interpolated over the counts (its logarithm; 1 for the unchanged model),
multiplies the curve. These passes replay the blocks before the group, and are few: the rest of the work is linear in
the depth of the model.

Curves of convolutional models, and of models that let no gradients through, are measured at every count on all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    refitted,
    replayed,
    tensor_in,
)

#: Share of the units at the second measured point; the first is the smallest count.
SHARE = 0.25
#: One in THINNED batches is measured.
THINNED = 4
#: Limits of the ratio: beyond them, one of both losses is rounding noise.
LIMITS = (0.05, 20.0)


def is_measured(structure: Structure) -> bool:
    """Whether curves are measured at every count, instead of to second order."""
    return structure.convolutional or bool(structure.walk is not None and structure.walk.blind)


def measured_at(counts: Sequence[int]) -> list[int]:
    """Which of the counts (ascending, the last is all units) are measured."""
    if len(counts) < 2:
        return []
    near = int(np.argmin(np.abs(np.array(counts[:-1]) - SHARE * counts[-1])))
    return sorted({0, near})


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
