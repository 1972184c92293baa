"""OPTIN's score: every unit is sketched, and a few units with large outputs are also masked exactly.

The sketch is a second-order expansion. It fails for a unit whose contribution dominates its row (massive activations):
the following norm saturates, so the unit's gradient vanishes although its removal changes everything. Such units have
large contributions on every row, so in every group the few units with the largest ones are masked exactly on some of
the rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from optin_export.data import Batch
from optin_export.models import Placement, TaskModel
from optin_export.objective import Reference, derived
from optin_export.progress import advance
from optin_export.recipe import PruneSection
from optin_export.scoring.activation import contributions
from optin_export.scoring.exact import exact_sums
from optin_export.scoring.registry import Request, Result, every_unit, register
from optin_export.scoring.shards import Map, Partial, Shard
from optin_export.scoring.sketch import CHUNK, ENOUGH, MAX_PROBES, Sketch, Values
from optin_export.units import Structure, UnitGroup

#: Units per group, those with the largest contribution, that are masked exactly as well, and the share of the rows.
SUSPECTS, SUSPECT_ROWS = 8, 0.25
#: Probes that the progress display assumes: the number that `probes: auto` takes is not known in advance.
PROBES = 24
#: Token rows are shared evenly among the samples of a batch of this size.
ROWS_SHARED_BY = 32


def observe_all(
    model: TaskModel, structure: Structure, batches: Sequence[Batch], rows: int, generator: torch.Generator
) -> Reference:
    """The unpruned model on every scoring batch; `rows` token rows per batch and block, the same number per sample."""
    each = max(1, rows // ROWS_SHARED_BY)
    return Reference(model, structure, batches, each, lambda number: derived(generator, 0, number))


def every_group(group: UnitGroup) -> bool:
    """All groups need gradients."""
    return True


class Scorer:
    """A worker's state for any shard of one scoring: one model, the batches, and the observations."""

    def __init__(
        self,
        model: TaskModel,
        structure: Structure,
        batches: Sequence[Batch],
        config: PruneSection,
        seed: int,
        placement: Placement | None = None,
        sketched: bool = True,
    ) -> None:
        self.model, self.structure, self.batches, self.config = model, structure, batches, config
        self.seed, self.placement, self.sketched = seed, placement or Placement(), sketched
        self.placed: contextlib.ExitStack | None = None
        generator = torch.Generator().manual_seed(seed)
        self.groups = {group.key: group for group in structure.groups}
        self.references = observe_all(model, structure, batches, config.rows, generator)
        self.few = observe_all(model, structure, [_some_rows(batch) for batch in batches], config.rows, generator)
        self.sketch = Sketch(
            model,
            structure,
            structure.groups if sketched else (),
            self.references,
            config.temperature,
            generator,
            None if config.autocast == "auto" else config.autocast,  # `score` settles it before
        )

    @classmethod
    def of(cls, request: Request, sketched: bool = True) -> Scorer:
        """A scorer for a request. sketched: whether its units are sketched, or only masked."""
        given = (request.model, request.structure, request.batches, request.config, request.seed, request.placement)
        return cls(*given, sketched)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the model and the batches to a worker, without this process's observations."""
        given = (self.model, self.structure, self.batches, self.config, self.seed, self.placement, self.sketched)
        return Scorer, given

    def close(self) -> None:
        """Move the model back to where it was before the first shard."""
        if self.placed is not None:
            self.placed.close()
            self.placed = None

    def __call__(self, shard: Shard) -> Partial:
        if self.placed is None:  # where the shards run: the model is sent to workers in its current state
            self.placed = contextlib.ExitStack()
            self.placed.enter_context(self.placement(self.model))
        if shard.kind in ("exact", "few"):
            references = self.references if shard.kind == "exact" else self.few
            reference, group = references[shard.batch], self.groups[shard.group]
            terms = exact_sums(self.model, self.structure, group, reference, self.config.temperature, shard.units)
            return {"trajectory": terms[0], "output": terms[1]}
        if shard.kind == "sizes":
            sizes = contributions(self.model, self.structure.groups, [self.batches[shard.batch]])
            return {key: found.largest for key, found in sizes.items()}
        return self.sketch.work(shard)

    def exact_shards(self, group: UnitGroup, units: Sequence[int] | None = None) -> list[Shard]:
        """Every batch with each of `units` masked, on some of its rows; all units, if None, on all rows."""
        kind: Literal["exact", "few"] = "exact" if units is None else "few"
        wanted = tuple(range(group.count)) if units is None else tuple(units)
        return [Shard(kind, number, group.key, wanted) for number in range(len(self.batches))]

    def exact_losses(self, shards: Sequence[Shard], parts: Sequence[Partial]) -> tuple[np.ndarray, np.ndarray]:
        """(trajectory, output) losses [units], the mean over samples, from the results of `exact_shards`."""
        samples = (self.references if shards[0].kind == "exact" else self.few).samples
        trajectory, output = (
            np.sum([part[term] for part in parts], axis=0) / samples for term in ("trajectory", "output")
        )
        return trajectory, output


