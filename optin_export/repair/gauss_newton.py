"""Gauss-Newton on the output: one gain and one bias per output of every layer, all refitted together.

The preceding repair fits one sub-layer after another to the original's residual stream, without regard to how the
output depends on it. Here the output itself is the target. With theta the gains and biases, L the divergence of the
output from the original's, g its gradient and H = E[2 j j^T] its Gauss-Newton matrix (j = gradient of v . r for random
v, as in `objective.probes`):

    delta = - (H + rho * s * C)^-1 g,    C = 1 for a gain, 1 / mean square of the output for its bias

Each round solves one linear system; rho is chosen on batches held out of the system, and a round that does not lower
their divergence is discarded. Only unlabelled calibration data is used. There are as many unknowns as outputs, not as
weights, because a system is built from few samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from optin_export.data import Batch
from optin_export.models import TaskModel, gathered, work_device
from optin_export.objective import (
    Observation,
    OutputNoise,
    Reference,
    compared_output,
    mean_output_loss,
    output_losses,
    output_probe,
)
from optin_export.progress import phase, report
from optin_export.repair.layer_problem import HOLD_OUT
from optin_export.repair.output_layer import is_tied
from optin_export.repair.sensitivity import graph
from optin_export.repair.sequential import AtWork, Repair, also_moved
from optin_export.units import Convolution, Structure, capture, get_layer, layer_outputs, refitted

#: Key of this refit among the repairs.
OUTPUT = "output"
#: Maximum linear systems, and the share by which each must lower the divergence for another one to be tried.
ROUNDS, WORTH = 3, 0.02
#: Random directions per sample in the Gauss-Newton matrix; the gradient is exact.
PROBES = 4
#: Initial rho, the factor between candidates, and the maximum number of candidates.
DAMPING, STEP, CANDIDATES = 1.0, 10**0.5, 6
#: Minimum rows held out: on fewer rows the best damping is a matter of chance.
LEAST_HELD = 64
#: A divergence below this is rounding.
NEGLIGIBLE = 1e-6
#: Unknowns up to which H is accumulated; above, its factor is kept for as many samples as fit into the given bytes.
MOST_UNKNOWNS, FACTOR_BYTES = 6144, 1 << 30


def refine(
    dense: TaskModel,
    reference: Reference,
    *,
    temperature: float = 1.0,
    at_work: AtWork = contextlib.nullcontext,
) -> Repair:
    """Refit gains and biases of all linear layers and convolutions of `dense` to the unpruned output, in place.

    reference: `outputs_of` the unpruned model, reusable for several plans. temperature: for the divergence of logits.
    at_work: a context held while the unpruned model runs. Returns the divergence per sample on the held-out batches
    before and after, the last damping, and the reason if nothing was changed.
    """
    batches = reference.batches
    held_out = list(range(HOLD_OUT - 1, len(batches), HOLD_OUT))
    rows = sum(len(batches[index].rows) for index in held_out)
    if rows < LEAST_HELD:
        every = sum(len(batch.rows) for batch in batches)
        why = f"of {every} calibration rows {rows} can be held out, and fewer than {LEAST_HELD} judge by chance"
        return Repair(None, None, None, why)
    with at_work(reference.model):
        reference.observe()
    with also_moved(at_work, dense):
        return _refined(dense, reference, held_out, temperature)


def _refined(dense: TaskModel, reference: Reference, held_out: Sequence[int], temperature: float) -> Repair:
    held = [reference[index] for index in held_out]
    train = [one for index, one in enumerate(reference) if index not in held_out]
    paths = _layers(dense, reference[0])
    unknowns = 2 * sum(_widths(dense, paths))
    if 4 * unknowns * PROBES * max(map(len, train)) > FACTOR_BYTES:
        return Repair(
            None, None, None, f"derivatives by {unknowns:,} gains and biases do not fit into {FACTOR_BYTES:,} bytes"
        )
    noise = OutputNoise(reference.generator())
    before = error = mean_output_loss(dense, held, temperature)
    if before <= NEGLIGIBLE:
        return Repair(before, before, None, "the output is that of the unpruned model already")
    phase("re-fitting to the output", until=0.8)
    damping, rho = None, DAMPING
    for turn in range(ROUNDS):
        system = _System(dense, paths, reference.structure)
        for index, observed in enumerate(train):
            system.add(index, observed, noise, temperature)
            report(turn * len(train) + index + 1, ROUNDS * len(train))
        found = _best_step(dense, paths, system, held, temperature, rho)
        if found is None or found[0] >= error:
            break
        (now, delta, rho), last = found, error
        _apply(dense, paths, delta)
        error, damping = now, rho
        if error > (1 - WORTH) * last:
            break
    report(1, 1)
    if damping is None:
        return Repair(before, before, None, "no step lowered the divergence of the rows held out")
    return Repair(before, error, damping)


def outputs_of(model: TaskModel, structure: Structure, batches: Sequence[Batch], seed: int) -> Reference:
    """The unpruned model's outputs, observed once for all plans."""
    return Reference(model, structure, batches, draw=torch.Generator().manual_seed(seed), keep="output")


