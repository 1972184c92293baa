"""Scores that look at no data: what OPTIN has to beat."""

from __future__ import annotations

import numpy as np
import torch

from optin_export.families import Structure, UnitGroup, get_linear
from optin_export.sources import TaskModel


def magnitude_scores(model: TaskModel, structure: Structure) -> dict[str, np.ndarray]:
    """Squared L2 norm of all weights that leave with a unit."""
    return {group.key: _squared_norms(model, group).double().numpy() for group in structure.groups}


def _squared_norms(model: TaskModel, group: UnitGroup) -> torch.Tensor:
    consumer = get_linear(model, group.consumer).weight.detach()
    total = consumer.square().sum(0).view(group.count, group.width).sum(1)
    for producer in group.producers:
        weight = get_linear(model, producer.path).weight.detach()
        total = total + weight.square().sum(1).view(producer.fused, group.count, group.width).sum((0, 2))
    return total


def random_scores(structure: Structure, seed: int) -> dict[str, np.ndarray]:
    """Uniform noise under a seed."""
    generator = np.random.default_rng(seed)
    return {group.key: generator.random(group.count) for group in structure.groups}
