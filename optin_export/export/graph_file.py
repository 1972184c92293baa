"""Read an untrusted ONNX graph: no more bytes than it holds, and nothing from outside its folder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optin_export.errors import InputError
from optin_export.workdir.onnx_files import MAX_BYTES
from optin_export.workdir.opening import regular

#: Maximum elements of a tensor whose shape, but not its values, is in the graph (ConstantOfShape, Expand ...).
MAX_ELEMENTS = 2**28
MAX_DEPTH = 20
#: A provider's context node names a file, or holds a compiled engine that runs as code.
_OPAQUE = ("EPContext", "TRTEngineOp")
#: Bits of an element by ONNX type, for types whose values fill whole bytes in `raw_data`.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}


def read_graph(path: Path) -> Any:
    """Read the ModelProto of an ONNX file; external weights are checked, but not loaded.

    Raises InputError for a file that is not valid, refers to files outside its folder, or claims more bytes than exist.
    The graph's computation is not checked: running a graph can take any amount of memory.
    """
    import onnx

    try:
        size = regular(path).stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"it has {size} bytes; an ONNX file holds at most 2 GiB")
        model = onnx.load(path, load_external_data=False)
        for tensor in _tensors(model.graph, 0):
            _check_tensor(tensor, path.parent)
        for function in model.functions:
            for tensor in _tensors(function, 0):
                _check_tensor(tensor, path.parent)
        _check_ends(model.graph)
    except InputError:
        raise
    except Exception as error:  # protobuf's decoders raise their own types
        why = str(error).strip() or f"it is no ONNX file ({type(error).__name__})"
        raise InputError(
            f"cannot read the graph {path}", why[:300], "give the onnx/ folder of a finished run"
        ) from None
    return model


def _tensors(graph: Any, depth: int) -> Iterator[Any]:
    """Every tensor in a graph or function and its subgraphs."""
    if depth > MAX_DEPTH:
        raise ValueError(f"graphs are nested more than {MAX_DEPTH} levels")
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        if node.op_type in _OPAQUE:
            raise ValueError(f"it holds a {node.op_type}, which is compiled code")
        shape = _written_shape(node, graph)
        if shape is not None and math.prod(shape) > MAX_ELEMENTS:
            raise ValueError(f"{node.op_type} creates a tensor of shape {shape[:8]}")
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _tensors(inner, depth + 1)


def _written_shape(node: Any, graph: Any) -> list[int] | None:
    """The shape that a constant of the graph gives to a node, for operators that create tensors."""
    position = {"ConstantOfShape": 0, "Expand": 1}.get(node.op_type)
    if position is None or len(node.input) <= position:
        return None
    import onnx

    name = node.input[position]
    tensors = [tensor for tensor in getattr(graph, "initializer", ()) if tensor.name == name]
    for other in graph.node:
        if other.op_type == "Constant" and name in other.output:
            tensors += [attribute.t for attribute in other.attribute if attribute.name == "value"]
    if not tensors or len(tensors[0].dims) != 1 or tensors[0].dims[0] > 16:
        return None
    _check_tensor(tensors[0])
    return [max(int(size), 0) for size in onnx.numpy_helper.to_array(tensors[0])]


def _check_tensor(tensor: Any, folder: Path | None = None) -> None:
    """Check one tensor. folder: the graph's folder, where external values may lie; None: they are not allowed."""
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"'{tensor.name[:60]}' has a negative dimension")
    count = math.prod(tensor.dims)
    bits = _BITS.get(tensor.data_type)
    if tensor.data_location == 1 or len(tensor.external_data):
        _check_external(tensor, folder, count * bits if bits is not None else None)
        return
    if tensor.HasField("raw_data") and bits is not None and len(tensor.raw_data) * 8 != count * bits:
        shape = list(tensor.dims)[:8]
        raise ValueError(f"'{tensor.name[:60]}' has the shape {shape} and {len(tensor.raw_data)} bytes of values")
    # Values stored in lists: at least one list element per value, or (packed types) per few values.
    held = sum(len(getattr(tensor, name)) for name in _LISTS)
    if not tensor.HasField("raw_data") and count > 16 * max(held, 1):
        raise ValueError(f"'{tensor.name[:60]}' has the shape {list(tensor.dims)[:8]} and {held} values")


def _check_external(tensor: Any, folder: Path | None, bits: int | None) -> None:
    """Check external values: a regular file in the graph's folder that holds as many values as the shape says."""
    name = f"the values of '{tensor.name[:60]}'"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    place = entries.get("location", "")
    if folder is None or bits is None or any(tensor.HasField(field) for field in ("raw_data",)):
        raise ValueError(f"{name} are in another file, which is not allowed for this tensor")
    if not place or Path(place).name != place or place in (".", "..") or "\\" in place or "\0" in place:
        raise ValueError(f"{name} are outside the graph's folder: '{place[:80]}'")
    file = folder / place
    if not file.is_file() or file.is_symlink():
        raise ValueError(f"{name} lie in '{place[:80]}', which is not a file next to the graph")
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
    if offset < 0 or length * 8 != bits or offset + length > file.stat().st_size:
        shape = list(tensor.dims)[:8]
        raise ValueError(f"{name} have the shape {shape}, but '{place[:80]}' holds {length} bytes of them at {offset}")


_LISTS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def _check_ends(graph: Any) -> None:
    """Check that inputs and outputs are named tensors."""
    if not graph.input or not graph.output:
        raise ValueError("it has no inputs or no outputs")
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        if not value.name or not value.type.HasField("tensor_type") or not kind.HasField("shape") or not kind.shape.dim:
            raise ValueError(f"its input or output '{value.name[:60]}' is not a tensor with a batch dimension")
