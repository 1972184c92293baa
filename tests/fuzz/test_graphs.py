"""ONNX files by anybody: nothing beside them is read, nothing larger than they are is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from optin_export import engines
from optin_export.errors import InputError
from optin_export.export import read_graph
from optin_export.recipe import Target
from optin_export.ship.signature import of_onnx
from tests.fuzz.oracle import harmless
from tests.fuzz.strategies import NUMBERS, mangled


def used(path: Path, build: bool) -> None:
    """As `measure` and `ship` use a graph: looked at first, then given to onnxruntime."""
    with harmless("onnx", path.parent):
        of_onnx(path)
        if build:
            engines.build(path, Target(), path.parent / "engine.onnx", ())


@given(data=st.data())
def test_bytes(data: st.DataObject, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(data.draw(mangled((finished / "onnx" / "pruned.onnx").read_bytes())))
    used(tmp_path / "a.onnx", True)


@given(data=st.data())
def test_tensors(data: st.DataObject, finished: Path, tmp_path: Path) -> None:
    model = onnx.load(finished / "onnx" / "pruned.onnx")
    for _ in range(data.draw(st.integers(1, 3))):
        tensor = model.graph.initializer[data.draw(st.integers(0, len(model.graph.initializer) - 1))]
        kind = data.draw(st.sampled_from(["dims", "type", "empty", "external", "rename"]))
        if kind == "dims":
            tensor.dims[:] = data.draw(st.lists(st.sampled_from([n for n in NUMBERS if abs(n) < 2**63]), max_size=5))
        elif kind == "type":
            tensor.data_type = data.draw(st.integers(0, 30))
        elif kind == "empty":
            tensor.ClearField("raw_data")
        elif kind == "external":
            outside(tensor, data.draw(st.sampled_from(["../secret", "/etc/passwd", "secret", "", "a/../../secret"])))
        else:
            tensor.name = data.draw(st.sampled_from(["", "x" * 10_000, model.graph.input[0].name]))
    (tmp_path / "secret").write_bytes(bytes(1000))
    onnx.save(model, tmp_path / "a.onnx")
    used(tmp_path / "a.onnx", True)


def outside(tensor: Any, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location


def graph(nodes: list[Any], initializers: list[Any] = (), inputs: tuple[int | str, ...] = ("n", 4)) -> onnx.ModelProto:  # type: ignore[assignment]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    y.type.tensor_type.shape.dim.add()
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], list(initializers)), ir_version=9)


def constant(dims: list[int]) -> list[Any]:
    shape = helper.make_tensor("shape", TensorProto.INT64, [len(dims)], dims)
    return [
        helper.make_node("Constant", [], ["shape"], value=shape),
        helper.make_node("ConstantOfShape", ["shape"], ["big"]),
        helper.make_node("ReduceSum", ["big"], ["y"], keepdims=0),
    ]


def nested(levels: int) -> list[Any]:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    inner = [helper.make_node("Identity", ["x"], ["y"])]
    for _ in range(levels):
        body = helper.make_graph(inner, "body", [], [y])
        inner = (
            [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
            if levels < 8
            else [helper.make_node("If", ["c"], ["y"], then_branch=body)]
        )
    return inner


def external(where: str) -> onnx.ModelProto:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [4], [0.0] * 4)
    outside(tensor, "../../../../etc/passwd")
    if where == "initializer":
        return graph([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])
    if where == "attribute":
        node = helper.make_node("Constant", [], ["w"])
        attribute = node.attribute.add()
        attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
        attribute.t.CopyFrom(tensor)
        return graph([node, helper.make_node("Add", ["x", "w"], ["y"])])
    if where == "subgraph":
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        body = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "b", [], [y], [tensor])
        return graph([helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)])
    model = graph([helper.make_node("F", ["x"], ["y"], domain="own")])
    node = helper.make_node("Constant", [], ["w"])
    attribute = node.attribute.add()
    attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
    attribute.t.CopyFrom(tensor)
    opset = [helper.make_opsetid("", 20)]
    add = helper.make_node("Add", ["x", "w"], ["y"])
    model.functions.append(helper.make_function("own", "F", ["x"], ["y"], [node, add], opset))
    return model


ATTACKS = {
    **{f"external in {where}": external(where) for where in ("initializer", "attribute", "subgraph", "function")},
    "huge constant": graph(constant([10**6, 10**6])),
    "deep": graph(nested(25)),
    "compiled": graph([helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="../x")]),
    "no output": onnx.ModelProto(ir_version=9),
}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attacks_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(ATTACKS[name].SerializeToString())
    with pytest.raises(InputError):
        read_graph(tmp_path / "a.onnx")
    used(tmp_path / "a.onnx", True)


def test_a_link_to_an_endless_file(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").symlink_to("/dev/zero")
    used(tmp_path / "a.onnx", False)
