"""The loss of other weights in single layers, to second order, from a few backward passes.

    loss = E[(sum over rows of <g, dy>)^2],   dy = (W' - W) a + b' - b

g is the gradient, with respect to the layer's output, of v . r: the residuals r of the loss, in a random direction v.
With E[v v^T] = I this is the quadratic form of the loss's Gauss-Newton matrix in dy. Every sample has its own v. One
backward pass gives g for all layers, so the work is linear in depth; a forward pass per candidate, through all layers
that follow, is quadratic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel, gathered, passes_in, work_device
from optin_export.objective import ROWS, OutputNoise, observation_of, output_probe, trajectory_probe
from optin_export.progress import advance
from optin_export.repair.sensitivity import graph, in_single
from optin_export.repair.settings import RepairSettings
from optin_export.units import (
    Structure,
    block_outputs,
    calls_of,
    get_layer,
    layer_inputs,
    layer_outputs,
    with_weights,
)
from optin_export.workdir.disk_offload import OffloadedTensors
from optin_export.workdir.peak_memory import release_freed

#: Probes per term and batch.
PROBES = 2
#: Bytes of weight gradients that are held at once.
GRADIENT_BYTES = 1 << 27
#: How many times faster a product in bfloat16 is taken to be, to choose between two ways to compute the same.
SHORTER = 4.0
#: Changes below it are stored in float16, which ends at 65504.
HALF_MAX = 6e4
#: Layer -> the changes of its weight [candidates, ...] and of its bias [candidates, outputs].
Changes = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class Tried:
    """What is tried in each group: a number of candidates, and the changes of the layers that read its units."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.batch_dims: dict[str, int] = {}
        self.changes = OffloadedTensors("the loss curves", "lower prune.curve_samples")

    def add(self, changes: Changes, candidates: int, batch_dim: int) -> None:
        # Half of the memory: a change rounded to 11 bits has the same loss, to a thousandth.
        self.changes[len(self.counts)] = {path: tuple(map(_rounded, pair)) for path, pair in changes.items()}
        self.counts.append(candidates)
        self.batch_dims.update(dict.fromkeys(changes, batch_dim))


def _rounded(change: torch.Tensor) -> torch.Tensor:
    fits = change.dtype == torch.float32 and bool(change.abs().max() < HALF_MAX) if change.numel() else False
    return change.half() if fits else change


def second_order_losses(
    model: TaskModel,
    structure: Structure,
    batches: Sequence[Batch],
    tried: Tried,
    settings: RepairSettings,
) -> list[np.ndarray]:
    """(trajectory, output) losses, sums over a batch's samples: per group float64 [batches, candidates, 2].

    structure: measured. settings: temperature, and the seed of the probes and of the compared token rows.
    """
    draw, generator = (torch.Generator().manual_seed(settings.seed + one) for one in (0, 1))
    noise, paths = OutputNoise(generator), sorted(tried.batch_dims)
    here: Any = {"dtype": torch.float64, "device": work_device()}
    losses = [torch.zeros(len(batches), count, 2, **here) for count in tried.counts]
    for index, batch in enumerate(batches):
        # The graph ends with the call: only the layers' inputs and gradients are kept.
        given, gradients = _passes(
            model, structure, batch, paths, settings, draw, generator, partial(noise.draw, index)
        )
        with torch.no_grad():
            for number, total in enumerate(losses):
                samples = len(next(iter(batch.inputs.values())))
                products = _products(model, tried, number, given, gradients, samples, settings.autocast)
                total[index] = products.square().sum(2).view(-1, 2, PROBES).mean(2)
        del given, gradients
        release_freed()
        advance()
    return [one.cpu().numpy() for one in losses]


_Gradients = Mapping[str, Sequence[torch.Tensor | None]]