def _some_rows(batch: Batch) -> Batch:
    step = round(1 / SUSPECT_ROWS)
    return Batch({name: value[::step] for name, value in batch.inputs.items()}, batch.rows[::step])


def _steps(structure: Structure) -> int:
    """Number of masked units, and of probes (the maximum, with `probes: auto`)."""
    return sum(min(one.count, SUSPECTS) for one in structure.groups) + PROBES


@register("optin", steps=_steps, gradients=every_group)
def optin_scores(request: Request) -> Result:
    """Scores by `score: optin`.

    lambda = sum of trajectory losses / sum of output losses, so that both terms have the same total weight.
    """
    scorer, config = Scorer.of(request), request.config
    sketch = scorer.sketch
    with contextlib.closing(scorer), request.spread(scorer) as run:
        sketch.run = run
        # All at once, so that no worker waits for another in between.
        pilots = sketch.pilot_shards()
        sizes = [Shard("sizes", number) for number in range(len(request.batches))]
        parts = counted(run, [*pilots, *sizes])
        weight = balance(*sketch.pilot_losses(parts[: len(pilots)]))
        facts = {"lambda": weight, **add_until_stable(sketch, weight, config.probes)}
        scores = sketch.values()
        facts["masked_exactly"] = _mask_suspects(scorer, parts[len(pilots) :], run, weight, scores)
    sketch.run = None
    return {group.key: scores[group.key] for group in request.structure.groups}, facts


def _mask_suspects(scorer: Scorer, sizes: Sequence[Partial], run: Map, weight: float, scores: Values) -> float:
    """Mask the units of largest contribution exactly, and raise their scores to the result; returns how many of the
    scores more than doubled."""
    suspects = {}
    for group in scorer.sketch.groups:
        largest = np.max([part[group.key] for part in sizes], axis=0)
        suspects[group.key] = np.sort(np.argsort(-largest, kind="stable")[:SUSPECTS])
    groups = [group for group in scorer.sketch.groups if len(suspects[group.key])]
    found = _masked(scorer, groups, run, {key: units.tolist() for key, units in suspects.items()})
    raised = 0.0
    for key in found[0]:
        measured, at = found[0][key] + weight * found[1][key], suspects[key]
        raised += float((measured > 2 * scores[key][at]).sum())
        scores[key][at] = np.maximum(scores[key][at], measured)
    return raised


def _masked(
    scorer: Scorer, groups: Sequence[UnitGroup], run: Map, units: Mapping[str, Sequence[int]] | None = None
) -> tuple[Values, Values]:
    """(trajectory, output) losses of masking all units of the groups, or these."""
    each = [scorer.exact_shards(group, None if units is None else units[group.key]) for group in groups]
    parts = counted(run, [shard for shards in each for shard in shards])
    trajectory, output, batches = Values(), Values(), len(scorer.batches)
    for at, (group, shards) in enumerate(zip(groups, each, strict=True)):
        losses = scorer.exact_losses(shards, parts[at * batches : (at + 1) * batches])
        trajectory[group.key], output[group.key] = losses
    return trajectory, output


def counted(run: Map, shards: Sequence[Shard]) -> list[Partial]:
    """Execute shards; a unit counts as done when its last batch has been masked, and a pilot's probes likewise."""
    parts = []
    last = max((shard.batch for shard in shards), default=0)
    for shard, part in zip(shards, run(shards), strict=True):
        parts.append(part)
        if shard.batch == last:
            advance(len(shard.units) + shard.count)
    return parts


@register("optin-exact", steps=every_unit)
def exact_scores(request: Request) -> Result:
    """Scores by `score: optin-exact`: a masked forward pass for every unit. For comparison; hours on large models."""
    scorer = Scorer.of(request, sketched=False)
    with contextlib.closing(scorer), request.spread(scorer) as run:
        trajectory, output = _masked(scorer, request.structure.groups, run)
    weight = balance(trajectory, output)
    return {key: trajectory[key] + weight * output[key] for key in trajectory}, {"lambda": weight}


def balance(trajectory: Values, output: Values) -> float:
    """lambda; 0 if the output does not depend on any unit, so that only the trajectory counts."""
    total = sum(float(values.sum()) for values in output.values())
    return sum(float(values.sum()) for values in trajectory.values()) / total if total > 0 else 0.0


def add_until_stable(sketch: Sketch, weight: float, probes: int | str) -> dict[str, float]:
    """Add a fixed number of probes, or with "auto" as many as the ranking needs; returns facts for the report."""
    if probes != "auto":
        sketch.add_probes(weight, int(probes))
    else:
        sketch.add_probes(weight, 2 * CHUNK)
        while sketch.probes < MAX_PROBES and sketch.stability()["rank_correlation"] < ENOUGH:
            sketch.add_probes(weight, 2 * CHUNK)
    stability = sketch.stability() if sketch.probes > 1 else {}
    return {"probes": float(sketch.probes), **stability}
