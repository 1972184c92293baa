"""fp16 and bf16: weights and products in half precision, what sums or divides in fp32, inputs and outputs unchanged.

Which nodes stay in fp32 is decided by the rules below; then every edge between the two gets one Cast. The result is
strongly typed: every node's types agree by themselves, as TensorRT demands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from optin_export.errors import InputError
from optin_export.workdir.onnx_files import SMALL

#: Element type and largest value.
HALF = {"fp16": (TensorProto.FLOAT16, 65504.0), "bf16": (TensorProto.BFLOAT16, 3.3895313892515355e38)}
#: The first opset in which convolutions take bf16.
BF16_OPSET = 22
#: Beyond this a constant means "masked": any large number works.
FILL = 1e30
#: Outputs of these are normalised: the range of a half holds them.
_NORMALISED = {
    "LayerNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "RMSNormalization",
    "LpNormalization",
    "Softmax",
    "LogSoftmax",
}
#: What overflows, loses small terms, or does not take half precision at all.
_STATISTICS = {"Pow", "Sqrt", "Reciprocal", "Exp", "Log", "CumSum", "GlobalAveragePool", "GlobalLpPool"}
_FLOAT_ONLY = {"Range", "NonMaxSuppression", "GridSample", "Cast", "RandomNormal", "RandomUniform", "Resize"}
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Pow", "Sqrt", "Clip", "Max", "Min", "Floor", "Ceil", "Round"}
#: Stay in fp32 where everything they work on does.
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
_INTEGERS = {TensorProto.INT64, TensorProto.INT32}


@dataclass
class _Graph:
    """The graph's look-ups: element types by value, producers, constants, consumers.

    folder: location of constants in another file. beyond: constants out of the range of half precision, once known.
    """

    graph: Any
    types: dict[str, int]
    producer: dict[str, Any]
    constants: dict[str, Any]
    consumers: dict[str, list[Any]]
    folder: str
    beyond: dict[str, bool] = field(default_factory=dict)

    def values(self, name: str) -> np.ndarray:
        """A constant's values."""
        return np.asarray(numpy_helper.to_array(self.constants[name], self.folder))

    def inputs(self, node: Any) -> Iterator[str]:
        """The float inputs that are computed, not constant."""
        for name in node.input:
            if self.types.get(name) == TensorProto.FLOAT and name not in self.constants:
                yield name


def to_half(model: Any, precision: str, folder: Path | str = "") -> dict[str, int]:
    """Rewrite the fp32 `model` (a ModelProto) in place; returns how many nodes stay in fp32, by operator.

    precision: 'fp16' or 'bf16'. folder: of the file that the model was read from without its external weights, if it
    has any; all values are in the model after. Raises InputError for a graph with control flow.
    """
    element, largest = HALF[precision]
    if precision == "bf16":
        model.CopyFrom(onnx.version_converter.convert_version(model, BF16_OPSET))
    view = _look(model, str(folder))
    kept = _kept(view, largest)
    _cast_edges(view, kept, element, largest)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            load_external_data_for_tensor(tensor, str(folder))
            del tensor.external_data[:]
            tensor.data_location = TensorProto.DEFAULT
    del model.graph.value_info[:]
    inferred = _inferred(model, check_type=True, strict_mode=True).graph
    for whole, found in ((model.graph.value_info, inferred.value_info), (model.graph.output, inferred.output)):
        del whole[:]
        whole.extend(found)
    return dict(sorted(Counter(node.op_type for node in view.graph.node if node.name in kept).items()))


def _inferred(model: Any, **options: bool) -> Any:
    """The model with inferred shapes and without its large constants, which together may be too much for a message."""
    held = {}
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > SMALL:
            held[tensor.name] = tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="elsewhere")
    try:
        return onnx.shape_inference.infer_shapes(model, **options)
    finally:
        for tensor in model.graph.initializer:
            if tensor.name in held:
                tensor.raw_data = held[tensor.name]
                tensor.ClearField("data_location")
                del tensor.external_data[:]


def _look(model: Any, folder: str) -> _Graph:
    """Names for all nodes, constants as initialisers, element types of every value."""
    graph = model.graph
    plain = []
    for index, node in enumerate(graph.node):
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise InputError(
                f"the graph cannot be written in half precision: it has the control flow {node.op_type}",
                "only graphs without branches and loops are converted",
                "use export.precision: fp32",
            )
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            continue
        node.name = f"{node.op_type}.{index}"
        plain.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in plain]
    del graph.node[:]
    graph.node.extend(copies)
    inferred = _inferred(model, data_prop=True).graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
    }
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    consumers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    producer = {name: node for node in graph.node for name in node.output}
    return _Graph(graph, types, producer, constants, consumers, folder)


# What stays in fp32. Each rule: (node, graph, kept so far, largest half) -> does it stay?
_Rule = Callable[[Any, _Graph, set[str], float], bool]


def _by_itself(node: Any, view: _Graph, kept: set[str], largest: float) -> bool:
    """Norms, Softmax, reductions, and operators that take no half."""
    every = _NORMALISED | _STATISTICS | _FLOAT_ONLY
    return node.op_type in every or node.op_type.startswith("Reduce")


def _weight_out_of_range(node: Any, view: _Graph, kept: set[str], largest: float) -> bool:
    """A constant no half can hold, which is no filler either."""
    for name in node.input:
        if name in view.constants and view.types[name] == TensorProto.FLOAT:
            if name not in view.beyond:
                array = view.values(name)
                size = np.abs(array) if _passes(array, largest) else np.zeros(0)
                view.beyond[name] = bool(((size > largest) & (size < FILL)).any())
            if view.beyond[name]:
                return True
    return False


