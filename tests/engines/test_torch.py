"""torch as an engine: a program that needs neither our code nor the model's source, and targets that make sense."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import optin_export
from optin_export.data import Sources, load_sources
from optin_export.engines import CALL, MODES, artefact, build, load, modes, source_of, unavailable, versions
from optin_export.errors import EnvironmentLacks, InputError, ParityError
from optin_export.export import export_program
from optin_export.export.program import fused_attention
from optin_export.measure.latency import LatencySettings, measure_latency
from optin_export.models import as_function
from optin_export.recipe import Target, validate
from tests.conftest import ROOT, Make
from tests.shortly import measure_shortly

CPU, CUDA = (Target.model_validate({"engine": "torch", "device": device}) for device in ("cpu", "cuda"))


@pytest.fixture
def sources(bert_recipe: Make, tmp_path: Path) -> Sources:
    return load_sources(validate(bert_recipe(), tmp_path))


@pytest.fixture
def program(sources: Sources, tmp_path: Path) -> Path:
    path = tmp_path / "onnx" / "base.pt2"
    export_program(sources.model, sources.fixed(2), path, max_batch=4, sequence=16)
    return path


def inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(batch).integers(5, 20, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def test_every_batch_and_length_up_to_the_maximum(sources: Sources, program: Path, tmp_path: Path) -> None:
    assert source_of(tmp_path, CPU, "base") == program
    path = artefact(tmp_path, CPU, "base")
    facts = build(program, CPU, path)
    assert facts["torch"] == torch.__version__ and facts["nodes"] > 10
    engine = load(path, CPU)
    assert engine.inputs == ("input_ids", "attention_mask") and engine.outputs == ("sentence_embedding",)
    for batch, length in ((1, 2), (1, 16), (3, 7), (4, 16)):
        given = inputs(batch, length)
        expected = as_function(sources.model)(given)
        np.testing.assert_allclose(engine.run(given)["sentence_embedding"], expected, atol=1e-5)


def test_the_program_runs_without_our_code_and_without_the_models(program: Path, tmp_path: Path) -> None:
    """In a Python that cannot import either, from the file alone."""
    code = f"""
import sys
for name in ("optin_export", "transformers", "timm"):
    sys.modules[name] = None
