"""The sketch: importance of every unit from a few backward passes, whatever the number of units.

The masked loss of one sample is ||r(m) - r(1)||^2 for the residual vector r of its relation matrices and its output, so
to second order I(u) = ||dr/dm_u||^2, and for v ~ N(0, I), E[(v . dr/dm_u)^2] is exactly that. Every sample has its own
mask and its own v, so that one backward pass of the sum of (v . r) over samples yields (v . dr/dm_u) for every unit of
every block and every sample: squaring per sample leaves none of the noise of products between samples
(docs/method.md, section 2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import spearmanr

from optin_export.families import Structure, UnitGroup, block_outputs, masked
from optin_export.scoring.losses import (
    OutputNoise,
    Reference,
    compared_output,
    normalised_rows,
    output_probe,
    trajectory_probe,
)
from optin_export.sources import TaskModel

Values = dict[str, np.ndarray]
#: Probes between two looks at the stability, each chunk on a graph of its own: memory is that of one batch.
CHUNK = 4
MAX_PROBES = 64
#: `probes: auto` stops when the estimated rank correlation with converged scores reaches this.
ENOUGH = 0.99


@dataclass
class Sketch:
    """Squared residual gradients of every unit of `groups`, averaged over samples and over the probes so far.

    autocast: dtype of the forward pass ("bfloat16", "float16"), or None for the model's own.
    keep: also keep the gradients themselves, as embeddings of the units.
    """

    model: TaskModel
    structure: Structure
    groups: Sequence[UnitGroup]
    references: Sequence[Reference]
    temperature: float
    generator: torch.Generator
    autocast: str | None = None
    keep: bool = False
    halves: tuple[Values, Values] = field(default_factory=lambda: ({}, {}))
    counts: list[int] = field(default_factory=lambda: [0, 0])
    embeddings: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.noise = OutputNoise(self.generator)
        self.samples = sum(len(reference) for reference in self.references)
        # In half precision small gradients would underflow: scaled up on the way, less where the large ones overflow.
        self.scale = 2.0**12 if self.autocast == "float16" else 1.0

    def pilot(self, step: Callable[[int], None], trajectory: bool = True) -> tuple[Values, Values]:
        """One chunk of probes with both terms apart: (trajectory, output) losses per unit."""
        first, second = self._zeros(), self._zeros()
        for number, reference in enumerate(self.references):
            with self._pass(reference) as (masks, rows, result):
                for _ in range(CHUNK):
                    if trajectory:
                        self._add(first, self._gradients(trajectory_probe(rows, self.generator), masks), CHUNK)
                    probe = self._output_probe(number, result)
                    self._add(second, self._gradients(probe, masks), CHUNK)
        step(CHUNK)
        return first, second

    def add_probes(self, weight: float, probes: int, step: Callable[[int], None]) -> None:
        """`probes` more of the combined loss (trajectory + weight * output): one backward pass each.

        The cross term of the two has mean zero, because their noise is independent.
        """
        for start in range(0, probes, CHUNK):
            size, before = min(CHUNK, probes - start), self.probes
            for number, reference in enumerate(self.references):
                with self._pass(reference) as (masks, rows, result):
                    for turn in range(size):
                        probe = weight**0.5 * self._output_probe(number, result)
                        probe = probe + trajectory_probe(rows, self.generator)
                        gradients = self._gradients(probe, masks)
                        half = (before + turn) % 2
                        self._add(self.halves[half], gradients, 1)
                        if self.keep:
                            for key, values in gradients.items():
                                self.embeddings.setdefault(key, []).append(values.numpy())
            for turn in range(size):
                self.counts[(before + turn) % 2] += 1
            step(size)

    @property
    def probes(self) -> int:
        return sum(self.counts)

    def values(self) -> Values:
        """The mean over all combined probes: {group key: float64 [units]}."""
        return {key: sum(half.get(key, 0) for half in self.halves) / self.probes for key in self._zeros()}  # type: ignore[misc]

    def stability(self) -> dict[str, float]:
        """How far the ranking can be trusted, from its two halves.

        rank_correlation: estimated Spearman correlation with converged scores (for halves that correlate by r, the mean
        of both correlates with the truth by sqrt(2 r / (1 + r))). cut_agreement: share of units that both halves keep,
        at the worst of three cuts (a quarter, a half, three quarters stay).
        """
        first, second = (np.concatenate([half[group.key] for group in self.groups]) for half in self.halves)
        between = float(spearmanr(first, second).statistic) if len(first) > 1 and np.ptp(first) > 0 else 1.0
        agreement = []
        for share in (0.25, 0.5, 0.75):
            count = max(1, round(share * len(first)))
            kept = [set(np.argsort(-half, kind="stable")[:count].tolist()) for half in (first, second)]
            agreement.append(len(kept[0] & kept[1]) / count)
        return {
            "rank_correlation": (2 * max(between, 0.0) / (1 + max(between, 0.0))) ** 0.5,
            "cut_agreement": min(agreement),
        }

    @contextlib.contextmanager
    def _pass(self, reference: Reference) -> Iterator[tuple[dict[str, torch.Tensor], list[torch.Tensor], torch.Tensor]]:
        """One forward pass with a mask per sample and unit in the graph: (masks, normalised rows per block, output)."""
        device = reference.output.device
        masks = {
            group.key: torch.ones(len(reference), group.count, requires_grad=True, device=device)
            for group in self.groups
        }
        precision = (
            torch.autocast(device.type, getattr(torch, self.autocast)) if self.autocast else contextlib.nullcontext()
        )
        with precision, masked(self.model, self.groups, masks), block_outputs(self.model, self.structure.blocks) as out:
            result = self.model(**reference.inputs)
        rows = [
            normalised_rows(out[path], reference.inputs, reference.chosen, self.structure.channels_first)
            for path in self.structure.blocks
        ]
        result = compared_output(self.model, reference, result)
        yield masks, rows, result.float() if self.autocast else result

    def _output_probe(self, number: int, result: torch.Tensor) -> torch.Tensor:
        noise = self.noise.draw(number, result)
        weights = self.references[number].weights
        return output_probe(self.model.output_kind, result, self.temperature, noise, weights)

    def _gradients(self, probe: torch.Tensor, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """v . dr/dm per sample and unit, [samples, units]; zero for a unit that the probe does not depend on."""
        while True:
            found = torch.autograd.grad(probe * self.scale, list(masks.values()), retain_graph=True, allow_unused=True)
            if self.scale <= 1 or all(gradient is None or torch.isfinite(gradient).all() for gradient in found):
                break
            self.scale /= 16
        return {
            key: (torch.zeros_like(mask) if gradient is None else gradient / self.scale).detach().double().cpu()
            for (key, mask), gradient in zip(masks.items(), found, strict=True)
        }

    def _zeros(self) -> Values:
        return {group.key: np.zeros(group.count) for group in self.groups}

    def _add(self, totals: Values, gradients: dict[str, torch.Tensor], probes: int) -> None:
        for key, values in gradients.items():
            added = values.square().sum(0).numpy() / (self.samples * probes)
            totals[key] = totals[key] + added if key in totals else added
