"""Scorers to compare `optin` with: importing this registers `fisher`, `random`, `obs` and `optin-reference`.

They are in no recipe. `PruneSection.score` names them by `prune.model_copy(update={"score": "obs"})`, as
benchmark_accuracy.py does.
"""

from __future__ import annotations

import contextlib

import numpy as np
import obs_scorer  # noqa: F401 - registers itself
import reference_scorer  # noqa: F401

from optin_export.scoring import Request, Result, register
from optin_export.scoring.optin import Scorer, counted
from optin_export.scoring.sketch import CHUNK, MAX_PROBES
from optin_export.units import UnitGroup


def every_group(group: UnitGroup) -> bool:
    return True


@register("fisher", gradients=every_group)
def fisher_scores(request: Request) -> Result:
    """Diagonal Fisher information of the masks (Kwon et al. 2022), of the model's own output.

    No labels: the expectation is over the model's own distribution, not over the data's labels.
    """
    scorer = Scorer.of(request)
    sketch, wanted = scorer.sketch, request.config.probes
    starts = range(0, MAX_PROBES // 2 if wanted == "auto" else wanted, CHUNK)
    with contextlib.closing(scorer), request.spread(scorer) as run:
        shards = [shard for start in starts for shard in sketch.pilot_shards(trajectory=False, start=start)]
        parts = counted(run, shards)
    size = len(request.batches)
    chunks = [sketch.pilot_losses(parts[at * size : (at + 1) * size])[1] for at in range(len(starts))]
    values = {key: np.mean([chunk[key] for chunk in chunks], axis=0) for key in scorer.groups}
    return values, {"probes": float(len(chunks) * CHUNK)}


@register("random")
def random_scores(request: Request) -> Result:
    """Uniform noise under the seed."""
    generator = np.random.default_rng(request.seed)
    return {group.key: generator.random(group.count) for group in request.structure.groups}, {}
