"""Exact masking: the loss of removing each unit, by forward passes with many units per batch and a replayed prefix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from optin_export.models import TaskModel
from optin_export.objective import Observation, output_losses, trajectory_losses
from optin_export.units import Structure, UnitGroup, Walk, block_outputs, masked, replayed

#: Rows in one forward pass: copies of the samples, each copy with another unit masked.
ROWS_PER_PASS = 128


def exact_sums(
    model: TaskModel,
    structure: Structure,
    group: UnitGroup,
    reference: Observation,
    temperature: float,
    wanted: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """(trajectory, output) loss of masking each of the units `wanted`, float64 [units], sums over a batch's samples.

    Blocks before the group's own are replayed from the reference pass: masking cannot change them.
    """
    sums: list[torch.Tensor] = []  # read at the end: no pass waits for the one before it
    before, later, walk = structure.before(group), structure.after(group), structure.walk or Walk(structure.order)
    size = max(1, ROWS_PER_PASS // len(reference))
    for start in range(0, len(wanted), size):
        chunk = wanted[start : start + size]
        copies = len(chunk)
        mask = torch.ones(copies, group.count, device=reference.output.device)
        mask[torch.arange(copies), torch.tensor(chunk)] = 0.0
        mask = mask.repeat_interleave(len(reference), dim=0)
        inputs = {name: _copies(tensor, copies) for name, tensor in reference.inputs.items()}
        prefix = {path: walk.repeated(path, reference.hidden[path], copies) for path in before}
        with (
            torch.no_grad(),
            replayed(model, prefix),
            block_outputs(model, later, structure.rewritten) as outputs,
            masked(model, [group], {group.key: mask}),
        ):
            result = model(**inputs)
            moved = trajectory_losses(reference, outputs, later, structure.channels_first)
            changed = output_losses(model, reference, result, temperature)
        sums.append(torch.stack([_per_copy(moved, copies), _per_copy(changed, copies).to(moved.device)]))
    trajectory, output = torch.cat(sums, 1).cpu().numpy() if sums else np.zeros((2, 0))
    return trajectory, output


def _per_copy(losses: torch.Tensor, copies: int) -> torch.Tensor:
    return losses.double().expand(len(losses) if losses.dim() else copies).view(copies, -1).sum(1)


def _copies(value: torch.Tensor, copies: int) -> torch.Tensor:
    """The batch repeated several times."""
    return value.repeat(copies, *[1] * (value.dim() - 1))
