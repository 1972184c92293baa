"""Measure on a few rows how the blocks of a model depend on each other, before anything relies on it.

Scores, loss curves and repairs replay the stored outputs of earlier blocks and compute only the later ones. That is
correct if every later layer then reads the same as in a plain forward pass. It is not if a block runs several times, if
a late block reads an early one (skip connections, parallel branches) that is no longer kept, or if blocks pass on
values other than their outputs (attributes of modules, caches). So a walk that replays outputs is compared with a plain
pass, and if they differ every pass has to run the whole model.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.units.capture import Point, captured
from optin_export.units.declare import Structure, UnitGroup
from optin_export.units.execution_order import Walk
from optin_export.units.gradients import mutates, without_gradients
from optin_export.units.hooks import replayed
from optin_export.units.outputs import tensors_in
from optin_export.units.passes import Inputs, Plain, plain_pass, points_of, same, take_rows
from optin_export.units.readers import ROWS, check_samples, find_readers, pass_of_others


def measured(model: nn.Module, structure: Structure, inputs: Inputs) -> Structure:
    """The structure with its measured `walk`, without groups of layers that do not run on these inputs.

    inputs: real rows, of which a few are used. A structure that was measured before is returned unchanged.
    """
    if structure.walk is not None:
        return structure
    walk = measure_walk(model, structure, inputs)
    groups = tuple(_placed(group, walk) for group in structure.groups if group.key not in walk.idle)
    if not groups:
        raise InputError(
            "the model has nothing to prune",
            f"none of the layers that family {structure.family} found runs in a forward pass",
            "check that the model calls these layers as modules, not only their weights",
        )
    if not set(walk.order) or len(walk.silent) == len(walk.order):
        raise InputError(
            "the model cannot be scored",
            f"it never calls its blocks ({structure.blocks[0]}, ...) as modules, only their parts",
            "call each block as a module in the model's forward",
        )
    return dataclasses.replace(structure, groups=groups, walk=walk)


def _placed(group: UnitGroup, walk: Walk) -> UnitGroup:
    """The group with the sample dimension of its consumer's input, if that is not the first one."""
    dim = walk.sample_dim(group.consumer)
    return dataclasses.replace(group, batch_dim=dim) if dim else group


def notices(structure: Structure) -> list[str]:
    """Warnings about how this model is run block by block, one line each."""
    walk = structure.walk
    if walk is None:
        return []
    found = []
    if walk.whole is not None:
        found.append(f"every pass runs the whole model, which is right but slower: {walk.whole}")
    if walk.idle:
        count, which = len(walk.idle), walk.idle[0] if len(walk.idle) == 1 else f"{walk.idle[0]} and others"
        found.append(f"{count} groups of units are not pruned ({which}): no forward pass uses them")
    return found


@torch.no_grad()
def measure_walk(model: nn.Module, structure: Structure, inputs: Inputs) -> Walk:
    """Run the model on a few rows, normally and block by block, and determine how it can be run block by block."""
    few = take_rows(inputs, list(range(ROWS)))
    plain = plain_pass(model, structure, few)
    walk = _first_guess(structure, plain)
    # Other rows of another length, so that state that the model keeps between passes does not suit the walk.
    with without_gradients(model, structure) as blind:
        other, dims = pass_of_others(model, structure, inputs, plain)
    walk = dataclasses.replace(
        walk,
        sample_dims=dims,
        blind=tuple(dict.fromkeys(blind)),
        mutates=mutates(model, structure, walk, plain, few),
    )
    check_samples(model, structure, walk, plain, few)
    model(**other)
    if walk.whole is not None:
        return walk
    wrong = _compare(model, structure, walk, plain, few)
    if wrong is not None:
        walk = dataclasses.replace(walk, readers=find_readers(model, structure, walk, plain, few))
        model(**other)
        wrong = _compare(model, structure, walk, plain, few)
    return walk if wrong is None else dataclasses.replace(walk, whole=wrong)


