"""A model's inputs and outputs: names, types and dims, from the ONNX graph or the record of a TensorRT engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optin_export.errors import InputError
from optin_export.export import read_graph

#: ONNX element types by Triton's names (model_config.proto, DataType).
_TYPES = {
    1: "TYPE_FP32",
    2: "TYPE_UINT8",
    3: "TYPE_INT8",
    5: "TYPE_INT16",
    6: "TYPE_INT32",
    7: "TYPE_INT64",
    9: "TYPE_BOOL",
    10: "TYPE_FP16",
    11: "TYPE_FP64",
    16: "TYPE_BF16",
}


@dataclass(frozen=True)
class Tensor:
    """One input or output. type: Triton's name. dims: the batch first; -1 for any size."""

    name: str
    type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def of_onnx(path: Path) -> Signature:
    """The signature of an ONNX graph. Raises InputError if it cannot be read or Triton lacks a type."""
    graph = read_graph(path).graph
    # Weights may be listed among the inputs of old graphs.
    weights = {tensor.name for tensor in graph.initializer}
    inputs = tuple(_tensor(value) for value in graph.input if value.name not in weights)
    return Signature(inputs, tuple(_tensor(value) for value in graph.output))


def of_engine(path: Path, profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]]) -> Signature:
    """The signature of a TensorRT engine built from the graph `path`, with the dims its profiles allow.

    profiles: per optimization profile and input [min, opt, max], each [batch, ...]. Networks are strongly typed: the
    engine's types are those of the graph.
    """
    signature = of_onnx(path)
    shapes = {
        tensor.name: [tuple(shape) for profile in profiles for shape in profile[tensor.name]]
        for tensor in signature.inputs
    }
    inputs = tuple(
        replace(
            tensor,
            dims=tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes[tensor.name], strict=True)),
        )
        for tensor in signature.inputs
    )
    # An output's dim that the graph leaves open is fixed only if all inputs are.
    if all(-1 not in tensor.dims for tensor in inputs):
        batch = inputs[0].dims[0]
        outputs = tuple(replace(tensor, dims=(batch, *tensor.dims[1:])) for tensor in signature.outputs)
        return Signature(inputs, outputs)
    return Signature(inputs, signature.outputs)


def _tensor(value: Any) -> Tensor:
    kind = value.type.tensor_type
    if kind.elem_type not in _TYPES:
        raise InputError(
            f"'{value.name}' has ONNX element type {kind.elem_type}", "Triton has no such type", "export another type"
        )
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    return Tensor(value.name, _TYPES[kind.elem_type], dims)
