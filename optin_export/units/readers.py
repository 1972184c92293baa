"""Readers of the tensors that blocks return, and their sample dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.units.capture import Point, capture, captured
from optin_export.units.declare import Structure
from optin_export.units.execution_order import Walk
from optin_export.units.hooks import in_place_of
from optin_export.units.outputs import copied, map_tensors, tensors_in
from optin_export.units.passes import Inputs, Plain, points_of, same, take_rows

#: Rows of the walk, and of the pass in between, which leaves other values in the model.
ROWS, OTHER_ROWS = 2, 3
#: Relative difference between a sample in a batch and alone, because sums are computed in another order.
LOOSE = 1e-2


def find_readers(
    model: nn.Module, structure: Structure, walk: Walk, plain: Plain, inputs: Inputs
) -> dict[str, tuple[int, ...]]:
    """Find the readers of each tensor that blocks return: change it, and compare the arguments of all other blocks.

    No block computes anything here: each returns its output of the plain pass.
    """
    order = [structure.blocks[index] for index in walk.order]
    outputs = {path: plain.outputs[path][0] for path in order}
    outside = [
        point
        for group in structure.groups
        for point in points_of(group)
        if not any(point[0].startswith(f"{path}.") or point[0] == path for path in order)
    ]

    def run(changed: Mapping[str, Any]) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def forward_of(path: str) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                seen[path] = copied((args, kwargs))
                return copied(changed.get(path, outputs[path]))

            return forward

        with in_place_of(model, {path: forward_of(path) for path in order}), captured(model, outside) as points:
            result = model(**inputs)
        seen[""] = (result, list(points.values()))
        return seen

    try:
        base = run({})
    except Exception:  # blocks do more than return their outputs: `_compare` will report it
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
            reads = [at for at, place in enumerate(places) if not same(seen.get(place), base.get(place))]
            last.append(max(reads, default=-1))
        found[path] = tuple(last)
    return found


def pass_of_others(
    model: nn.Module, structure: Structure, inputs: Inputs, plain: Plain
) -> tuple[Inputs, dict[str, tuple[int | None, ...]]]:
    """Run other rows; returns them, and which dimension grows with their number.

    Covers each tensor that blocks return, and the inputs of layers that read units.
    """
    samples = len(next(iter(inputs.values())))
    rows = [(samples - 1 - number) % samples for number in range(OTHER_ROWS)]
    reordered = {
        name: tensor.flip(-1) if tensor.dim() == 4 else tensor for name, tensor in take_rows(inputs, rows).items()
    }
    lengths = {tensor.shape[1] for tensor in inputs.values() if tensor.dim() == 2}
    shorter = {name: tensor[:, :-1] if tensor.dim() == 2 else tensor for name, tensor in reordered.items()}
    readers = [group.consumer for group in structure.groups if group.consumer not in structure.blocks]
    candidates = [shorter, reordered] if len(lengths) == 1 and min(lengths) > 2 else [reordered]
    for number, candidate in enumerate(candidates):
        try:
            shapes = _shapes(model, structure.blocks, readers, candidate)
            break
        except Exception:
            if number == len(candidates) - 1:
                raise  # otherwise it is a model for one length only
    mine = {path: list(tensors_in(outputs[-1])) for path, outputs in plain.outputs.items()}
    mine |= {path: list(tensors_in(plain.seen[(path, 0)][-1])) for path in readers if (path, 0) in plain.seen}
    dims = {
        path: tuple(
            next((dim for dim, (a, b) in enumerate(zip(one.shape, other, strict=False)) if _grows(a, b)), None)
            for one, other in zip(tensors, shapes.get(path, ()), strict=False)
        )
        for path, tensors in mine.items()
    }
    return candidate, dims


def _shapes(
    model: nn.Module, blocks: Sequence[str], readers: Sequence[str], inputs: Inputs
) -> dict[str, list[torch.Size]]:
    """The shapes of the blocks' outputs, and of the readers' inputs."""
    shapes: dict[str, list[torch.Size]] = {}

    def after(path: str, args: Any, output: Any) -> None:
        shapes[path] = [tensor.shape for tensor in tensors_in(output)]

    def before(path: str, args: Any, kwargs: Any) -> None:
        shapes[path] = [args[0].shape]

    with capture(model, dict.fromkeys(readers, before), dict.fromkeys(blocks, after)):
        model(**inputs)
    return shapes


def check_samples(model: nn.Module, structure: Structure, walk: Walk, plain: Plain, inputs: Inputs) -> None:
    """Check that the parts of a sample in the first dimension (windows, patches, tokens) are consecutive.

    Masks and losses per sample rely on it. Raises InputError if a single sample does not equal the first parts.
    """
    points: list[Point] = [(path, "output") for path in plain.outputs]
    points += [(group.consumer, 0) for group in structure.groups if (group.consumer, 0) in plain.seen]
    expected = {}
    for point in dict.fromkeys(points):
        value = plain.outputs[point[0]] if point[1] == "output" else plain.seen[point]
        tensor = next(tensors_in(value[-1]), None)
        if tensor is not None and tensor.dim() and walk.sample_dim(point[0]) == 0 and len(tensor) > ROWS:
            expected[point] = tensor[: len(tensor) // ROWS]
    if not expected:
        return
    with captured(model, list(expected)) as seen:
        model(**take_rows(inputs, [0]))
    for point, tensor in expected.items():
        alone = next(tensors_in(seen[point][-1])) if point in seen else None
        if alone is None or not same(alone, tensor, LOOSE):
            raise InputError(
                f"the rows of '{point[0]}' cannot be distinguished by sample",
                "its first dimension is not only samples, and the rows of one sample are not contiguous",
                "make the samples the first dimension there",
            )


def _grows(size: int, other: int) -> bool:
    """Whether a dimension counts samples, or parts of samples: once with ROWS, once with OTHER_ROWS of them."""
    return size * OTHER_ROWS == other * ROWS
