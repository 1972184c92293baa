"""Shapes of a TensorRT engine: the profile that holds some inputs, padding to it, and what is cut off afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optin_export.errors import ParityError

Shape = tuple[int, ...]
#: Input shapes at one shipped batch size, by name.
Shapes = Mapping[str, Shape]
#: (min, opt, max) of every input.
Profile = dict[str, tuple[Shape, Shape, Shape]]
#: Output name -> dynamic axis -> the input, and its axis of the same length.
Axes = dict[str, dict[int, tuple[str, int]]]


def fitted(
    profiles: Sequence[Mapping[str, Sequence[Shape]]], inputs: Mapping[str, np.ndarray]
) -> tuple[int, dict[str, np.ndarray]]:
    """The smallest profile that holds `inputs`, and the inputs padded with zeros to its minimum.

    Raises ParityError for inputs outside every profile.
    """
    order = sorted(
        range(len(profiles)), key=lambda number: [np.prod(ranges[2]) for ranges in profiles[number].values()]
    )
    for number in order:
        profile = profiles[number]
        if all(
            array.ndim == len(profile[name][2])
            and all(size <= most for size, most in zip(array.shape, profile[name][2], strict=True))
            for name, array in inputs.items()
        ):
            return number, {name: _padded(array, profile[name][0]) for name, array in inputs.items()}
    given = {name: array.shape for name, array in inputs.items()}
    held = [{name: tuple(ranges[2]) for name, ranges in profile.items()} for profile in profiles]
    raise ParityError(f"no optimization profile covers {given}", f"the largest are {held}", "build for this shape")


def _padded(array: np.ndarray, least: Shape) -> np.ndarray:
    missing = [max(0, wanted - size) for size, wanted in zip(array.shape, least, strict=True)]
    return np.pad(array, [(0, more) for more in missing]) if any(missing) else array


def dynamic_axes(model: Any) -> Axes:
    """The axes of an ONNX model's outputs that share a declared dimension with an axis of an input.

    They are matched by names ("batch", "sequence"), never by sizes: a sequence may be as long as an embedding.
    """
    inputs = {
        dimension.dim_param: (one.name, axis)
        for one in reversed(model.graph.input)
        for axis, dimension in enumerate(one.type.tensor_type.shape.dim)
        if dimension.dim_param
    }
    return {
        one.name: {
            axis: inputs[dimension.dim_param]
            for axis, dimension in enumerate(one.type.tensor_type.shape.dim)
            if dimension.dim_param in inputs
        }
        for one in model.graph.output
    }


def read_axes(entries: Mapping[str, Sequence[Sequence[Any]]]) -> Axes:
    """The axes as `write_axes` wrote them."""
    return {name: {int(axis): (str(source), int(at)) for axis, source, at in one} for name, one in entries.items()}


def write_axes(axes: Axes) -> dict[str, list[list[Any]]]:
    """{output: [[axis, input, axis of the input]]}, for JSON."""
    return {name: [[axis, *source] for axis, source in one.items()] for name, one in axes.items()}


def cut(array: np.ndarray, axes: Mapping[int, tuple[str, int]], given: Mapping[str, Shape]) -> np.ndarray:
    """An output without padding: every dynamic axis is cut to the length of the input's axis.

    axes: of this output (see `dynamic_axes`). given: the shapes of the inputs before they were padded.
    """
    for axis, (name, at) in axes.items():
        array = array[(slice(None),) * axis + (slice(given[name][at]),)]
    return array