class _System:
    """H, g and C of the gains and biases of `paths`, summed over the added batches."""

    def __init__(self, model: TaskModel, paths: Sequence[str], structure: Structure | None = None) -> None:
        self.model, self.paths, self.walk = model, paths, None if structure is None else structure.walk
        self.widths = _widths(model, paths)
        self.unknowns = 2 * sum(self.widths)
        here: Any = {"dtype": torch.float64, "device": work_device()}
        self.gradient = torch.zeros(self.unknowns, **here)
        self.squares = torch.zeros(sum(self.widths), **here)
        self.samples = self.batches = 0
        self.small = self.unknowns <= MOST_UNKNOWNS
        self.matrix = torch.zeros((self.unknowns,) * 2, **here) if self.small else None
        self.factor: list[torch.Tensor] = []
        self.seen = 0  # samples in the matrix or its factor

    def add(self, index: int, reference: Observation, noise: OutputNoise, temperature: float) -> None:
        samples = len(reference)
        with (
            contextlib.nullcontext() if self.walk is None else self.walk.gradients(),
            graph(self.model),
            layer_outputs(self.model, self.paths, () if self.walk is None else self.walk.rewritten) as outputs,
        ):
            result = self.model(**reference.inputs)
            layers = [outputs[path][0] for path in self.paths]  # each runs once, see _layers
            probes = [output_losses(self.model, reference, result, temperature).sum()]
            compared = compared_output(self.model, reference, result)
            room = FACTOR_BYTES // (4 * self.unknowns) - sum(map(len, self.factor))
            if self.small or room >= PROBES * samples:
                kind, weights = self.model.output_kind, reference.weights
                for _ in range(PROBES):
                    drawn = noise.draw(index, compared)
                    probes.append(output_probe(kind, compared, temperature, drawn, weights))
            rows = []
            for probe in probes:
                gradients = torch.autograd.grad(probe, layers, retain_graph=True, allow_unused=True)
                rows.append(self._per_sample(layers, gradients, samples))
        self.gradient += rows[0].double().sum(0)
        powers = [_mean_square(self.model, path, one) for path, one in zip(self.paths, layers, strict=True)]
        self.squares += torch.cat(powers).double()
        noise.waiting.clear()  # directions are orthogonal within a batch; unused ones would take memory
        self.samples += samples
        self.batches += 1
        if len(rows) > 1:
            factor = torch.cat(rows[1:]) * (2 / PROBES) ** 0.5
            if self.matrix is None:
                self.factor.append(factor)
            else:
                self.matrix += (factor.T @ factor).double()
            self.seen += samples

    def _per_sample(
        self, layers: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], samples: int
    ) -> torch.Tensor:
        """[samples, unknowns]: derivatives with respect to the gains of all layers, then to their biases."""
        gains, biases = [], []
        for path, layer, gradient, width in zip(self.paths, layers, gradients, self.widths, strict=True):
            if gradient is None:
                gains.append(layer.new_zeros(samples, width))
                biases.append(layer.new_zeros(samples, width))
                continue
            for found, value in ((gains, gradient * layer.detach()), (biases, gradient)):
                found.append(gathered(_features(self.model, path, value).view(samples, -1, width).sum(1)))
        return torch.cat([*gains, *biases], 1)

    def steps(self) -> Callable[[float], torch.Tensor]:
        """rho -> delta, [unknowns]."""
        mean = (self.squares / self.batches).clamp(min=1e-12)
        ridge = torch.cat([torch.ones_like(mean), 1 / mean])
        gradient = self.gradient / self.samples
        if self.matrix is not None:
            matrix = self.matrix / self.seen
            scale = float((matrix.diagonal() / ridge).mean())

            def solved(rho: float) -> torch.Tensor:
                factor, info = torch.linalg.cholesky_ex(matrix + torch.diag(rho * scale * ridge))
                if int(info):
                    return torch.zeros_like(gradient)
                return -torch.cholesky_solve(gradient[:, None], factor)[:, 0]

            return solved
        factor = torch.cat(self.factor).double() / self.seen**0.5
        scale = float((factor.square().sum(0) / ridge).mean())
        inner = (factor / ridge) @ factor.T

        def by_factor(rho: float) -> torch.Tensor:
            # (R^T R + l C)^-1 g = C^-1 (g - R^T (l I + R C^-1 R^T)^-1 R C^-1 g) / l
            damped = inner + rho * scale * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
            dual, info = torch.linalg.cholesky_ex(damped)
            if int(info):
                return torch.zeros_like(gradient)
            part = torch.cholesky_solve((factor @ (gradient / ridge))[:, None], dual)[:, 0]
            return -(gradient - factor.T @ part) / ridge / (rho * scale)

        return by_factor


