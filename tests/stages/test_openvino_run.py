"""Runs with an OpenVINO target: built, measured like with like, judged, and shipped as it was measured."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import optin_export
from optin_export import cli, engines
from optin_export.errors import EnvironmentLacks, InputError
from optin_export.models import as_function
from optin_export.recipe import Target, validate
from optin_export.stages.context import RunContext
from optin_export.stages.latency_trials import LatencyTrials
from tests.conftest import Make

runtime = pytest.importorskip("openvino")
pytest.importorskip("nncf")
TARGET = Target(engine="openvino")
TARGETS = [{"engine": "openvino"}]
GATES = {"speedup": 0.01}
pytestmark = pytest.mark.usefixtures("short_measurement")


def config_of(repository: Path, name: str) -> Any:
    from optin_export.ship.config import read_config

    return read_config((repository / name / "config.pbtxt").read_text())


def compiled(model: Path, parameters: Any) -> Any:
    """The model as Triton's backend compiles it: its parameters are OpenVINO's properties, but for HINT_BF16."""
    given = {name: value.string_value for name, value in parameters.items()}
    if given.pop("HINT_BF16", None) == "YES":
        given["INFERENCE_PRECISION_HINT"] = "bf16"
    return runtime.Core().compile_model(model, "CPU", given)


def server_module() -> types.ModuleType:
    """What a model of Triton's python backend imports: requests and responses are dictionaries of arrays here."""
    server: Any = types.ModuleType("triton_python_backend_utils")
    server.Tensor = lambda name, array: (name, array)
    server.InferenceResponse = dict
    server.get_input_tensor_by_name = lambda request, name: types.SimpleNamespace(as_numpy=lambda: request[name])
    return server


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_four_engines_are_measured_and_served_by_its_own_backend(
    precision: str, tmp_path: Path, vit_recipe: Make
) -> None:
    if engines.lacks(TARGET, precision):
        pytest.skip("this CPU has no such kernels")
    ship = {"triton": True, "backend": "openvino", "instances": 2}
    export = {"batch": [1, 3], "precision": precision, "calibration_rows": 8}
    report = optin_export.run(vit_recipe(targets=TARGETS, export=export, gates=GATES, ship=ship), tmp_path)
    assert report is not None and report.verdict.passed
    names = ["base", "pruned", f"base.{precision}", f"pruned.{precision}"]
    written = {f"{name}.{end}" for name in names for end in ("xml", "bin")}
    assert {path.name for path in (tmp_path / "engines" / "openvino-cpu-1t").iterdir()} == written
    graphs = {f"{which}.int8.{end}" for which in ("base", "pruned") for end in ("xml", "bin")}
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"base.onnx", "pruned.onnx"} | (
        graphs if precision == "int8" else set()
    )
    assert all(list(one.engines_ms) == names for one in report.latency)
    fp32, other = (
        max(one.max_error for one in report.parity.cases if one.precision == kind) for kind in ("fp32", precision)
    )
    assert fp32 < 1e-5 < 1e-3 < other
    assert runtime.__version__.startswith(report.environment["packages"]["openvino"])

    place = tmp_path / "triton"
    rows = load_file(tmp_path / "measure" / "reference.safetensors")
    for name, which in (("tiny-vit", "pruned"), ("tiny-vit-base", "base")):
        config = config_of(place, name)
        # With a batch dimension of the server's own, the backend fixes the largest batch for all requests.
        assert (config.backend, config.max_batch_size) == ("openvino", 0)
        assert list(config.input[0].dims) == [-1, 1, 32, 32] and list(config.output[0].dims) == [-1, 5]
        assert not config.HasField("dynamic_batching")
        given = {key: value.string_value for key, value in config.parameters.items()}
        assert given == {
            "INFERENCE_NUM_THREADS": "2",
            "NUM_STREAMS": "2",
            "PERFORMANCE_HINT": "LATENCY",
            **({"HINT_BF16": "YES"} if precision == "bf16" else {}),
        }
        model = place / name / "1" / config.default_model_filename
        engine = tmp_path / "engines" / "openvino-cpu-1t" / f"{which}.{precision}.xml"
        assert model.name == "model.xml" and model.read_bytes() == engine.read_bytes()
        assert model.with_suffix(".bin").read_bytes() == engine.with_suffix(".bin").read_bytes()
        served = compiled(model, config.parameters)
        measured = engines.load(engine, TARGET)
        for warm, count in zip(config.model_warmup, (1, 3), strict=True):
            sample = warm.inputs["pixel_values"]
            assert (warm.batch_size, list(sample.dims)) == (1, [count, 1, 32, 32])
            stored = np.frombuffer((place / name / "warmup" / sample.input_data_file).read_bytes(), np.float32)
            batch = stored.reshape(count, 1, 32, 32)
            assert np.array_equal(batch, rows["input.pixel_values"][:count])
            answer = served({"pixel_values": batch})["logits"]
            assert np.array_equal(answer, measured.run({"pixel_values": batch})["logits"])
    assert cli.main(["verify", str(place)]) == 0
    assert cli.main(["ship", str(tmp_path), "--to", str(tmp_path / "models")]) == 0
    again = tmp_path / "models" / "tiny-vit"
    assert (again / "config.pbtxt").read_bytes() == (place / "tiny-vit" / "config.pbtxt").read_bytes()
    assert (again / "1" / "model.bin").read_bytes() == (place / "tiny-vit" / "1" / "model.bin").read_bytes()