def _first_guess(structure: Structure, plain: Plain) -> Walk:
    """Blocks in the order in which they run, each read only by the next; or the reason why that is impossible."""
    ran: dict[str, None] = dict.fromkeys(path for path, begins in plain.events if begins)
    idle = tuple(group.key for group in structure.groups if not any(plain.calls.get(path) for path in group.reads))
    starts = {structure.blocks.index(path): plain.events.index((path, True)) for path in ran}
    for group in structure.groups:
        if group.key not in idle and structure.blocks[group.block] not in ran:
            first = min(plain.first[path] for path in group.reads if path in plain.first)
            starts[group.block] = min(first, starts.get(group.block, first))
    order = tuple(sorted(starts, key=lambda index: (starts[index], index)))
    silent = frozenset(structure.blocks[index] for index in order) - set(ran)
    readers = {
        path: (position + 1, *[-1] * (len(list(tensors_in(plain.outputs[path][0]))) - 1))
        for position, path in enumerate(ran)
    }
    known = {path for group in structure.groups for path in (*group.reads, *(one.path for one in group.producers))}
    calls = {path: plain.calls.get(path, 0) for path in sorted({*known, *plain.calls})}
    calls = {path: count for path, count in calls.items() if count != 1}
    walk = Walk(order, None, readers, plain.rewritten, {}, calls, silent, idle)
    return dataclasses.replace(walk, whole=_not_a_chain(structure, walk, plain))


def _not_a_chain(structure: Structure, walk: Walk, plain: Plain) -> str | None:
    if walk.silent:
        return f"'{min(walk.silent)}' is never called itself, only its layers are"
    repeated = next((path for path in structure.blocks if walk.calls.get(path, 0) > 1), None)
    if repeated is not None:
        return f"'{repeated}' runs {walk.calls[repeated]} times"
    spans = list(zip(plain.events[::2], plain.events[1::2], strict=True))
    nested = next((end[0] for begin, end in spans if begin[0] != end[0]), None)
    if nested is not None:
        return f"'{nested}' runs within another block"
    # With the outputs before `order[position]` replayed, nothing that reads the block's units has run yet.
    for group in structure.groups:
        if group.key in walk.idle:
            continue
        start = 2 * walk.order.index(structure.first_block(group, walk.order))
        early = next((path for path in group.reads if plain.first.get(path, start) < start), None)
        if early is not None:
            return f"'{early}' runs before the blocks in front of it"
    return None


def _compare(model: nn.Module, structure: Structure, walk: Walk, plain: Plain, inputs: Inputs) -> str | None:
    """The first value that differs between a walk with replayed outputs and the plain pass; None if none differs.

    The last blocks come first, so that the earlier blocks still hold the values that the other rows left there.
    """
    for position in reversed(range(len(walk.order))):
        path = structure.blocks[walk.order[position]]
        try:
            wrong = _compare_at(model, structure, walk, position, plain, inputs)
        except Exception as error:  # placeholders may not fit; any failure means that the walk is not possible
            wrong = f"'{path}' cannot run without the blocks before it ({type(error).__name__})"
        if wrong is not None:
            return wrong
    return None


def _compare_at(
    model: nn.Module, structure: Structure, walk: Walk, position: int, plain: Plain, inputs: Inputs
) -> str | None:
    order, last = [structure.blocks[index] for index in walk.order], position == len(walk.order) - 1
    path = order[position]
    points: list[Point] = []
    for group in structure.groups:
        if group.key in walk.idle:
            continue
        if not group.coupled and group.block == walk.order[position]:
            points += points_of(group)
        elif group.coupled:
            behind = [one for one in group.reads if not any(one.startswith(f"{block}.") for block in structure.blocks)]
            inside = [one for one in group.reads if one.startswith(f"{path}.")]
            points += [(one, 0) for one in (*inside, *(behind if last else ()))]
    points = [point for point in dict.fromkeys(points) if point in plain.seen]
    before = {one: walk.kept(one, plain.outputs[one][0], position) for one in order[:position]}
    seen_at, stop = [*points, (path, "output")], None if last else path
    with replayed(model, before, walk.rewritten), captured(model, seen_at, stop=stop) as seen:
        result = model(**inputs)
    expected = {**{point: plain.seen[point] for point in points}, (path, "output"): plain.outputs[path]}
    for point, values in expected.items():
        if not same(seen.get(point), values):
            return f"'{point[0]}' depends on more than the outputs of the blocks before it"
    if last and not same(result, plain.result):
        return "the output depends on more than the outputs of the last blocks"
    return None
