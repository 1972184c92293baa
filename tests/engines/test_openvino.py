"""OpenVINO on the CPU: every precision computes what it states, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from optin_export.engines import build, files, lacks, load, source_of, versions
from optin_export.errors import EnvironmentLacks, ParityError
from optin_export.export import nncf, weight_bits
from optin_export.recipe import ExportSection, Target

runtime = pytest.importorskip("openvino")
TARGET = Target(engine="openvino", threads=1)
GENERATOR = np.random.default_rng(0)
ROWS = {"x": GENERATOR.standard_normal((6, 32)).astype(np.float32)}


class Perceptron(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(32, 64), torch.nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.gelu(self.first(x)))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "base.onnx"
    torch.onnx.export(
        Perceptron().eval(),
        (torch.zeros(2, 32),),
        str(path),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},),
        output_names=["y"],
        verbose=False,
        external_data=False,
    )
    return path


def error_of(path: Path, target: Target = TARGET) -> float:
    """The largest error, relative to the largest value of the torch model."""
    with torch.no_grad():
        expected = Perceptron().eval()(torch.from_numpy(ROWS["x"])).numpy()
    engine = load(path, target)
    assert (engine.inputs, engine.outputs) == (("x",), ("y",))
    for batch in (1, 6):  # one engine for all batch sizes
        found = engine.run({"x": ROWS["x"][:batch]})["y"]
        assert found.shape == (batch, 8) and found.dtype == np.float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_fp32_is_what_torch_computes_also_where_the_default_is_bf16(graph: Path, tmp_path: Path) -> None:
    facts = build(graph, TARGET, tmp_path / "base.xml")
    assert error_of(tmp_path / "base.xml") < 1e-6
    assert facts["kernels"] == "f32" and facts["openvino"] == metadata.version("openvino")
    assert [path.name for path in files(tmp_path / "base.xml", TARGET)] == ["base.xml", "base.bin"]
    assert facts["bytes"] == sum(path.stat().st_size for path in files(tmp_path / "base.xml", TARGET))


@pytest.mark.skipif(lacks(TARGET, "bf16") is not None, reason="this CPU has no bf16")
def test_bf16_is_the_same_graph_in_other_kernels(graph: Path, tmp_path: Path) -> None:
    assert build(graph, TARGET, tmp_path / "base.bf16.xml")["kernels"] == "bf16"
    assert 1e-4 < error_of(tmp_path / "base.bf16.xml") < 2e-2
    build(graph, TARGET, tmp_path / "base.xml")
    assert (tmp_path / "base.bf16.bin").read_bytes() == (tmp_path / "base.bin").read_bytes()


def test_int8_is_what_nncf_quantised(graph: Path, tmp_path: Path) -> None:
    rows = [{"x": GENERATOR.standard_normal((4, 32)).astype(np.float32)} for _ in range(8)]
    path = tmp_path / "base.int8.xml"
    facts = nncf.quantize(graph, path, rows, weight_bits(ExportSection(precision="int8"), [TARGET], path))
    assert facts["quantised_activations"] == 2  # the inputs of both layers
    assert (tmp_path / "base.int8.bin").stat().st_size < 0.5 * 4 * (32 * 64 + 64 * 8)
    build(tmp_path / "base.int8.xml", TARGET, tmp_path / "engine" / "base.int8.xml")
    assert 1e-3 < error_of(tmp_path / "engine" / "base.int8.xml") < 0.1


def test_int8_follows_the_calibration_rows(graph: Path, tmp_path: Path) -> None:
    nncf.quantize(graph, tmp_path / "small.int8.xml", [{"x": 1e-3 * ROWS["x"]}])
    assert error_of(tmp_path / "small.int8.xml") > 0.5  # larger rows than these are clipped


def test_products_of_activations_make_a_transformer(graph: Path, tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save_model

    assert not nncf.has_attention(runtime.Core().read_model(graph))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, 4]) for name in ("x", "y")]
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    made = helper.make_graph(nodes, "g", values[:1], values[1:])
    save_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "a.onnx")
    assert nncf.has_attention(runtime.Core().read_model(tmp_path / "a.onnx"))


def test_each_precision_has_its_source(tmp_path: Path) -> None:
    names = {"base": "base.onnx", "base.bf16": "base.onnx", "pruned.int8": "pruned.int8.xml"}
    assert {name: source_of(tmp_path, TARGET, name) for name in names} == {
        name: tmp_path / "onnx" / file for name, file in names.items()
    }
    assert source_of(tmp_path, Target(), "base.int8") == tmp_path / "onnx" / "base.int8.onnx"


def test_threads_are_the_targets(graph: Path, tmp_path: Path) -> None:
    build(graph, TARGET, tmp_path / "base.xml")
    for threads in (1, 2):
        engine = load(tmp_path / "base.xml", Target(engine="openvino", threads=threads))
        assert engine.compiled.get_property("INFERENCE_NUM_THREADS") == threads  # type: ignore[attr-defined]


def test_files_that_it_cannot_read(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(ParityError, match="Unable to read the model") as error:
        build(tmp_path / "junk.onnx", TARGET, tmp_path / "base.xml")
    assert error.value.exit_code == 3 and not (tmp_path / "base.xml").exists()
    build(graph, TARGET, tmp_path / "base.xml")
    (tmp_path / "base.bin").write_bytes(b"")
    with pytest.raises(ParityError, match=r"cannot load base\.xml"):
        load(tmp_path / "base.xml", TARGET)


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_a_missing_package_names_the_pip_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentLacks, match=r"pip install 'optin-export\[openvino\]'") as error:
        versions(TARGET) if package == "openvino" else nncf.versions()
    assert error.value.exit_code == 5 and f"'{package}'" in error.value.what


def test_a_cpu_without_bf16_refuses_it(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(runtime, "Core", Core)
    assert lacks(TARGET, "fp32") is None and lacks(TARGET, "int8") is None and lacks(Target(), "fp16") is None
    with pytest.raises(EnvironmentLacks, match="no instructions for bf16"):
        build(graph, TARGET, tmp_path / "base.bf16.xml")


@pytest.mark.parametrize(("precision", "able"), [("fp32", True), ("bf16", True), ("int8", True), ("fp16", False)])
def test_precisions_of_a_recipe(precision: str, able: bool) -> None:
    section = ExportSection.model_validate({"precision": precision})
    assert (section.cannot("openvino", "cpu") is None) == able


def test_it_runs_on_the_cpu_only() -> None:
    with pytest.raises(ValueError, match="device: cpu only"):
        Target(engine="openvino", device="cuda")


def test_nncf_reports_nothing_over_the_network() -> None:
    code = (
        "from optin_export.export import nncf; nncf.versions(); import nncf.telemetry.wrapper as told;"
        "print(type(told.telemetry).__name__)"
    )
    # Within pytest it never does.
    environment = {name: value for name, value in os.environ.items() if name not in ("NNCF_CI", "NNCF_DEV", "CI")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() not in ("", "NNCFTelemetry")
