"""Sequential least squares: refit layers so that the smaller model reproduces the original's residual stream.

For each sub-layer, in forward order, with activations h of the original and h' of the already repaired smaller model:

    min over (W', b') of sum over rows of w || (h + W a + b) - (h' + W' a' + b') ||^2 + rho || [W' b'] - [W_kept b] ||^2

Parallel sub-layers add to one stream, h + o1 + o2: the first is refitted with h, the second with h + o1 in place of h.
a' are the kept inputs in the smaller model, so errors from upstream are corrected too. Before that, the layers that
produce the kept units are refitted to the original's pre-activations in the same way. w is the sensitivity of the
trajectory and of the output to the row (see `sensitivity`). Only unlabelled calibration data is used (docs/method.md).
`layer_problem` solves one such problem; `model_pair` provides its rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.progress import phase, report
from optin_export.repair.layers import constant_of, kept_rows, overwrite, start_of
from optin_export.repair.least_squares import Fit, Moments
from optin_export.repair.model_pair import ConsumerRows, ModelPair, OutputRows, ProducerRows
from optin_export.repair.output_layer import output_layer
from optin_export.repair.paired_forward import Stream
from optin_export.repair.query_keys import reduce_rank
from optin_export.repair.relu import ReluTarget, relu_of_units, shift_of_block_relu
from optin_export.repair.residual_branch import affine_of
from optin_export.repair.sensitivity import Weights, sensitivities
from optin_export.repair.settings import RepairSettings
from optin_export.search import GroupPlan
from optin_export.units import (
    Calls,
    Structure,
    UnitGroup,
    columns_per_unit,
    get_layer,
    measured,
    patches_of,
    reads_rows,
)
from optin_export.workdir.peak_memory import release_freed

#: Key of the output layer's repair, which belongs to no group.
HEAD = "head"
Tick = Callable[[int, int], None]
#: A model -> a context to hold while it runs, if it has to be moved for that (see `models.Placement`).
AtWork = Callable[[TaskModel], AbstractContextManager[Any]]


def also_moved(at_work: AtWork, dense: TaskModel) -> AbstractContextManager[Any]:
    """A context that has the smaller model where `at_work` moves the unpruned one."""
    along: AtWork = getattr(at_work, "also", contextlib.nullcontext)
    return along(dense)


@dataclass(frozen=True)
class Repair:
    """One sub-layer's repair: weighted squared error on the residual stream, per element, before and after its refit
    (None if it could not be computed).

    damping: rho as a share of the Gram matrix's mean diagonal. fallback: why the projection was not changed, if so.
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
    settings: RepairSettings,
    *,
    dimensions: Mapping[str, int] | None = None,
    weights: Weights | None = None,
    at_work: AtWork = contextlib.nullcontext,
) -> dict[str, Repair]:
    """Refit the layers around every group of `dense` and its output layer, in place; returns the errors by group key.

    structure, smaller: the structures of `original` and `dense`; groups: the plan between them. Groups that lost
    nothing are refitted as well: they correct errors from upstream. dimensions: the rank that the queries and keys of
    an attention are limited to, by its `QueryKeys.name`. weights: the `sensitivities` of `original`, if they
    are already known. at_work: a context held while `original` runs; its method `also`, if it
    has one, moves `dense` to the same device.
    """
    only_scale = settings.repair == "rescale"
    if batches:
        with at_work(original):
            structure = measured(original, structure, batches[0].inputs)
    limits = {one.heads: one for one in structure.attentions if one.name in (dimensions or {})}
    head = output_layer(original, batches[0].inputs) if batches and not only_scale else None
    repairs: dict[str, Repair] = {}
    with at_work(original), also_moved(at_work, dense):
        if weights is None:
            weights = sensitivities(original, structure, batches, settings.seed, settings.autocast)
        pair = _paired(original, dense, structure, groups, batches, weights)
        # Channels of a residual stream have no sub-layer: the layers around them compensate for them.
        left_of = {group.key: group for group in smaller.groups}
        todo = [(group, left_of[group.key]) for group in structure.groups if not group.coupled]
        consumers = {group.consumer: group.key for group, _ in todo}  # the last group of each
        last_read = _last_read(structure, [group for group, small in todo if small.count])
        shortcuts = [] if only_scale else [one for one in _projections(structure) if pair.calls(one)]
        phase("re-fitting layer by layer", until=0.6)
        try:
            for position, block in enumerate(structure.order):
                inside = [one for one in shortcuts if one.startswith(structure.blocks[block] + ".")]
                pair.observe(block, inside)
                for projection in inside:
                    refit_layer(pair, projection)
                for group, small in [(group, small) for group, small in todo if group.block == block]:
                    if not only_scale and small.count:
                        read = refit_producers(pair, group, consumers, last_read)
                        if group.key in limits:
                            one = limits[group.key]
                            reduce_rank(pair, one, (dimensions or {})[one.name], read.get(one.query))
                    if consumers[group.consumer] == group.key:
                        repairs[group.key] = _repair(refit_consumer(pair, group, small, only_scale))
                    else:
                        repairs[group.key] = Repair(None, None, fallback=f"repaired with {consumers[group.consumer]}")
                    report(len(repairs), len(todo))
                release_freed()
                if any(group.block in structure.order[position + 1 :] for group, _ in todo):
                    pair.advance(block)
            if head is not None and head not in consumers:
                repairs[HEAD] = _repair(refit_layer(pair, head))
        finally:
            pair.close()
    return repairs


