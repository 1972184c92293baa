"""Observe the unpruned model on one batch, and choose the compared rows: tokens of blocks, output rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from optin_export.data import Batch
from optin_export.errors import InputError
from optin_export.models import Inputs, TaskModel, as_rows, block_inputs, counted_rows
from optin_export.units import Structure, block_outputs, tensor_of

#: Rows of one sample's output (tokens, pixels) that are compared.
OUTPUT_ROWS = 32


@dataclass(frozen=True)
class Observation:
    """The unpruned model's values on one batch.

    chosen: per shape of hidden states the compared token rows, [samples, rows]; rows: per block these rows, normalised,
    [samples, rows, features]; hidden: block outputs as returned, to replay.
    layouts: per block the dimension of its hidden states that counts samples, and into how many parts one after another
    each sample is cut there (windows, patches).
    picked: the compared rows of the output, [samples, rows], None for all; output: these rows, [samples, rows,
    features]; weights: the weight of each row, [samples, rows], with sum 1 per sample.
    mask: which tokens of the blocks are not padding, [samples, tokens], if the inputs say so.
    """

    inputs: Inputs
    chosen: dict[tuple[int, ...], torch.Tensor]
    rows: dict[str, torch.Tensor]
    picked: torch.Tensor | None
    output: torch.Tensor
    weights: torch.Tensor
    hidden: dict[str, Any]
    layouts: dict[str, tuple[int, int]] = field(default_factory=dict)
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.output)


def observe(model: TaskModel, structure: Structure, batch: Batch, rows: int, generator: torch.Generator) -> Observation:
    """Run the unpruned model once and fix the token rows (at most `rows` a sample, never padding) of every block."""
    with torch.no_grad(), block_outputs(model, structure.observed, structure.rewritten) as outputs:
        output = model(**batch.inputs)
    return observation_of(model, structure, batch.inputs, (outputs, output), rows, generator)


def observation_of(
    model: TaskModel,
    structure: Structure,
    inputs: Inputs,
    passed: tuple[Mapping[str, Any], torch.Tensor],
    rows: int,
    generator: torch.Generator,
) -> Observation:
    """The observation of a finished pass, from its block outputs and its output, which may be in a graph."""
    outputs, output = passed
    chosen: dict[tuple[int, ...], torch.Tensor] = {}
    compared, layouts, mask = {}, {}, block_inputs(model, inputs).get("attention_mask")
    for path in structure.observed:
        if path not in outputs:
            raise InputError(
                f"'{path}' does not run for all calibration rows",
                "the model decides by its inputs which blocks run",
                "use a model that runs the same blocks for all inputs",
            )
        layout = layouts[path] = _layout(structure, path, outputs[path], len(next(iter(inputs.values()))))
        first = path in structure.channels_first
        tokens = _tokens(outputs[path], first, layout)
        shape = tuple(tokens.shape[:2])
        if shape not in chosen:
            chosen[shape] = _sample_rows(mask, shape, rows, generator).to(tokens.device)
        compared[path] = normalised_rows(outputs[path], mask, chosen, first, layout)
    every = as_rows(model, output, inputs)
    counted = counted_rows(model, output, inputs)
    picked = None
    if every.shape[1] > OUTPUT_ROWS:
        picked = _drawn(counted, tuple(every.shape[:2]), OUTPUT_ROWS, generator).to(every.device)
    counts = torch.ones(every.shape[:2], device=every.device) if counted is None else counted.float()
    weights = counts if picked is None else counts.gather(1, picked)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1.0)
    return Observation(inputs, chosen, compared, picked, _picked(every, picked), weights, dict(outputs), layouts, mask)


def compared_output(model: TaskModel, observed: Observation, output: torch.Tensor) -> torch.Tensor:
    """The compared rows of another output of the same batch, or of copies of it: [copies x samples, rows, features]."""
    return _picked(as_rows(model, output, observed.inputs), observed.picked)


def _picked(rows: torch.Tensor, picked: torch.Tensor | None) -> torch.Tensor:
    if picked is None:
        return rows
    index = picked.repeat(len(rows) // len(picked), 1)
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def normalised_rows(
    output: Any,
    mask: torch.Tensor | None,
    chosen: Mapping[tuple[int, ...], torch.Tensor],
    channels_first: bool,
    layout: tuple[int, int] = (0, 1),
) -> torch.Tensor:
    """The chosen token rows of a block's output in float32, L2-normalised, zero where they are padding.

    The batch of `output` may hold the samples several times over, one copy after another. layout: see `Observation`.
    """
    tokens = _tokens(output, channels_first, layout)
    samples = next(iter(chosen))[0]
    # A block's rows are compared on the block's device: a model's blocks may be on several devices.
    copies, rows = len(tokens) // samples, chosen[(samples, tokens.shape[1])].to(tokens.device)
    picked = tokens.gather(1, rows.repeat(copies, 1)[..., None].expand(-1, -1, tokens.shape[-1]))
    normalised = F.normalize(picked.float() if picked.dtype != torch.float64 else picked, dim=-1)
    if mask is None or tuple(mask.shape) != (samples, tokens.shape[1]):
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


def _sample_rows(
    mask: torch.Tensor | None, shape: tuple[int, ...], rows: int, generator: torch.Generator
) -> torch.Tensor:
    """Positions [samples, rows] drawn without replacement, real tokens before padding."""
    return _drawn(mask if mask is not None and tuple(mask.shape) == shape else None, shape, rows, generator)


def _drawn(mask: torch.Tensor | None, shape: tuple[int, ...], rows: int, generator: torch.Generator) -> torch.Tensor:
    order = torch.rand(shape, generator=generator)
    if mask is not None:
        order = order + mask.cpu()
    return order.argsort(dim=1, descending=True)[:, :rows].sort(dim=1).values
