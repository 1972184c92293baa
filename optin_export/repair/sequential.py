"""Sequential least squares: layers are refitted so that the smaller model lands on the original's path.

For each sub-layer, in forward order, with activations h of the original and h' of the already repaired smaller model:

    min over (W', b') of sum over rows of w || (h + W a + b) - (h' + W' a' + b') ||^2 + rho || [W' b'] - [W_kept b] ||^2

a' are the kept inputs in the smaller model, so errors from upstream are corrected too. Before that, the layers that
produce the kept units are refitted to the original's pre-activations in the same way. w is the sensitivity of the
trajectory and of the output to the row (see `sensitivity`). Unlabelled calibration data only (docs/method.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.progress import report
from optin_export.repair.layers import constant_of, kept_rows, overwrite, start_of
from optin_export.repair.least_squares import Fit, Moments, rescale, ridge
from optin_export.repair.output_layer import output_layer
from optin_export.repair.paired_forward import Point, Stream
from optin_export.repair.relu import ROUNDS, ReluTarget, bend_of_units, shift_of_block_relu
from optin_export.repair.residual_branch import affine_of
from optin_export.repair.sensitivity import Weights, sensitivities
from optin_export.search import GroupPlan
from optin_export.units import (
    Calls,
    Structure,
    UnitGroup,
    columns_per_unit,
    get_layer,
    input_rows,
    measured,
    output_rows,
    reads_rows,
    tensor_of,
)

#: One batch in so many is held out to choose the damping; with fewer batches, one row in so many.
HOLD_OUT = 5
#: Key of the output layer's repair, which belongs to no group.
HEAD = "head"
#: Bytes of rows kept from one round to the next; what does not fit is computed again.
ROWS_IN_MEMORY = 1 << 31
#: A model -> what is held while it runs, where that is not its usual place (see `sources.Placement`).
AtWork = Callable[[TaskModel], AbstractContextManager[Any]]
#: Of one batch: what the layer reads, what it should output, and the ReLU that follows, if one does.
Rows = tuple[torch.Tensor, torch.Tensor, ReluTarget | None]


@dataclass(frozen=True)
class Repair:
    """One sub-layer's repair: weighted squared error on the residual stream, per element, before and after its refit
    (None where it could not be computed).

    damping: rho as a share of the Gram matrix' mean diagonal. fallback: why the projection stayed as it was, if it did.
    """

    before: float | None
    after: float | None
    damping: float | None = None
    fallback: str | None = None


def compensate(
    original: TaskModel,
    dense: TaskModel,
    structure: Structure,
    smaller: Structure,
    groups: Mapping[str, GroupPlan],
    batches: Sequence[Batch],
    *,
    only_scale: bool = False,
    weights: Weights | None = None,
    seed: int = 0,
    at_work: AtWork = contextlib.nullcontext,
) -> dict[str, Repair]:
    """Refit, in place, the layers around every group of `dense`, and its output layer; returns the errors by group key.

    structure, smaller: the structures of `original` and `dense`; groups: the plan between them. Groups that lost
    nothing are refitted as well: they correct what reaches them from upstream. only_scale: find one factor per kept
    unit instead of new weights. weights: the `sensitivities` of `original`, where they are known already. at_work: held
    while `original` runs; `dense` stays where it is.
    """
    if batches:
        with at_work(original):
            structure = measured(original, structure, batches[0].inputs)
    head = output_layer(original, batches[0].inputs) if batches and not only_scale else None
    repairs: dict[str, Repair] = {}
    with at_work(original):
        weights = sensitivities(original, structure, batches, seed) if weights is None else weights
        pair = _Pair(original, dense, structure, groups, batches, weights)
        # Channels of a residual stream have no sub-layer of their own: the layers around them make up for what is gone.
        left_of = {group.key: group for group in smaller.groups}
        todo = [(group, left_of[group.key]) for group in structure.groups if not group.coupled]
        shortcuts = [one for one in _projections(structure) if pair.calls(one)]
        try:
            for block in structure.order:
                path = structure.blocks[block]
                for projection in (one for one in shortcuts if not only_scale and one.startswith(path + ".")):
                    pair.refit_layer(projection)
                for group, small in [(group, small) for group, small in todo if group.block == block]:
                    if not only_scale and small.count:
                        pair.refit_before(group)
                    fit = pair.refit_consumer(group, small, only_scale)
                    repairs[group.key] = _repair(fit)
                    report(len(repairs), len(todo))
                left = structure.order[structure.order.index(block) + 1 :]
                if any(group.block in left for group, _ in todo):
                    pair.source.advance(block)
                    pair.target.advance(block)
            if head is not None and head not in pair.consumers:
                repairs[HEAD] = _repair(pair.refit_layer(head))
        finally:
            pair.source.close()
            pair.target.close()
    return repairs


class _Pair:
    """The original and the smaller model, walked side by side."""

    def __init__(
        self,
        original: TaskModel,
        dense: TaskModel,
        structure: Structure,
        groups: Mapping[str, GroupPlan],
        batches: Sequence[Batch],
        weights: Weights,
    ) -> None:
        self.structure, self.groups, self.batches, self.weights = structure, groups, batches, weights
        self.source = Stream(original, structure, batches)
        self.target = Stream(dense, structure, batches)
        self.consumers = {group.consumer for group in structure.groups if not group.coupled}
        self.kept_outputs = {
            producer.path: kept_rows(groups[group.key], group.count, group.rows_in(producer), producer.fused)
            for group in structure.groups
            for producer in group.producers
        }

    def refit_before(self, group: UnitGroup) -> None:
        """Refit what makes the units, to the original's pre-activations of the units that stay, and what else reads
        them, to what it output there; in forward order."""
        paths = [producer.path for producer in group.producers]
        if any(path in self.consumers for path in paths):
            paths = []  # a layer that reads the group before was refitted as its consumer
        seen = self.source.see(0, [(path, 0) for path in (*paths, *group.readers)], group.consumer)
        ordered = [path for path, _ in seen] + [path for path in group.readers if (path, 0) not in seen]
        # Producers that read the same input are refitted together: one Gram matrix serves them.
        sets: dict[int | str | tuple[int, ...], list[str]] = {}
        for path in ordered:
            if self.calls(path) and reads_rows(get_layer(self.target.model, path)):
                read = seen.get((path, 0))
                same = tuple(map(id, read)) if isinstance(read, Calls) else id(read)
                sets.setdefault(path if path in group.readers else same, []).append(path)
        for together in sets.values():
            if together[0] in group.readers:
                self.refit_layer(together[0])
            else:
                self._refit_alike(together)

    def _refit_alike(self, paths: list[str]) -> None:
        layers = [get_layer(self.target.model, path) for path in paths]
        starts = [start_of(self.target.model, path) for path in paths]
        bend = self._bend(paths)

        def rows(index: int) -> Rows:
            inputs = self.batches[index].inputs
            wanted = self.source.see(index, [(path, "output") for path in paths], paths[-1])
            given = self.target.see(index, [(paths[0], 0)], paths[0])[(paths[0], 0)]
            targets = [
                output_rows(self.target.like(index, wanted[(path, "output")]), layer, inputs, index)[
                    :, self.kept_outputs[path]
                ]
                for path, layer in zip(paths, layers, strict=True)
            ]
            return input_rows(given, layers[0], inputs, index), torch.cat(targets, 1), bend

        fit = self._fit(torch.cat(starts, 1), rows, paths)
        for path, part in zip(paths, fit.solution.split([one.shape[1] for one in starts], 1), strict=True):
            overwrite(self.target.model, path, dataclasses.replace(fit, solution=part))

    def refit_consumer(self, group: UnitGroup, small: UnitGroup, only_scale: bool) -> Fit:
        """Refit the layer that reads the units so that the residual stream behind it is the original's."""
        model, path = self.target.model, group.consumer
        dropped = small.count == 0
        layer = get_layer(self.source.model, path)
        start = constant_of(model, small)[None].double() if dropped else start_of(model, path)
        scale = affine_of(self.source.model, group)
        if scale is None or not reads_rows(layer):
            why = "the batch norm behind it has no statistics" if scale is None else "a convolution of this kind"
            return Fit(start, None, float("nan"), float("nan"), why)
        stands = small.sublayer if dropped else path
        assert stands is not None
        beside: list[Point] = [] if group.residual is None else [group.residual]
        kept = self.kept_outputs.get(path, torch.arange(len(layer.weight)))
        scale = scale[kept] if len(scale.shape) else scale
        if len({self.calls(one) for one, _ in [*beside, (path, 0)]}) > 1:
            return Fit(start, None, float("nan"), float("nan"), "it runs more often than the residual stream is seen")
        bend, shift = None, None
        if group.residual is None:
            bend = self._bend([path])
        else:
            shift = shift_of_block_relu(self.source, self.structure, group)

        def rows(index: int) -> Rows:
            inputs = self.batches[index].inputs
            there = self.source.see(index, [*beside, (path, "output")], self._last(beside, path, group))
            points: list[Point] = [*beside, *([] if dropped else [(path, 0)])]
            here = self.target.see(index, points, self._last(beside, stands, group)) if points else {}
            output = output_rows(self.target.like(index, there[(path, "output")]), layer, inputs, index)
            # The sub-layer has to add what is missing between the two streams.
            missing = output[:, kept]
            behind = bend
            if group.residual is not None:
                whole = group.residual[1] == "call"
                beside_it = there[group.residual] if whole else self.target.like(index, there[group.residual])
                pairs = ((self.source.model, beside_it), (self.target.model, here[group.residual]))
                arranged = [_arranged(group, model, seen) for model, seen in pairs]
                streams = [output_rows(stream, layer, inputs, index) for stream in arranged]
                # Layer scale or batch norm is undone; where its factor is zero nothing can be added.
                difference = torch.where(scale == 0, 0.0, (streams[0][:, kept] - streams[1]) / scale)
                missing = missing + difference
                behind = behind if shift is None else ReluTarget(scale, shift[kept] + streams[1])
            if dropped:
                return missing.new_zeros(len(missing), 0), missing, behind
            return input_rows(here[(path, 0)], layer, inputs, index), missing, behind

        width = columns_per_unit(layer, group) if only_scale else None
        fit = self._fit(start, rows, [path], width)
        if dropped:
            constant_of(model, small).copy_(fit.solution[-1])
        else:
            overwrite(model, path, fit)
        return fit

    def refit_layer(self, path: str) -> Fit:
        """Refit a layer to its output in the original: the one that outputs the logits, or a shortcut's projection."""
        layer = get_layer(self.target.model, path)
        kept = self.kept_outputs.get(path, torch.arange(len(get_layer(self.source.model, path).weight)))

        def rows(index: int) -> Rows:
            inputs = self.batches[index].inputs
            wanted = self.source.see(index, [(path, "output")], path)[(path, "output")]
            given = self.target.see(index, [(path, 0)], path)[(path, 0)]
            return input_rows(given, layer, inputs, index), output_rows(wanted, layer, inputs, index)[:, kept], None

        fit = self._fit(start_of(self.target.model, path), rows, [path])
        overwrite(self.target.model, path, fit)
        return fit

    def _fit(
        self, start: torch.Tensor, rows: Callable[[int], Rows], paths: Sequence[str], width: int | None = None
    ) -> Fit:
        """Least squares over all batches near `start`; where a ReLU follows, rounds of it that look through the ReLU.

        The errors of a layer before a ReLU are those behind it. width: find one factor per unit of so many columns
        instead of new weights.
        """
        fit, before, error = Fit(start, None, 0.0, 0.0), 0.0, 0.0
        ready: dict[int, Rows] = {}
        room = ROWS_IN_MEMORY
        train, held = (Moments(len(start) - 1, start.shape[1]) for _ in range(2))
        for turn in range(2 + ROUNDS):
            if turn > 0:
                train, held = train.again(), held.again()
            behind, error, weight = None, 0.0, 0.0
            for index in range(len(self.batches)):
                design, target, behind = ready[index] if index in ready else rows(index)
                if behind is not None:
                    size = 4 * (design.numel() + target.numel() + behind.shift.numel())
                    if index not in ready and size <= room:
                        ready[index], room = (design, target, behind), room - size
                    predicted = design @ fit.solution[:-1].to(design) + fit.solution[-1].to(design)
                    weights = self.target.weights_like(index, self.weights.of(index, paths))
                    errors = behind.error(target, predicted)
                    error += float((errors if weights is None else errors * weights).double().sum())
                    weight += float(len(errors) if weights is None else weights.double().sum())
                    if turn > 0:
                        target = behind.target(target, predicted)
                if turn <= ROUNDS:
                    self._add(train, held, index, design, target, paths)
            if width is not None:
                return rescale(train, held, start, width)
            if behind is None:
                return ridge(train, held, start)
            error /= max(weight * start.shape[1], 1e-30)
            before = error if turn == 0 else before
            if turn > ROUNDS:
                break
            found = ridge(train, held, fit.solution)
            if found.damping is None:
                fit = found if turn == 0 else fit
                break
            fit = found
        if error > before:
            return Fit(start, None, before, before, "no refit was better behind the ReLU")
        return dataclasses.replace(fit, before=before, after=error)

    def _bend(self, paths: Sequence[str]) -> ReluTarget | None:
        """The ReLU behind the layers that make a group's units, for the units that stay."""
        groups = self.structure.groups
        group = next((group for group in groups if [one.path for one in group.producers] == paths), None)
        return None if group is None else bend_of_units(self.source, group, self.kept_outputs[paths[0]])

    def calls(self, path: str) -> int:
        """How often a module runs in one pass."""
        walk = self.structure.walk
        return 1 if walk is None else walk.calls.get(path, 1)

    def _last(self, beside: Sequence[Point], path: str, group: UnitGroup) -> str:
        """Where a pass may stop: behind the layer, unless the residual stream's other side is computed after it."""
        return self.structure.blocks[group.block] if beside and beside[0][1] == "output" else path

    def _add(
        self,
        train: Moments,
        held: Moments,
        index: int,
        design: torch.Tensor,
        target: torch.Tensor,
        paths: Sequence[str],
    ) -> None:
        weight = self.target.weights_like(index, self.weights.of(index, paths))
        if len(self.batches) >= HOLD_OUT:
            (held if index % HOLD_OUT == HOLD_OUT - 1 else train).add(design, target, weight)
            return
        chosen = torch.arange(len(design)) % HOLD_OUT == HOLD_OUT - 1
        for moments, part in ((train, ~chosen), (held, chosen)):
            moments.add(design[part], target[part], None if weight is None else weight[part])


def _projections(structure: Structure) -> list[str]:
    """Layers that read and write residual streams whose channels may go, and belong to no other group."""
    streams = [group for group in structure.groups if group.coupled]
    inner = {producer.path for group in structure.groups if not group.coupled for producer in group.producers}
    writers = {producer.path for group in streams for producer in group.producers}
    return [path for group in streams for path in group.reads if path in writers and path not in inner]


def _repair(fit: Fit) -> Repair:
    before, after = (error if math.isfinite(error) else None for error in (fit.before, fit.after))
    return Repair(before, after, fit.damping, fit.fallback)


def _arranged(group: UnitGroup, model: TaskModel, seen: Any) -> Any:
    """The residual stream with its rows as the consumer's output has them."""
    if isinstance(seen, Calls):
        return Calls(_arranged(group, model, one) for one in seen)
    stream = seen if group.residual is not None and group.residual[1] == "call" else tensor_of(seen)
    with torch.no_grad():
        return stream if group.arrange is None else group.arrange(model, stream)
