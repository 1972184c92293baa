"""`score: magnitude`: the weights of a unit. `score: auto` takes it for channels of convolutional networks."""

from __future__ import annotations

import numpy as np
import torch

from optin_export.models import TaskModel
from optin_export.scoring.activation import activation_scores
from optin_export.scoring.registry import Request, Result, register
from optin_export.units import Structure, UnitGroup, get_layer, get_weight, of_units


@register("magnitude")
def _scored(request: Request) -> Result:
    values = magnitude_scores(request.model, request.structure)
    if request.config.score == "auto":
        # Weights do not show that a channel is zero everywhere: a batch norm with zero output, a dead ReLU.
        with request.placement(request.model):
            energy = activation_scores(request.model, request.structure.groups, request.batches)
        values = {key: np.where(energy[key] == 0, 0.0, value) for key, value in values.items()}
    return values, {}


def magnitude_scores(model: TaskModel, structure: Structure) -> dict[str, np.ndarray]:
    """Squared L2 norm of all weights that are removed with a unit."""
    return {group.key: _squared_norms(model, group).double().cpu().numpy() for group in structure.groups}


def _squared_norms(model: TaskModel, group: UnitGroup) -> torch.Tensor:
    squares = [
        of_units(get_weight(get_layer(model, path)).square().transpose(0, 1), group, path) for path in group.reads
    ]
    total = torch.stack([one.reshape(group.count, -1).sum(1) for one in squares]).sum(0)
    for producer in group.producers:
        weight = get_weight(get_layer(model, producer.path))
        if producer.index is None:
            total = total + weight.square().reshape(producer.fused, group.count, -1).sum((0, 2))
        else:
            per_row = weight.square().flatten(1).sum(1)
            total = total + per_row[torch.tensor(producer.index, device=weight.device)].sum(1)
    return total
