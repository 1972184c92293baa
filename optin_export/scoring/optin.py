"""OPTIN's score: heads masked exactly, neurons and channels sketched, and the few units the sketch cannot see exactly.

The sketch is a second-order expansion. It fails for a unit whose own contribution dwarfs everything around it (massive
activations): a norm behind it saturates, its gradient vanishes, and yet its removal changes everything. Such units
show by the size of their contribution; in every group the largest few are masked exactly, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from optin_export.data import Batch
from optin_export.models import Placement, TaskModel
from optin_export.objective import Reference, derived
from optin_export.progress import advance
from optin_export.recipe import PruneSection
from optin_export.scoring.activation import contributions
from optin_export.scoring.exact import exact_sums
from optin_export.scoring.shards import Map, Partial, Shard, Spread, in_process, sketched_groups
from optin_export.scoring.sketch import CHUNK, ENOUGH, MAX_PROBES, Sketch, Values
from optin_export.units import Structure, UnitGroup

#: Sketched units per group whose contribution is largest; they are masked exactly as well.
SUSPECTS = 8
#: Token rows are shared evenly among the samples of a batch of this size.
ROWS_SHARED_BY = 32
Result = tuple[Values, dict[str, float]]


def observe_all(
    model: TaskModel, structure: Structure, batches: Sequence[Batch], rows: int, generator: torch.Generator
) -> Reference:
    """The unpruned model on every scoring batch; `rows` token rows a batch and block, the same number per sample."""
    each = max(1, rows // ROWS_SHARED_BY)
    return Reference(model, structure, batches, each, lambda number: derived(generator, 0, number))


class Scorer:
    """What a worker holds to do any shard of one scoring: the model once, the batches, and what it has observed."""

    def __init__(
        self,
        model: TaskModel,
        structure: Structure,
        batches: Sequence[Batch],
        config: PruneSection,
        seed: int,
        placement: Placement | None = None,
    ) -> None:
        self.model, self.structure, self.batches, self.config = model, structure, batches, config
        self.seed, self.placement = seed, placement or Placement()
        self.placed: contextlib.ExitStack | None = None
        generator = torch.Generator().manual_seed(seed)
        self.groups = {group.key: group for group in structure.groups}
        self.references = observe_all(model, structure, batches, config.rows, generator)
        self.sketch = Sketch(
            model,
            structure,
            sketched_groups(structure, config),
            self.references,
            config.temperature,
            generator,
            config.autocast,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """What is sent to a worker: the model and the batches, not what this one has observed."""
        return Scorer, (self.model, self.structure, self.batches, self.config, self.seed, self.placement)

    def close(self) -> None:
        """The model is where it was before the first shard."""
        if self.placed is not None:
            self.placed.close()
            self.placed = None

    def __call__(self, shard: Shard) -> Partial:
        if self.placed is None:  # where the shards are done: a model is sent to workers as it is here
            self.placed = contextlib.ExitStack()
            self.placed.enter_context(self.placement(self.model))
        if shard.kind == "exact":
            reference, group = self.references[shard.batch], self.groups[shard.group]
            terms = exact_sums(self.model, self.structure, group, reference, self.config.temperature, shard.units)
            return {"trajectory": terms[0], "output": terms[1]}
        if shard.kind == "sizes":
            sizes = contributions(self.model, self.structure.groups, [self.batches[shard.batch]])
            return {key: found.largest for key, found in sizes.items()}
        return self.sketch.work(shard)

    def exact_shards(self, group: UnitGroup, units: Sequence[int] | None = None) -> list[Shard]:
        """Every batch with each of `units` (default: all) masked."""
        wanted = tuple(range(group.count)) if units is None else tuple(units)
        return [Shard("exact", number, group.key, wanted) for number in range(len(self.batches))]

    def exact_losses(self, parts: Sequence[Partial]) -> tuple[np.ndarray, np.ndarray]:
        """(trajectory, output) losses [units], the mean over samples, out of what `exact_shards` gave."""
        trajectory, output = (
            np.sum([part[term] for part in parts], axis=0) / self.references.samples
            for term in ("trajectory", "output")
        )
        return trajectory, output


def optin_scores(scorer: Scorer, spread: Spread = in_process) -> Result:
    """`score: optin`. Returns ({group key: float64 [units]}, facts about the score).

    lambda = sum of trajectory losses / sum of output losses, so that both terms weigh the same in total.
    spread: has the shards done.
    """
    structure, config = scorer.structure, scorer.config
    sketched = sketched_groups(structure, config)
    exact = [group for group in structure.groups if group.kind == "heads"]
    sketch = scorer.sketch
    with contextlib.closing(scorer), spread(scorer) as run:
        sketch.run = run
        # All at once, so that no worker waits for another between them; those that take longest first.
        pilots = sketch.pilot_shards() if sketched else []
        sizes = [Shard("sizes", number) for number in range(len(scorer.batches))] if sketched else []
        masks = [shard for group in exact for shard in scorer.exact_shards(group)]
        parts = _counted(run, [*masks, *pilots, *sizes])
        trajectory, output = _terms(scorer, exact, parts[: len(masks)])
        if sketched:
            pilot = sketch.pilot_losses(parts[len(masks) : len(masks) + len(pilots)])
            trajectory, output = trajectory | pilot[0], output | pilot[1]
        weight = balance(trajectory, output)
        scores = {group.key: trajectory[group.key] + weight * output[group.key] for group in exact}
        facts = {"lambda": weight}
        if sketched:
            facts |= add_until_stable(sketch, weight, config.probes)
            scores |= sketch.values()
            facts["masked_exactly"] = _mask_suspects(scorer, parts[len(masks) + len(pilots) :], run, weight, scores)
    sketch.run = None
    return {group.key: scores[group.key] for group in structure.groups}, facts


def _mask_suspects(scorer: Scorer, sizes: Sequence[Partial], run: Map, weight: float, scores: Values) -> float:
    """Mask the units of largest contribution exactly, and raise their scores to that; how many it more than doubled."""
    suspects = {}
    for group in scorer.sketch.groups:
        largest = np.max([part[group.key] for part in sizes], axis=0)
        suspects[group.key] = np.sort(np.argsort(-largest, kind="stable")[:SUSPECTS])
    shards = [
        shard
        for group in scorer.sketch.groups
        if len(suspects[group.key])
        for shard in scorer.exact_shards(group, suspects[group.key].tolist())
    ]
    found = _terms(scorer, [g for g in scorer.sketch.groups if len(suspects[g.key])], _counted(run, shards))
    raised = 0.0
    for key in found[0]:
        measured, at = found[0][key] + weight * found[1][key], suspects[key]
        raised += float((measured > 2 * scores[key][at]).sum())
        scores[key][at] = np.maximum(scores[key][at], measured)
    return raised


def _terms(scorer: Scorer, groups: Sequence[UnitGroup], parts: Sequence[Partial]) -> tuple[Values, Values]:
    """(trajectory, output) losses of exactly masked groups, out of the parts of their shards, group by group."""
    trajectory, output, batches = Values(), Values(), len(scorer.batches)
    for at, group in enumerate(groups):
        losses = scorer.exact_losses(parts[at * batches : (at + 1) * batches])
        trajectory[group.key], output[group.key] = losses
    return trajectory, output


def _counted(run: Map, shards: Sequence[Shard]) -> list[Partial]:
    """Have shards done; counts a unit when its last batch has been masked, and the probes of a pilot likewise."""
    parts = []
    last = max((shard.batch for shard in shards), default=0)
    for shard, part in zip(shards, run(shards), strict=True):
        parts.append(part)
        if shard.batch == last:
            advance(len(shard.units) + shard.count)
    return parts


def exact_scores(scorer: Scorer, spread: Spread = in_process) -> Result:
    """`score: optin-exact`: a masked forward pass for every unit. For comparison; hours on large models."""
    with contextlib.closing(scorer), spread(scorer) as run:
        groups = scorer.structure.groups
        shards = [shard for group in groups for shard in scorer.exact_shards(group)]
        trajectory, output = _terms(scorer, groups, _counted(run, shards))
    weight = balance(trajectory, output)
    return {key: trajectory[key] + weight * output[key] for key in trajectory}, {"lambda": weight}


def fisher_scores(scorer: Scorer, spread: Spread = in_process) -> Result:
    """`score: fisher`: diagonal Fisher information of the masks (Kwon et al. 2022), of the model's own output.

    No labels: the expectation is over the model's own distribution, not over the data's labels.
    """
    sketch, config = scorer.sketch, scorer.config
    probes = MAX_PROBES // 2 if config.probes == "auto" else config.probes
    starts = range(0, probes, CHUNK)
    with contextlib.closing(scorer), spread(scorer) as run:
        shards = [shard for start in starts for shard in sketch.pilot_shards(trajectory=False, start=start)]
        parts = _counted(run, shards)
    size = len(scorer.batches)
    chunks = [sketch.pilot_losses(parts[at * size : (at + 1) * size])[1] for at in range(len(starts))]
    values = {group.key: np.mean([chunk[group.key] for chunk in chunks], axis=0) for group in scorer.structure.groups}
    return values, {"probes": float(len(chunks) * CHUNK)}


def balance(trajectory: Values, output: Values) -> float:
    """lambda; 0 when the output does not depend on any unit, so that only the trajectory counts."""
    total = sum(float(values.sum()) for values in output.values())
    return sum(float(values.sum()) for values in trajectory.values()) / total if total > 0 else 0.0


def add_until_stable(sketch: Sketch, weight: float, probes: int | str) -> dict[str, float]:
    """Add a fixed number of probes, or with "auto" as many as the ranking needs; returns what the report says of it."""
    if probes != "auto":
        sketch.add_probes(weight, int(probes))
    else:
        sketch.add_probes(weight, 2 * CHUNK)
        while sketch.probes < MAX_PROBES and sketch.stability()["rank_correlation"] < ENOUGH:
            sketch.add_probes(weight, 2 * CHUNK)
    stability = sketch.stability() if sketch.probes > 1 else {}
    return {"probes": float(sketch.probes), **stability}
