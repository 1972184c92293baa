"""The trajectory loss of OPTIN (Khaki & Plataniotis, ICLR 2024, section 3), per sample, and the residuals it squares.

    I(u) = sum over blocks l of L_MD(h_l, h_l^u) + lambda * L_KD(z, z^u), averaged over samples
    L_MD(F, F') = || N(F) N(F)^T - N(F') N(F')^T ||_F^2, N = a sample's token rows, L2-normalised

Deliberate differences from the paper: rows are compared within a sample, never across samples, so that one sample's
loss depends on that sample alone (docs/method.md, section 2, needs it); a unit's own block is part of the sum for every
block (there: only for the last); padding rows are never compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from optin_export.models import TaskModel
from optin_export.objective.observation import Observation, compared_output, normalised_rows


def relation(rows: torch.Tensor) -> torch.Tensor:
    """Cosine similarities of a sample's normalised rows: [samples, rows, features] -> [samples, rows, rows].

    A single row has no relations; it is compared itself.
    """
    return rows if rows.shape[1] == 1 else rows @ rows.mT


def trajectory_losses(
    reference: Observation, outputs: Mapping[str, Any], blocks: Sequence[str], channels_first: Collection[str]
) -> torch.Tensor:
    """Sum over `blocks` of L_MD between the reference and masked passes, per row of the (repeated) batch.

    channels_first: see `Structure`.
    """
    total = None
    for path in blocks:
        layout = reference.layouts.get(path, (0, 1))
        rows = normalised_rows(outputs[path], reference.mask, reference.chosen, path in channels_first, layout)
        expected = relation(reference.rows[path]).repeat(len(rows) // len(reference), 1, 1)
        moved = (relation(rows) - expected).square().sum((1, 2))
        # Blocks may be on several devices.
        total = moved if total is None else total + moved.to(total.device)
    return torch.zeros(()) if total is None else total


def output_losses(model: TaskModel, reference: Observation, output: torch.Tensor, temperature: float) -> torch.Tensor:
    """L_KD per row of the (repeated) batch; the mean over the compared rows of a sample's output."""
    output = compared_output(model, reference, output)
    copies = len(output) // len(reference)
    losses = divergence(model.output_kind, reference.output.repeat(copies, 1, 1), output, temperature)
    return (losses * reference.weights.repeat(copies, 1)).sum(1)


def mean_output_loss(model: TaskModel, references: Sequence[Observation], temperature: float) -> float:
    """L_KD of `model` per sample over all these batches."""
    with torch.no_grad():
        total = sum(float(output_losses(model, one, model(**one.inputs), temperature).sum()) for one in references)
    return total / sum(len(reference) for reference in references)


def divergence(kind: str, reference: torch.Tensor, output: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL divergence for logits, squared error for regression and for normalised embeddings: [..., features] -> [...]"""
    if kind == "logits":
        target = F.log_softmax(reference / temperature, -1)
        return F.kl_div(F.log_softmax(output / temperature, -1), target, reduction="none", log_target=True).sum(-1)
    if kind == "regression":
        return (output - reference).square().sum(-1)
    return (F.normalize(output, dim=-1) - F.normalize(reference, dim=-1)).square().sum(-1)
