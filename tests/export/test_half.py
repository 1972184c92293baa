"""fp16 and bf16 graphs: what stays in fp32, what is clamped, and that they compute what the fp32 graph does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optin_export.errors import InputError
from optin_export.export import convert
from optin_export.export.half import to_half
from optin_export.recipe import ExportSection

LOWEST = float(np.finfo(np.float32).min)


def graph(nodes: list[Any], constants: dict[str, np.ndarray], inputs: tuple[str, ...] = ("x",)) -> onnx.ModelProto:
    """A model from x [b, 8] float (and m [b, 8] bool) to y."""
    kinds = {"x": TensorProto.FLOAT, "m": TensorProto.BOOL}
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(name, kinds[name], ["b", 8]) for name in inputs],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of each node's first output, by operator."""
    found = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*found.value_info, *found.output)}
    return {node.op_type: kinds[node.output[0]] for node in model.graph.node if node.op_type != "Cast"}


def run(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    runtime = pytest.importorskip("onnxruntime")
    onnx.checker.check_model(model, full_check=True)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


WEIGHT = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_products_are_half_softmax_and_ends_are_not(precision: str) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["s"]), helper.make_node("Softmax", ["s"], ["y"])]
    model = graph(nodes, {"w": WEIGHT})
    kept = to_half(model, precision)
    half = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
    assert types(model) == {"MatMul": half, "Softmax": TensorProto.FLOAT} and kept == {"Softmax": 1}
    assert [tensor.data_type for tensor in model.graph.initializer] == [half]
    onnx.checker.check_model(model, full_check=True)


def test_a_mask_is_clamped_and_a_row_that_is_masked_whole_stays_finite() -> None:
    nodes = [
        helper.make_node("Where", ["m", "zero", "low"], ["mask"]),
        helper.make_node("Add", ["x", "mask"], ["one"]),
        helper.make_node("Add", ["one", "mask"], ["two"]),
        helper.make_node("Softmax", ["two"], ["y"]),
    ]
    constants = {"zero": np.float32(0), "low": np.float32(LOWEST)}
    model = graph(nodes, constants, ("x", "m"))
    to_half(model, "fp16")
    mask = np.ones((3, 8), bool)
    mask[0, 4:] = False
    mask[1] = False
    y = run(model, x=X, m=mask)
    assert np.isfinite(y).all() and not y[0, 4:].any()
    assert y[0, :4].sum() == pytest.approx(1, abs=1e-3)


def test_a_weight_that_no_half_holds_stays_fp32_and_is_not_clamped() -> None:
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": WEIGHT * 1e5})
    assert to_half(model, "fp16") == {"MatMul": 1}
    assert np.allclose(run(model, x=X), X @ (WEIGHT * 1e5), rtol=1e-4)


def test_a_norm_written_out_stays_fp32_whole() -> None:
    """Squares of 300 overflow fp16, and an epsilon of 1e-12 is zero in it."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["s"]),
        helper.make_node("Mul", ["s", "s"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "axis"], ["mean"]),
        helper.make_node("Add", ["mean", "epsilon"], ["safe"]),
        helper.make_node("Sqrt", ["safe"], ["root"]),
        helper.make_node("Div", ["s", "root"], ["y"]),
    ]
    model = graph(nodes, {"w": WEIGHT, "axis": np.array([-1]), "epsilon": np.float32(1e-12)})
    kept = to_half(model, "fp16")
    assert kept == {"Mul": 1, "ReduceMean": 1, "Add": 1, "Sqrt": 1, "Div": 1}
    x = np.concatenate([X * 300, np.zeros((1, 8), np.float32)])
    s = x @ WEIGHT
    assert np.allclose(run(model, x=x), s / np.sqrt((s * s).mean(-1, keepdims=True) + 1e-12), atol=5e-3)


def test_what_follows_a_softmax_is_half_again() -> None:
    nodes = [
        helper.make_node("Softmax", ["x"], ["p"]),
        helper.make_node("Mul", ["p", "two"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    model = graph(nodes, {"two": np.float32(2), "w": WEIGHT})
    assert to_half(model, "fp16") == {"Softmax": 1}


def test_positions_are_counted_in_fp32() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "size"], ["place"]),
        helper.make_node("Cast", ["place"], ["y64"], to=TensorProto.INT64),
        helper.make_node("Cast", ["y64"], ["y"], to=TensorProto.FLOAT),
    ]
    model = graph(nodes, {"size": np.float32(5001)})
    to_half(model, "fp16")
    assert np.array_equal(run(model, x=np.ones((1, 8), np.float32)), np.full((1, 8), 5001, np.float32))


def test_constants_that_name_no_tensor_get_the_type_of_their_readers() -> None:
    """A number as an attribute, and a filled tensor whose value is the default of the operator."""
    nodes = [
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Mul", ["x", "two"], ["d"]),
        helper.make_node("Add", ["d", "zeros"], ["y"]),
    ]
    model = graph(nodes, {})
    assert to_half(model, "fp16") == {}
    assert {types(model)[name] for name in ("ConstantOfShape", "Mul", "Add")} == {TensorProto.FLOAT16}
    assert np.allclose(run(model, x=X), 2 * X, atol=2e-3)


def test_an_output_that_is_also_read_inside() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Softmax", ["y"], ["p"]),
        helper.make_node("MatMul", ["y", "w"], ["z"]),
    ]
    model = graph(nodes, {"w": WEIGHT})
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "pz")
    assert to_half(model, "fp16") == {"Softmax": 1}
    assert [value.name for value in model.graph.output] == ["y", "p", "z"]
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 3  # x, y and z; Softmax reads the output
    assert np.allclose(run(model, x=X), X @ WEIGHT, atol=2e-2)


def test_control_flow_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    with pytest.raises(InputError, match="If"):
        to_half(graph([node], {"c": np.array(True)}), "fp16")


def test_an_operator_without_bf16_is_refused(tmp_path: Path) -> None:
    model = graph([helper.make_node("Einsum", ["x", "w"], ["y"], equation="bi,ij->bj")], {"w": WEIGHT})
    onnx.save_model(model, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="cannot be written in bf16"):
        convert(tmp_path / "a.onnx", tmp_path / "b.onnx", ExportSection(precision="bf16"), [])
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("name", ["bert", "vit", "resnet-timm"])
def test_tensorrt_rtx_builds_every_precision(name: str, precision: str, tmp_path: Path) -> None:
    """Built, not run: that takes a GPU."""
    from optin_export.export import export_onnx
    from tests.units import rtx
    from tests.units.models import inputs_for, small_model

    model = small_model(name)[0]
    inputs = inputs_for(model, 2, 0)
    export_onnx(model, inputs, tmp_path / "m.onnx", max_batch=4, sequence=None)
    rows = [{key: value.numpy() for key, value in inputs.items()}]
    section = ExportSection(precision=precision, batch=(1, 4))  # type: ignore[arg-type]
    convert(tmp_path / "m.onnx", tmp_path / "p.onnx", section, rows)
    shapes = {key: (2, *value.shape[1:]) for key, value in inputs.items()}
    assert rtx.build(tmp_path / "p.onnx", {key: (shape, shape, shape) for key, shape in shapes.items()})
