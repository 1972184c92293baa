"""The scorer `optin-reference`: what the authors' published code computes, faults included. For comparison only.

Where it departs from the paper (and from `score: optin`): every score is multiplied by a geometric prior on the unit's
index (heads 10 to 1, neurons 100 to 1); the last head masked in a block stays masked while later blocks are scored; the
compared token rows are drawn again at every call, from one batch, padding included; the KL divergence is multiplied by
T^2 although logits are not divided by T; its weight is a power of ten chosen per unit; the last block and all heads
count half.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from optin_export.data import Batch
from optin_export.models import TaskModel, as_rows
from optin_export.progress import advance
from optin_export.scoring import Request, Result, register
from optin_export.scoring.registry import every_unit
from optin_export.units import Structure, UnitGroup, block_outputs, masked, replayed, tensor_of

_TEMPERATURE = 4.0


@register("optin-reference", steps=every_unit)
def _scored(request: Request) -> Result:
    model, config = request.model, request.config
    with request.placement(model):
        return reference_scores(model, request.structure, request.batches[0], config.rows, request.seed), {}


def reference_scores(
    model: TaskModel, structure: Structure, batch: Batch, rows: int, seed: int
) -> dict[str, np.ndarray]:
    """Scores from one batch, one masked forward pass per unit: {group key: float64 [units]}."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), block_outputs(model, structure.observed, structure.rewritten) as outputs:
        output = model(**batch.inputs)
    hidden = dict(outputs)
    stuck: dict[str, torch.Tensor] = {}
    scores = {}
    for group in structure.groups:
        values = np.zeros(group.count)
        # Later blocks are compared; the last block has none and stands in for itself.
        # Where passes are whole, blocks that cannot change are compared as well, which adds nothing.
        later = structure.after(group)[1:] or structure.observed[-1:]
        # With heads of earlier blocks masked their outputs are no longer those of the reference pass.
        prefix = {} if stuck else {path: hidden[path] for path in structure.before(group)}
        for unit in range(group.count):
            mask = torch.ones(group.count)
            mask[unit] = 0.0
            with (
                torch.no_grad(),
                replayed(model, prefix, structure.rewritten),
                block_outputs(model, later, structure.rewritten) as moved,
                masked(model, structure.groups, {**stuck, group.key: mask}),
            ):
                result = model(**batch.inputs)
            distance = sum(
                _distance(hidden[path], moved[path], rows, generator, path in structure.channels_first)
                for path in later
            )
            values[unit] = _combined(
                distance, _divergence(*(as_rows(model, one, batch.inputs) for one in (output, result)))
            )
            advance()
        values *= np.geomspace(10.0 if group.kind == "heads" else 100.0, 1.0, group.count)
        values *= 0.5 if group.kind == "heads" else 1.0
        values *= 0.5 if group.block == len(structure.blocks) - 1 else 1.0
        scores[group.key] = values
        if group.kind == "heads":
            stuck[group.key] = _last_masked(group)
    return scores


def _last_masked(group: UnitGroup) -> torch.Tensor:
    mask = torch.ones(group.count)
    mask[-1] = 0.0
    return mask


def _distance(first: object, second: object, rows: int, generator: torch.Generator, channels_first: bool) -> float:
    """L_MD over a fresh sample of token rows of the whole batch."""
    flat = []
    for value in (first, second):
        hidden = tensor_of(value)
        hidden = hidden.movedim(1, -1) if channels_first and hidden.dim() == 4 else hidden
        flat.append(hidden.flatten(0, -2) if hidden.dim() > 2 else hidden)
    chosen = torch.randperm(len(flat[0]), generator=generator)[:rows]
    relations = []
    for value in flat:
        normalised = F.normalize(value[chosen], dim=-1)
        relations.append(normalised @ normalised.T)
    return float((relations[0] - relations[1]).square().sum())


def _divergence(reference: torch.Tensor, output: torch.Tensor) -> float:
    target = F.log_softmax(reference, -1)
    divergence = F.kl_div(F.log_softmax(output, -1), target, reduction="batchmean", log_target=True)
    return float(divergence) * _TEMPERATURE**2


def _combined(distance: float, divergence: float) -> float:
    if distance <= 0 or divergence <= 0:
        return distance
    return distance + 10.0 ** (math.floor(math.log10(distance)) - math.floor(math.log10(divergence))) * divergence
