"""How the blocks of a model depend on each other, measured on a few rows before anything relies on it.

Scores, loss curves and repairs put the outputs of earlier blocks in their place and compute what follows. That is
right where every later layer then sees what it sees in a plain forward pass. It is not where a block runs several
times, where a late block reads an early one (skip connections, parallel branches) that is no longer kept, or where
blocks hand something on in other ways than by their outputs (attributes of modules, caches). So a walk with outputs put
in place is held against a plain pass, and where they differ passes have to be whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.families._declare import Structure, UnitGroup
from optin_export.families._hooks import get_module, in_place_of, replayed, stopped_after
from optin_export.families._outputs import copied, map_tensors, tensors_in
from optin_export.families._walk import Walk

#: Largest difference, relative to the largest value, at which two passes see the same.
TOLERANCE = 1e-5
#: Rows of the walk, and of the pass between that leaves other values behind in the model.
ROWS, OTHER_ROWS = 2, 3
Inputs = Mapping[str, torch.Tensor]
#: What is seen: a module, and its first argument, another one, its output or its whole call.
Point = tuple[str, Any]


def measured(model: nn.Module, structure: Structure, inputs: Inputs) -> Structure:
    """The structure with its `walk`, without groups of layers that do not run on these inputs.

    inputs: real rows, of which a few are taken. A structure that was measured before is given back as it is.
    """
    if structure.walk is not None:
        return structure
    walk = measure_walk(model, structure, inputs)
    groups = tuple(group for group in structure.groups if group.key not in walk.idle)
    if not groups:
        raise InputError(
            "the model has nothing to prune",
            f"none of the layers that family {structure.family} found runs in a forward pass",
            "check that the model calls these layers as modules, not only their weights",
        )
    if not set(walk.order) or len(walk.silent) == len(walk.order):
        raise InputError(
            "the model cannot be scored",
            f"it never calls its blocks ({structure.blocks[0]}, ...) themselves, only what is in them",
            "call each block as a module in the model's forward",
        )
    return dataclasses.replace(structure, groups=groups, walk=walk)


def notices(structure: Structure) -> list[str]:
    """What a user has to know of how this model is walked, one line each."""
    walk, found = structure.walk, []
    if walk is None:
        return found
    if walk.whole is not None:
        found.append(f"every pass runs the whole model, which is right but slower: {walk.whole}")
    if walk.idle:
        count, which = len(walk.idle), walk.idle[0] if len(walk.idle) == 1 else f"{walk.idle[0]} and others"
        found.append(f"{count} groups of units stay as they are ({which}): no forward pass uses them")
    return found


@torch.no_grad()
def measure_walk(model: nn.Module, structure: Structure, inputs: Inputs) -> Walk:
    """Run the model on a few rows, plainly and walked block by block, and say how it can be walked."""
    few = _rows(inputs, list(range(ROWS)))
    plain = _plain(model, structure, few)
    walk = _first_guess(structure, plain)
    # Other rows, of another length: what the model keeps between passes is then not what the walk needs.
    with _blind(model, structure) as blind:
        other, dims = _pass_of_others(model, structure, inputs, plain)
    walk = dataclasses.replace(walk, sample_dims=dims, blind=tuple(dict.fromkeys(blind)))
    if walk.whole is not None:
        return walk
    wrong = _compare(model, structure, walk, plain, few)
    if wrong is not None:
        walk = dataclasses.replace(walk, readers=_readers(model, structure, walk, plain, few))
        model(**other)
        wrong = _compare(model, structure, walk, plain, few)
    return walk if wrong is None else dataclasses.replace(walk, whole=wrong)


@dataclass
class _Plain:
    """One plain pass: events (block, begins or ends), block outputs, per point its values call by call, the result.

    first: when a module first ran, as the number of events before. live: outputs with their version when they were
    made; a higher one since then means that they were written over.
    """

    events: list[tuple[str, bool]] = field(default_factory=list)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    seen: dict[Point, list[Any]] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    live: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)
    result: Any = None

    @property
    def rewritten(self) -> frozenset[str]:
        return frozenset(path for path, tensor, version in self.live if tensor._version != version)


def _plain(model: nn.Module, structure: Structure, inputs: Inputs) -> _Plain:
    found = _Plain()
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]

    def begins(path: str) -> Callable[..., None]:
        return lambda module, args: found.events.append((path, True))

    def ends(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.events.append((path, False))
            found.outputs.setdefault(path, []).append(copied(output))

        return hook

    def ran(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.calls[path] = found.calls.get(path, 0) + 1
            found.first.setdefault(path, len(found.events))
            found.live.extend((path, tensor, tensor._version) for tensor in tensors_in(output))

        return hook

    points = [point for group in structure.groups for point in _points(group)]
    with contextlib.ExitStack() as stack, _watched(model, points) as seen:
        producers = (one.path for group in structure.groups for one in group.producers)
        counted = {*layers, *structure.blocks, *producers, *(path for path, _ in points)}
        for path in sorted(counted):
            stack.callback(get_module(model, path).register_forward_hook(ran(path)).remove)
        for path in structure.blocks:
            module = get_module(model, path)
            stack.callback(module.register_forward_pre_hook(begins(path)).remove)
            stack.callback(module.register_forward_hook(ends(path)).remove)
        found.result = model(**inputs)
    found.seen = seen
    return found


def _first_guess(structure: Structure, plain: _Plain) -> Walk:
    """Blocks in the order in which they run, each read by the next alone; or why that cannot be."""
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


def _not_a_chain(structure: Structure, walk: Walk, plain: _Plain) -> str | None:
    if walk.silent:
        return f"'{min(walk.silent)}' is never called itself, only its layers are"
    repeated = next((path for path in structure.blocks if walk.calls.get(path, 0) > 1), None)
    if repeated is not None:
        return f"'{repeated}' runs {walk.calls[repeated]} times"
    spans = list(zip(plain.events[::2], plain.events[1::2], strict=True))
    nested = next((end[0] for begin, end in spans if begin[0] != end[0]), None)
    if nested is not None:
        return f"'{nested}' runs within another block"
    # With the outputs before `order[position]` in place, nothing that reads the block's units has run yet.
    for group in structure.groups:
        if group.key in walk.idle:
            continue
        start = 2 * walk.order.index(structure.first_block(group, walk.order))
        early = next((path for path in group.reads if plain.first.get(path, start) < start), None)
        if early is not None:
            return f"'{early}' runs before the blocks in front of it"
    return None


def _points(group: UnitGroup) -> list[Point]:
    """What masks and repairs see of a group, wherever it is."""
    beside = [] if group.residual is None else [group.residual]
    return [*((path, 0) for path in group.reads), *beside]


def _compare(model: nn.Module, structure: Structure, walk: Walk, plain: _Plain, inputs: Inputs) -> str | None:
    """The first thing that a walk with outputs put in place sees otherwise than the plain pass; None if nothing is.

    Last blocks first: what the other rows left behind in the blocks before is then still there.
    """
    for position in reversed(range(len(walk.order))):
        path = structure.blocks[walk.order[position]]
        try:
            wrong = _compare_at(model, structure, walk, position, plain, inputs)
        except Exception as error:  # placeholders may fit nowhere; any failure says that the walk is not possible
            wrong = f"'{path}' cannot run without the blocks before it ({type(error).__name__})"
        if wrong is not None:
            return wrong
    return None


def _compare_at(
    model: nn.Module, structure: Structure, walk: Walk, position: int, plain: _Plain, inputs: Inputs
) -> str | None:
    order, last = [structure.blocks[index] for index in walk.order], position == len(walk.order) - 1
    path = order[position]
    points: list[Point] = []
    for group in structure.groups:
        if group.key in walk.idle:
            continue
        if not group.coupled and group.block == walk.order[position]:
            points += _points(group)
        elif group.coupled:
            behind = [one for one in group.reads if not any(one.startswith(f"{block}.") for block in structure.blocks)]
            inside = [one for one in group.reads if one.startswith(f"{path}.")]
            points += [(one, 0) for one in (*inside, *(behind if last else ()))]
    points = [point for point in dict.fromkeys(points) if point in plain.seen]
    before = {one: walk.kept(one, plain.outputs[one][0], position) for one in order[:position]}
    with replayed(model, before, walk.rewritten), _watched(model, [*points, (path, "output")]) as seen:
        if last:
            result = model(**inputs)
        else:
            with stopped_after(model, path) as forward:
                forward(inputs)
    expected = {**{point: plain.seen[point] for point in points}, (path, "output"): plain.outputs[path]}
    for point, values in expected.items():
        if not _same(seen.get(point), values):
            return f"'{point[0]}' depends on more than the outputs of the blocks before it"
    if last and not _same(result, plain.result):
        return "the output depends on more than the outputs of the last blocks"
    return None


def _readers(
    model: nn.Module, structure: Structure, walk: Walk, plain: _Plain, inputs: Inputs
) -> dict[str, tuple[int, ...]]:
    """Who reads each tensor that blocks hand on: it is changed, and what all other blocks are called with is compared.

    No block computes anything here: each hands on what it did in the plain pass.
    """
    order = [structure.blocks[index] for index in walk.order]
    outputs = {path: plain.outputs[path][0] for path in order}
    outside = [
        point
        for group in structure.groups
        for point in _points(group)
        if not any(point[0].startswith(f"{path}.") or point[0] == path for path in order)
    ]

    def run(changed: Mapping[str, Any]) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def forward_of(path: str) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                seen[path] = copied((args, kwargs))
                return copied(changed.get(path, outputs[path]))

            return forward

        with in_place_of(model, {path: forward_of(path) for path in order}), _watched(model, outside) as points:
            result = model(**inputs)
        seen[""] = (result, list(points.values()))
        return seen

    try:
        base = run({})
    except Exception:  # blocks do more than hand on their outputs: `_compare` will say so
        return dict(walk.readers)
    generator, found = torch.Generator().manual_seed(0), {}
    for path in order:
        last: list[int] = []
        for number, tensor in enumerate(tensors_in(outputs[path])):
            if not tensor.is_floating_point() or not tensor.numel():
                last.append(len(order))
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            moved = tensor + noise * tensor.float().abs().mean().clamp(min=1.0).to(tensor)

            def change(at: int, value: torch.Tensor, number: int = number, moved: torch.Tensor = moved) -> torch.Tensor:
                return moved if at == number else value

            try:
                seen = run({path: map_tensors(outputs[path], change)})
            except Exception:  # the model looks at values: keep them all
                last.append(len(order))
                continue
            places = [*order, ""]
            reads = [at for at, place in enumerate(places) if not _same(seen.get(place), base.get(place))]
            last.append(max(reads, default=-1))
        found[path] = tuple(last)
    return found


def _pass_of_others(
    model: nn.Module, structure: Structure, inputs: Inputs, plain: _Plain
) -> tuple[Inputs, dict[str, tuple[int | None, ...]]]:
    """Run other rows; returns them, and which dimension of each tensor that blocks hand on grows with their number."""
    samples = len(next(iter(inputs.values())))
    rows = [(samples - 1 - number) % samples for number in range(OTHER_ROWS)]
    reordered = {
        name: tensor.flip(-1) if tensor.dim() == 4 else tensor for name, tensor in _rows(inputs, rows).items()
    }
    lengths = {tensor.shape[1] for tensor in inputs.values() if tensor.dim() == 2}
    shorter = {name: tensor[:, :-1] if tensor.dim() == 2 else tensor for name, tensor in reordered.items()}
    candidates = [shorter, reordered] if len(lengths) == 1 and min(lengths) > 2 else [reordered]
    for number, candidate in enumerate(candidates):
        with contextlib.ExitStack() as stack:
            shapes: dict[str, list[torch.Size]] = {}
            for path in structure.blocks:

                def hook(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                    shapes[path] = [tensor.shape for tensor in tensors_in(output)]  # noqa: B023

                stack.callback(get_module(model, path).register_forward_hook(hook).remove)
            try:
                model(**candidate)
            except Exception:
                if number == len(candidates) - 1:
                    raise
                continue  # a model for one length only
        break
    dims = {
        path: tuple(
            next((dim for dim, (a, b) in enumerate(zip(mine.shape, theirs, strict=False)) if _grows(a, b)), None)
            for mine, theirs in zip(tensors_in(outputs[-1]), shapes.get(path, ()), strict=False)
        )
        for path, outputs in plain.outputs.items()
    }
    return candidate, dims


@contextlib.contextmanager
def _blind(model: nn.Module, structure: Structure) -> Iterator[list[str]]:
    """Layers that run without gradients although they are asked for: under `no_grad`, or in a reentrant checkpoint."""
    found: list[str] = []

    def hook_of(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if not torch.is_grad_enabled():
                found.append(path)

        return hook

    with contextlib.ExitStack() as stack, torch.enable_grad():
        for path in (path for group in structure.groups for path in group.reads):
            stack.callback(get_module(model, path).register_forward_pre_hook(hook_of(path)).remove)
        yield found


def _grows(size: int, other: int) -> bool:
    """Whether a dimension counts samples, or parts of samples: once with ROWS, once with OTHER_ROWS of them."""
    return size * OTHER_ROWS == other * ROWS


def _rows(inputs: Inputs, wanted: Sequence[int]) -> dict[str, torch.Tensor]:
    """These rows of the inputs, from the first again where there are fewer."""
    return {name: tensor[[row % len(tensor) for row in wanted]] for name, tensor in inputs.items()}


@contextlib.contextmanager
def _watched(model: nn.Module, points: Sequence[Point]) -> Iterator[dict[Point, list[Any]]]:
    """Copies of what is seen at these points, call by call."""
    values: dict[Point, list[Any]] = {}

    def before(point: Point) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = (args, kwargs) if point[1] == "call" else args[point[1]]
            values.setdefault(point, []).append(copied(seen))

        return hook

    def after(point: Point) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            values.setdefault(point, []).append(copied(output))

        return hook

    with contextlib.ExitStack() as stack:
        for point in dict.fromkeys(points):
            module = get_module(model, point[0])
            handle = (
                module.register_forward_hook(after(point))
                if point[1] == "output"
                else module.register_forward_pre_hook(before(point), with_kwargs=True)
            )
            stack.callback(handle.remove)
        yield values


def _same(one: Any, other: Any) -> bool:
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
        if not torch.allclose(a.float(), b.float(), rtol=0, atol=float(TOLERANCE * scale), equal_nan=True):
            return False
    return True
