"""Scores that look at no data: what OPTIN has to beat."""

from __future__ import annotations

import numpy as np
import torch

from optin_export.models import TaskModel
from optin_export.units import Structure, UnitGroup, get_layer


def magnitude_scores(model: TaskModel, structure: Structure) -> dict[str, np.ndarray]:
    """Squared L2 norm of all weights that leave with a unit."""
    return {group.key: _squared_norms(model, group).double().cpu().numpy() for group in structure.groups}


def _squared_norms(model: TaskModel, group: UnitGroup) -> torch.Tensor:
    readers = [get_layer(model, path).weight.detach() for path in group.reads]
    total = torch.stack([one.square().transpose(0, 1).reshape(group.count, -1).sum(1) for one in readers]).sum(0)
    for producer in group.producers:
        weight = get_layer(model, producer.path).weight.detach()
        total = total + weight.square().reshape(producer.fused, group.count, -1).sum((0, 2))
    return total


def random_scores(structure: Structure, seed: int) -> dict[str, np.ndarray]:
    """Uniform noise under a seed."""
    generator = np.random.default_rng(seed)
    return {group.key: generator.random(group.count) for group in structure.groups}
