"""Symmetric int8 activations of a Q/DQ graph as unsigned ones, for onnxruntime on an x86 CPU.

Its int8 kernels there take unsigned activations. onnxruntime rewrites signed ones itself, but only pairs that no two
products share; the others run in fp32 with their weights dequantised at every call, slower than the fp32 graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

#: What is added to a quantised value and to its zero point. Rounding and limits stay the same, so every value does.
SHIFT = 128


def shift_activations(model: Any) -> int:
    """Turn int8 Q/DQ pairs of activations into uint8 pairs of the same values, in place; returns how many nodes.

    A pair is not changed if its quantised value is used by anything but DequantizeLinear.
    """
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    shifted: dict[str, str] = {}
    changed, retyped = 0, set()

    def unsigned(name: str) -> str:
        """The zero point of this name as uint8; others may still read the int8 one."""
        if name not in shifted:
            values = numpy_helper.to_array(constants[name]).astype(np.int32) + SHIFT
            shifted[name] = f"{name}.unsigned"
            graph.initializer.append(numpy_helper.from_array(values.astype(np.uint8), shifted[name]))
        return shifted[name]

    for node in graph.node:
        if node.op_type != "QuantizeLinear" or len(node.input) < 3 or node.input[2] not in constants:
            continue
        after = readers.get(node.output[0], [])
        pairs = [one for one in after if _dequantizes(one, node.output[0], constants.__contains__)]
        if (
            constants[node.input[2]].data_type != TensorProto.INT8
            or node.output[0] in outputs
            or len(pairs) != len(after)
        ):
            continue
        for one in (node, *pairs):
            one.input[2] = unsigned(one.input[2])
            changed += 1
        retyped.add(node.output[0])
    # The others' shapes are needed: without them onnxruntime fuses less.
    for value in graph.value_info:
        if value.name in retyped:
            value.type.tensor_type.elem_type = TensorProto.UINT8
    return changed


def _dequantizes(node: Any, name: str, is_constant: Callable[[str], bool]) -> bool:
    return (
        node.op_type == "DequantizeLinear"
        and node.input[0] == name
        and len(node.input) == 3
        and is_constant(node.input[2])
    )