def test_other_commands_find_what_the_run_quantised(
    tmp_path: Path, vit_recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    export = {"batch": [1], "precision": "int8", "calibration_rows": 8}
    optin_export.run(vit_recipe(targets=TARGETS, export=export, gates=GATES), run)
    (tmp_path / "gates.yaml").write_text("gates: 1\nverdict: false\nparity: false\nmodel_mib: 50\n")
    assert cli.main(["check", str(run), "--gates", str(tmp_path / "gates.yaml"), "--json"]) == 0
    (gate,) = json.loads(capsys.readouterr().out)["gates"]
    size = sum((run / "onnx" / f"pruned.int8.{end}").stat().st_size for end in ("xml", "bin"))
    assert (gate["name"], gate["measured"]) == ("model_mib", size / 2**20)
    assert cli.main(["measure", str(run), "--machine", "other", "--quiet"]) == 0
    engine = run / "machines" / "other" / "engines" / "openvino-cpu-1t" / "pruned.int8.bin"
    assert engine.read_bytes() == (run / "onnx" / "pruned.int8.bin").read_bytes()
    (run / "onnx" / "pruned.int8.bin").write_bytes(b"")
    assert cli.main(["measure", str(run), "--machine", "third", "--quiet"]) == 2
    assert "pruned.int8.bin is not the file that the run wrote" in capsys.readouterr().err


def test_fp32_is_served_by_a_model_of_the_python_backend(
    tmp_path: Path, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship = {"triton": True, "backend": "python"}
    report = optin_export.run(vit_recipe(targets=TARGETS, gates=GATES, ship=ship), tmp_path)
    assert report is not None and report.verdict.passed
    config = config_of(tmp_path / "triton", "tiny-vit")
    assert (config.backend, config.max_batch_size) == ("python", 3)
    place = tmp_path / "triton" / "tiny-vit"
    parameters = {name: {"string_value": value.string_value} for name, value in config.parameters.items()}
    assert {name: value["string_value"] for name, value in parameters.items()} == {
        "file": "model.xml",
        "threads": "1",
        "kernels": "f32",
    }
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server_module())
    found = importlib.util.spec_from_file_location("served", place / "1" / "model.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    model = module.TritonPythonModel()
    described = {"parameters": parameters, "input": [{"name": "pixel_values"}], "output": [{"name": "logits"}]}
    model.initialize({"model_config": json.dumps(described), "model_repository": str(place), "model_version": "1"})
    images = load_file(tmp_path / "measure" / "reference.safetensors")["input.pixel_values"][:3]
    answers = model.execute([{"pixel_values": images[:1]}, {"pixel_values": images[1:]}])
    engine = engines.load(tmp_path / "engines" / "openvino-cpu-1t" / "pruned.xml", TARGET)
    assert [len(answer["logits"]) for answer in answers] == [1, 2]
    expected = engine.run({"pixel_values": images})["logits"]
    assert np.array_equal(np.concatenate([answer["logits"] for answer in answers]), expected)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"ship": {"triton": True, "backend": "openvino"}}, "no parameter for fp32"),
        ({"ship": {"triton": True}}, "would serve what no target measures"),
        ({"ship": {"triton": True, "backend": "openvino"}, "targets": [{}]}, "needs {engine: openvino} in targets"),
        (
            {"ship": {"triton": True, "backend": "openvino", "ensemble": True}, "export": {"precision": "int8"}},
            "python",
        ),
        ({"export": {"precision": "fp16"}}, "in fp32, bf16, int8"),
    ],
)
def test_what_is_refused_before_anything_runs(sections: dict[str, Any], says: str, vit_recipe: Make) -> None:
    with pytest.raises(InputError) as error:
        validate(vit_recipe(**{"targets": TARGETS, **sections}), Path.cwd())
    assert says in str(error.value)


def test_a_missing_package_stops_the_run_at_its_start(
    tmp_path: Path, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    recipe = vit_recipe(targets=TARGETS, export={"batch": [1, 3], "precision": "int8"})
    with pytest.raises(EnvironmentLacks, match=r"optin-export\[openvino\]"):
        optin_export.run(recipe, tmp_path)
    assert not (tmp_path / "scores").exists()


def test_trials_of_a_latency_budget_are_built_as_what_ships(tmp_path: Path, vit_recipe: Make) -> None:
    export = {"batch": [1], "precision": "int8", "calibration_rows": 8}
    recipe = validate(vit_recipe(targets=TARGETS, export=export), tmp_path)
    work = RunContext(recipe, tmp_path / "run", False)
    trials = LatencyTrials(work.sources, work.structure, TARGET, 1, tmp_path / "trials")
    engine = trials.load(work.sources.model, "base")()
    built = tmp_path / "trials" / "base"
    assert (built / "onnx" / "trial.int8.xml").is_file()
    assert (built / "engines" / "openvino-cpu-1t" / "trial.int8.xml").is_file()
    reference = as_function(work.sources.model)(trials.inputs())
    error = np.abs(engine.run(trials.inputs())["logits"] - reference).max() / np.abs(reference).max()
    assert 1e-3 < error < 0.4
