"""`optin-export export`: the model card, the command, and what it refuses without leaving anything half-written."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from optin_export import cli
from optin_export.errors import InputError
from optin_export.formats import sources, transformers_folder, write_folder
from optin_export.formats.changes import Changes, Unlike
from optin_export.formats.run import FinishedRun, OtherOutputs, open_run
from optin_export.models import build_module
from optin_export.report.schema import read_report
from tests.conftest import Make
from tests.formats.made import made_run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def made(classifier_recipe: Make, finished_vit: Path, tmp_path: Path) -> FinishedRun:
    (tmp_path / "run").mkdir()
    return made_run(classifier_recipe(), tmp_path / "run", read_report(finished_vit))


def with_base(run: FinishedRun, **fields: Any) -> FinishedRun:
    base = {**run.base, **fields}
    return dataclasses.replace(run, architecture=run.architecture.model_copy(update={"base": base}))


def test_a_finished_run_of_timm_loads_in_three_lines(finished_vit: Path, tmp_path: Path, capsys: Capture) -> None:
    to = tmp_path / "small"
    assert cli.main(["export", str(finished_vit), "--format", "timm", "--to", str(to), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == ["README.md", "config.json", "model.py", "model.safetensors", "onnx/model.onnx"]
    card = (to / "README.md").read_text(encoding="utf-8")
    lines = card.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(to))
    rows = finished_vit / "measure" / "reference.safetensors"
    check = (
        "import torch; from safetensors.torch import load_file\n"
        f"rows = load_file({str(rows)!r})\n"
        "with torch.no_grad(): print((model(rows['input.pixel_values']) - rows['output.pruned']).abs().max().item())\n"
        "assert 'optin_export' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-I", "-c", lines + check], capture_output=True, text=True)
    assert float(done.stdout) < 1e-5, done.stderr
    assert (to / "onnx" / "model.onnx").read_bytes() == (finished_vit / "onnx" / "pruned.onnx").read_bytes()


def test_the_card_says_what_the_report_says(finished_vit: Path, tmp_path: Path) -> None:
    report = read_report(finished_vit)
    card = (write_folder(open_run(finished_vit), "timm", tmp_path / "small") / "README.md").read_text(encoding="utf-8")
    accuracy = report.accuracy
    assert accuracy is not None
    assert f"{accuracy.base:.2f} unpruned, {accuracy.pruned:.2f} pruned" in card
    assert f"95 % interval {accuracy.drop_low:+.2f} to {accuracy.drop_high:+.2f}" in card
    for one in report.latency:
        assert f"{one.speedup.ci_low:.2f} to {one.speedup.ci_high:.2f}" in card
    heads = [group for group in report.pruning.groups if group.kind == "heads"]
    removed = sum(group.count - group.kept for group in heads)
    assert (
        f"| heads | {removed} | {sum(group.kept for group in heads)} of {sum(group.count for group in heads)} |" in card
    )
    assert "Licence of the unpruned model: unknown" in card and "library_name: timm" in card


def test_the_run_is_as_it_was_and_the_default_folder_is_beside_it(finished_vit: Path, capsys: Capture) -> None:
    to = finished_vit.with_name(f"{finished_vit.name}-timm")
    assert cli.main(["export", str(finished_vit), "--format", "timm"]) == 0
    assert str(to / "README.md") in capsys.readouterr().out
    assert cli.main(["verify", str(finished_vit)]) == 0
    assert cli.main(["export", str(finished_vit), "--format", "timm"]) == 2  # it exists
    assert "delete it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("format", "why", "fix"),
    [("hf", "it is a model of timm", "--format timm"), ("coreml", "not one of the known", "hf, sentence-transformers")],
)
def test_a_format_that_does_not_fit_is_refused(
    finished_vit: Path, tmp_path: Path, capsys: Capture, format: str, why: str, fix: str
) -> None:
    assert cli.main(["export", str(finished_vit), "--format", format, "--to", str(tmp_path / "to")]) == 2
    printed = capsys.readouterr().err
    assert why in printed and fix in printed
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_finished_run_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["export", str(tmp_path), "--format", "hf"]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_saved_model_is_told_from_a_run(finished_vit: Path, tmp_path: Path, capsys: Capture) -> None:
    """What `Pruned.save` writes, and the same files inside of a run."""
    saved = shutil.copytree(finished_vit / "model", tmp_path / "small")
    for folder, fix in ((saved, "optin_export.load_model"), (finished_vit / "model", f"give {finished_vit}, the run")):
        assert cli.main(["export", str(folder), "--format", "timm", "--to", str(tmp_path / "to")]) == 2
        printed = capsys.readouterr().err
        assert "holds a model, not a run" in printed and fix in printed
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("format", "fields", "why"),
    [
        ("hf", {"library": "python", "source": "py:a.py:b", "args": {}}, "your own Python function"),
        ("timm", {}, "it is a model of transformers"),
        ("sentence-transformers", {}, "a model for text-classification gives no embedding"),
        ("hf", {"tower": {}}, "one tower of a model with two"),
        ("hf", {"encoder": True}, "also has a decoder"),
        ("optimum", {"task": "question-answering"}, "no class that takes the graph of this question-answering"),
    ],
)
def test_a_model_that_a_format_cannot_hold_is_refused(
    made: FinishedRun, tmp_path: Path, format: str, fields: dict[str, Any], why: str
) -> None:
    with pytest.raises(InputError) as error:
        write_folder(with_base(made, **fields), format, tmp_path / "to")
    assert why in error.value.why
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_merged_tokens_are_refused(made: FinishedRun, tmp_path: Path) -> None:
    merged = dataclasses.replace(made, architecture=made.architecture.model_copy(update={"merged": (0, 2, 0)}))
    with pytest.raises(InputError, match="cannot be written as hf") as error:
        write_folder(merged, "hf", tmp_path / "to")
    assert "tokens are merged" in error.value.why and "optimum" in error.value.fix


def test_a_folder_that_gives_other_outputs_is_not_written(made: FinishedRun, tmp_path: Path) -> None:
    inputs, outputs = made.rows
    made.__dict__["rows"] = inputs, outputs + 1e-3
    with pytest.raises(InputError) as error:
        write_folder(made, "hf", tmp_path / "to")
    assert "gives other outputs" in error.value.why
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_library_whose_attentions_differ_gets_the_eager_one(
    made: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Falcon's do with position biases in transformers."""
    compared: list[torch.Tensor] = []

    def check(run: FinishedRun, name: str, got: torch.Tensor) -> None:
        compared.append(got)
        if len(compared) == 1:
            raise OtherOutputs("what", "why", "fix")

    monkeypatch.setattr(transformers_folder, "check_outputs", check)
    to = write_folder(made, "hf", tmp_path / "to")
    assert len(compared) == 2
    cls = transformers_folder._class_in(to / "modeling_pruned.py", "BertForSequenceClassification")
    assert cls.from_pretrained(to).config._attn_implementation == "eager"
    assert "_supports_sdpa" not in sources.modeling_file("BertForSequenceClassification")


