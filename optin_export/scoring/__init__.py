"""scoring: model, units and calibration batches become one float per unit. Knows nothing of budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from optin_export.errors import InputError
from optin_export.families import Structure
from optin_export.recipe import PruneSection
from optin_export.scoring.baselines import magnitude_scores, random_scores
from optin_export.scoring.optin import optin_scores
from optin_export.sources import Batch, TaskModel

__all__ = ["Scores", "score"]


@dataclass(frozen=True)
class Scores:
    """Importance per unit ({group key: float64 [units]}, larger is more important), and how it was obtained."""

    values: dict[str, np.ndarray]
    info: dict[str, float] = field(default_factory=dict)


def score(
    model: TaskModel,
    structure: Structure,
    batches: Sequence[Batch],
    config: PruneSection,
    seed: int,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Score every unit of the structure by the recipe's method.

    Raises InputError if a score is not finite (calibration data or weights that overflow).
    """
    info: dict[str, float] = {}
    if config.score == "optin":
        values, info = optin_scores(
            model,
            structure,
            batches,
            probes=config.probes,
            rows=config.rows,
            temperature=config.temperature,
            seed=seed,
            tick=tick,
        )
    elif config.score == "magnitude":
        values = magnitude_scores(model, structure)
    else:
        values = random_scores(structure, seed)
    bad = [key for key, scores in values.items() if not np.isfinite(scores).all()]
    if bad:
        raise InputError(
            f"the scores of {bad[0]} are not finite",
            "activations overflow or hold NaN on the calibration data",
            "check the calibration data and the weights of that block",
        )
    return Scores(values, info)
