"""Outputs of modules: a tensor, or tensors in tuples, lists, dictionaries and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch


def map_tensors(output: Any, change: Callable[[int, torch.Tensor], Any]) -> Any:
    """The same containers with `change(number, tensor)` in place of every tensor; tensors are numbered in order.

    Containers are copied, so that later changes of the model's own lists and dictionaries do not affect them. Objects
    of other kinds are returned unchanged.
    """
    numbers = itertools.count()

    def changed(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return change(next(numbers), part)
        if isinstance(part, MutableMapping):
            new = copy.copy(part)
            for key, value in part.items():
                new[key] = changed(value)
            return new
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*map(changed, part))
        if isinstance(part, list | tuple):
            return type(part)(map(changed, part))
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            same = copy.copy(part)
            for field in dataclasses.fields(part):
                object.__setattr__(same, field.name, changed(getattr(part, field.name)))
            return same
        return part

    return changed(output)


def tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """Every tensor of an output, in the order of `map_tensors`."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_in(getattr(output, field.name))


def tensor_of(output: Any) -> torch.Tensor:
    """A block's hidden states: the output itself, or the first tensor of a tuple, list, dictionary or dataclass."""
    return output if isinstance(output, torch.Tensor) else next(tensors_in(output))


def copied(output: Any) -> Any:
    """The same values in new tensors (in the graph, if gradients are enabled)."""
    return map_tensors(output, lambda _, tensor: tensor.clone())


def placeholder(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros of the same shape that occupy no memory; flags and indices are kept, because zero could be out of range."""
    return tensor.new_zeros(()).expand(tensor.shape) if tensor.is_floating_point() else tensor


class Calls(list[Any]):
    """The values at a point that runs several times in one forward pass: one entry per call, in order."""


def calls_of(value: Any) -> list[Any]:
    """The values, call by call; a single call as a list of one."""
    return list(value) if isinstance(value, Calls) else [value]
