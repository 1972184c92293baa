"""scoring: model, units and calibration batches become one float per unit. Knows nothing of budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from optin_export.data import Batch
from optin_export.errors import InputError
from optin_export.models import Placement, TaskModel
from optin_export.progress import task
from optin_export.recipe import PruneSection
from optin_export.scoring.activation import activation_scores
from optin_export.scoring.baselines import magnitude_scores, random_scores
from optin_export.scoring.elimination import elimination_scores
from optin_export.scoring.optin import Scorer, exact_scores, fisher_scores, optin_scores
from optin_export.scoring.reference import reference_scores
from optin_export.scoring.shards import Map, Partial, Shard, Spread, in_process
from optin_export.units import Structure, measured

__all__ = ["Map", "Partial", "Scores", "Shard", "Spread", "in_process", "methods", "score"]

#: What `score: auto` takes for channels of convolutional networks.
CHANNELS = "magnitude"

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
    spread: Spread = in_process,
    placement: Placement | None = None,
) -> Scores:
    """Score every unit of the structure by the recipe's method.

    spread: has the shards of `optin`, `optin-exact` and `fisher` done, here or elsewhere, with the same scores.
    placement: where the model is while it runs, here or on a worker.

    Raises InputError if a score is not finite (calibration data or weights that overflow).
    """
    placement = placement or Placement()
    if structure.walk is None and batches:
        with placement(model):
            structure = measured(model, structure, batches[0].inputs)
    _check_gradients(structure, config)
    info: dict[str, float] = {}
    values: dict[str, np.ndarray] = {}
    with task(_steps(structure, config)):
        for method, part in _parts(structure, config):
            found, facts = _scored(method, Scorer(model, part, batches, config, seed, placement), spread)
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
    """{group key: the method that scores it}. `score: auto` takes what keeps most accuracy, as docs/results.md has it.

    Channels of convolutional networks, if they are repaired by least squares and chosen by loss curves, which compare
    groups: CHANNELS, and nothing for those without effect. All else: optin.
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
    asked = {key for key, method in methods(structure, config).items() if method in ("optin", "fisher")}
    sketched = {one.key for one in structure.groups if one.kind != "heads" or config.score == "fisher"}
    if blind and asked & sketched:
        raise InputError(
            f"no gradients flow through '{blind[0]}'",
            "the model runs it under torch.no_grad(), or in a checkpoint with use_reentrant=True",
            "let it run with gradients (use_reentrant=False), or set prune.score: obs",
        )


def _parts(structure: Structure, config: PruneSection) -> list[tuple[str, Structure]]:
    """Methods, each with the structure as far as it scores it."""
    chosen = methods(structure, config)
    return [
        (method, replace(structure, groups=tuple(one for one in structure.groups if chosen[one.key] == method)))
        for method in sorted(set(chosen.values()))
    ]


def _scored(method: str, scorer: Scorer, spread: Spread) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    if method in _IN_SHARDS:
        return _IN_SHARDS[method](scorer, spread)
    model, structure, batches, placement = scorer.model, scorer.structure, scorer.batches, scorer.placement
    config, seed = scorer.config, scorer.seed
    if method == "optin-reference":
        with placement(model):
            return reference_scores(model, structure, batches[0], config.rows, seed), {}
    if method == "obs":
        return elimination_scores(model, structure.groups, batches, placement), {}
    if method == "activation":
        with placement(model):
            return activation_scores(model, structure.groups, batches), {}
    if method == "magnitude":
        values = magnitude_scores(model, structure)
        if config.score == "auto":
            # Weights do not tell that a channel is zero everywhere: a batch norm with nothing left of it, a dead ReLU.
            with placement(model):
                energy = activation_scores(model, structure.groups, batches)
            values = {key: np.where(energy[key] == 0, 0.0, value) for key, value in values.items()}
        return values, {}
    return random_scores(structure, seed), {}


def _steps(structure: Structure, config: PruneSection) -> int:
    """Steps that the method will count: masked units, and probes (the largest number, with `probes: auto`)."""
    chosen, steps = methods(structure, config), 0
    for group in structure.groups:
        if chosen[group.key] in ("optin-exact", "optin-reference", "obs"):
            steps += group.count
        elif chosen[group.key] == "optin":
            steps += group.count if group.kind == "heads" else min(group.count, 8)
    return max(steps + (24 if "optin" in chosen.values() else 0), 1)
