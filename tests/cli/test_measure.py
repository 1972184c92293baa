"""A run folder on another machine: the model's source is not there, engines are built and measured for real."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import optin_export
from optin_export import cli
from optin_export.cli.measure import parse_target
from optin_export.errors import InputError
from optin_export.report import still_elsewhere
from optin_export.ship import check_manifest
from optin_export.workdir.files import read_json, sha256_file
from tests.conftest import Make, measured_shortly

pytestmark = pytest.mark.usefixtures("short_measurement")


def finish(make: Make, weights: Path, here: Path, targets: Sequence[str]) -> Path:
    """A finished run of the small ViT for these engines, whose model's weights are gone."""
    shutil.copy(weights, here / "vit.safetensors")
    recipe = make(targets=[{"engine": engine} for engine in targets], gates={"speedup": 0.01})
    recipe["model"]["weights"] = str(here / "vit.safetensors")
    with measured_shortly():
        report = optin_export.run(recipe, here / "run")
    assert report is not None and report.verdict.passed
    (here / "vit.safetensors").rename(here / "elsewhere.safetensors")
    return here / "run"


@pytest.fixture(scope="module")
def finished(vit_recipe: Make, vit_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(vit_recipe, vit_checkpoint, tmp_path_factory.mktemp("elsewhere"), ["onnxruntime"])


@pytest.fixture(scope="module")
def with_programs(vit_recipe: Make, vit_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(vit_recipe, vit_checkpoint, tmp_path_factory.mktemp("programs"), ["onnxruntime", "torch"])


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def copied_programs(with_programs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_programs, tmp_path / "copy"))


def measure(run: Path, *more: str) -> int:
    return cli.main(["measure", str(run), "--quiet", *more])


def test_a_copied_run_is_measured_without_the_models_source(
    copied_programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = copied_programs
    before = read_json(copied / "report.json")
    mine = {path: path.read_bytes() for path in (copied / "measure").iterdir()}
    chosen = ("--target", "engine=onnxruntime,threads=2", "--target", "engine=torch,device=cpu", "--machine", "box-b")
    assert measure(copied, *chosen, "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(one["machine"], one["target"]) for one in results] == [
        ("box-b", "onnxruntime-cpu-2t"),
        ("box-b", "torch-cpu-1t"),
    ]
    for one in results:
        assert one["parity"]["passed"] and {row["batch"] for row in one["latency"]} == {1, 3}
        assert {(case["batch"], case["rows"]) for case in one["parity"]["cases"]} == {
            (batch, rows) for batch in (1, 3) for rows in ("distinct", "identical")
        }
        assert one["accuracy"] is None and "cannot be read here" in one["accuracy_note"]
        assert {gate["name"] for gate in one["gates"]} == {"parity", "speedup"}
    after = read_json(copied / "report.json")
    assert after.pop("elsewhere") == results
    before.pop("elsewhere")
    assert after == before  # the run's own results and verdict stay
    assert mine == {path: path.read_bytes() for path in (copied / "measure").iterdir()}
    page = (copied / "report.html").read_text(encoding="utf-8")
    assert "Other machines" in page and "box-b" in page and "onnxruntime-cpu-2t" in page
    assert check_manifest(copied) == []
    stored = read_json(copied / "machines" / "box-b" / "measure" / "torch-cpu-1t.json")
    assert stored["latency"][0]["samples"]["pruned"] and stored["environment"]["cpu"]
    # Another machine beside it; nothing that was measured is replaced unasked.
    assert measure(copied, "--target", "engine=onnxruntime,threads=2", "--machine", "box-c") == 0
    assert {one["machine"] for one in read_json(copied / "report.json")["elsewhere"]} == {"box-b", "box-c"}
    assert measure(copied, "--target", "engine=onnxruntime,threads=2", "--machine", "box-b") == 2
    assert "measured on box-b already" in capsys.readouterr().err
    assert measure(copied, "--target", "engine=onnxruntime,threads=2", "--machine", "box-b", "--replace") == 0


def test_with_the_source_accuracy_is_measured(
    with_programs: Path, copied_programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = with_programs.parent / "elsewhere.safetensors"
    shutil.copy(weights, with_programs.parent / "vit.safetensors")
    try:
        assert measure(copied_programs, "--target", "engine=torch", "--machine", "a", "--json") == 0
    finally:
        (with_programs.parent / "vit.safetensors").unlink()
    (one,) = json.loads(capsys.readouterr().out)["results"]
    own = read_json(copied_programs / "report.json")["accuracy"]
    assert one["accuracy"]["base"] == own["base"] and one["accuracy"]["drop"] == own["drop"]


def test_results_of_other_graphs_are_left_out(copied: Path) -> None:
    assert measure(copied, "--target", "engine=onnxruntime", "--machine", "a") == 0
    assert [one.machine for one in still_elsewhere(copied)] == ["a"]
    (copied / "onnx" / "base.onnx").write_bytes(b"another run's")
    assert still_elsewhere(copied) == ()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_cannot_run_here_is_built_and_never_passes(
    copied_programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(copied_programs, "--target", "engine=torch,device=cuda", "--machine", "a") == 4
    assert "not evaluated" in capsys.readouterr().out
    (one,) = still_elsewhere(copied_programs)
    assert one.parity is None and one.latency == () and not any(gate.passed for gate in one.gates)
    assert "no NVIDIA GPU" in (one.engines[0].unmeasured or "")
    assert (copied_programs / "machines" / "a" / "engines" / "torch-cuda" / "base.pt2").exists()


def wrong_answers(run: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = run / "measure" / "reference.safetensors"
    tensors = load_file(path)
    tensors["output.pruned"] = tensors["output.pruned"] * 1.01
    save_file(tensors, path)
    manifest = read_json(run / "manifest.json")
    manifest["files"]["measure/reference.safetensors"]["sha256"] = sha256_file(path)
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_engines_that_compute_something_else_fail_parity(copied: Path) -> None:
    wrong_answers(copied)
    assert measure(copied, "--target", "engine=onnxruntime", "--machine", "a") == 3
    (one,) = still_elsewhere(copied)
    assert one.latency == () and one.parity is not None and not one.parity.passed


def damaged(run: Path, name: str, how: Any) -> None:
    path = run / name
    how(path)


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("manifest.json", Path.unlink, "cannot read"),
        ("recipe.yaml", Path.unlink, "is not a run folder"),
        ("report.json", Path.unlink, "has no report.json"),
        ("onnx/base.onnx", Path.unlink, "has no onnx/base.onnx"),
        ("onnx/pruned.onnx", lambda path: path.write_bytes(b"x"), "not the file that the run wrote"),
        ("measure/reference.safetensors", Path.unlink, "has no measure/reference.safetensors"),
        ("measure/reference.safetensors", lambda path: path.write_bytes(b"x"), "not the file that the run wrote"),
    ],
)
def test_what_is_no_finished_run_is_refused(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str, how: Any, message: str
) -> None:
    damaged(copied, name, how)
    assert measure(copied, "--target", "engine=onnxruntime") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(copied.glob("machines/*/measure/*"))


def test_a_torch_target_without_a_program_says_how_to_get_one(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not (copied / "onnx" / "base.pt2").exists()
    assert measure(copied, "--target", "engine=torch") == 2
    assert "engine: torch among its targets" in capsys.readouterr().err


def test_no_run_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(tmp_path / "nowhere") == 2
    assert "give the folder of a finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine=no-such-engine", "engine"),
        ("tensorrt", "not KEY=VALUE"),
        ("engine=onnxruntime,compile=true", "compile is for the engine torch"),
        ("engine=torch,devise=cuda", "devise"),
        ("engine=torch,engine.x=1", "does not set a field"),
        ("engine=[", "does not set a field"),
    ],
)
def test_targets_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_target(text)


def test_a_target_may_reach_into_a_section() -> None:
    target = parse_target("engine=tensorrt,tensorrt.workspace=2048,tensorrt.dynamic=true")
    assert (target.name, target.tensorrt.workspace, target.tensorrt.dynamic) == ("tensorrt-cuda", 2048, True)


@pytest.mark.parametrize("target", ["engine=tensorrt", "engine=onnxruntime,device=cuda"])
def test_a_missing_library_shows_before_anything_is_built(
    copied: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    from optin_export.engines import versions
    from optin_export.errors import EnvironmentLacks

    try:
        versions(parse_target(target))
        pytest.skip("the library is installed")
    except EnvironmentLacks:
        pass
    assert measure(copied, "--target", "engine=onnxruntime", "--target", target) == 5
    assert "pip" in capsys.readouterr().err
    assert not (copied / "machines").exists()


@pytest.mark.slow
def test_a_text_run_without_its_model_folder(bert_recipe: Make, bert_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(bert_folder, tmp_path / "bert")
    model = {"source": str(tmp_path / "bert"), "task": "feature-extraction", "pooling": "mean"}
    targets = [{"engine": "onnxruntime"}, {"engine": "torch"}]
    assert optin_export.run(bert_recipe(model=model, targets=targets), tmp_path / "run") is not None
    shutil.rmtree(tmp_path / "bert")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert measure(tmp_path / "copy", "--machine", "b") == 0  # the recipe's targets
    found = still_elsewhere(tmp_path / "copy")
    assert [one.target for one in found] == ["onnxruntime-cpu-1t", "torch-cpu-1t"]
    assert all(one.parity is not None and one.parity.passed and len(one.latency) == 2 for one in found)
