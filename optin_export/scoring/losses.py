"""The trajectory loss of OPTIN (Khaki & Plataniotis, ICLR 2024, section 3), per sample, and the residuals it squares.

    I(u) = sum over blocks l of L_MD(h_l, h_l^u) + lambda * L_KD(z, z^u), averaged over samples
    L_MD(F, F') = || N(F) N(F)^T - N(F') N(F')^T ||_F^2, N = a sample's token rows, L2-normalised

Deliberate differences from the paper: rows are compared within a sample, never across samples, so that one sample's
loss depends on that sample alone (docs/method.md, section 2, needs it); a unit's own block is part of the sum for every
block (there: only for the last); padding rows are never compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from optin_export.data import Batch
from optin_export.errors import InputError
from optin_export.models import Inputs, TaskModel, as_rows, counted_rows
from optin_export.units import Structure, block_outputs, tensor_of

#: Classes up to which output probes are drawn orthogonal: as many probes as classes are then the exact Fisher matrix.
ORTHOGONAL_CLASSES = 64
#: Rows of one sample's output (tokens, pixels) that are compared.
OUTPUT_ROWS = 32


def relation(rows: torch.Tensor) -> torch.Tensor:
    """Cosine similarities of a sample's normalised rows: [samples, rows, features] -> [samples, rows, rows].

    A single row has no relations; it is compared itself.
    """
    return rows if rows.shape[1] == 1 else rows @ rows.mT


@dataclass(frozen=True)
class Reference:
    """What the unpruned model does on one batch.

    chosen: per shape of hidden states the compared token rows, [samples, rows]; rows: per block these rows, normalised,
    [samples, rows, features]; hidden: block outputs as returned, to replay.
    layouts: per block the dimension of its hidden states that counts samples, and into how many parts one after another
    each sample is cut there (windows, patches).
    picked: the compared rows of the output, [samples, rows], None for all; output: these rows, [samples, rows,
    features]; weights: what each counts, [samples, rows], of sum 1 per sample.
    """

    inputs: Inputs
    chosen: dict[tuple[int, ...], torch.Tensor]
    rows: dict[str, torch.Tensor]
    picked: torch.Tensor | None
    output: torch.Tensor
    weights: torch.Tensor
    hidden: dict[str, Any]
    layouts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.output)


def observe(model: TaskModel, structure: Structure, batch: Batch, rows: int, generator: torch.Generator) -> Reference:
    """Run the unpruned model once and fix the token rows (at most `rows` a sample, never padding) of every block."""
    with torch.no_grad(), block_outputs(model, structure.observed, structure.rewritten) as outputs:
        output = model(**batch.inputs)
    chosen: dict[tuple[int, ...], torch.Tensor] = {}
    compared, layouts = {}, {}
    for path in structure.observed:
        if path not in outputs:
            raise InputError(
                f"'{path}' does not run for all calibration rows",
                "the model decides by its inputs which blocks run",
                "use a model that runs the same blocks for all inputs",
            )
        layout = layouts[path] = _layout(structure, path, outputs[path], len(next(iter(batch.inputs.values()))))
        first = path in structure.channels_first
        tokens = _tokens(outputs[path], first, layout)
        shape = tuple(tokens.shape[:2])
        if shape not in chosen:
            chosen[shape] = _sample_rows(batch.inputs, shape, rows, generator).to(tokens.device)
        compared[path] = normalised_rows(outputs[path], batch.inputs, chosen, first, layout)
    every = as_rows(model, output, batch.inputs)
    counted = counted_rows(model, output, batch.inputs)
    picked = None
    if every.shape[1] > OUTPUT_ROWS:
        picked = _drawn(counted, tuple(every.shape[:2]), OUTPUT_ROWS, generator).to(every.device)
    counts = torch.ones(every.shape[:2], device=every.device) if counted is None else counted.float()
    weights = counts if picked is None else counts.gather(1, picked)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1.0)
    return Reference(batch.inputs, chosen, compared, picked, _picked(every, picked), weights, dict(outputs), layouts)


def compared_output(model: TaskModel, reference: Reference, output: torch.Tensor) -> torch.Tensor:
    """The compared rows of another output of the same batch, or of copies of it: [copies x samples, rows, features]."""
    return _picked(as_rows(model, output, reference.inputs), reference.picked)


def _picked(rows: torch.Tensor, picked: torch.Tensor | None) -> torch.Tensor:
    if picked is None:
        return rows
    index = picked.repeat(len(rows) // len(picked), 1)
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def normalised_rows(
    output: Any,
    inputs: Inputs,
    chosen: Mapping[tuple[int, ...], torch.Tensor],
    channels_first: bool,
    layout: tuple[int, int] = (0, 1),
) -> torch.Tensor:
    """The chosen token rows of a block's output in float32, L2-normalised, zero where they are padding.

    The batch of `output` may hold the samples several times over, one copy after another. layout: see `Reference`.
    """
    tokens = _tokens(output, channels_first, layout)
    samples = next(iter(inputs.values())).shape[0]
    # A block's rows are compared where the block is: a model's blocks may lie on several devices.
    copies, rows = len(tokens) // samples, chosen[(samples, tokens.shape[1])].to(tokens.device)
    picked = tokens.gather(1, rows.repeat(copies, 1)[..., None].expand(-1, -1, tokens.shape[-1]))
    normalised = F.normalize(picked.float() if picked.dtype != torch.float64 else picked, dim=-1)
    mask = _token_mask(inputs, (samples, tokens.shape[1]))
    if mask is None:
        return normalised
    return normalised * mask.to(rows.device).gather(1, rows).repeat(copies, 1)[..., None].to(normalised)


def _layout(structure: Structure, path: str, output: Any, samples: int) -> tuple[int, int]:
    dim, hidden = 0 if structure.walk is None else structure.walk.sample_dim(path), tensor_of(output)
    parts, rest = divmod(hidden.shape[dim], samples)
    if rest or not parts:
        raise InputError(
            f"the output of '{path}' cannot be compared",
            f"none of its dimensions {tuple(hidden.shape)} counts the {samples} samples of a batch",
            "let the block return its hidden states first, a row per sample",
        )
    return dim, parts


def _tokens(output: Any, channels_first: bool, layout: tuple[int, int]) -> torch.Tensor:
    """A block's output as [samples, tokens, features]; the parts of a sample one after another."""
    dim, parts = layout
    hidden = tensor_of(output)
    hidden = hidden.movedim(dim, 0) if dim else hidden
    if hidden.dim() == 2:
        tokens = hidden[:, None]
    elif hidden.dim() == 3:
        tokens = hidden
    else:
        tokens = hidden.flatten(2).mT if channels_first else hidden.flatten(1, -2)
    return tokens if parts == 1 else tokens.reshape(len(tokens) // parts, parts * tokens.shape[1], -1)


def _token_mask(inputs: Inputs, shape: tuple[int, int]) -> torch.Tensor | None:
    mask = inputs.get("attention_mask")
    return mask if mask is not None and tuple(mask.shape) == shape else None


def _sample_rows(inputs: Inputs, shape: tuple[int, ...], rows: int, generator: torch.Generator) -> torch.Tensor:
    """Positions [samples, rows] drawn without replacement, real tokens before padding."""
    return _drawn(_token_mask(inputs, (shape[0], shape[1])), shape, rows, generator)


def _drawn(mask: torch.Tensor | None, shape: tuple[int, ...], rows: int, generator: torch.Generator) -> torch.Tensor:
    order = torch.rand(shape, generator=generator)
    if mask is not None:
        order = order + mask.cpu()
    return order.argsort(dim=1, descending=True)[:, :rows].sort(dim=1).values


def trajectory_losses(
    reference: Reference, outputs: Mapping[str, Any], blocks: Sequence[str], channels_first: Collection[str]
) -> torch.Tensor:
    """Sum over `blocks` of L_MD between the reference and masked passes, per row of the (repeated) batch.

    channels_first: see `Structure`.
    """
    total = torch.zeros(())
    for path in blocks:
        layout = reference.layouts.get(path, (0, 1))
        rows = normalised_rows(outputs[path], reference.inputs, reference.chosen, path in channels_first, layout)
        expected = relation(reference.rows[path]).repeat(len(rows) // len(reference), 1, 1)
        total = total + (relation(rows) - expected).square().sum((1, 2)).cpu()
    return total


def output_losses(model: TaskModel, reference: Reference, output: torch.Tensor, temperature: float) -> torch.Tensor:
    """L_KD per row of the (repeated) batch; the mean over the compared rows of a sample's output."""
    output = compared_output(model, reference, output)
    copies = len(output) // len(reference)
    losses = divergence(model.output_kind, reference.output.repeat(copies, 1, 1), output, temperature)
    return (losses * reference.weights.repeat(copies, 1)).sum(1)


def mean_output_loss(model: TaskModel, references: Sequence[Reference], temperature: float) -> float:
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


def trajectory_probe(rows: Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """v . r for the trajectory residuals r and one random v ~ N(0, I) per sample: a scalar whose gradient is taken.

    rows: normalised token rows per block, in the graph.
    """
    total = torch.zeros(())
    for block in rows:
        if block.shape[1] == 1:
            total = total + (_noise(block.shape, block, generator) * block).sum().cpu()
        else:
            direction = _noise((*block.shape[:2], block.shape[1]), block, generator)
            # <V, N N^T> without forming N N^T in the graph: less memory in the backward pass.
            total = total + ((direction @ block) * block).sum().cpu()
    return total


def output_probe(
    kind: str, output: torch.Tensor, temperature: float, noise: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """v . r for the output residual and v = `noise`; output, noise: [samples, rows, features].

    For logits the Fisher square root: with w = sqrt(p) * v - p * (sqrt(p) . v), E[w w^T] = diag(p) - p p^T, the Fisher
    matrix of a softmax; KL is half of its quadratic form.
    """
    noise = noise * weights.sqrt()[..., None].to(noise)
    if kind == "logits":
        root = F.softmax(output.detach() / temperature, -1).sqrt()
        direction = root * noise - root.square() * (root * noise).sum(-1, keepdim=True)
        return (direction * output).sum() / (temperature * 2**0.5)
    return (noise * (output if kind == "regression" else F.normalize(output, dim=-1))).sum()


class OutputNoise:
    """Directions v for output probes, E[v v^T] = I; orthogonal ones in turn where there are few classes.

    Any run of as many probes as classes then sums to the exact matrix: no noise of its own is left.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.waiting: dict[int, list[torch.Tensor]] = {}

    def draw(self, batch: int, output: torch.Tensor) -> torch.Tensor:
        """The next directions for batch number `batch`, whose outputs are [samples, rows, features]."""
        features = output.shape[-1]
        if features > ORTHOGONAL_CLASSES:
            return _noise(output.shape, output, self.generator)
        if not self.waiting.get(batch):
            self.waiting[batch] = list(orthogonal(output.shape, self.generator).unbind(-1))
        return self.waiting[batch].pop().to(output)


def orthogonal(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Directions v for as many probes as features, orthogonal: [samples, rows, features, probes], E[v v^T] = I."""
    samples, rows, features = shape
    basis = torch.linalg.qr(torch.randn(samples * rows, features, features, generator=generator)).Q
    return (basis * features**0.5).view(samples, rows, features, features)


def _noise(shape: Sequence[int], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """N(0, 1), drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(tuple(shape), generator=generator).to(like)