import torch
module = torch.export.load({str(program)!r}).module()
ids = torch.arange(5, 12).repeat(3, 1)
print(tuple(module(input_ids=ids, attention_mask=torch.ones_like(ids)).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "(3, 32)", done.stderr


def test_the_program_says_nothing_of_the_machine_or_the_data(program: Path) -> None:
    with zipfile.ZipFile(program) as archive:
        held = b"".join(archive.read(name) for name in archive.namelist())
    assert b"site-packages" not in held and str(ROOT).encode() not in held
    assert torch.export.load(program).example_inputs is None


def test_attention_is_fused_for_the_program_only(sources: Sources, program: Path) -> None:
    operators = {str(node.target) for node in torch.export.load(program).graph.nodes}
    assert any("scaled_dot_product" in name for name in operators)
    with fused_attention(sources.model):
        assert sources.model.model.config._attn_implementation == "sdpa"
    assert sources.model.model.config._attn_implementation == "eager"


def test_threads_are_given_back(program: Path, tmp_path: Path) -> None:
    target = CPU.model_copy(update={"threads": torch.get_num_threads() + 1})
    build(program, target, tmp_path / "e.pt2")
    engine, before, seen = load(tmp_path / "e.pt2", target), torch.get_num_threads(), []
    engine._module = lambda **given: seen.append(torch.get_num_threads()) or torch.zeros(1)  # type: ignore[attr-defined]
    engine.run(inputs(1, 4))
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_it_is_measured_by_its_own_clock(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_shortly(monkeypatch.setattr)
    build(program, CPU, tmp_path / "e.pt2")
    engine = load(tmp_path / "e.pt2", CPU)
    assert modes(engine) == (CALL,)
    result = measure_latency(lambda: engine, lambda: engine, inputs(2, 8), LatencySettings("t", 2, 8, 0))
    assert result.base_ms.p50 > 0 and result.mode == CALL


@pytest.mark.slow
def test_compiled_it_computes_the_same(program: Path, tmp_path: Path) -> None:
    target = CPU.model_copy(update={"compile": True})
    assert target.name == "torch-cpu-1t-compile"
    build(program, target, tmp_path / "e.pt2")
    build(program, CPU, tmp_path / "plain.pt2")
    compiled, plain = (load(tmp_path / name, one) for name, one in (("e.pt2", target), ("plain.pt2", CPU)))
    for given in (inputs(1, 16), inputs(4, 16)):
        expected = plain.run(given)["sentence_embedding"]
        np.testing.assert_allclose(compiled.run(given)["sentence_embedding"], expected, atol=1e-5)


def test_what_is_no_program_is_a_parity_error(tmp_path: Path) -> None:
    (tmp_path / "base.pt2").write_bytes(b"not a zip")
    with pytest.raises(ParityError, match=r"cannot load base\.pt2"):
        build(tmp_path / "base.pt2", CPU, tmp_path / "engine.pt2")
    assert not (tmp_path / "engine.pt2").exists()


def test_what_torch_cannot_export_is_an_input_error(tmp_path: Path) -> None:
    class DataDependent(torch.nn.Module):
        output_name = "logits"

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return pixel_values if pixel_values.sum().item() > 0 else -pixel_values

    given = {"pixel_values": torch.ones(2, 1, 4, 4)}
    with pytest.raises(InputError, match="torch cannot export"):
        export_program(DataDependent(), given, tmp_path / "no.pt2", max_batch=2, sequence=None)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_for_a_gpu_it_is_built_and_not_run_without_one(program: Path, tmp_path: Path) -> None:
    path = artefact(tmp_path, CUDA, "base")
    build(program, CUDA, path)
    assert path.exists() and versions(CUDA) == {"torch": torch.__version__}
    assert "no NVIDIA GPU" in (unavailable(CUDA) or "")
    with pytest.raises(EnvironmentLacks, match=r"cannot run base\.pt2 here") as error:
        load(path, CUDA)
    assert error.value.exit_code == 5


@pytest.mark.gpu
def test_on_a_gpu_in_every_mode(sources: Sources, program: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    build(program, CUDA, tmp_path / "e.pt2")
    engine = load(tmp_path / "e.pt2", CUDA)
    assert modes(engine) == tuple(MODES)
    given = inputs(4, 16)
    expected = as_function(sources.model)(given)
    np.testing.assert_allclose(engine.run(given)["sentence_embedding"], expected, atol=1e-4)
    for mode in MODES:
        once = engine.timer(given, mode)  # type: ignore[attr-defined]
        assert all(0.0 < once() < 1000.0 for _ in range(20))
    memory = engine.memory(given)  # type: ignore[attr-defined]
    assert memory["model"] > 0 and memory["activations"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("short_measurement")
def test_a_run_measures_torch_beside_onnxruntime(vit_recipe: Make, tmp_path: Path) -> None:
    targets = [{"engine": "onnxruntime"}, {"engine": "torch"}, {"engine": "torch", "device": "cuda"}]
    report = optin_export.run(vit_recipe(targets=targets, gates={"speedup": 0.01}), tmp_path / "run")
    assert report is not None
    measured = {one.target for one in report.latency}
    assert {"onnxruntime-cpu-1t", "torch-cpu-1t"} <= measured
    assert {case.target for case in report.parity.cases if case.passed} == measured
    if not torch.cuda.is_available():
        missed = [gate for gate in report.verdict.gates if not gate.passed]
        assert {gate.name for gate in missed} == {"parity", "speedup"}
        assert all("not evaluated on torch-cuda" in gate.note for gate in missed)
    names = [path.name for path in sorted((tmp_path / "run" / "onnx").iterdir())]
    assert names == ["base.onnx", "base.pt2", "pruned.onnx", "pruned.pt2"]
