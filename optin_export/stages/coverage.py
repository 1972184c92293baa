"""Notes on the part of a model outside all units: the share of its MACs, its layers, and refused units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.models import Inputs, TaskModel
from optin_export.units import Costs, Refusal, Structure, capture

#: A note is written if units contain a smaller share of the MACs.
ENOUGH = 0.5
#: Maximum refusals that are listed individually, and layers that are named.
MOST, NAMED = 3, 3


def coverage_notes(
    model: TaskModel, structure: Structure, costs: Costs, least: dict[str, int], inputs: Inputs
) -> list[str]:
    """Notes for the user before the search for a budget, one line each; none if units contain nearly all MACs.

    costs: costs at the shape of `inputs`. least: units that must stay, by group key.
    """
    notes = _refused(structure.refused)
    without = costs.of("macs", dict.fromkeys(costs.units, 0)) / costs.macs
    if 1 - without < ENOUGH:
        floor = costs.of("macs", least) / costs.whole("macs")
        layers = _largest(model, structure, inputs)
        where = ", ".join(f"{path} ({share:.0%})" for path, share in layers)
        notes.append(
            f"units cover {1 - without:.0%} of the MACs; the other {without:.0%} are in layers without units"
            + (f", such as {where}" if layers else "")
            + f"; a budget of macs can be {floor:.2f} at the smallest"
        )
    return notes


def with_refusals(error: InputError, refusals: Iterable[Refusal]) -> InputError:
    """The error, extended by refused units that might have helped."""
    lines = _refused(refusals)
    return InputError(error.what, "; ".join([error.why, *lines]), error.fix) if lines else error


def _refused(refusals: Iterable[Refusal]) -> list[str]:
    lines = list(dict.fromkeys(f"{one.error.what}: {one.error.why}" for one in refusals))
    more = [f"{len(lines) - MOST} more groups of units cannot be removed for like reasons"] if len(lines) > MOST else []
    return [*lines[:MOST], *more]


def _largest(model: TaskModel, structure: Structure, inputs: Inputs) -> list[tuple[str, float]]:
    """The linear layers and convolutions in no unit with the most MACs, as shares of those of all such layers."""
    within = {path for group in structure.groups for path in group.reads}
    within |= {producer.path for group in structure.groups for producer in group.producers}
    macs: dict[str, int] = {}

    layers = {path: one for path, one in model.named_modules() if isinstance(one, nn.Linear | nn.Conv1d | nn.Conv2d)}

    def count(path: str, args: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor):  # of a subclass that does more, such as a router of experts
            return
        weight = layers[path].weight
        features = output.shape[1] if weight.dim() > 2 else output.shape[-1]
        macs[path] = macs.get(path, 0) + output.numel() // features * weight.numel()

    with capture(model, outputs=dict.fromkeys(layers, count)), torch.no_grad():
        model(**inputs)
    whole = max(sum(macs.values()), 1)
    outside = sorted(((count / whole, path) for path, count in macs.items() if path not in within), reverse=True)
    return [(path, share) for share, path in outside[:NAMED] if share >= 0.01]
