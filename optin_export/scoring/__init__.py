"""Compute one importance score per unit from a model and calibration batches; independent of budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from optin_export.data import Batch
from optin_export.errors import InputError
from optin_export.models import Placement, TaskModel
from optin_export.progress import phase, task
from optin_export.recipe import PruneSection
from optin_export.scoring import activation, magnitude, optin  # noqa: F401 - they register themselves
from optin_export.scoring.effort import effort
from optin_export.scoring.precision import precision_of
from optin_export.scoring.registry import SCORERS, Request, Result, register
from optin_export.scoring.shards import Map, Partial, Shard, Spread, in_process
from optin_export.units import Structure, measured

__all__ = [
    "SCORERS",
    "Map",
    "Partial",
    "Request",
    "Result",
    "Scores",
    "Shard",
    "Spread",
    "effort",
    "in_process",
    "methods",
    "precision_of",
    "register",
    "score",
]

#: The method of `score: auto` for channels of convolutional networks.
CHANNELS = "magnitude"


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
    spread: Spread = in_process,
    placement: Placement | None = None,
) -> Scores:
    """Score every unit of the structure by the recipe's method.

    spread: executes the shards of `optin` and `optin-exact`, here or on workers, with the same scores.
    placement: the device of the model while it runs, here or on a worker.

    Raises InputError if a score is not finite (calibration data or weights that overflow).
    """
    placement = placement or Placement()
    if structure.walk is None and batches:
        with placement(model):
            structure = measured(model, structure, batches[0].inputs)
    _check_gradients(structure, config)
    info: dict[str, float] = {}
    values: dict[str, np.ndarray] = {}
    parts = _parts(structure, config)
    if any(SCORERS[method].gradients(group) for method, part in parts for group in part.groups):
        precision, agreement = precision_of(model, structure, batches, config, seed, placement)
        config = config.model_copy(update={"autocast": precision})
        info |= {} if agreement is None else {"bfloat16_agreement": agreement}
    with task(max(1, sum(SCORERS[method].steps(part) for method, part in parts))):
        for method, part in parts:
            phase(" and ".join(sorted({group.kind for group in part.groups})))
            found, facts = SCORERS[method].score(Request(model, part, batches, config, seed, spread, placement))
            values |= found
            info |= facts
    values = {group.key: values[group.key] for group in structure.groups}
    bad = [key for key, scores in values.items() if not np.isfinite(scores).all()]
    if bad:
        raise InputError(
            f"the scores of {bad[0]} are not finite",
            "activations overflow or hold NaN on the calibration data",
            "check the calibration data and the weights of that block",
        )
    info["without_effect"] = float(sum((scores == 0).sum() for scores in values.values()))
    return Scores(values, info)


def methods(structure: Structure, config: PruneSection) -> dict[str, str]:
    """{group key: the method that scores it}. `score: auto` uses those that keep most accuracy in docs/results.md.

    Channels of convolutional networks, if they are repaired by least squares and chosen by loss curves, which compare
    groups, use CHANNELS, with a score of 0 for channels without effect. All other groups use optin.
    """
    if config.score != "auto":
        return {group.key: config.score for group in structure.groups}
    measured = config.compensate is True and config.allocation == "joint"
    return {
        group.key: CHANNELS if measured and group.kind == "channels" and structure.is_convolutional(group) else "optin"
        for group in structure.groups
    }


def _check_gradients(structure: Structure, config: PruneSection) -> None:
    """Raise InputError where scores come from gradients and the model lets none through."""
    blind = () if structure.walk is None else structure.walk.blind
    chosen = methods(structure, config)
    if blind and any(SCORERS[chosen[group.key]].gradients(group) for group in structure.groups):
        raise InputError(
            f"no gradients flow through '{blind[0]}'",
            "the model runs it under torch.no_grad(), or in a checkpoint with use_reentrant=True",
            "let it run with gradients (use_reentrant=False), or set prune.score: activation",
        )


def _parts(structure: Structure, config: PruneSection) -> list[tuple[str, Structure]]:
    """Methods, each with the part of the structure that it scores."""
    chosen = methods(structure, config)
    return [
        (method, replace(structure, groups=tuple(one for one in structure.groups if chosen[one.key] == method)))
        for method in sorted(set(chosen.values()))
    ]
