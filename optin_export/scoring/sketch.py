"""The sketch: importance of every unit from a few backward passes, independent of the number of units.

The masked loss of one sample is ||r(m) - r(1)||^2 for the residual vector r of its relation matrices and its output, so
to second order I(u) = ||dr/dm_u||^2, and for v ~ N(0, I), E[(v . dr/dm_u)^2] is exactly that. Every sample has its own
mask and its own v, so that one backward pass of the sum of (v . r) over samples yields (v . dr/dm_u) for every unit of
every block and every sample: squaring per sample leaves none of the noise of products between samples
(docs/method.md, section 2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from optin_export.models import TaskModel, passes_in
from optin_export.objective import (
    ORTHOGONAL_CLASSES,
    Observation,
    compared_output,
    derived,
    normalised_rows,
    orthogonal,
    output_probe,
    samples_of,
    trajectory_probe,
)
from optin_export.progress import advance
from optin_export.scoring.shards import Map, Partial, Shard
from optin_export.units import Structure, UnitGroup, block_outputs, masked

Values = dict[str, np.ndarray]
#: Probes between two checks of the stability, each chunk on a separate graph, so that memory is that of one batch.
CHUNK = 4
MAX_PROBES = 64
#: Distinguishes the noise of pilot and combined probes; the next number is used for their output noise.
_STREAMS = {"pilot": 10, "output": 10, "probes": 20}
#: `probes: auto` stops when the estimated rank correlation with converged scores reaches this.
ENOUGH = 0.99


@dataclass
class Sketch:
    """Squared residual gradients of every unit of `groups`, averaged over samples and over the probes so far.

    autocast: dtype of the forward pass ("bfloat16", "float16"), or None for the model's own.
    generator: its seed is used for all probes; a probe's noise depends only on its number and batch.
    run: executes shards; None: in this process.
    """

    model: TaskModel
    structure: Structure
    groups: Sequence[UnitGroup]
    references: Sequence[Observation]
    temperature: float
    generator: torch.Generator
    autocast: str | None = None
    run: Map | None = None
    halves: tuple[Values, Values] = field(default_factory=lambda: ({}, {}))
    counts: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        self.samples = samples_of(self.references)
        self.bases: dict[tuple[int, ...], torch.Tensor] = {}
        # In half precision small gradients would underflow: they are scaled up, less if large ones overflow.
        self.scale = 2.0**12 if self.autocast == "float16" else 1.0

    def pilot_shards(self, trajectory: bool = True, start: int = 0) -> list[Shard]:
        """One chunk of probes, numbered from `start`, with both terms separately, or only that of the output."""
        kind: Literal["pilot", "output"] = "pilot" if trajectory else "output"
        return [Shard(kind, number, start=start, count=CHUNK) for number in range(len(self.references))]

    def pilot_losses(self, parts: Sequence[Partial]) -> tuple[Values, Values]:
        """(trajectory, output) losses per unit from the results of the shards of one chunk."""
        terms: list[Values] = []
        for term in ("trajectory", "output"):
            total = self._zeros()
            for part in parts:
                for group in self.groups:
                    added = part.get(f"{term}.{group.key}")
                    if added is not None:
                        total[group.key] = total[group.key] + added / (self.samples * CHUNK)
            terms.append(total)
        return terms[0], terms[1]

    def add_probes(self, weight: float, probes: int) -> None:
        """Add `probes` probes of the combined loss (trajectory + weight * output): one backward pass each.

        The cross term of the two has mean zero, because their noise is independent.
        """
        before = self.probes
        shards = [
            Shard("probes", number, start=before + start, count=min(CHUNK, probes - start), weight=weight)
            for start in range(0, probes, CHUNK)
            for number in range(len(self.references))
        ]
        for shard, part in zip(shards, self._run(shards), strict=True):
            for half, totals in enumerate(self.halves):
                for group in self.groups:
                    added = part.get(f"{half}.{group.key}")
                    if added is not None:
                        added = added / self.samples
                        totals[group.key] = totals[group.key] + added if group.key in totals else added
            if shard.batch == len(self.references) - 1:
                for probe in range(shard.start, shard.start + shard.count):
                    self.counts[probe % 2] += 1
                advance(shard.count)

    def work(self, shard: Shard) -> Partial:
        """The result of a shard's probes: squared gradients, summed over the samples of its batch and its probes.

        "trajectory.KEY" and "output.KEY" [units] of the two terms, or "0.KEY" and "1.KEY" of the halves of the
        combined loss: probes of even and of odd number.
        """
        total: dict[str, torch.Tensor] = {}
        reference = self.references[shard.batch]
        if self.autocast == "float16":
            self.scale = 2.0**12  # independent of other shards
        with self._pass(reference) as (masks, rows, result):
            for probe in range(shard.start, shard.start + shard.count):
                along = self._output_probe(shard, probe, result)
                generator = derived(self.generator, _STREAMS[shard.kind], shard.batch, probe)
                if shard.kind == "probes":
                    moved = trajectory_probe(rows, generator)
                    both = shard.weight**0.5 * along + moved.to(along.device)
                    self._add(total, f"{probe % 2}", self._gradients(both, masks))
                    continue
                if shard.kind == "pilot":
                    self._add(total, "trajectory", self._gradients(trajectory_probe(rows, generator), masks))
                self._add(total, "output", self._gradients(along, masks))
        return {name: values.cpu().numpy() for name, values in total.items()}

    def _run(self, shards: Sequence[Shard]) -> Iterable[Partial]:
        return map(self.work, shards) if self.run is None else self.run(shards)

    @property
    def probes(self) -> int:
        return sum(self.counts)

    def values(self) -> Values:
        """The mean over all combined probes: {group key: float64 [units]}."""
        return {key: sum(half.get(key, 0) for half in self.halves) / self.probes for key in self._zeros()}  # type: ignore[misc]

    def stability(self) -> dict[str, float]:
        """The reliability of the ranking, estimated from the two halves of the probes.

        rank_correlation: estimated Spearman correlation with converged scores (for halves that correlate by r, the mean
        of both correlates with the truth by sqrt(2 r / (1 + r))). cut_agreement: share of units that both halves keep,
        at the worst of three cuts (a quarter, a half, three quarters stay).
        """
        from scipy.stats import spearmanr  # slow to import; `init` and `--dry-run` only look at this package

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
    def _pass(
        self, reference: Observation
    ) -> Iterator[tuple[dict[str, torch.Tensor], list[torch.Tensor], torch.Tensor]]:
        """One forward pass with a mask per sample and unit in the graph: (masks, normalised rows per block, output)."""
        masks = {
            group.key: torch.ones(len(reference), group.count, requires_grad=True, device=reference.output.device)
            for group in self.groups
        }
        precision = passes_in(self.model, self.autocast)
        blocks, rewritten = self.structure.observed, self.structure.rewritten
        with self.structure.gradients():
            with precision, masked(self.model, self.groups, masks), block_outputs(self.model, blocks, rewritten) as out:
                result = self.model(**reference.inputs)
            rows = [
                normalised_rows(
                    out[path],
                    reference.mask,
                    reference.chosen,
                    path in self.structure.channels_first,
                    reference.layouts[path],
                )
                for path in blocks
            ]
            result = compared_output(self.model, reference, result)
            # Blocks may be recomputed in the backward pass, and then must be masked again.
            with masked(self.model, self.groups, masks):
                yield masks, rows, result.float() if self.autocast else result

    def _output_probe(self, shard: Shard, probe: int, result: torch.Tensor) -> torch.Tensor:
        noise = self._output_noise(_STREAMS[shard.kind] + 1, shard.batch, probe, result)
        weights = self.references[shard.batch].weights
        return output_probe(self.model.output_kind, result, self.temperature, noise, weights)

    def _output_noise(self, stream: int, batch: int, probe: int, output: torch.Tensor) -> torch.Tensor:
        """Directions v of one probe, by its number; with few classes every run of as many probes is orthogonal."""
        classes = output.shape[-1]
        turn, column = (probe, 0) if classes > ORTHOGONAL_CLASSES else divmod(probe, classes)
        generator = derived(self.generator, stream, batch, turn)
        if classes > ORTHOGONAL_CLASSES:
            return torch.randn(output.shape, generator=generator).to(output)
        if (stream, batch, turn) not in self.bases:
            self.bases = {(stream, batch, turn): orthogonal(output.shape, generator)}  # the next probes need it, too
        return self.bases[stream, batch, turn][..., column].to(output)

    def _gradients(self, probe: torch.Tensor, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """v . dr/dm per sample and unit, [samples, units]; zero for a unit that the probe does not depend on."""
        while True:
            found = torch.autograd.grad(probe * self.scale, list(masks.values()), retain_graph=True, allow_unused=True)
            if self.scale <= 1 or all(gradient is None or torch.isfinite(gradient).all() for gradient in found):
                break
            self.scale /= 16
        return {
            key: (torch.zeros_like(mask) if gradient is None else gradient / self.scale).detach().double()
            for (key, mask), gradient in zip(masks.items(), found, strict=True)
        }

    def _zeros(self) -> Values:
        return {group.key: np.zeros(group.count) for group in self.groups}

    def _add(self, totals: dict[str, torch.Tensor], term: str, gradients: dict[str, torch.Tensor]) -> None:
        for key, values in gradients.items():
            name, added = f"{term}.{key}", values.square().sum(0)
            totals[name] = totals[name] + added if name in totals else added
