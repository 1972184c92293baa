"""Runs in another precision than fp32: four engines, judged like with like, and what is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

import optin_export
from optin_export.cli.run import exit_code
from optin_export.measure import parity
from tests.conftest import Make

pytest.importorskip("onnxruntime")
TARGET = "onnxruntime-cpu-1t"


pytestmark = pytest.mark.usefixtures("short_measurement")


def run(recipe: dict[str, Any], folder: Path, **export: Any) -> Any:
    return optin_export.run({**recipe, "export": {**recipe.get("export", {}), **export}}, out=folder)


@pytest.mark.parametrize(
    ("precision", "more", "operator"),
    [
        ("fp16", {}, "Cast"),
        ("int8", {"quantization": "dynamic"}, "MatMulInteger"),
        ("int8", {"quantization": "static-u8"}, "QuantizeLinear"),
        ("int8", {}, "QuantizeLinear"),
        ("fp8", {}, "QuantizeLinear"),
    ],
)
def test_four_engines_are_built_measured_and_reported(
    precision: str, more: dict[str, Any], operator: str, tmp_path: Path, vit_recipe: Make
) -> None:
    report = run(vit_recipe(ship={"triton": True}), tmp_path, precision=precision, **more)
    names = ["base", "pruned", f"base.{precision}", f"pruned.{precision}"]
    for name in names:
        graph = onnx.load(tmp_path / "onnx" / f"{name}.onnx").graph
        assert (operator in {node.op_type for node in graph.node}) == (name.endswith(precision))
        assert all(
            value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in (*graph.input, *graph.output)
        )
        assert (tmp_path / "engines" / TARGET / f"{name}.onnx").is_file()
    assert report.precision == precision
    assert {(one.model, one.precision) for one in report.engines} == {
        (name.partition(".")[0], name.partition(".")[2] or "fp32") for name in names
    }
    for one in report.latency:
        assert list(one.engines_ms) == names
        assert one.base_ms == one.engines_ms[f"base.{precision}"] != one.engines_ms["base"]
        assert {(pair.engine, pair.against) for pair in one.comparisons} == {
            (f"pruned.{precision}", "base"),
            (f"base.{precision}", "base"),
            (f"pruned.{precision}", "pruned"),
            ("pruned", "base"),
        }
    assert list(report.accuracy.engines) == names
    assert report.accuracy.base == report.accuracy.engines["base"]
    assert report.accuracy.pruned == report.accuracy.engines[f"pruned.{precision}"]
    assert [gate.name for gate in report.verdict.gates][:2] == ["parity", f"parity.{precision}"]
    assert {case.precision for case in report.parity.cases} == {"fp32", precision}
    shipped = (tmp_path / "triton" / "tiny-vit" / "1" / "model.onnx").read_bytes()
    assert shipped == (tmp_path / "onnx" / f"pruned.{precision}.onnx").read_bytes()
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f">{name}<" in html for name in names)
    assert (f"{precision} does not win" in report.verdict.summary) == any(
        not one.precision_wins for one in report.latency
    )


def test_a_precision_that_computes_the_wrong_thing_fails_parity_alone(
    tmp_path: Path, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.TOLERANCES, "fp16", parity.Tolerance(0.0, 1.0, 1.0))
    report = run(vit_recipe(gates={"speedup": 0.01}), tmp_path, precision="fp16")
    passed = {gate.name: gate.passed for gate in report.verdict.gates}
    assert passed["parity"] and not passed["parity.fp16"]
    assert exit_code(report) == 3 and report.latency == () and report.accuracy is None


def test_another_precision_does_not_repeat_the_fp32_exports(tmp_path: Path, vit_recipe: Make) -> None:
    recipe = vit_recipe()
    optin_export.run(recipe, out=tmp_path, stop_after="export")
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "onnx").iterdir()}
    optin_export.run(
        {**recipe, "export": {**recipe.get("export", {}), "precision": "int8"}}, out=tmp_path, stop_after="export"
    )
    second = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "onnx").iterdir()}
    assert set(second) - set(first) == {"base.int8.onnx", "pruned.int8.onnx"}
    assert all(second[name] == time for name, time in first.items())
