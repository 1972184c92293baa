"""The trajectory loss of OPTIN (Khaki & Plataniotis, ICLR 2024, section 3) and the residuals whose square it is.

    I(u) = sum over blocks l of L_MD(h_l, h_l^u) + lambda * L_KD(z, z^u)
    L_MD(F, F') = || N(F) N(F)^T - N(F') N(F')^T ||_F^2, N = token rows, L2-normalised

Two deliberate differences from the paper: a unit's own block is part of the sum for every block (there: only for the
last), so that one backward pass serves all blocks; and padding rows are never compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from optin_export.families import block_outputs, tensor_of, valid_rows
from optin_export.sources import Inputs, TaskModel


def relation(rows: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every pair of rows: [rows, features] -> [rows, rows]."""
    normalised = F.normalize(rows, dim=-1)
    return normalised @ normalised.mT


@dataclass(frozen=True)
class Reference:
    """What the unpruned model does on one batch: per block the chosen token rows and their relation, and the output."""

    inputs: Inputs
    rows: dict[str, torch.Tensor]
    relations: dict[str, torch.Tensor]
    output: torch.Tensor
    hidden: dict[str, Any]


def observe(
    model: TaskModel, blocks: Sequence[str], inputs: Inputs, rows: int, generator: torch.Generator
) -> Reference:
    """Run the unpruned model once and fix the sample of at most `rows` token rows (never padding) for every block."""
    with torch.no_grad(), block_outputs(model, blocks) as outputs:
        output = model(**inputs)
    chosen: dict[str, torch.Tensor] = {}
    by_shape: dict[torch.Size, torch.Tensor] = {}
    for path in blocks:
        hidden = tensor_of(outputs[path])
        if hidden.shape[:-1] not in by_shape:
            by_shape[hidden.shape[:-1]] = _sample_rows(inputs, hidden, rows, generator)
        chosen[path] = by_shape[hidden.shape[:-1]]
    relations = {path: relation(pick(outputs[path], chosen[path])) for path in blocks}
    return Reference(inputs, chosen, relations, output, dict(outputs))


def _sample_rows(inputs: Inputs, hidden: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    valid = valid_rows(inputs, hidden)
    count = hidden.shape[:-1].numel()
    candidates = torch.arange(count) if valid is None else valid.nonzero().squeeze(1)
    order = torch.randperm(len(candidates), generator=generator)[:rows]
    return candidates[order.sort().values]


def pick(output: Any, rows: torch.Tensor) -> torch.Tensor:
    """The chosen token rows of a block's output, [rows, features]."""
    return tensor_of(output).flatten(0, -2)[rows]


def trajectory_loss(reference: Reference, outputs: Mapping[str, Any], blocks: Sequence[str]) -> float:
    """Sum over `blocks` of L_MD between the reference and a masked pass."""
    return sum(
        float((relation(pick(outputs[path], reference.rows[path])) - reference.relations[path]).square().sum())
        for path in blocks
    )


def output_loss(model: TaskModel, reference: torch.Tensor, output: torch.Tensor, temperature: float) -> float:
    """L_KD: KL divergence for logits, squared error for regression, relation loss for embeddings; summed over rows."""
    if model.output_kind == "logits":
        target = F.log_softmax(reference / temperature, -1)
        return float(F.kl_div(F.log_softmax(output / temperature, -1), target, reduction="sum", log_target=True))
    if model.output_kind == "regression":
        return float((output - reference).square().sum())
    return float((relation(output) - relation(reference)).square().sum())


def trajectory_probe(
    reference: Reference, outputs: Mapping[str, Any], blocks: Sequence[str], generator: torch.Generator
) -> torch.Tensor:
    """v . r for the trajectory residuals r and one random v ~ N(0, I): a scalar whose gradient is taken."""
    total = reference.output.new_zeros(())
    for path in blocks:
        rows = F.normalize(pick(outputs[path], reference.rows[path]), dim=-1)
        direction = _noise((len(rows), len(rows)), rows, generator)
        # <V, N N^T> without forming N N^T in the graph: half the memory of the backward pass.
        total = total + ((direction @ rows) * rows).sum()
    return total


def output_probe(
    model: TaskModel, output: torch.Tensor, temperature: float, generator: torch.Generator
) -> torch.Tensor:
    """v . r for the output residual. For logits the Fisher square root, so that E[(v . dr)^2] is the KL to 2nd order.

    With w = sqrt(p) * v - p * (sqrt(p) . v): E[w w^T] = diag(p) - p p^T, the Fisher matrix of a softmax; KL is half
    of its quadratic form.
    """
    if model.output_kind == "logits":
        root = F.softmax(output.detach() / temperature, -1).sqrt()
        noise = _noise(output.shape, output, generator)
        direction = root * noise - root.square() * (root * noise).sum(-1, keepdim=True)
        return (direction * output).sum() / (temperature * 2**0.5)
    if model.output_kind == "regression":
        return (_noise(output.shape, output, generator) * output).sum()
    rows = F.normalize(output, dim=-1)
    return ((_noise((len(rows), len(rows)), rows, generator) @ rows) * rows).sum()


def _noise(shape: Sequence[int], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """N(0, 1), drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(tuple(shape), generator=generator).to(like)
