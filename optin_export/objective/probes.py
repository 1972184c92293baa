"""Random directions v of the residuals r that the losses square: the gradient of v . r is a sketch of their Jacobian.

E[(d(v . r) / dx)^2] is the diagonal of the Gauss-Newton matrix of the loss. Scores, row weights and the repair of the
output are computed from it, without a loss per unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

#: Classes up to which output probes are orthogonal: as many probes as classes then give the exact Fisher matrix.
ORTHOGONAL_CLASSES = 64


def trajectory_probe(rows: Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """v . r for the trajectory residuals r and one random v ~ N(0, I) per sample: a scalar whose gradient is taken.

    rows: normalised token rows per block, in the graph.
    """
    total = None
    for block in rows:
        if block.shape[1] == 1:
            along = (_noise(block.shape, block, generator) * block).sum()
        else:
            direction = _noise((*block.shape[:2], block.shape[1]), block, generator)
            # <V, N N^T> without N N^T in the graph, which saves memory in the backward pass.
            along = ((direction @ block) * block).sum()
        # Blocks may be on several devices.
        total = along if total is None else total + along.to(total.device)
    return torch.zeros(()) if total is None else total


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
    """Directions v for output probes, E[v v^T] = I; successive ones are orthogonal if there are few classes.

    Any sequence of as many probes as classes then sums to the exact matrix, without noise.
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
    """N(0, 1), drawn on the CPU so that a seed gives the same numbers on every device."""
    return torch.randn(tuple(shape), generator=generator).to(like)
