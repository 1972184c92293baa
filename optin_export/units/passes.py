"""Fully observed forward passes, to compare one with another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from optin_export.units.capture import Point, capture, captured
from optin_export.units.declare import Structure, UnitGroup
from optin_export.units.outputs import copied, tensors_in

#: Largest difference, relative to the largest value, at which the values of two passes count as equal.
TOLERANCE = 1e-5
#: Tokens of a text that are enough to find and verify units.
TOKENS = 32
#: Samples of raw sound per frame of a model, as in wav2vec2 and its successors (20 ms at 16 kHz).
SAMPLES = 320
Inputs = Mapping[str, torch.Tensor]


@dataclass
class Plain:
    """One plain pass: events (block, begins or ends), block outputs, per point its values call by call, the result.

    first: when a module first ran, as the number of earlier events. live: outputs with their original version; a higher
    version means that they were overwritten. read: the same for the inputs of modules without submodules.
    """

    events: list[tuple[str, bool]] = field(default_factory=list)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    seen: dict[Point, list[Any]] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    live: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)
    read: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    result: Any = None

    @property
    def writes_over(self) -> bool:
        """Whether any tensor that a module has read was overwritten afterwards."""
        return any(tensor._version != version for tensor, version in self.read)

    @property
    def rewritten(self) -> frozenset[str]:
        return frozenset(path for path, tensor, version in self.live if tensor._version != version)


def plain_pass(model: nn.Module, structure: Structure, inputs: Inputs) -> Plain:
    """Run one forward pass on these inputs and record it completely."""
    found = Plain()
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]

    def begins(path: str, args: Any, kwargs: Any) -> None:
        found.events.append((path, True))

    def ends(path: str, args: Any, output: Any) -> None:
        found.events.append((path, False))
        found.outputs.setdefault(path, []).append(copied(output))

    def ran(path: str, args: Any, output: Any) -> None:
        found.calls[path] = found.calls.get(path, 0) + 1
        found.first.setdefault(path, len(found.events))
        found.live.extend((path, tensor, tensor._version) for tensor in tensors_in(output))

    def reads(path: str, args: Any, kwargs: Any) -> None:
        found.read.extend((tensor, tensor._version) for tensor in tensors_in(args))

    points = [point for group in structure.groups for point in points_of(group)]
    producers = (one.path for group in structure.groups for one in group.producers)
    counted = {*layers, *structure.blocks, *producers, *(path for path, _ in points)}
    leaves = [path for path, module in model.named_modules() if not any(True for _ in module.children())]
    with (
        captured(model, points) as seen,
        capture(model, dict.fromkeys(leaves, reads), dict.fromkeys(sorted(counted), ran)),
        capture(model, dict.fromkeys(structure.blocks, begins), dict.fromkeys(structure.blocks, ends)),
    ):
        found.result = model(**inputs)
    found.seen = seen
    return found


def points_of(group: UnitGroup) -> list[Point]:
    """The points of a group that masks and repairs observe."""
    residuals = [] if group.residual is None else [group.residual]
    return [*((path, 0) for path in group.reads), *residuals, *((path, "output") for path in group.added)]


def take_rows(inputs: Inputs, wanted: Sequence[int]) -> dict[str, torch.Tensor]:
    """These rows of the inputs, repeated from the first one if there are fewer."""
    return {name: tensor[[row % len(tensor) for row in wanted]] for name, tensor in inputs.items()}


def few_rows(model: nn.Module, inputs: Inputs, rows: int, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """The first rows, and of texts the first tokens if the model takes them: units do not depend on the length.

    Of raw sound [rows, samples], as many samples as make about that number of frames; its mask is as long.
    """
    few = {name: tensor[:rows] for name, tensor in inputs.items()}
    is_sound = any(tensor.dim() == 2 and tensor.is_floating_point() for tensor in few.values())
    length = tokens * SAMPLES if is_sound else tokens
    short = {name: tensor[:, :length] if tensor.dim() == 2 else tensor for name, tensor in few.items()}
    if all(few[name].shape == tensor.shape for name, tensor in short.items()):
        return few
    with torch.no_grad():
        try:
            model(**short)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            model(**few)  # runs if it is a model for one length only; raises what else is wrong
            return few
    return short


def constant_inputs(model: nn.Module, inputs: Inputs, paths: Sequence[str]) -> frozenset[str]:
    """The layers that read the same for the first two rows, such as those that compute a table of relative positions.

    Zeros do not count: a ReLU may give them for both rows by chance. Empty if the model's output is the same for both.
    """
    seen, results = [], []
    for row in (0, 1):
        with torch.no_grad(), captured(model, [(path, 0) for path in paths]) as values:
            results.append(copied(model(**take_rows(inputs, [row]))))
        seen.append(values)
    if same(results[0], results[1], tolerance=0.0):
        return frozenset()
    return frozenset(
        path
        for (path, _), values in seen[0].items()
        if same(values, seen[1].get((path, 0)), tolerance=0.0) and any(one.any() for one in tensors_in(values))
    )


def same(one: Any, other: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether all tensors of two values are equal up to rounding; NaN equals NaN."""
    if one is None or other is None:
        return one is other
    ones, others = list(tensors_in(one)), list(tensors_in(other))
    if len(ones) != len(others):
        return False
    for a, b in zip(ones, others, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if torch.equal(a, b) or not a.numel():
            continue
        if not a.is_floating_point():
            return False
        scale = b.float().abs().nan_to_num(posinf=0.0).max()
        if not torch.allclose(a.float(), b.float(), rtol=0, atol=float(tolerance * scale), equal_nan=True):
            return False
    return True
