"""Contribution of each unit to its sub-layer's output: a baseline score, which also detects dominating units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel, block_inputs, gathered
from optin_export.scoring.registry import Request, Result, register
from optin_export.units import (
    Convolution,
    Transposed,
    UnitGroup,
    calls_of,
    get_layer,
    layer_inputs,
    of_units,
    tensor_in,
    valid_rows,
)


@dataclass
class Contribution:
    """Norms of (weight columns of a unit) times (its activations), float64 [units].

    energy: mean square over positions; largest: maximum over positions. For a convolution, of one input pixel.
    """

    energy: np.ndarray
    largest: np.ndarray


def contributions(model: TaskModel, groups: Sequence[UnitGroup], batches: Sequence[Batch]) -> dict[str, Contribution]:
    """Contributions of every unit over all batches, without padding; also for one batch, as a shard's sizes."""
    energy = {group.key: np.zeros(group.count) for group in groups}
    reading = [(group, path) for group in groups for path in group.reads]
    squared = {(group.key, path): _gram_of_weights(model, group, path) for group, path in reading}
    positions = dict.fromkeys(squared, 0)
    zeros = {key: torch.zeros(len(one), dtype=torch.float64, device=one.device) for key, one in squared.items()}
    sums, peaks = dict(zeros), dict(zeros)
    for batch in batches:
        with layer_inputs(model, list(dict.fromkeys(path for _, path in reading))) as seen, torch.no_grad():
            model(**batch.inputs)
        masked = block_inputs(model, batch.inputs)
        every = [(one, path) for one in groups for path in one.reads if path in seen]
        for group, path, value in [(*one, value) for one in every for value in calls_of(seen[one[1]])]:
            inputs = gathered(value)
            if isinstance(get_layer(model, path), Convolution):
                inputs = inputs.flatten(2).mT
            valid = valid_rows(masked, inputs)
            rows = inputs.reshape(-1, inputs.shape[-1])
            rows = rows if valid is None else rows[valid]
            rows = of_units(rows.mT, group, path).mT.reshape(len(rows), group.count, -1).float()
            # |W_u a_u|^2 = a_u^T (W_u^T W_u) a_u, per row and unit
            norms = torch.einsum("ruw,uwv,ruv->ru", rows, squared[group.key, path], rows).clamp(min=0).double()
            sums[group.key, path] = sums[group.key, path] + norms.sum(0)
            peaks[group.key, path] = torch.maximum(peaks[group.key, path], norms.amax(0))
            positions[group.key, path] += len(norms)
    for group in groups:
        for path in group.reads:
            energy[group.key] += sums[group.key, path].cpu().numpy() / max(positions[group.key, path], 1)
    largest = {group.key: np.zeros(group.count) for group in groups}
    for (key, _), peak in peaks.items():
        largest[key] = np.maximum(largest[key], peak.sqrt().cpu().numpy())
    return {key: Contribution(energy[key], largest[key]) for key in energy}


def activation_scores(model: TaskModel, groups: Sequence[UnitGroup], batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """`score: activation`: mean energy of a unit's contribution to its sub-layer's output."""
    return {key: found.energy for key, found in contributions(model, groups, batches).items()}


@register("activation")
def _scored(request: Request) -> Result:
    with request.placement(request.model):
        return activation_scores(request.model, request.structure.groups, request.batches), {}


def _gram_of_weights(model: TaskModel, group: UnitGroup, path: str) -> torch.Tensor:
    """W_u^T W_u of every unit, [units, width, width]; kernel positions of a convolution are summed."""
    layer = get_layer(model, path)
    weight = tensor_in(layer, "weight").float()
    weight = weight if isinstance(layer, Transposed) else weight.transpose(0, 1)
    columns = of_units(weight, group, path).reshape(group.count, group.width_in(path), -1)
    return columns @ columns.mT
