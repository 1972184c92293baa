"""What a computation on a model takes, counted in units that can be timed once on any machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optin_export.models import TaskModel
from optin_export.units.declare import Structure, UnitGroup
from optin_export.units.hooks import get_layer, get_weight


@dataclass(frozen=True)
class Effort:
    """forward: passes of one row; graph: passes that a backward pass can follow; backward: backward passes of one row;
    multiply: multiply-adds of large matrix products in float32; solve: those of float64 products and linear systems."""

    forward: float = 0.0
    graph: float = 0.0
    backward: float = 0.0
    multiply: float = 0.0
    solve: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(*(one + two for one, two in zip(self._all, other._all, strict=True)))

    def __mul__(self, factor: float) -> Effort:
        return Effort(*(one * factor for one in self._all))

    __rmul__ = __mul__

    @property
    def _all(self) -> tuple[float, ...]:
        return self.forward, self.graph, self.backward, self.multiply, self.solve


@dataclass(frozen=True)
class LayerSize:
    """A layer's inputs and outputs (of a convolution: the inputs of one window), and its positions per row of data."""

    inputs: int
    outputs: int
    positions: float


def later_share(structure: Structure, group: UnitGroup) -> float:
    """The share of the blocks that a pass runs if those before the group are replayed."""
    return len(structure.after(group)) / max(len(structure.observed), 1)


def layer_sizes(model: TaskModel, positions: Mapping[str, float], paths: Sequence[str]) -> dict[str, LayerSize]:
    """positions: layer -> outputs of one row of data without their features."""
    sizes = {}
    for path in paths:
        weight = get_weight(get_layer(model, path))
        outputs = len(weight)
        sizes[path] = LayerSize(weight.numel() // max(outputs, 1), outputs, positions.get(path, 0.0))
    return sizes
