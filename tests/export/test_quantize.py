"""Weights of 7 bits where a CPU clips sums of 8-bit products: the largest possible products then give the right sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optin_export import environment
from optin_export.export import precision, quantize
from optin_export.recipe import ExportSection, Target

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
WIDTH = 64


def all_ones(path: Path) -> None:
    """x @ w with equal weights: every pair of products is as large as it can be."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(np.ones((WIDTH, WIDTH), np.float32), "w")
    values = [helper.make_tensor_value_info(name, kind, ["batch", WIDTH]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


@pytest.mark.parametrize(("overflows", "largest"), [(True, 64), (False, 127)])
def test_weights_have_the_range_of_the_cpus_sums(
    overflows: bool, largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "sums_of_int8_overflow", lambda: overflows)
    all_ones(tmp_path / "fp32.onnx")
    section = ExportSection(precision="int8", quantization="dynamic")
    bits = precision.weight_bits(section, [Target()], tmp_path / "int8.onnx")
    facts = quantize.quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", section, (), bits)
    tensors = [onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "int8.onnx").graph.initializer]
    (weights,) = (one for one in tensors if one.dtype == np.int8 and one.size > WIDTH)
    assert abs(int(weights.max())) in (largest, largest - 1)
    assert facts.get("weight_bits", 8) == bits == (7 if overflows else 8)


@pytest.mark.parametrize("form", ["dynamic", "static", "static-u8"])
def test_a_graph_of_this_machine_adds_up(form: Any, tmp_path: Path) -> None:
    """On any CPU: the sum of the largest products is the one in fp32, within the rounding of 8 bits."""
    all_ones(tmp_path / "fp32.onnx")
    section, x = ExportSection(precision="int8", quantization=form), np.ones((2, WIDTH), np.float32)
    bits = precision.weight_bits(section, [Target()], tmp_path / "int8.onnx")
    quantize.quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", section, [{"x": x}], bits)
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ np.ones((WIDTH, WIDTH)), rtol=0.02)


@pytest.mark.parametrize(
    ("kind", "form", "engines", "file", "bits"),
    [
        ("int8", "static", ["onnxruntime"], "a.onnx", 7),
        ("int8", "static", ["onnxruntime", "tensorrt"], "a.onnx", 8),
        ("int8", "static", ["onnxruntime", "tensorrt"], "a.xml", 7),
        ("int8", "static-u8", ["onnxruntime", "tensorrt"], "a.onnx", 7),
        ("fp8", "static", ["onnxruntime"], "a.onnx", 8),
    ],
)
def test_who_runs_a_graph_decides_on_the_bits(
    kind: Any, form: Any, engines: list[Any], file: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "sums_of_int8_overflow", lambda: True)
    targets = [Target.model_validate({"engine": engine}) for engine in engines]
    assert precision.weight_bits(ExportSection(precision=kind, quantization=form), targets, Path(file)) == bits


@pytest.mark.parametrize(
    ("machine", "flags", "overflows", "bfloat16"),
    [
        ("x86_64", "fpu avx2", True, False),
        ("x86_64", "fpu avx2 avx512_vnni", False, False),
        ("x86_64", "fpu avx2 avx512_vnni avx512_bf16", False, True),
        ("x86_64", "fpu avx512_vnni amx_bf16 amx_tile", False, True),
        ("x86_64", "avx2 avx_vnni", False, False),
        ("aarch64", "asimd bf16", False, False),
    ],
)
def test_which_cpus_overflow_and_which_have_bfloat16(
    machine: str, flags: str, overflows: bool, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\nflags\t\t: {flags}\n")
    assert environment.sums_of_int8_overflow() == overflows
    assert environment.multiplies_bfloat16() == bfloat16
