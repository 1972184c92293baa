"""scoring: model, units and calibration batches become one float per unit. Knows nothing of budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from optin_export.errors import InputError
from optin_export.families import Structure
from optin_export.recipe import PruneSection
from optin_export.scoring.activation import activation_scores
from optin_export.scoring.baselines import magnitude_scores, random_scores
from optin_export.scoring.optin import exact_scores, fisher_scores, optin_scores
from optin_export.scoring.reference import reference_scores
from optin_export.scoring.shards import Map, Partial, Shard, Spread, in_process
from optin_export.sources import Batch, Placement, TaskModel

__all__ = ["Map", "Partial", "Scores", "Shard", "Spread", "in_process", "score"]

_IN_SHARDS = {"optin": optin_scores, "optin-exact": exact_scores, "fisher": fisher_scores}


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
    spread: Spread = in_process,
    placement: Placement | None = None,
) -> Scores:
    """Score every unit of the structure by the recipe's method.

    spread: has the shards of `optin`, `optin-exact` and `fisher` done, here or elsewhere, with the same scores.
    placement: where the model is while it runs, here or on a worker.

    Raises InputError if a score is not finite (calibration data or weights that overflow).
    """
    total, done = _steps(structure, config), 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        tick(min(done, total), total)

    info: dict[str, float] = {}
    placement = placement or Placement()
    if config.score in _IN_SHARDS:
        values, info = _IN_SHARDS[config.score](model, structure, batches, config, seed, step, spread, placement)
    elif config.score == "optin-reference":
        with placement(model):
            values = reference_scores(model, structure, batches[0], config.rows, seed, step)
    elif config.score == "activation":
        with placement(model):
            values = activation_scores(model, structure.groups, batches)
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
    info["without_effect"] = float(sum((scores == 0).sum() for scores in values.values()))
    return Scores(values, info)


def _steps(structure: Structure, config: PruneSection) -> int:
    """Steps that the method will count: masked units, and probes (the largest number, with `probes: auto`)."""
    units = {group.key: group.count for group in structure.groups}
    if config.score in ("optin-exact", "optin-reference"):
        return max(sum(units.values()), 1)
    if config.score == "optin":
        heads = sum(group.count for group in structure.groups if group.kind == "heads")
        suspects = sum(min(group.count, 8) for group in structure.groups if group.kind != "heads")
        return heads + suspects + 24
    return 1