def _squares(node: Any, view: _Graph, kept: set[str], largest: float) -> bool:
    """What a reduction sums, if that is a square or a difference from a mean."""
    used = view.consumers.get(node.output[0], [])
    if node.op_type == "Mul":
        return node.input[0] == node.input[1] and any(_reduces(other) for other in used)
    return node.op_type == "Sub" and any(
        other.name in kept and (_reduces(other) or other.op_type in ("Mul", "Pow")) for other in used
    )


def _follows(node: Any, view: _Graph, kept: set[str], largest: float) -> bool:
    """Between a statistic and its use: the epsilon added to a variance, the root, the division by it."""
    if node.op_type not in _FOLLOW:
        return False
    known = [_is_statistic(view.producer.get(name), kept) for name in view.inputs(node)]
    return any(known) if node.op_type in ("Sub", "Div", "Mul") else bool(known) and all(known)


def _makes_indices(node: Any, view: _Graph, kept: set[str], largest: float) -> bool:
    """Arithmetic that ends in a whole number: a half cannot tell positions above 2048 apart."""
    if node.op_type not in _ELEMENTWISE:
        return False
    for other in view.consumers.get(node.output[0], []):
        if other.op_type == "Cast" and view.types.get(other.output[0]) in _INTEGERS:
            return True
        if other.op_type in ("Floor", "Ceil", "Round"):
            return True
        if other.name in kept and _makes_indices(other, view, kept, largest):
            return True
    return False


RULES: tuple[_Rule, ...] = (_by_itself, _weight_out_of_range, _squares, _follows, _makes_indices)


def _kept(view: _Graph, largest: float) -> set[str]:
    """Names of the nodes that stay in fp32: rules depend on one another, so they run until none finds more."""
    kept: set[str] = set()
    floats = [
        node
        for node in view.graph.node
        if any(view.types.get(name) == TensorProto.FLOAT for name in (*node.input, *node.output))
    ]
    while True:
        found = {
            node.name
            for node in (*floats, *reversed(floats))
            if node.name not in kept and any(rule(node, view, kept, largest) for rule in RULES)
        }
        if not found:
            return kept
        kept |= found


def _reduces(node: Any) -> bool:
    return node.op_type.startswith("Reduce")


def _is_statistic(node: Any, kept: set[str]) -> bool:
    return node is not None and node.name in kept and node.op_type not in _NORMALISED | {"Cast", "Resize"}


# The rewrite.


def _cast_edges(view: _Graph, kept: set[str], element: int, largest: float) -> None:
    """Give every node the type it was assigned, with one Cast per value and direction, and half constants."""
    graph, nodes, made = view.graph, [], set()
    now = {name: TensorProto.FLOAT for name, kind in view.types.items() if kind == TensorProto.FLOAT}
    outputs = {value.name for value in graph.output}
    short = {element: "half", TensorProto.FLOAT: "full"}

    def of_type(name: str, wanted: int) -> str:
        if now.get(name, wanted) == wanted or not name:
            return name
        cast = f"{name}.{short[wanted]}"
        if cast not in made:
            made.add(cast)
            if name in view.constants:
                graph.initializer.append(_half_tensor(view.values(name), cast, element, largest))
            else:
                nodes.append(helper.make_node("Cast", [name], [cast], name=cast, to=wanted))
        return cast

    for node in graph.node:
        floats = [name for name in (*node.input, *node.output) if view.types.get(name) == TensorProto.FLOAT]
        if not floats:
            nodes.append(node)
            continue
        wanted = TensorProto.FLOAT if node.name in kept else element
        given = [of_type(name, wanted) if view.types.get(name) == TensorProto.FLOAT else name for name in node.input]
        del node.input[:]
        node.input.extend(given)
        if wanted == element and node.op_type == "ConstantOfShape":
            attribute = node.attribute[0]
            given = numpy_helper.to_array(attribute.t)
            attribute.t.CopyFrom(_half_tensor(given, attribute.t.name, element, largest))
        nodes.append(node)
        for index, name in enumerate(node.output):
            if view.types.get(name) != TensorProto.FLOAT:
                continue
            if wanted == element and name in outputs:
                inner = f"{name}.half"
                node.output[index] = inner
                made.add(inner)
                nodes.append(helper.make_node("Cast", [inner], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
            else:
                now[name] = wanted
    used = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in used or tensor.name in outputs]
    constants = [TensorProto.FromString(tensor.SerializeToString()) for tensor in constants]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _half_tensor(array: np.ndarray, name: str, element: int, largest: float) -> Any:
    """The values in half precision; fillers beyond its range become half of its largest value, so that what is added
    to one stays finite (a row of -inf would make Softmax NaN). Infinities stay what they are."""
    if _passes(array, largest):
        limit = largest / 2
        array = np.where(np.isfinite(array) & (np.abs(array) > largest), np.copysign(limit, array), array)
    kind = helper.tensor_dtype_to_np_dtype(element)
    return numpy_helper.from_array(array.astype(kind), name)


def _passes(array: np.ndarray, largest: float) -> bool:
    """Whether any value is beyond `largest`, found without a copy of the array: weights may be gigabytes."""
    return array.size > 0 and not (array.max() <= largest and array.min() >= -largest)