def test_a_layer_of_another_class_is_named(made: FinishedRun) -> None:
    model: Any = made.model.model
    model.classifier = torch.nn.Sequential(model.classifier)
    with pytest.raises(Unlike, match="'classifier' was a Linear, and is a Sequential"):
        Changes(build_module(made.base), model)


def test_a_tampered_run_is_refused(finished_vit: Path, tmp_path: Path, capsys: Capture) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(finished_vit, copy)
    path = copy / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert cli.main(["export", str(copy), "--format", "timm", "--to", str(tmp_path / "to")]) == 2
    assert "is not the file that was measured" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_optimum_gets_the_measured_graph_and_the_original_configuration(made: FinishedRun, tmp_path: Path) -> None:
    to = write_folder(made, "optimum", tmp_path / "to")
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] and "pruned" not in config and "auto_map" not in config
    assert (to / "onnx" / "model.onnx").read_bytes() == b"the graph that was measured"
    assert (to / "tokenizer.json").is_file() and not (to / "model.safetensors").exists()
    assert "ORTModelForSequenceClassification" in (to / "README.md").read_text(encoding="utf-8")


def test_the_weights_are_those_of_the_run(made: FinishedRun, tmp_path: Path) -> None:
    found = load_file(write_folder(made, "hf", tmp_path / "to") / "model.safetensors")
    expected = made.model.model.state_dict()
    assert found and all(torch.equal(value, expected[name]) for name, value in found.items())
