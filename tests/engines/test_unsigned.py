"""Symmetric int8 graphs on an x86 CPU: activations turn unsigned, values stay, every product has its int8 kernel."""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optin_export.engines import build, load
from optin_export.engines._unsigned import SHIFT, shift_activations
from optin_export.export import convert, weight_bits
from optin_export.measure.parity import compare
from optin_export.recipe import ExportSection, Target

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ROWS, WIDTH = 16, 32


def three_products_of_one_input(path: Path) -> None:
    """softmax(x @ q, x @ k) @ (x @ v), like an attention: three products share an input, two take no weight."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    generator = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(generator.standard_normal((WIDTH, WIDTH)).astype(np.float32), name)
        for name in ("q", "k", "v")
    ]
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        *(helper.make_node("MatMul", ["r", name], [f"r{name}"], name=name) for name in "qkv"),
        helper.make_node("Transpose", ["rk"], ["t"], perm=[0, 2, 1], name="transpose"),
        helper.make_node("MatMul", ["rq", "t"], ["scores"], name="scores"),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1, name="softmax"),
        helper.make_node("MatMul", ["shares", "rv"], ["y"], name="mixed"),
    ]
    values = [helper.make_tensor_value_info(name, kind, ["batch", ROWS, WIDTH]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


def inputs(seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((4, ROWS, WIDTH)).astype(np.float32)}


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    three_products_of_one_input(tmp_path / "fp32.onnx")
    section = ExportSection(precision="int8")
    path = tmp_path / "int8.onnx"
    bits = weight_bits(section, [Target()], path)
    convert(tmp_path / "fp32.onnx", path, section, [inputs(seed) for seed in range(3)], bits)
    return path


def unoptimised(model: Any) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, inputs(9))[0]


def test_products_of_two_activations_stay_in_fp32(quantised: Path) -> None:
    graph = onnx.load(quantised).graph
    made = {node.output[0]: node.op_type for node in graph.node}
    by = {node.name: [made.get(name) for name in node.input] for node in graph.node if node.op_type == "MatMul"}
    assert all(by[name] == ["DequantizeLinear"] * 2 for name in "qkv")
    assert all("DequantizeLinear" not in by[name] for name in ("scores", "mixed"))


def test_every_value_stays_what_it_was(quantised: Path) -> None:
    model = onnx.load(quantised)
    before = unoptimised(model)
    count = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    assert shift_activations(model) == 2 * count > 0
    onnx.checker.check_model(model, full_check=True)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert onnx.numpy_helper.to_array(constants[node.input[2]]) == np.uint8(SHIFT)
    assert np.array_equal(unoptimised(model), before)
    assert shift_activations(model) == 0


def test_a_value_that_others_read_is_left_alone(quantised: Path) -> None:
    model = onnx.load(quantised)
    quantise = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    info = onnx.helper.make_tensor_value_info(quantise[0].output[0], onnx.TensorProto.INT8, None)
    model.graph.output.append(info)
    assert shift_activations(model) == 2 * (len(quantise) - 1)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="kernels of x86")
def test_products_of_a_shared_input_get_int8_kernels(quantised: Path, tmp_path: Path) -> None:
    source = quantised.read_bytes()
    build(quantised, Target(), tmp_path / "engine.onnx", [])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "engine.onnx").graph.node)
    assert counts["MatMulIntegerToFloat"] == 3 and counts["MatMul"] + counts["FusedMatMul"] == 2
    assert quantised.read_bytes() == source  # what ships stays symmetric
    got = load(tmp_path / "engine.onnx", Target()).run(inputs(9))["y"]
    assert np.allclose(got, unoptimised(onnx.load(quantised)), atol=1e-4)


@pytest.mark.parametrize("wrong", ["nothing", "a weight's scale", "an activation's scale", "weights exchanged"])
def test_the_tolerance_of_int8_passes_the_right_graph_and_finds_a_wrong_one(
    wrong: str,
    quantised: Path,
    tmp_path: Path,
) -> None:
    model = onnx.load(quantised)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    q, v = (next(node for node in model.graph.node if node.name == name) for name in "qv")
    if wrong == "weights exchanged":
        q.input[1], v.input[1] = v.input[1], q.input[1]
    elif wrong != "nothing":
        scale = constants[pairs[v.input[wrong == "a weight's scale"]].input[1]]
        scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(2), scale.name))
        if wrong == "an activation's scale":
            # The pair's two ends share one scale: only what is read back is wrong.
            reader = pairs[v.input[0]]
            for node in model.graph.node:
                if node.op_type == "QuantizeLinear" and node.output[0] == reader.input[0]:
                    scale = onnx.numpy_helper.to_array(constants[node.input[1]]) / np.float32(2)
                    model.graph.initializer.append(onnx.numpy_helper.from_array(scale, "right"))
                    node.input[1] = "right"
    onnx.save_model(model, tmp_path / "tried.onnx")
    for name in ("fp32", "tried"):
        build(tmp_path / f"{name}.onnx", Target(), tmp_path / f"{name}.engine.onnx", [])
    right, tried = (load(tmp_path / f"{name}.engine.onnx", Target()) for name in ("fp32", "tried"))
    case = compare(
        tried,
        lambda rows: right.run(rows)["y"],
        inputs(9),
        target="t",
        model="base",
        rows="distinct",
        precision="int8",
    )
    assert case.passed == (wrong == "nothing"), case
