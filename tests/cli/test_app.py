"""The command line: what is wrong ends in three lines and its exit code, before anything is written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from optin_export import cli, errors
from optin_export.cli import run as run_module
from optin_export.units import supported
from optin_export.workdir.run_directory import STAGES
from tests.conftest import ROOT, Make

Run = Callable[..., tuple[int, str, str]]
#: Fields of a small DINOv2 of transformers.
DINOV2: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 1,
    "num_labels": 5,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in an empty working directory; returns exit code, standard output and standard error."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)

    def run(recipe: dict[str, Any] | str | Path, *options: str) -> tuple[int, str, str]:
        if isinstance(recipe, dict):
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
            recipe = tmp_path / "recipe.yaml"
        code = cli.main([str(recipe), *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def assert_refused(result: tuple[int, str, str], says: str, code: int = 2, progress: bool = False) -> None:
    """Exactly three lines on standard error (after `progress`, once stages have begun), nothing on standard output."""
    lines = result[2].splitlines()
    assert result[0] == code, result[2]
    assert [line.partition(":")[0].strip() for line in lines[-3:]] == ["error", "why", "fix"], result[2]
    assert all(line.partition(":")[2].strip() for line in lines[-3:])
    assert progress or len(lines) == 3, result[2]
    assert says in "\n".join(lines[-3:]) and "Traceback" not in result[2] and result[1] == ""
    assert list(Path.cwd().iterdir()) == []  # no run folder, nothing half-written


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--set", "modle.source=x"], "did you mean 'model'?"),
        (["--set", "recipe=2"], "recipe: should be 1"),
        (["--set", "prune.budget.params=0.5"], "exactly one of: macs, params"),
        (["--set", "prune.budget={}"], "exactly one of: macs, params"),
        (["--set", "prune.budget.macs=1.5"], "prune.budget.macs"),
        (["--set", "targets=[{}, {}]"], "two entries are the same"),
        (["--set", "gates.accuracy_drop=1", "--set", "data.evaluation="], "needs data.evaluation"),
        (["--set", "model.pooling=mean"], "model.pooling is only for"),
        (["--set", "tokens.keep=1.5"], "tokens.keep"),
        (["--set", "seed"], "it is not KEY=VALUE"),
        (["--set", "targets.9.threads=2"], "targets: should be a valid list"),
        (["--set", "export.batch.9=2"], "does not name a field"),
        (["--set", "model.source=hub:x"], "unknown source 'hub:x'"),
        (["--set", "model.source=py:x.py"], "names no function"),
        (["--set", "data.calibration.source=images.npz"], "unknown source"),
        (["--set", "name=../escape"], "name: String should match pattern"),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--dry-run"]], ids=["run", "dry"])
def test_a_bad_recipe(run: Run, vit_recipe: Make, options: list[str], says: str, mode: list[str]) -> None:
    assert_refused(run(vit_recipe(), *options, *mode), says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"- 1\n", "not a mapping"),
        (b"recipe: [\n", "not a usable YAML file"),
        (b"\xff\xfe", "not UTF-8"),
        (b"recipe: 1\nrecipe: 1\n", "given twice"),
        (b"[" * 20_000, "not a usable YAML file"),
        (b"a: &a {b: *a}\n", "not a usable YAML file"),
    ],
)
def test_a_bad_file(run: Run, tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    assert_refused(run(tmp_path / "bad.yaml"), says)


def test_a_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    assert_refused(run(tmp_path / "none.yaml"), "No such file")
    assert_refused(run(tmp_path), "directory")


def test_an_error_as_json(run: Run, vit_recipe: Make) -> None:
    code, out, err = run(vit_recipe(), "--json", "--set", "prune.budget.macs=7")
    described = json.loads(out)["error"]
    assert code == described["exit_code"] == 2 and "prune.budget.macs" in described["why"]
    assert set(described) == {"what", "why", "fix", "exit_code"} and err.startswith("error: ")


def test_unknown_options_end_with_2(run: Run, vit_recipe: Make) -> None:
    for options in (["--no-such-option"], ["--stop-after", "nowhere"], ["--quiet", "--verbose"]):
        code, _, err = run(vit_recipe(), *options)
        told = [line.split(":")[0].strip() for line in err.splitlines()]
        assert code == 2 and told == ["error", "why", "fix"] and options[0] in err


# --- dry run --------------------------------------------------------------------------------------------------------


def test_a_dry_run_names_every_stage_and_touches_nothing(run: Run, vit_recipe: Make, bert_recipe: Make) -> None:
    for recipe in (vit_recipe(), bert_recipe()):
        code, out, err = run(recipe, "--dry-run", "--out", "somewhere")
        assert code == 0 and err == ""
        stages = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2] != " "]
        assert stages == list(STAGES)
        code, out, _ = run(recipe, "--dry-run", "--json")
        assert [stage["name"] for stage in json.loads(out)["stages"]] == list(STAGES)
        assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.calibration.source=npz:none.npz", "No such file"),
        ("data.evaluation.source=npz:.", "Is a directory"),
        ("data.calibration.source=images:none", "no images in"),
        ("data.calibration.source=py:none.py:rows", "No such file"),
        ("model.source=py:none.py:model", "No such file"),
        ("model.source=none", "no readable config.json"),
        ("model.source=.", "no readable config.json"),
        ("model.weights=none.safetensors", "cannot read the checkpoint"),
    ],
)
def test_a_dry_run_misses_files(run: Run, vit_recipe: Make, override: str, says: str) -> None:
    assert_refused(run(vit_recipe(), "--dry-run", "--set", override), says)


@pytest.mark.parametrize(
    "words",
    [["explain", "prune.budget"], ["schema"], ["completion", "bash"], ["{recipe}", "--dry-run", "--set", "seed=x"]],
)
def test_light_commands_import_no_torch(vit_recipe: Make, tmp_path: Path, words: list[str]) -> None:
    """Nor does a recipe that does not validate."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(vit_recipe()), encoding="utf-8")
    code = (
        "import sys; from optin_export.cli import main\n"
        f"code = main({[word.format(recipe=tmp_path / 'recipe.yaml') for word in words]!r})\n"
        "heavy = {'torch', 'transformers', 'timm', 'onnx', 'onnxruntime', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0 if code in (0, 2) else code)"
    )
    place = tmp_path / "work"
    place.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=place, env=environment, stdout=subprocess.DEVNULL)
    assert list(place.iterdir()) == []


