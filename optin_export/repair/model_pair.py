"""The unpruned and the smaller model, run block by block together, and the targets of the smaller model's layers.

Each class here gives the rows of one kind of refit, batch by batch: the layer's input in the smaller model (a'), and
its target. h is a value in the unpruned model, h' the value at the same place in the smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optin_export.data import Batch
from optin_export.models import Inputs, TaskModel, block_inputs
from optin_export.repair.layer_problem import LayerProblem, Rows
from optin_export.repair.paired_forward import Stream
from optin_export.repair.relu import ReluTarget
from optin_export.repair.sensitivity import Weights
from optin_export.units import (
    Calls,
    Point,
    Structure,
    UnitGroup,
    get_layer,
    get_weight,
    input_rows,
    output_rows,
    tensor_of,
)
from optin_export.workdir.disk_offload import OffloadedTensors, bytes_of

#: Maximum bytes of one block's values that are kept, in memory and in temporary files.
OBSERVED_BYTES = 4 << 30


@dataclass
class ModelPair:
    """source, target: the unpruned and the smaller model; structure: the structure of `source`; kept: producer -> its
    output rows that stay; weights: the weights of the rows."""

    source: Stream
    target: Stream
    structure: Structure
    batches: Sequence[Batch]
    weights: Weights
    kept: dict[str, torch.Tensor]
    observed: OffloadedTensors | None = None

    def observe(self, block: int, layers: Sequence[str]) -> None:
        """Run a block of the unpruned model once over all batches, and keep what the refits of this block and of
        `layers` compare with.

        If that takes more than OBSERVED_BYTES, nothing is kept: every refit runs the block again.
        """
        self._forget()
        path, groups = self.structure.blocks[block], [one for one in self.structure.groups if one.block == block]
        if not groups and not layers:
            return
        points: list[Point] = [(one.path, "output") for group in groups for one in group.producers]
        points += [(one, "output") for group in groups for one in (*group.reads, *group.added)]
        points += [(one, "output") for one in (*layers, path)]
        points += [group.residual for group in groups if group.residual is not None]
        points = list(dict.fromkeys(points))
        for index in range(len(self.batches)):
            found = self.source.see(index, points, path)
            if self.observed is None:
                if bytes_of(found) * len(self.batches) > OBSERVED_BYTES:
                    return
                self.observed = OffloadedTensors("the repair", "use fewer data.calibration.samples")
            self.observed[index] = found

    def there(self, index: int, points: Sequence[Point], until: str) -> dict[Point, Any]:
        """The unpruned model's values at these points: see `Stream.see`."""
        if self.observed is not None:
            known = self.observed[index]
            if all(point in known for point in points):
                return {point: known[point] for point in points}
        return self.source.see(index, points, until)

    def advance(self, block: int) -> None:
        self.source.advance(block, self.there)
        self.target.advance(block)

    def close(self) -> None:
        self._forget()
        self.source.close()
        self.target.close()

    def _forget(self) -> None:
        if self.observed is not None:
            self.observed.close()
            self.observed = None

    def calls(self, path: str) -> int:
        """How often a module runs in one pass."""
        walk = self.structure.walk
        return 1 if walk is None else walk.calls.get(path, 1)

    def kept_of(self, path: str) -> torch.Tensor:
        """The outputs of a layer of the unpruned model that stay."""
        found = self.kept.get(path)
        return torch.arange(len(get_weight(get_layer(self.source.model, path)))) if found is None else found

    def inputs(self, index: int) -> Inputs:
        """The inputs of one batch, with the mask of the blocks' tokens."""
        return block_inputs(self.source.model, self.batches[index].inputs)

    def weight(self, index: int, paths: Sequence[str]) -> torch.Tensor | None:
        """[rows]: the weight of each row of these layers' outputs in the smaller model."""
        return self.target.weights_like(index, self.weights.of(index, paths))

    def problem(self, start: torch.Tensor, rows: ProducerRows | ConsumerRows | OutputRows) -> LayerProblem:
        return LayerProblem(start, rows, len(self.batches), rows.has_relu)


@dataclass(frozen=True)
class ProducerRows:
    """Layers that read the same input and make units: y = the unpruned model's outputs for the units that stay."""

    pair: ModelPair
    paths: Sequence[str]
    relu: ReluTarget | None

    @property
    def has_relu(self) -> bool:
        return self.relu is not None

    def __call__(self, index: int) -> Rows:
        pair, paths, inputs = self.pair, self.paths, self.pair.inputs(index)
        layers = [get_layer(pair.target.model, path) for path in paths]
        wanted = pair.there(index, [(path, "output") for path in paths], paths[-1])
        given = pair.target.see(index, [(paths[0], 0)], paths[0])[(paths[0], 0)]
        targets = [
            output_rows(pair.target.like(index, wanted[(path, "output")]), layer, inputs, index)[:, pair.kept[path]]
            for path, layer in zip(paths, layers, strict=True)
        ]
        read = input_rows(given, layers[0], inputs, index)
        return Rows(read, torch.cat(targets, 1), self.relu, pair.weight(index, paths))


