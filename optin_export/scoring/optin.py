"""OPTIN's score: heads masked exactly, neurons and channels sketched, and the few units the sketch cannot see exactly.

The sketch is a second-order expansion. It fails for a unit whose own contribution dwarfs everything around it (massive
activations): a norm behind it saturates, its gradient vanishes, and yet its removal changes everything. Such units
show by the size of their contribution; in every group the largest few are masked exactly, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from optin_export.families import Structure
from optin_export.recipe import PruneSection
from optin_export.scoring.activation import contributions
from optin_export.scoring.exact import exact_losses
from optin_export.scoring.held import References
from optin_export.scoring.losses import observe
from optin_export.scoring.sketch import CHUNK, ENOUGH, MAX_PROBES, Sketch, Values
from optin_export.sources import Batch, TaskModel

#: Sketched units per group whose contribution is largest; they are masked exactly as well.
SUSPECTS = 8
#: Token rows are shared evenly among the samples of a batch of this size.
ROWS_SHARED_BY = 32
Step = Callable[[int], None]
Result = tuple[Values, dict[str, float]]


def observe_all(
    model: TaskModel, structure: Structure, batches: Sequence[Batch], rows: int, generator: torch.Generator
) -> References:
    """The unpruned model on every scoring batch; `rows` token rows a batch and block, the same number per sample."""
    references = References()
    for batch in batches:
        references.append(observe(model, structure, batch, max(1, rows // ROWS_SHARED_BY), generator))
    return references


def optin_scores(
    model: TaskModel, structure: Structure, batches: Sequence[Batch], config: PruneSection, seed: int, step: Step
) -> Result:
    """`score: optin`. Returns ({group key: float64 [units]}, facts about the score).

    lambda = sum of trajectory losses / sum of output losses, so that both terms weigh the same in total.
    """
    generator = torch.Generator().manual_seed(seed)
    references = observe_all(model, structure, batches, config.rows, generator)
    exact = [group for group in structure.groups if group.kind == "heads"]
    sketched = [group for group in structure.groups if group.kind != "heads"]
    sketch = Sketch(model, structure, sketched, references, config.temperature, generator, config.autocast)
    trajectory: Values = {}
    output: Values = {}
    for group in exact:
        losses = exact_losses(model, structure, group, references, config.temperature, step=step)
        trajectory[group.key], output[group.key] = losses
    if sketched:
        pilot = sketch.pilot(step)
        trajectory, output = trajectory | pilot[0], output | pilot[1]
    weight = balance(trajectory, output)
    scores = {group.key: trajectory[group.key] + weight * output[group.key] for group in exact}
    facts = {"lambda": weight}
    if sketched:
        facts |= add_until_stable(sketch, weight, config.probes, step)
        scores |= sketch.values()
        facts["masked_exactly"] = 0.0
        sizes = contributions(model, structure.groups, batches)
        for group in sketched:
            suspects = np.sort(np.argsort(-sizes[group.key].largest, kind="stable")[:SUSPECTS])
            losses = exact_losses(model, structure, group, references, config.temperature, suspects.tolist(), step)
            measured = losses[0] + weight * losses[1]
            facts["masked_exactly"] += float((measured > 2 * scores[group.key][suspects]).sum())
            scores[group.key][suspects] = np.maximum(scores[group.key][suspects], measured)
    return {group.key: scores[group.key] for group in structure.groups}, facts


def exact_scores(
    model: TaskModel, structure: Structure, batches: Sequence[Batch], config: PruneSection, seed: int, step: Step
) -> Result:
    """`score: optin-exact`: a masked forward pass for every unit. For comparison; hours on large models."""
    generator = torch.Generator().manual_seed(seed)
    references = observe_all(model, structure, batches, config.rows, generator)
    trajectory: Values = {}
    output: Values = {}
    for group in structure.groups:
        losses = exact_losses(model, structure, group, references, config.temperature, step=step)
        trajectory[group.key], output[group.key] = losses
    weight = balance(trajectory, output)
    return {key: trajectory[key] + weight * output[key] for key in trajectory}, {"lambda": weight}


def fisher_scores(
    model: TaskModel, structure: Structure, batches: Sequence[Batch], config: PruneSection, seed: int, step: Step
) -> Result:
    """`score: fisher`: diagonal Fisher information of the masks (Kwon et al. 2022), of the model's own output.

    No labels: the expectation is over the model's own distribution, not over the data's labels.
    """
    generator = torch.Generator().manual_seed(seed)
    references = observe_all(model, structure, batches, config.rows, generator)
    sketch = Sketch(model, structure, structure.groups, references, config.temperature, generator, config.autocast)
    probes = MAX_PROBES // 2 if config.probes == "auto" else config.probes
    chunks = [sketch.pilot(step, trajectory=False)[1] for _ in range(-(-probes // CHUNK))]
    values = {group.key: np.mean([chunk[group.key] for chunk in chunks], axis=0) for group in structure.groups}
    return values, {"probes": float(len(chunks) * CHUNK)}


def balance(trajectory: Values, output: Values) -> float:
    """lambda; 0 when the output does not depend on any unit, so that only the trajectory counts."""
    total = sum(float(values.sum()) for values in output.values())
    return sum(float(values.sum()) for values in trajectory.values()) / total if total > 0 else 0.0


def add_until_stable(sketch: Sketch, weight: float, probes: int | str, step: Step) -> dict[str, float]:
    """Add a fixed number of probes, or with "auto" as many as the ranking needs; returns what the report says of it."""
    if probes != "auto":
        sketch.add_probes(weight, int(probes), step)
    else:
        sketch.add_probes(weight, 2 * CHUNK, step)
        while sketch.probes < MAX_PROBES and sketch.stability()["rank_correlation"] < ENOUGH:
            sketch.add_probes(weight, 2 * CHUNK, step)
    stability = sketch.stability() if sketch.probes > 1 else {}
    return {"probes": float(sketch.probes), **stability}
