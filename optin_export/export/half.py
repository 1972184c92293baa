"""fp16 and bf16: weights and products in half precision, sums and divisions in fp32, inputs and outputs unchanged.

The rules below decide which nodes stay in fp32; then every edge between the two precisions gets one Cast. The result
is strongly typed, as TensorRT requires: the types of every node agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes import common as passes

from optin_export.errors import InputError

#: Element type and largest value.
HALF = {"fp16": (ir.DataType.FLOAT16, 65504.0), "bf16": (ir.DataType.BFLOAT16, 3.3895313892515355e38)}
#: The first opset in which convolutions take bf16.
BF16_OPSET = 22
#: A constant above this means "masked": any large number works.
FILL = 1e30
#: Operators with normalised outputs, which fit the range of a half.
_NORMALISED = {
    "LayerNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "RMSNormalization",
    "LpNormalization",
    "Softmax",
    "LogSoftmax",
}
#: Operators that overflow, lose small terms, or do not support half precision.
_STATISTICS = {"Pow", "Sqrt", "Reciprocal", "Exp", "Log", "CumSum", "GlobalAveragePool", "GlobalLpPool"}
_FLOAT_ONLY = {
    "Range",
    "NonMaxSuppression",
    "GridSample",
    "Cast",
    "Constant",
    "RandomNormal",
    "RandomUniform",
    "Resize",
}
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Pow", "Sqrt", "Clip", "Max", "Min", "Floor", "Ceil", "Round"}
#: Operators that stay in fp32 if all their inputs do.
_FOLLOW = _ELEMENTWISE | {
    "Reciprocal",
    "Expand",
    "Unsqueeze",
    "Squeeze",
    "Reshape",
    "Transpose",
    "Identity",
    "Where",
    "Slice",
    "Concat",
    "Gather",
}
_INTEGERS = {ir.DataType.INT64, ir.DataType.INT32}


def to_half(proto: Any, precision: str, folder: Path | str = "") -> dict[str, int]:
    """Rewrite the fp32 `proto` (a ModelProto) in place; returns how many nodes stay in fp32, by operator.

    precision: 'fp16' or 'bf16'. folder: the folder of the model's file, if it was read without its external weights;
    afterwards all values are in the model. Raises InputError for a graph with control flow.
    """
    element, largest = HALF[precision]
    if precision == "bf16":
        proto.CopyFrom(onnx.version_converter.convert_version(proto, BF16_OPSET))
    model = ir.from_proto(proto)
    _refuse_control_flow(model.graph)
    ir.external_data.set_base_dir(model.graph, folder)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    kept = _kept(model.graph, largest)
    _set_types(model.graph, kept, element, largest)
    passes.RemoveUnusedNodesPass()(model)
    ir.external_data.load_to_model(model)
    proto.Clear()
    ir.serde.serialize_model_into(proto, model)
    return dict(sorted(Counter(node.op_type for node in kept).items()))


def _refuse_control_flow(graph: ir.Graph) -> None:
    for node in graph:
        if any(one.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for one in node.attributes.values()):
            raise InputError(
                f"the graph cannot be written in half precision: it has the control flow {node.op_type}",
                "only graphs without branches and loops are converted",
                "use export.precision: fp32",
            )


# Rules for nodes that stay in fp32: (node, nodes kept so far) -> whether it stays.
_Rule = Callable[[ir.Node, Collection[ir.Node]], bool]


def _by_itself(node: ir.Node, kept: Collection[ir.Node]) -> bool:
    """Norms, Softmax, reductions, and operators that do not support half precision."""
    return node.op_type in _NORMALISED | _STATISTICS | _FLOAT_ONLY or _reduces(node)


def _squares(node: ir.Node, kept: Collection[ir.Node]) -> bool:
    """The input of a reduction, if it is a square or a difference from a mean."""
    used = node.outputs[0].consumers()
    if node.op_type == "Mul":
        return node.inputs[0] is node.inputs[1] and any(_reduces(other) for other in used)
    return node.op_type == "Sub" and any(
        other in kept and (_reduces(other) or other.op_type in ("Mul", "Pow")) for other in used
    )


def _follows(node: ir.Node, kept: Collection[ir.Node]) -> bool:
    """Nodes between a statistic and its use: adding epsilon to a variance, the root, the division by it."""
    if node.op_type not in _FOLLOW:
        return False
    known = [_is_statistic(value.producer(), kept) for value in _floats(node.inputs) if value.const_value is None]
    return any(known) if node.op_type in ("Sub", "Div", "Mul") else bool(known) and all(known)


def _makes_indices(node: ir.Node, kept: Collection[ir.Node]) -> bool:
    """Arithmetic that results in an integer: a half cannot distinguish positions above 2048."""
    if node.op_type not in _ELEMENTWISE:
        return False
    for other in node.outputs[0].consumers():
        if other.op_type == "Cast" and other.outputs[0].dtype in _INTEGERS:
            return True
        if other.op_type in ("Floor", "Ceil", "Round"):
            return True
        if other in kept and _makes_indices(other, kept):
            return True
    return False


RULES: tuple[_Rule, ...] = (_by_itself, _squares, _follows, _makes_indices)


def _kept(graph: ir.Graph, largest: float) -> set[ir.Node]:
    """Nodes that stay in fp32: rules depend on one another, so they run until none finds more."""
    floats = [node for node in graph if any(_floats((*node.inputs, *node.outputs)))]
    # Nodes that read a constant which a half cannot hold, and which is not a filler, stay in fp32.
    beyond = [value for value in _floats(graph.initializers.values()) if _out_of_range(value, largest)]
    kept = {node for value in beyond for node in value.consumers()}
    while True:
        found = {
            node
            for node in (*floats, *reversed(floats))
            if node not in kept and any(rule(node, kept) for rule in RULES)
        }
        if not found:
            return kept
        kept |= found


def _floats(values: Iterable[ir.Value | None]) -> list[ir.Value]:
    return [value for value in values if value is not None and value.dtype == ir.DataType.FLOAT]


def _reduces(node: ir.Node) -> bool:
    return node.op_type.startswith("Reduce")


def _is_statistic(node: ir.Node | None, kept: Collection[ir.Node]) -> bool:
    return node is not None and node in kept and node.op_type not in _NORMALISED | {"Cast", "Resize"}


# The rewrite.


def _set_types(graph: ir.Graph, kept: Collection[ir.Node], element: ir.DataType, largest: float) -> None:
    """Give every node its assigned type, with one Cast per value and direction, and half constants."""
    floats = set(
        _floats((*graph.inputs, *graph.initializers.values(), *(one for node in graph for one in node.outputs)))
    )
    made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def cast(value: ir.Value, kind: ir.DataType) -> ir.Node:
        name = f"{value.name}.{'half' if kind == element else 'full'}"
        output = ir.Value(name=name, type=ir.TensorType(kind), shape=value.shape)
        return ir.node("Cast", [value], {"to": kind}, outputs=[output], name=name)

    def of_type(value: ir.Value, kind: ir.DataType, node: ir.Node) -> ir.Value:
        if value.dtype == kind:
            return value
        if (value, kind) not in made:
            if value.const_value is not None:
                made[value, kind] = _half_constant(value, element, largest)
                graph.register_initializer(made[value, kind])
            else:
                graph.insert_before(node, before := cast(value, kind))
                made[value, kind] = before.outputs[0]
        return made[value, kind]

    for node in list(graph):
        kind = ir.DataType.FLOAT if node in kept else element
        for index, value in enumerate(node.inputs):
            if value in floats:
                node.replace_input_with(index, of_type(value, kind, node))
        if kind == ir.DataType.FLOAT:
            continue
        for value in node.outputs:
            if value not in floats:
                continue
            value.dtype = element
            if node.op_type == "ConstantOfShape":
                fill = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_halved(fill, element, largest)))
            if value.is_graph_output():
                after = cast(value, ir.DataType.FLOAT)
                made[value, ir.DataType.FLOAT] = after.outputs[0]
                after.outputs[0].name, value.name = value.name, f"{value.name}.half"
                graph.insert_after(node, after)
                graph.outputs[graph.outputs.index(value)] = after.outputs[0]


def _out_of_range(value: ir.Value, largest: float) -> bool:
    """Whether a constant has a value that a half cannot hold and that is not a filler."""
    array = _array(value)
    if not _passes(array, largest):
        return False
    size = np.abs(array)
    return bool(((size > largest) & (size < FILL)).any())


def _half_constant(value: ir.Value, element: ir.DataType, largest: float) -> ir.Value:
    name = f"{value.name}.half"
    tensor = ir.tensor(_halved(_array(value), element, largest), name=name)
    return ir.Value(name=name, type=ir.TensorType(element), shape=tensor.shape, const_value=tensor)


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _halved(array: np.ndarray, element: ir.DataType, largest: float) -> np.ndarray:
    """The values in half precision; fillers beyond its range become half of its largest value, so that sums with them
    stay finite (a row of -inf would make Softmax NaN). Infinities are not changed."""
    if _passes(array, largest):
        array = np.where(np.isfinite(array) & (np.abs(array) > largest), np.copysign(largest / 2, array), array)
    return array.astype(element.numpy())


def _passes(array: np.ndarray, largest: float) -> bool:
    """Whether any value exceeds `largest`, without copying the array: weights may be gigabytes."""
    return array.size > 0 and not (array.max() <= largest and array.min() >= -largest)