@dataclass(frozen=True)
class OutputRows:
    """A single layer (the output layer, or a shortcut's projection): y = the unpruned model's output."""

    pair: ModelPair
    path: str
    has_relu: bool = False

    def __call__(self, index: int) -> Rows:
        pair, path, inputs = self.pair, self.path, self.pair.inputs(index)
        layer = get_layer(pair.target.model, path)
        wanted = pair.there(index, [(path, "output")], path)[(path, "output")]
        given = pair.target.see(index, [(path, 0)], path)[(path, 0)]
        target = output_rows(wanted, layer, inputs, index)[:, pair.kept_of(path)]
        return Rows(input_rows(given, layer, inputs, index), target, None, pair.weight(index, [path]))


@dataclass(frozen=True)
class ConsumerRows:
    """The layer that reads a group's units and adds to a residual stream, if there is one:

        y = W a + b + (h - h') / scale,   the stream afterwards is then the unpruned model's

    A layer scale or batch norm that follows the layer is inverted with its factor, `scale` [outputs]; outputs with a
    zero factor cannot be corrected. Parallel sub-layers are added to the same stream, h + o1 + o2: for the second, h
    includes o1, so it also corrects what is left of the error of the first. removed: the sub-layer at this path is now
    a constant without inputs. relu: the ReLU that follows a layer without a residual stream; shift: [features] of the
    batch norm, if relu(stream + norm(layer)) follows.
    """

    pair: ModelPair
    group: UnitGroup
    scale: torch.Tensor
    removed: str | None
    relu: ReluTarget | None
    shift: torch.Tensor | None

    @property
    def has_relu(self) -> bool:
        return self.relu is not None or self.shift is not None

    def __call__(self, index: int) -> Rows:
        pair, path, inputs = self.pair, self.group.consumer, self.pair.inputs(index)
        layer, kept = get_layer(pair.source.model, path), pair.kept_of(path)
        stream: list[Point] = [] if self.group.residual is None else [self.group.residual]
        stream += self._added
        reads: list[Point] = [] if self.removed is not None else [(path, 0)]
        there = pair.there(index, [*stream, (path, "output")], self._last(path))
        here = pair.target.see(index, [*stream, *reads], self._last(self.removed or path)) if stream or reads else {}
        target = output_rows(pair.target.like(index, there[(path, "output")]), layer, inputs, index)[:, kept]
        relu = self.relu
        if self.group.residual is not None:
            wanted, got = (output_rows(one, layer, inputs, index) for one in self._streams(index, there, here))
            for point in self._added:
                wanted = wanted + output_rows(pair.target.like(index, there[point]), layer, inputs, index)
                got = got + output_rows(here[point], layer, inputs, index)
            target = target + torch.where(self.scale == 0, 0.0, (wanted[:, kept] - got) / self.scale)
            relu = relu if self.shift is None else ReluTarget(self.scale, self.shift[kept] + got)
        read = input_rows(here[(path, 0)], layer, inputs, index) if reads else target.new_zeros(len(target), 0)
        return Rows(read, target, relu, pair.weight(index, [path]))

    @property
    def _added(self) -> list[Point]:
        return [(path, "output") for path in self.group.added]

    def _streams(self, index: int, there: dict[Point, Any], here: dict[Point, Any]) -> tuple[Any, Any]:
        """(h, h'), with their rows in the order of the layer's output."""
        point, (source, target) = self.group.residual, (self.pair.source, self.pair.target)
        assert point is not None
        wanted = there[point] if point[1] == "call" else target.like(index, there[point])
        return arranged(self.group, source.model, wanted), arranged(self.group, target.model, here[point])

    def _last(self, path: str) -> str:
        """Where a pass may stop: after the layer, unless the other side of the residual stream is computed later."""
        residual = self.group.residual
        return self.pair.structure.blocks[self.group.block] if residual and residual[1] == "output" else path


def arranged(group: UnitGroup, model: TaskModel, seen: Any) -> Any:
    """The residual stream with its rows in the order of the consumer's output."""
    if isinstance(seen, Calls):
        return Calls(arranged(group, model, one) for one in seen)
    stream = seen if group.residual is not None and group.residual[1] == "call" else tensor_of(seen)
    with torch.no_grad():
        return stream if group.arrange is None else group.arrange(model, stream)
