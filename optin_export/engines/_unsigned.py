"""Turn symmetric int8 activations of a Q/DQ graph into unsigned ones, for onnxruntime on an x86 CPU.

onnxruntime's int8 kernels on x86 take unsigned activations. It rewrites signed ones itself, but only pairs that no two
products share; the others run in fp32 with their weights dequantised at every call, slower than the fp32 graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

#: Added to a quantised value and to its zero point. Rounding and limits stay the same, so every value does.
SHIFT = 128


def shift_activations(proto: Any) -> int:
    """Turn int8 Q/DQ pairs of activations into uint8 pairs of the same values, in place; returns how many nodes.

    A pair is not changed if its quantised value is used by anything but DequantizeLinear.
    """
    model = ir.from_proto(proto)
    shifted: dict[ir.Value, ir.Value] = {}
    changed = 0
    for node in model.graph:
        if node.op_type != "QuantizeLinear" or not _has_int8_zero(node) or node.outputs[0].is_graph_output():
            continue
        value = node.outputs[0]
        after = value.consumers()
        if not all(one.op_type == "DequantizeLinear" and _has_int8_zero(one) for one in after):
            continue
        for one in (node, *after):
            zero = one.inputs[2]
            if zero not in shifted:  # other nodes may still read the int8 one
                shifted[zero] = _unsigned(zero)
                model.graph.register_initializer(shifted[zero])
            one.replace_input_with(2, shifted[zero])
            changed += 1
        value.dtype = ir.DataType.UINT8
    proto.Clear()
    ir.serde.serialize_model_into(proto, model)
    return changed


def _has_int8_zero(node: ir.Node) -> bool:
    zero = node.inputs[2] if len(node.inputs) == 3 else None
    return zero is not None and zero.const_value is not None and zero.dtype == ir.DataType.INT8


def _unsigned(zero: ir.Value) -> ir.Value:
    values = zero.const_value.numpy().astype(np.int32) + SHIFT
    return ir.Value(name=f"{zero.name}.unsigned", const_value=ir.tensor(np.asarray(values, np.uint8)))
