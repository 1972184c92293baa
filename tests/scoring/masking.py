"""Losses of masked units over several batches, for tests to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optin_export.models import TaskModel
from optin_export.scoring.exact import exact_sums
from optin_export.scoring.losses import Reference
from optin_export.units import Structure, UnitGroup


def exact_losses(
    model: TaskModel,
    structure: Structure,
    group: UnitGroup,
    references: Sequence[Reference],
    temperature: float,
    units: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(trajectory, output) loss of masking each of `units` (default: all), float64 [units], averaged over samples."""
    wanted = list(range(group.count)) if units is None else list(units)
    parts = [exact_sums(model, structure, group, reference, temperature, wanted) for reference in references]
    samples = sum(len(reference) for reference in references)
    trajectory, output = (np.sum([part[term] for part in parts], axis=0) / samples for term in (0, 1))
    return trajectory, output