def refit_producers(
    pair: ModelPair, group: UnitGroup, consumers: Collection[str], last_read: Mapping[str, str]
) -> dict[str, Moments]:
    """Refit the layers that make the units to the original's pre-activations of the units that stay, and other readers
    of the units to their original outputs, in forward order.

    consumers: layers that are refitted as consumers, not here. last_read: reader -> the group with which it is
    refitted. Returns sums over what the layers that make the units read.
    """
    readers = [path for path in group.readers if last_read[path] == group.key]
    paths = [producer.path for producer in group.producers]
    if any(path in consumers for path in paths):
        paths = []  # a layer that reads the previous group was refitted as its consumer
    seen = pair.source.see(0, [(path, 0) for path in (*paths, *readers)], group.consumer)
    ordered = [path for path, _ in seen] + [path for path in readers if (path, 0) not in seen]
    # Producers that read the same rows of the same input are refitted together with one Gram matrix.
    sets: dict[Any, list[str]] = {}
    for path in ordered:
        layer = get_layer(pair.target.model, path)
        if pair.calls(path) and reads_rows(layer):
            read = seen.get((path, 0))
            same = tuple(map(id, read)) if isinstance(read, Calls) else id(read)
            sets.setdefault(path if path in readers else (same, patches_of(layer)), []).append(path)
    found: dict[str, Moments] = {}
    for together in sets.values():
        if together[0] in readers:
            refit_layer(pair, together[0])
        else:
            found |= dict.fromkeys(together, _refit_together(pair, together))
    return found


def _last_read(structure: Structure, groups: Sequence[UnitGroup]) -> dict[str, str]:
    """Reader -> the last of the groups that it reads besides their consumers. Only that refit counts: what it reads of
    the groups before has been repaired by then."""
    running = [group for block in structure.order for group in groups if group.block == block]
    return {path: group.key for group in running for path in group.readers}


def _refit_together(pair: ModelPair, paths: list[str]) -> Moments:
    starts = [start_of(pair.target.model, path) for path in paths]
    rows = ProducerRows(pair, paths, _relu_after(pair, paths))
    problem = pair.problem(torch.cat(starts, 1), rows)
    fit = problem.solve()
    for path, part in zip(paths, fit.solution.split([one.shape[1] for one in starts], 1), strict=True):
        overwrite(pair.target.model, path, dataclasses.replace(fit, solution=part))
    assert problem.read is not None
    return problem.read


def refit_consumer(pair: ModelPair, group: UnitGroup, small: UnitGroup, only_scale: bool) -> Fit:
    """Refit the layer that reads the units so that the following residual stream equals the original's.

    small: the group in the smaller model; without units, the constant that replaces the sub-layer is fitted.
    """
    model, path, dropped = pair.target.model, group.consumer, small.count == 0
    layer = get_layer(pair.source.model, path)
    start = constant_of(model, small)[None].double() if dropped else start_of(model, path)
    scale = affine_of(pair.source.model, group)
    if scale is None or not reads_rows(layer):
        why = "the batch norm behind it has no statistics" if scale is None else "a convolution of this kind"
        return Fit(start, None, float("nan"), float("nan"), why)
    stream = [] if group.residual is None else [group.residual[0]]
    if len({pair.calls(one) for one in [*stream, path]}) > 1:
        return Fit(start, None, float("nan"), float("nan"), "it runs more often than the residual stream is seen")
    relu = _relu_after(pair, [path]) if group.residual is None else None
    shift = None if group.residual is None else shift_of_block_relu(pair.source, pair.structure, group)
    scale = scale[pair.kept_of(path)] if len(scale.shape) else scale
    rows = ConsumerRows(pair, group, scale, small.sublayer if dropped else None, relu, shift)
    problem = pair.problem(start, rows)
    fit = problem.rescale(columns_per_unit(layer, group)) if only_scale else problem.solve()
    if dropped:
        constant_of(model, small).copy_(fit.solution[-1])
    else:
        overwrite(model, path, fit)
    return fit


def refit_layer(pair: ModelPair, path: str) -> Fit:
    """Refit a layer (the output layer, or a shortcut's projection) to its output in the original."""
    fit = pair.problem(start_of(pair.target.model, path), OutputRows(pair, path)).solve()
    overwrite(pair.target.model, path, fit)
    return fit


def _paired(
    original: TaskModel,
    dense: TaskModel,
    structure: Structure,
    groups: Mapping[str, GroupPlan],
    batches: Sequence[Batch],
    weights: Weights,
) -> ModelPair:
    kept: dict[str, torch.Tensor] = {}
    for group, producer in [(one, producer) for one in structure.groups for producer in one.producers]:
        rows, before = kept_rows(original, group, producer, groups[group.key]), kept.get(producer.path)
        kept[producer.path] = rows if before is None else rows[torch.isin(rows, before)]
    source, target = (Stream(model, structure, batches) for model in (original, dense))
    return ModelPair(source, target, structure, batches, weights, kept)


def _relu_after(pair: ModelPair, paths: Sequence[str]) -> ReluTarget | None:
    """The ReLU that follows the layers that make a group's units, for the units that stay."""
    groups = pair.structure.groups
    group = next((group for group in groups if [one.path for one in group.producers] == list(paths)), None)
    return None if group is None else relu_of_units(pair.source, group, pair.kept[paths[0]])


def _projections(structure: Structure) -> list[str]:
    """Layers that read and write residual streams with removable channels, and belong to no other group."""
    streams = [group for group in structure.groups if group.coupled]
    inner = {producer.path for group in structure.groups if not group.coupled for producer in group.producers}
    writers = {producer.path for group in streams for producer in group.producers}
    return [path for group in streams for path in group.reads if path in writers and path not in inner]


def _repair(fit: Fit) -> Repair:
    before, after = (error if math.isfinite(error) else None for error in (fit.before, fit.after))
    return Repair(before, after, fit.damping, fit.fallback)
