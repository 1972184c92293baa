"""Row weights of the least squares: how much trajectory and output depend on each row of each layer's output.

A row's weight is E[|d(v . r) / dy_row|^2] for the residuals r of OPTIN's loss and random v: to second order, the loss
that an error in that row causes. Rows that a norm will shrink (massive activations) and rows that no output reads (all
tokens but the first, after the last attention of a classifier) get low weights. Output directions need no weights:
every output has its own solution, which is the same for any invertible weighting of directions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from optin_export.data import Batch
from optin_export.models import TaskModel, block_inputs, passes_in
from optin_export.objective import ROWS, OutputNoise, observation_of, output_probe, trajectory_probe
from optin_export.units import (
    Calls,
    Convolution,
    Structure,
    block_outputs,
    get_module,
    layer_outputs,
    measured,
    output_rows,
)
from optin_export.workdir.peak_memory import release_freed

#: Probes per term and batch; a row's weight is a mean over all its features, so one is enough.
PROBES = 1
#: Batches after which freed memory is given back: it takes as long as a small batch.
RELEASED = 8


@dataclass(frozen=True)
class Weights:
    """Weights per batch and layer, mean 1 over all rows; None if a layer has none (all rows equal)."""

    values: Sequence[dict[str, torch.Tensor]]

    def of(self, batch: int, paths: Sequence[str]) -> torch.Tensor | None:
        """[rows] in the order of `output_rows`; the mean over several layers that are refitted at once."""
        found = [self.values[batch][path] for path in paths if path in self.values[batch]]
        return torch.stack(found).mean(0) if found else None


def sensitivities(
    model: TaskModel, structure: Structure, batches: Sequence[Batch], seed: int, autocast: str | None = None
) -> Weights:
    """Weights for every layer that makes or reads units, from the original model.

    Both terms, trajectory and output, have the same total weight at every layer on which they depend. autocast: dtype
    of the passes, as in `RepairSettings`; one probe per row is a rougher estimate than any rounding.
    """
    structure = measured(model, structure, batches[0].inputs) if batches else structure
    generator = torch.Generator().manual_seed(seed)
    noise = OutputNoise(generator)
    paths = {path for group in structure.groups for path in group.reads}
    paths |= {producer.path for group in structure.groups for producer in group.producers}
    batch_dims = {
        path: group.batch_dim
        for group in structure.groups
        for path in (*group.reads, *(producer.path for producer in group.producers))
    }
    terms: list[list[dict[str, torch.Tensor]]] = [[], []]
    for index, batch in enumerate(batches):
        # A function of its own: the batch's graph ends with the call, before the next one's begins.
        found = _squares(
            model, structure, batch, index, sorted(paths), batch_dims, generator, partial(noise.draw, index), autocast
        )
        for kept, square_of in zip(terms, found, strict=True):
            kept.append(square_of)
        if index % RELEASED == RELEASED - 1:
            release_freed()
    return Weights(_combined(terms))


def _squares(
    model: TaskModel,
    structure: Structure,
    batch: Batch,
    index: int,
    paths: Sequence[str],
    batch_dims: Mapping[str, int],
    generator: torch.Generator,
    noise: Callable[[torch.Tensor], torch.Tensor],
    autocast: str | None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Squared gradients of the trajectory's and of the output's probes: layer -> [rows], of one batch."""
    with (
        structure.gradients(),
        graph(model),
        layer_outputs(model, paths, structure.rewritten) as layers,
        block_outputs(model, structure.observed, structure.rewritten) as hidden,
    ):
        with passes_in(model, autocast):
            output = in_single(model(**batch.inputs))
        masked = block_inputs(model, batch.inputs)
        seen = observation_of(model, structure, batch.inputs, (hidden, output), ROWS, generator)
        rows = list(seen.rows.values())
        squares: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = {}, {}
        # A copy: layers that run again in the backward pass (checkpointing) must not be added to it.
        wanted = {path: [one for one in calls if one.requires_grad] for path, calls in layers.items()}
        for _ in range(PROBES):
            probes = (
                trajectory_probe(rows, generator),
                output_probe(model.output_kind, seen.output, 1.0, noise(seen.output), seen.weights),
            )
            for term, probe in zip(squares, probes, strict=True):
                every = [one for calls in wanted.values() for one in calls]
                found = iter(torch.autograd.grad(probe, every, retain_graph=True, allow_unused=True))
                for path, calls in wanted.items():
                    gradients = [next(found) for _ in calls]
                    if any(gradient is not None for gradient in gradients):
                        layer, dim = get_module(model, path), batch_dims.get(path, 0)
                        shared = Calls(
                            _shared(torch.zeros_like(output) if gradient is None else gradient, layer, dim)
                            for output, gradient in zip(calls, gradients, strict=True)
                        )
                        square = output_rows(shared, layer, masked, index)[:, 0]
                        term[path] = term.get(path, torch.zeros(())) + square
    return squares


def _combined(terms: Sequence[list[dict[str, torch.Tensor]]]) -> list[dict[str, torch.Tensor]]:
    """The mean of both terms, each scaled to mean 1 over all rows of a layer."""
    combined: list[dict[str, torch.Tensor]] = [{} for _ in terms[0]]
    for term in terms:
        for path in sorted({path for values in term for path in values}):
            mean = torch.cat([values[path] for values in term if path in values]).mean()
            if not torch.isfinite(mean) or mean <= 0:
                continue  # the term does not depend on that layer
            for total, values in zip(combined, term, strict=True):
                if path in values:
                    total[path] = total.get(path, torch.zeros(())) + values[path] / mean
    for path in {path for values in combined for path in values}:
        mean = torch.cat([values[path] for values in combined if path in values]).mean()
        for values in combined:
            if path in values:
                values[path] = values[path] / mean
    return combined


def _shared(gradient: torch.Tensor, layer: torch.nn.Module, batch_dim: int) -> torch.Tensor:
    """The squared gradient of each row, as one feature, every sample scaled to the same mean.

    So samples count alike, but not their rows.

    Otherwise the samples with the least certain output would dominate (the Fisher matrix of a certain one vanishes).
    """
    features = 1 if isinstance(layer, Convolution) else gradient.dim() - 1
    squares = torch.linalg.vector_norm(gradient, dim=features, keepdim=True, dtype=torch.float32).square()
    others = [dim for dim in range(gradient.dim()) if dim != batch_dim]
    mean = squares.mean(others, keepdim=True) / gradient.shape[features]
    return squares / torch.where(mean > 0, mean, 1.0)


def in_single(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, if it is of a pass in a shorter precision."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@contextlib.contextmanager
def graph(model: TaskModel) -> Iterator[None]:
    """Make outputs require gradients although the weights are frozen; gradients of weights are never computed."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    def ask(wanted: bool) -> None:
        for name, parameter in model.named_parameters():  # by name, because accelerate's hooks replace modules
            if name in frozen:
                parameter.requires_grad_(wanted)

    ask(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        ask(False)
