"""OPTIN's score, without a forward pass per unit: heads are masked exactly, neurons are sketched with random probes.

The masked loss is ||r(m) - r(1)||^2 for the residual vector r of all relation matrices and the output, so to second
order I(u) = ||dr/dm_u||^2, and for v ~ N(0, I), E[(v . dr/dm_u)^2] is exactly that. One backward pass of (v . r)
yields v . dr/dm_u for every unit of every block at once (docs/method.md, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import spearmanr

from optin_export.families import Structure, UnitGroup, block_outputs, masked, replayed
from optin_export.scoring.losses import (
    Reference,
    observe,
    output_loss,
    output_probe,
    trajectory_loss,
    trajectory_probe,
)
from optin_export.sources import Batch, TaskModel

#: Probes with separate trajectory and output passes; they fix lambda, after which one combined pass a probe is enough.
PILOT_PROBES = 8
Tick = Callable[[int, int], None]


def optin_scores(
    model: TaskModel,
    structure: Structure,
    batches: Sequence[Batch],
    *,
    probes: int,
    rows: int,
    temperature: float,
    seed: int,
    tick: Tick,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Score every unit: ({group key: float64 [units]}, {"lambda", "probes", "neuron_rank_stability"}).

    lambda = sum of trajectory losses / sum of output losses, so that both terms weigh the same in total.
    neuron_rank_stability: Spearman correlation of the neuron scores from two halves of the probes.
    """
    generator = torch.Generator().manual_seed(seed)
    references = [observe(model, structure.blocks, batch.inputs, rows, generator) for batch in batches]
    exact = [group for group in structure.groups if group.kind == "heads"]
    sketched = [group for group in structure.groups if group.kind != "heads"]
    total = sum(group.count for group in exact) + (probes if sketched else 0)
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        tick(done, total)

    trajectory, output = {}, {}
    for group in exact:
        trajectory[group.key], output[group.key] = exact_losses(model, structure, group, references, temperature)
        step(group.count)
    sketch = _Sketch(model, structure, sketched, references, temperature, generator)
    pilot = min(PILOT_PROBES, probes) if sketched else 0
    samples = [sketch.separate(step) for _ in range(pilot)]
    for group in sketched:
        trajectory[group.key] = np.mean([first[group.key] for first, _ in samples], 0)
        output[group.key] = np.mean([second[group.key] for _, second in samples], 0)
    weight = _balance(trajectory, output)
    scores = {key: trajectory[key] + weight * output[key] for key in trajectory}
    info = {"lambda": weight, "probes": float(probes if sketched else 0)}
    if sketched and probes > pilot:
        combined = [sketch.combined(weight, step) for _ in range(probes - pilot)]
        for group in sketched:
            rest = np.sum([sample[group.key] for sample in combined], 0)
            scores[group.key] = (pilot * scores[group.key] + rest) / probes
        info["neuron_rank_stability"] = _stability(combined)
    return scores, info


def exact_losses(
    model: TaskModel, structure: Structure, group: UnitGroup, references: Sequence[Reference], temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """(trajectory, output) loss of masking each unit of `group`, [units] each, averaged over batches.

    Blocks before the group's own are replayed from the reference pass: masking cannot change them.
    """
    trajectory, output = np.zeros(group.count), np.zeros(group.count)
    later = structure.blocks[group.block :]
    for reference in references:
        prefix = {path: reference.hidden[path] for path in structure.blocks[: group.block]}
        with torch.no_grad(), replayed(model, prefix), block_outputs(model, later) as outputs:
            for unit in range(group.count):
                mask = torch.ones(group.count)
                mask[unit] = 0.0
                with masked(model, [group], {group.key: mask}):
                    result = model(**reference.inputs)
                trajectory[unit] += trajectory_loss(reference, outputs, later) / len(references)
                output[unit] += output_loss(model, reference.output, result, temperature) / len(references)
    return trajectory, output


class _Sketch:
    """One forward pass a batch, kept; each probe is one backward pass (two, while lambda is not known)."""

    def __init__(
        self,
        model: TaskModel,
        structure: Structure,
        groups: Sequence[UnitGroup],
        references: Sequence[Reference],
        temperature: float,
        generator: torch.Generator,
    ) -> None:
        self.model, self.blocks, self.groups = model, structure.blocks, groups
        self.references, self.temperature, self.generator = references, temperature, generator
        self.passes = [self._forward(reference) for reference in references] if groups else []

    def _forward(self, reference: Reference) -> tuple[Reference, dict[str, torch.Tensor], dict, torch.Tensor]:
        masks = {group.key: torch.ones(group.count, requires_grad=True) for group in self.groups}
        with masked(self.model, self.groups, masks), block_outputs(self.model, self.blocks) as outputs:
            result = self.model(**reference.inputs)
        return reference, masks, dict(outputs), result

    def separate(self, step: Callable[[int], None]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """One probe: squared gradients of the trajectory and of the output residual, apart."""
        first, second = self._zeros(), self._zeros()
        for reference, masks, outputs, result in self.passes:
            probe = trajectory_probe(reference, outputs, self.blocks, self.generator)
            self._add(first, probe, masks)
            self._add(second, output_probe(self.model, result, self.temperature, self.generator), masks)
        step(1)
        return first, second

    def combined(self, weight: float, step: Callable[[int], None]) -> dict[str, np.ndarray]:
        """One probe of trajectory + sqrt(lambda) * output: the cross term has mean zero, so one pass gives both."""
        total = self._zeros()
        for reference, masks, outputs, result in self.passes:
            probe = trajectory_probe(reference, outputs, self.blocks, self.generator)
            probe = probe + weight**0.5 * output_probe(self.model, result, self.temperature, self.generator)
            self._add(total, probe, masks)
        step(1)
        return total

    def _zeros(self) -> dict[str, np.ndarray]:
        return {group.key: np.zeros(group.count) for group in self.groups}

    def _add(self, total: dict[str, np.ndarray], probe: torch.Tensor, masks: dict[str, torch.Tensor]) -> None:
        gradients = torch.autograd.grad(probe, list(masks.values()), retain_graph=True)
        for key, gradient in zip(masks, gradients, strict=True):
            total[key] += gradient.double().square().numpy() / len(self.passes)


def _balance(trajectory: dict[str, np.ndarray], output: dict[str, np.ndarray]) -> float:
    whole = sum(float(values.sum()) for values in output.values())
    return sum(float(values.sum()) for values in trajectory.values()) / whole if whole > 0 else 0.0


def _stability(samples: list[dict[str, np.ndarray]]) -> float:
    halves = [
        np.concatenate([np.sum([sample[key] for sample in samples[start::2]], 0) for key in samples[0]])
        for start in (0, 1)
    ]
    if len(samples) < 2 or halves[0].std() == 0 or halves[1].std() == 0:
        return 0.0
    return float(spearmanr(*halves).statistic)