def _best_step(
    model: TaskModel, paths: Sequence[str], system: _System, held: Sequence[Observation], temperature: float, rho: float
) -> tuple[float, torch.Tensor, float] | None:
    """(divergence on `held`, delta, rho) of the best damping there, searched upwards and downwards from `rho`.

    A non-finite step has infinite divergence. None if the output depends on no layer.
    """
    step_of = system.steps()
    tried: dict[int, tuple[float, torch.Tensor, float]] = {}

    def value(power: int) -> float:
        if power not in tried and len(tried) < CANDIDATES:
            damping = rho * STEP**power
            delta = step_of(damping)
            with refitted(model, _after(model, paths, delta)):
                error = mean_output_loss(model, held, temperature)
            tried[power] = (error if error == error else float("inf"), delta, damping)
        return tried[power][0] if power in tried else float("inf")

    if not bool(system.gradient.any()):
        return None
    best = 0
    for direction in (1, -1):
        while value(best + direction) < value(best):
            best += direction
        if best:
            break
    return min(tried.values(), key=lambda one: one[0])


def _layers(model: TaskModel, reference: Observation) -> list[str]:
    """Linear layers and convolutions that run once, do not share weights, and output rows sample by sample.

    The first dimension counts samples if doubling the samples doubles it; its size alone does not show this.
    """
    calls: dict[str, list[int]] = {}
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in reference.inputs.items()}

    def count(path: str, args: object, output: torch.Tensor) -> None:
        calls.setdefault(path, []).append(len(output))

    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    with torch.no_grad(), capture(model, outputs=dict.fromkeys(layers, count)):
        model(**reference.inputs)
        model(**twice)
    samples = len(next(iter(reference.inputs.values())))
    once = [
        path
        for path, sizes in calls.items()
        if len(sizes) == 2 and sizes[0] % samples == 0 and sizes[1] == 2 * sizes[0]
    ]
    return [path for path in once if not is_tied(model, path)]


def _features(model: TaskModel, path: str, value: torch.Tensor) -> torch.Tensor:
    """[rows, features], grouped by sample; positions of a convolution are summed first."""
    if isinstance(get_layer(model, path), Convolution):
        return value.flatten(2).sum(2)
    return value.reshape(-1, value.shape[-1])


def _mean_square(model: TaskModel, path: str, output: torch.Tensor) -> torch.Tensor:
    """[features]"""
    rows = output.detach().transpose(1, -1) if isinstance(get_layer(model, path), Convolution) else output.detach()
    return gathered(rows.reshape(-1, rows.shape[-1]).square().mean(0))


def _after(model: TaskModel, paths: Sequence[str], delta: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight and bias of every layer after the step."""
    gains, biases = (part.float().split(_widths(model, paths)) for part in delta.chunk(2))
    found = {}
    for path, gain, bias in zip(paths, gains, biases, strict=True):
        layer = get_layer(model, path)
        weight, own = layer.weight.detach(), 0.0 if layer.bias is None else layer.bias.detach()
        gain, bias = gain.to(weight), bias.to(weight)
        found[path] = weight * (1 + gain).view(-1, *[1] * (weight.dim() - 1)), own * (1 + gain) + bias
    return found


def _widths(model: TaskModel, paths: Sequence[str]) -> list[int]:
    return [len(get_layer(model, path).weight) for path in paths]


@torch.no_grad()
def _apply(model: TaskModel, paths: Sequence[str], delta: torch.Tensor) -> None:
    for path, (weight, bias) in _after(model, paths, delta).items():
        layer = get_layer(model, path)
        layer.weight.copy_(weight)
        layer.bias = nn.Parameter(bias, requires_grad=False)