def _passes(
    model: TaskModel,
    structure: Structure,
    batch: Batch,
    paths: Sequence[str],
    settings: RepairSettings,
    draw: torch.Generator,
    generator: torch.Generator,
    noise: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[dict[str, list[torch.Tensor]], list[_Gradients]]:
    """The layers' inputs, call by call, and the gradients of their outputs, the trajectory's probes first."""
    with (
        structure.gradients(),
        graph(model),
        layer_inputs(model, paths) as read,
        layer_outputs(model, paths, structure.rewritten) as made,
        block_outputs(model, structure.observed, structure.rewritten) as hidden,
    ):
        with passes_in(model, settings.autocast):
            output = in_single(model(**batch.inputs))
        seen = observation_of(model, structure, batch.inputs, (hidden, output), ROWS, draw)
        # A copy: layers that run again in the backward pass (checkpointing) must not be added to it.
        wanted = {path: [one for one in calls if one.requires_grad] for path, calls in made.items()}
        trajectory, outputs = [], []
        for _ in range(PROBES):
            along = noise(seen.output)
            trajectory.append(_gradients(trajectory_probe(list(seen.rows.values()), generator), wanted))
            probe = output_probe(model.output_kind, seen.output, settings.temperature, along, seen.weights)
            outputs.append(_gradients(probe, wanted))
        given = {path: [in_single(one.detach()) for one in calls_of(value)] for path, value in read.items()}
    return given, [*trajectory, *outputs]


def _gradients(probe: torch.Tensor, wanted: Mapping[str, Sequence[torch.Tensor]]) -> _Gradients:
    every = [one for calls in wanted.values() for one in calls]
    found = iter(torch.autograd.grad(probe, every, retain_graph=True, allow_unused=True))
    return {
        path: [None if one is None else in_single(one) for one in (next(found) for _ in calls)]
        for path, calls in wanted.items()
    }


def _products(
    model: TaskModel,
    tried: Tried,
    group: int,
    given: Mapping[str, Sequence[torch.Tensor]],
    gradients: Sequence[_Gradients],
    samples: int,
    autocast: str | None = None,
) -> torch.Tensor:
    """Sums over rows of <g, dy>, over all layers and calls: float64 [candidates, probes, samples].

    autocast: dtype of dy, of which the sum averages the rounding.
    """
    size = tried.counts[group], len(gradients), samples
    total = torch.zeros(size, dtype=torch.float64, device=work_device())
    for path, (weights, biases) in tried.changes[group].items():
        layer, batch_dim = get_layer(model, path), tried.batch_dims[path]
        for call, inputs in enumerate(given.get(path, ())):
            directions = [one[path][call] if call < len(one.get(path, ())) else None for one in gradients]
            present = [number for number, one in enumerate(directions) if one is not None]
            if not present:
                continue
            at = torch.tensor(present)
            stacked = torch.stack([_per_sample(directions[number], batch_dim, samples) for number in present])
            fast = 1.0 if autocast is None else SHORTER
            if type(layer) is torch.nn.Linear and _fewer_by_gradients(
                inputs, len(weights) / fast, len(present), samples
            ):
                changes = weights.to(inputs.dtype), biases.to(inputs.dtype)
                rows = _per_sample(inputs, batch_dim, samples).view(samples, -1, inputs.shape[-1])
                total[:, at] += gathered(_by_gradients(rows, stacked, changes).double())
                continue
            dtype = inputs.dtype if autocast is None else getattr(torch, autocast)
            read = inputs.to(dtype)
            for candidate, change in enumerate(zip(weights.to(dtype), biases.to(dtype), strict=True)):
                moved = _per_sample(in_single(with_weights(layer, change)(read)), batch_dim, samples)
                total[candidate, at] += gathered(torch.einsum("psf,sf->ps", stacked, moved).double())
    return total


def _fewer_by_gradients(inputs: torch.Tensor, candidates: float, probes: int, samples: int) -> bool:
    """Whether a product per sample and probe, then one with each candidate, is less work than a pass per candidate.

    candidates: passes, in units of what one takes in float32.
    """
    rows = inputs[..., 0].numel() / samples
    return probes * (rows + candidates) < 0.8 * candidates * rows


def _by_gradients(
    inputs: torch.Tensor, directions: torch.Tensor, changes: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Sums over rows of <g, W a + b> = <sum of g a^T, W> + <sum of g, b>: [candidates, probes, samples].

    inputs: a, [samples, rows, features]; directions: g, [probes, samples, rows * outputs]; changes: W [candidates,
    outputs, features] and b [candidates, outputs] of a linear layer.
    """
    weights, biases = changes
    (samples, rows, features), outputs = inputs.shape, biases.shape[1]
    flat, probes = weights.flatten(1).T, len(directions)
    gradients = directions.view(probes, samples, rows, outputs)
    total = torch.einsum("psro,co->cps", gradients, biases)
    # As many samples at once as fit: each gives a matrix of the weight's size per probe.
    step = max(1, GRADIENT_BYTES // (probes * outputs * features * inputs.element_size()))
    for start in range(0, samples, step):
        some, part = inputs[start : start + step], gradients[:, start : start + step]
        sums = part.transpose(2, 3) @ some  # [probes, samples, outputs, features]
        total[:, :, start : start + step] += (sums.flatten(2) @ flat).permute(2, 0, 1)
    return total


def _per_sample(tensor: torch.Tensor | None, batch_dim: int, samples: int) -> torch.Tensor:
    """[samples, all other elements]; windows of one sample follow each other."""
    assert tensor is not None
    return tensor.detach().movedim(batch_dim, 0).reshape(samples, -1)
