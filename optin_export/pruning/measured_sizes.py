"""Find the sizes in a module's code that count units, by what changes when some units get other values.

Between the layers that make units and those that read them, an entry of a tensor belongs to one unit. So the entries
along a dimension that change with some units are theirs, and the others are what the dimension has without them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from optin_export.models import Inputs
from optin_export.pruning.code_sizes import Key, SizedCall, SizedCalls, size_name
from optin_export.pruning.rebuild import copied
from optin_export.units import UnitGroup, capture, get_module

#: (sizes as given, per position the size with all units and without some).
Seen = tuple[tuple[Any, ...], list[tuple[int, int]]]


def measured_sizes(
    model: nn.Module, group: UnitGroup, removed: Sequence[int], variants: Sequence[Inputs]
) -> list[tuple[tuple[str, int], ...]]:
    """Sizes of the code around the group's layers that count units, with their value per unit, 0 for one that differs
    between the variants and follows from the others. Two sets per module that may hold the code, the innermost first:
    without and with the other sizes of the same calls.

    removed: units that get other values to measure this.
    """
    other = _with_other_values(model, group, removed)
    found = []
    for path in _around(model, group, variants[0]):
        seen = [one for inputs in variants for one in _compared(model, other, path, inputs)]
        for whole in (False, True):
            sizes = tuple(_sizes(path, seen, group.count, group.count - len(removed), whole))
            if sizes and sizes not in found:
                found.append(sizes)
    return found


def _around(model: nn.Module, group: UnitGroup, inputs: Inputs) -> list[str]:
    """The modules that run around all layers of the group, the innermost first; two at most."""
    paths = [*(one.path for one in group.producers), *group.reads]
    path = posixpath.commonpath([f"/{one.rpartition('.')[0].replace('.', '/')}" for one in paths])
    parts = [part for part in path.split("/") if part]
    outer = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
    ran: set[str] = set()
    with torch.no_grad(), capture(model, dict.fromkeys(outer, lambda path, args, kwargs: ran.add(path))):
        model(**inputs)
    return [one for one in outer if one in ran][:2]


def _with_other_values(model: nn.Module, group: UnitGroup, units: Sequence[int]) -> nn.Module:
    """A copy of the model with random rows and table entries of these units."""
    other, generator = copied(model), torch.Generator().manual_seed(0)

    def redraw(tensor: torch.Tensor | None, dim: int, entries: Sequence[int]) -> None:
        if tensor is None or not tensor.is_floating_point():
            return
        part = tensor.detach().index_select(dim, torch.tensor(entries, device=tensor.device))
        noise = torch.randn(part.shape, generator=generator).to(part)
        # As large as the whole tensor: an entry must not be lost in rounding.
        tensor.data.index_copy_(
            dim, torch.tensor(entries, device=tensor.device), part + noise * (tensor.detach().abs().mean() + 1e-3)
        )

    for producer in group.producers:
        layer: Any = get_module(other, producer.path)
        rows = group.rows_of(producer, units)
        redraw(layer.weight, 0, rows)
        redraw(layer.bias, 0, rows)
    for table in group.tables:
        where, _, name = table.path.rpartition(".")
        redraw(getattr(get_module(other, where), name), table.dim, group.entries_of(table, units))
    return other


def _compared(model: nn.Module, other: nn.Module, path: str, inputs: Inputs) -> Iterator[dict[Key, Seen]]:
    """Per run of the module, its calls with sizes, compared between the two models; without the later runs of a module
    that reads what it computed before, in which everything changes."""
    firsts, seconds = (_results(one, path, inputs) for one in (model, other))
    for run, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        found = {
            key: (sizes, [_kept(a, b, dim) for (a, dim), (b, _) in zip(results, second[key][1], strict=True)])
            for key, (sizes, results) in first.items()
            if key in second
        }
        if run == 0 or any(size != kept for _, sizes in found.values() for size, kept in sizes):
            yield found


def _results(
    model: nn.Module, path: str, inputs: Inputs
) -> list[dict[Key, tuple[tuple[Any, ...], list[tuple[torch.Tensor, int]]]]]:
    """Per run of the module and call, the sizes, and per size the result and the dimension that it describes."""
    runs: list[dict[Key, Any]] = []
    modes: list[SizedCalls] = []

    def see(call: SizedCall) -> Any:
        result = call.run(call.sizes)
        runs[-1][call.key] = call.sizes, [(one.detach().clone(), dim) for one, dim in call.described(result)]
        return result

    def begin(path: str, args: Any, kwargs: Any) -> None:
        runs.append({})
        modes.append(SizedCalls(get_module(model, path), (args, kwargs), see))
        modes[-1].__enter__()

    def end(path: str, args: Any, output: Any) -> None:
        modes.pop().__exit__(None, None, None)

    with torch.no_grad(), capture(model, {path: begin}, {path: end}):
        try:
            model(**inputs)
        finally:
            while modes:
                end(path, None, None)
    return runs


def _kept(one: torch.Tensor, other: torch.Tensor, dim: int) -> tuple[int, int]:
    """The entries along a dimension, and how many of them stay the same; all, if none or every one changes."""
    size = one.shape[dim]
    changed = int((one != other).movedim(dim, 0).reshape(size, -1).any(1).sum())
    return size, size - changed if changed < size else size


def _sizes(
    path: str, seen: Sequence[Mapping[Key, Seen]], count: int, left: int, whole: bool
) -> Iterator[tuple[str, int]]:
    for key in sorted(set[Key]().union(*seen)):
        calls = [one[key] for one in seen if key in one]
        if len({len(sizes) for sizes, _ in calls}) > 1:
            continue
        given = calls[0][0]
        pairs = [{sizes[position] for _, sizes in calls} for position in range(len(given))]
        counts = [any(size != kept for size, kept in one) for one in pairs]
        is_open = any(type(size) is int and size == -1 for size in given)
        for position, one in enumerate(pairs):
            if type(given[position]) is int and given[position] == -1:
                continue
            if not counts[position]:
                if whole and any(counts) and len(one) == 1:
                    yield size_name(path, key, position, whole=True), one.pop()[0]
            elif all(size % count == 0 and size // count * left == kept for size, kept in one):
                if len(one) == 1:
                    yield size_name(path, key, position), one.pop()[0] // count
                elif not is_open and key[0] != "split":
                    yield size_name(path, key, position), 0
                    is_open = True
