"""Whether gradients of a model can be computed in bfloat16: asked of a few rows, before the work is shared out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np

from optin_export.data import Batch
from optin_export.models import Placement, TaskModel, gains_by_bfloat16
from optin_export.recipe import PruneSection
from optin_export.scoring.optin import Scorer
from optin_export.scoring.shards import Shard
from optin_export.scoring.sketch import ENOUGH, Sketch
from optin_export.units import Structure

FAST = "bfloat16"
#: Probes of each loss: one alone has entries near zero, whose ranks are rounding.
PROBES = 2


def precision_of(
    model: TaskModel,
    structure: Structure,
    batches: Sequence[Batch],
    config: PruneSection,
    seed: int,
    placement: Placement,
) -> tuple[str | None, float | None]:
    """(dtype for torch.autocast, or None; the rank correlation that decided, if there was one), by the recipe's
    `prune.autocast`.

    auto: bfloat16, if the machine gains by it and the squared gradients of all units, of a few rows of the first batch
    and by the same probes, rank as in float32: for the trajectory's loss as for the output's.
    """
    if config.autocast != "auto":
        return config.autocast, None
    if not batches or not structure.groups or (structure.walk is not None and structure.walk.blind):
        return None, None
    with placement(model):
        if not gains_by_bfloat16(model):
            return None, None
    scorer = Scorer(model, structure, batches[:1], config.model_copy(update={"autocast": None}), seed, placement)
    with contextlib.closing(scorer), placement(model):
        agreement = agreement_of(scorer)
    return (FAST if agreement >= ENOUGH else None), agreement


def agreement_of(scorer: Scorer) -> float:
    """The smaller of the two losses' Spearman correlations between both precisions; 0 if the values in bfloat16 are not
    finite, or all the same."""
    from scipy.stats import spearmanr  # slow to import; `init` and `--dry-run` only look at this package

    shard = Shard("pilot", 0, count=PROBES)
    sketches: list[Sketch] = [
        dataclasses.replace(scorer.sketch, references=scorer.few, autocast=one) for one in (None, FAST)
    ]
    exact, fast = (sketch.work(shard) for sketch in sketches)
    found = []
    for term in ("trajectory", "output"):
        first, second = (
            np.concatenate([part[f"{term}.{key}"] for key in scorer.groups if f"{term}.{key}" in part])
            for part in (exact, fast)
        )
        if len(first) < 2 or not np.ptp(first) > 0:
            continue  # the term depends on no unit, or on a single one
        if not np.isfinite(second).all() or not np.ptp(second) > 0:  # a correlation with it would be NaN
            return 0.0
        found.append(float(spearmanr(first, second).statistic))
    return min(found, default=1.0)