def test_the_module_as_a_command(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-m", "optin_export", *arguments]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = command("none.yaml")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 3
    assert "Exit codes: 0 all gates passed" in command("--help").stdout and command("--version").returncode == 0
    assert list(tmp_path.iterdir()) == []


# --- the place of the run -------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_the_run_folder(run: Run, vit_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x", encoding="utf-8")
    for mode in ([], ["--dry-run"]):
        assert_refused(run(vit_recipe(), "--out", str(tmp_path / "file"), *mode), "is a file")
        assert_refused(run(vit_recipe(), "--out", str(foreign), *mode), "is not a run folder")
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("place", ["/proc/run", "../file/run"])
def test_an_unwritable_place(run: Run, vit_recipe: Make, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert_refused(run(vit_recipe(), "--out", place), "cannot write", code=5, progress=True)


# --- models and data ------------------------------------------------------------------------------------------------


def test_streams_of_an_unknown_architecture_are_refused(run: Run, vit_recipe: Make) -> None:
    raw = vit_recipe()
    raw["prune"]["coupled"] = True
    raw["model"] = {
        **raw["model"],
        "source": "timm:ghostnet_050",
        "weights": "random",
        "args": {"in_chans": 1, "num_classes": 5},
    }
    result = run(raw)
    assert_refused(result, "the model has no residual stream with removable channels", progress=True)
    assert "no family knows the blocks of a GhostNet" in result[2] and "prune.coupled: false" in result[2]


def test_a_variant_is_told_which_units_it_can_lose(run: Run, vit_recipe: Make) -> None:
    """EVA-02 with a norm inside its MLP: refused as it is, and the fix that the error names is one."""
    raw = vit_recipe()
    raw["model"] |= {"source": "timm:eva02_base_patch14_448", "weights": "random"}
    assert_refused(run(raw), "norm across its neurons", progress=True)
    result = run(raw, "--set", "prune.units=[heads]", "--stop-after", "surgery", "--set", "prune.budget.macs=0.9")
    assert result[0] == 0 and Path("runs/tiny-vit/model/architecture.json").is_file()


@pytest.mark.parametrize(
    ("source", "args"),
    [("timm:mobilenetv3_small_050", {"in_chans": 1, "num_classes": 5}), ("hf:model_type=dinov2", DINOV2)],
)
def test_a_random_model_needs_no_files(run: Run, vit_recipe: Make, source: str, args: dict[str, Any]) -> None:
    """weights: random with an architecture alone: scored with joint allocation, cut, repaired, saved."""
    raw = vit_recipe()
    raw["model"] |= {"source": source, "weights": "random", "args": args}
    raw["prune"] |= {"budget": {"macs": 0.8}, "curve_samples": 8}
    result = run(raw, "--stop-after", "surgery")
    assert result[0] == 0, result[2]
    assert Path("runs/tiny-vit/model/architecture.json").is_file()


def test_a_random_text_model_needs_a_tokenizer_and_nothing_else(run: Run, bert_recipe: Make, bert_folder: Path) -> None:
    raw = bert_recipe()
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    raw["model"] |= {"source": "hf:model_type=bert", "weights": "random", "args": {**sizes, "intermediate_size": 64}}
    assert_refused(run(raw), "set model.tokenizer", progress=True)
    raw["model"]["tokenizer"] = str(bert_folder)
    result = run(raw, "--stop-after", "surgery")
    assert result[0] == 0, result[2]


def test_the_families_are_listed(run: Run) -> None:
    code, out, err = run("families")
    assert code == 0 and err == ""
    *lines, other = out.splitlines()
    assert other.startswith("any other model") and "found by measurement" in other
    listed = {line.split()[0]: line for line in lines[::2]}
    assert list(listed) == [family.name for family in supported()]
    assert "whole sub-layers of heads and neurons" in listed["vit"] and "channels" in listed["resnet"]
    assert "deit3_*" in out
    code, out, _ = run("families", "--json")
    assert code == 0
    for family, row in zip(supported(), json.loads(out)["families"], strict=True):
        assert row == {
            "name": family.name,
            "library": family.library,
            "examples": family.examples,
            "units": list(family.units),
            "sublayers": list(family.sublayers),
        }
    assert run("families", "--quiet")[0] == 2


def test_a_budget_no_plan_meets_fails_before_scoring(
    run: Run, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optin_export import scoring

    def never(*arguments: Any) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr(scoring, "score", never)
    result = run(vit_recipe(prune={"budget": {"macs": 0.0001}}))
    assert_refused(result, "no plan meets the budget macs: 0.0001", progress=True)


def test_nan_in_data_and_in_weights(run: Run, vit_recipe: Make, vit_checkpoint: Path, tmp_path: Path) -> None:
    images = np.zeros((8, 1, 32, 32), np.float32)
    images[5, 0, 3, 3] = np.nan
    np.savez(tmp_path / "nan.npz", images=images, labels=np.arange(8) % 5)
    source = f"data.calibration.source=npz:{tmp_path / 'nan.npz'}"
    assert_refused(run(vit_recipe(), "--set", source), "'image' of row 5 is empty, NaN", progress=True)
    state = load_file(vit_checkpoint)
    state["blocks.1.attn.qkv.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    result = run(vit_recipe(), "--set", f"model.weights={tmp_path / 'nan.safetensors'}")
    assert_refused(result, "blocks.1.attn.qkv.weight holds NaN", progress=True)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.args.no_such=1", "cannot create the model"),
        ("model.source=timm:vit_tinny", "cannot create the model"),
        ("model.source=hf:no-such-owner/no-such-model", "cannot load the model"),
        ("model.weights=none.safetensors", "cannot read the checkpoint"),
        ("data.calibration.source=npz:none.npz", "No such file"),
        ("data.calibration.source=py:json:loads", "failed"),
        ("data.evaluation.columns={label: classes}", "has no array 'classes'"),
        ("model.args.num_classes=7", "does not fit the model"),
        ("model.preprocess.size=[16, 16]", "does not run on the calibration data"),
    ],
)
def test_bad_inputs(run: Run, vit_recipe: Make, override: str, says: str) -> None:
    assert_refused(run(vit_recipe(), "--set", override), says, progress=True)


def test_bad_inputs_of_text(run: Run, bert_recipe: Make) -> None:
    assert_refused(run(bert_recipe(), "--set", "export.sequence=65"), "64 positions", progress=True)
    assert_refused(run(bert_recipe(), "--set", "data.evaluation.columns.label=0"), "is not a number", progress=True)
    assert_refused(run(bert_recipe(), "--set", "data.calibration.columns.text=7"), "has no column 7", progress=True)


def test_a_missing_package_ends_with_5(run: Run, bert_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    raw = bert_recipe()
    raw["data"]["calibration"] = {"source": "hf-dataset:glue:sst2", "columns": {"text": "sentence"}}
    assert_refused(run(raw), "pip install 'optin-export[datasets]'", code=5, progress=True)


# --- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InputError("a", "b", "c"), 2),
        (errors.ParityError("a\nb", "c\n  d", "e"), 3),
        (errors.GateError("a", "b", "c"), 4),
        (errors.EnvironmentLacks("a", "b", "c"), 5),
        (MemoryError(), 5),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), 2),
        (OSError(errno.ENOSPC, "No space left on device", "there"), 5),
    ],
)
def test_every_error_has_its_code(
    run: Run, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(run_module, "run_folder", fail)
    assert_refused(run(vit_recipe()), "", code=code)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "No such file", "ours"), OSError("of no number")]
)
def test_our_own_bug_ends_with_1_and_shows_where(
    run: Run, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(run_module, "run_folder", fail)
    code, _, err = run(vit_recipe())
    assert code == 1 and "Traceback" in err and "this is a bug" in err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    ],
)
def test_out_of_memory_is_no_bug_of_ours(
    error: Exception,
    vit_recipe: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("optin_export.stages.pipeline.run", fail)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(vit_recipe()), encoding="utf-8")
    assert cli.main([str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 5
    assert capsys.readouterr().err.startswith("error: out of memory")


def test_a_bug_shows_its_traceback_and_exits_with_1(
    vit_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("optin_export.stages.pipeline.run", fail)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(vit_recipe()), encoding="utf-8")
    assert cli.main([str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 1
    assert "Traceback" in capsys.readouterr().err
