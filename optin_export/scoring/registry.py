"""Scorers by name: the values of `prune.score`, and scorers that a study adds for comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from optin_export.data import Batch
from optin_export.models import Placement, TaskModel
from optin_export.recipe import PruneSection
from optin_export.scoring.shards import Spread
from optin_export.units import Structure, UnitGroup

#: ({group key: float64 [units], larger is more important}, facts for the report).
Result = tuple[dict[str, np.ndarray], dict[str, float]]


@dataclass(frozen=True)
class Request:
    """The arguments of a scorer.

    model: the unpruned model. structure: the groups to score; with `score: auto` those of one method. batches:
    calibration rows. spread: executes shards, here or on workers. placement: the device of the model while it runs.
    """

    model: TaskModel
    structure: Structure
    batches: Sequence[Batch]
    config: PruneSection
    seed: int
    spread: Spread
    placement: Placement


Scorer = Callable[[Request], Result]


@dataclass(frozen=True)
class Method:
    """A scorer, its number of progress steps for a structure, and whether it needs gradients to score a group."""

    score: Scorer
    steps: Callable[[Structure], int]
    gradients: Callable[[UnitGroup], bool]


SCORERS: dict[str, Method] = {}


def every_unit(structure: Structure) -> int:
    """Steps of a scorer that counts units."""
    return sum(group.count for group in structure.groups)


def register(
    name: str,
    steps: Callable[[Structure], int] = lambda structure: 0,
    gradients: Callable[[UnitGroup], bool] = lambda group: False,
) -> Callable[[Scorer], Scorer]:
    """Decorator: the function is the scorer `name`; one of the same name is replaced.

    Args:
        name: as in `PruneSection.score`.
        steps: number of steps for a structure that it reports by `progress.advance`.
        gradients: whether it needs gradients to score a group; a model without gradients is then refused.
    """

    def add(scorer: Scorer) -> Scorer:
        SCORERS[name] = Method(scorer, steps, gradients)
        return scorer

    return add
