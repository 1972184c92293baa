"""The whole run on small random models: the run folder, resume by content, gates and exit codes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import optin_export
from optin_export import measure, pruning, repair
from optin_export.cli.run import exit_code
from optin_export.displays import Quiet
from optin_export.errors import InputError
from optin_export.measure import parity
from optin_export.recipe import Budget, load_recipe, validate
from optin_export.report.schema import read_report
from optin_export.search import find_plan, read_plan
from optin_export.ship import check_manifest
from optin_export.stages.context import RunContext
from optin_export.stages.measure import REFERENCE_ROWS
from optin_export.stages.pipeline import NEVER_REUSED
from optin_export.workdir.files import sha256_file
from optin_export.workdir.run_directory import STAGES
from tests.conftest import Make

pytest.importorskip("onnxruntime")
ARTEFACTS = {
    "recipe.yaml",
    "scores/scores.safetensors",
    "scores/curves.safetensors",
    "plan/plan.json",
    "model/architecture.json",
    "model/model.safetensors",
    "onnx/base.onnx",
    "onnx/pruned.onnx",
    "engines/onnxruntime-cpu-1t/base.onnx",
    "engines/onnxruntime-cpu-1t/pruned.onnx",
    "measure/parity.json",
    "measure/accuracy.json",
    "measure/latency.json",
    "measure/reference.safetensors",
    "manifest.json",
    "report.json",
    "report.html",
}
TOKENIZER = {"preprocess/tokenizer.json"}


pytestmark = pytest.mark.usefixtures("short_measurement")


def files(folder: Path) -> set[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in found if not name.startswith(".stages/")}


class Finished(Quiet):
    """Keeps which of the stages were reused."""

    def __init__(self) -> None:
        self.reused: list[bool] = []

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        self.reused.append(reused)


@pytest.fixture
def run(finished_vit: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of `vit_recipe()`."""
    return Path(shutil.copytree(finished_vit, tmp_path / "run"))


def reused(report: optin_export.Report) -> dict[str, bool]:
    return {stage.name: stage.reused for stage in report.stages}


@pytest.mark.parametrize("kind", ["vit_recipe", "bert_recipe", "classifier_recipe"])
def test_a_run_from_recipe_to_report(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recipe: dict[str, Any] = request.getfixturevalue(kind)(gates={"accuracy_drop": 100.0, "speedup": 0.01})
    report = optin_export.run(recipe, out=tmp_path / "run")
    assert report is not None
    # What an ensemble needs to take raw inputs: how images become pixels, or the tokenizer.
    prepared = {"preprocess/preprocess.json"} if kind == "vit_recipe" else TOKENIZER
    assert files(tmp_path / "run") == ARTEFACTS | prepared
    assert [stage.name for stage in report.stages] == list(STAGES[:-1])  # writing the report ends after the report
    assert report.verdict.passed
    assert {gate.name for gate in report.verdict.gates} == {"parity", "budget.macs", "speedup", "accuracy_drop"}
    assert report.macs.ratio <= 0.6
    assert report.params.pruned < report.params.base
    assert [one.batch for one in report.latency] == [1, 3]
    kinds = Counter(case.rows for case in report.parity.cases)
    short = {} if kind == "vit_recipe" else {"short": 4}  # texts of two and of three tokens, of both models
    assert kinds == {"distinct": 4, "identical": 4, **short}
    assert exit_code(report) == 0
    assert check_manifest(tmp_path / "run") == []
    on_disk = json.loads((tmp_path / "run" / "report.json").read_text())
    assert optin_export.Report.model_validate(on_disk) == report
    assert report.verdict.summary[8:40] in (tmp_path / "run" / "report.html").read_text()


def test_a_model_that_loads_as_another_one_is_refused(
    tmp_path: Path, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its code computed sizes from what it kept from an earlier pass, which a loaded model has not run."""
    real = pruning.load_model

    def load_model(*given: Any) -> Any:
        model = real(*given)
        model.get_parameter("model.blocks.0.mlp.fc1.bias").data += 0.1
        return model

    monkeypatch.setattr(pruning, "load_model", load_model)
    with pytest.raises(InputError, match="loaded again, is another one"):
        optin_export.run(vit_recipe(), out=tmp_path / "run", stop_after="surgery")


def test_the_gates_are_judged_once(tmp_path: Path, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ships and what is reported is the same verdict."""
    real, calls = measure.judge, []

    def judge(*given: Any, **named: Any) -> list[measure.Gate]:
        calls.append(given)
        return real(*given, **named)

    monkeypatch.setattr(measure, "judge", judge)
    report = optin_export.run(vit_recipe(gates={"speedup": 1000.0}), out=tmp_path / "run")
    assert len(calls) == 1
    assert report is not None and not report.verdict.passed and not (tmp_path / "run" / "triton").exists()


def test_reported_accuracy_is_that_of_the_onnx_file(finished_vit: Path, image_data: Path) -> None:
    """By hand, in plain onnxruntime, as a user would check."""
    import onnxruntime

    report = read_report(finished_vit)
    assert report.accuracy is not None
    session = onnxruntime.InferenceSession(finished_vit / "onnx" / "pruned.onnx", providers=["CPUExecutionProvider"])
    with np.load(image_data / "images.npz") as data:
        pixels = (data["images"][:, None].astype(np.float32) / 255 - 0.5) / 0.5
        predictions = np.concatenate([session.run(None, {"pixel_values": rows})[0] for rows in np.split(pixels, 40)])
        accuracy = 100 * (predictions.argmax(-1) == data["labels"]).mean()
    assert report.accuracy.pruned == pytest.approx(accuracy)


def test_the_reference_holds_what_the_torch_models_answer(finished_vit: Path) -> None:
    reference = load_file(finished_vit / "measure" / "reference.safetensors")
    rows, answers = reference["input.pixel_values"], reference["output.pruned"]
    assert len(rows) == len(answers) == len(reference["output.base"]) == REFERENCE_ROWS
    model = optin_export.load_model(finished_vit / "model")
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=torch.from_numpy(rows)), torch.from_numpy(answers))
    assert not np.allclose(answers, reference["output.base"])


def test_without_repair_the_onnx_is_the_masked_model(tmp_path: Path, vit_recipe: Make) -> None:
    prune = {**vit_recipe()["prune"], "compensate": False}
    report = optin_export.run(vit_recipe(prune=prune), out=tmp_path / "run")
    assert report is not None
    assert report.pruning.masked_difference <= 1e-5
    assert all(group.error_before is None for group in report.pruning.groups)


def test_a_second_run_reuses_everything_and_says_the_same(run: Path, vit_recipe: Make) -> None:
    first = read_report(run)
    named = {"report.json", "report.html", "manifest.json"}  # which say when, and the manifest what is in the other two
    before = {name: sha256_file(run / name) for name in ARTEFACTS - named}
    second = optin_export.run(vit_recipe(), out=run)
    assert second is not None
    assert all(done for name, done in reused(second).items() if name not in NEVER_REUSED)
    assert second.latency == first.latency
    assert before == {name: sha256_file(run / name) for name in before}


def test_another_budget_reuses_the_scores_and_the_base_engine(run: Path, vit_recipe: Make) -> None:
    base = (run / "onnx" / "base.onnx").stat().st_mtime_ns
    prune = {**vit_recipe()["prune"], "budget": {"params": 0.7}}
    report = optin_export.run(vit_recipe(prune=prune), out=run)
    assert report is not None
    assert reused(report)["scoring"]
    assert not any(reused(report)[name] for name in ("search", "surgery", "export", "engines", "measure"))
    assert (run / "onnx" / "base.onnx").stat().st_mtime_ns == base
    assert report.params.ratio <= 0.7


def test_force_does_everything_again(tmp_path: Path, vit_recipe: Make) -> None:
    optin_export.run(vit_recipe(), out=tmp_path / "run", stop_after="surgery")
    before = {name: sha256_file(tmp_path / "run" / name) for name in ("plan/plan.json", "model/model.safetensors")}
    times = {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in before}
    optin_export.run(vit_recipe(), out=tmp_path / "run", stop_after="surgery", force=True)
    assert all((tmp_path / "run" / name).stat().st_mtime_ns != times[name] for name in before)
    assert {name: sha256_file(tmp_path / "run" / name) for name in before} == before  # the same seed, the same result


def test_a_damaged_artefact_is_made_again(run: Path, vit_recipe: Make) -> None:
    path = run / "onnx" / "pruned.onnx"
    good = sha256_file(path)
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    optin_export.run(vit_recipe(), out=run, stop_after="export")
    assert sha256_file(path) == good


def test_a_changed_plan_is_not_reported_with_the_old_verdict(run: Path, vit_recipe: Make) -> None:
    """A run stopped half-way must not leave the conclusions of the run before it."""
    prune = {**vit_recipe()["prune"], "budget": {"macs": 0.5}}
    assert optin_export.run(vit_recipe(prune=prune), out=run, stop_after="search") is None
    assert not files(run) & {"report.json", "report.html", "manifest.json"}


def test_stop_after(tmp_path: Path, vit_recipe: Make) -> None:
    """One folder: each run goes on where the one before it stopped."""
    for stage, last, missing in (
        ("sources", "recipe.yaml", "scores/scores.safetensors"),
        ("scoring", "scores/scores.safetensors", "scores/curves.safetensors"),
        ("curves", "scores/curves.safetensors", "plan/plan.json"),
        ("search", "plan/plan.json", "model/architecture.json"),
        ("surgery", "model/model.safetensors", "onnx/base.onnx"),
    ):
        assert optin_export.run(vit_recipe(), out=tmp_path / "run", stop_after=stage) is None
        assert (tmp_path / "run" / last).exists()
        assert not (tmp_path / "run" / missing).exists()


def test_unknown_stage_is_refused(tmp_path: Path, vit_recipe: Make) -> None:
    with pytest.raises(InputError, match="scoring"):
        optin_export.run(vit_recipe(), out=tmp_path / "run", stop_after="scores")
    assert not (tmp_path / "run").exists()


def test_other_repairs_measure_new_curves_of_the_same_scores(run: Path, vit_recipe: Make) -> None:
    prune = vit_recipe()["prune"]
    curves = run / "scores" / "curves.safetensors"
    before = sha256_file(curves)
    display = Finished()
    for section in ({**prune, "compensate": False}, {**prune, "allocation": "additive"}):
        optin_export.run(vit_recipe(prune=section), out=run, stop_after="curves", display=display)
    assert sha256_file(curves) != before
    assert display.reused == [False, True, False, False, True, True]  # sources are loaded; the last one needs no curves


def test_a_missed_gate_is_a_failed_verdict_and_ships_nothing(run: Path, vit_recipe: Make) -> None:
    pytest.importorskip("tritonclient.grpc")
    passing, failing = {"accuracy_drop": 100.0}, {"speedup": 1000.0}
    report = optin_export.run(vit_recipe(gates=passing, ship={"triton": True}), out=run)
    assert report is not None and report.verdict.passed
    assert (run / "triton" / "tiny-vit" / "config.pbtxt").exists()
    report = optin_export.run(vit_recipe(gates=failing, ship={"triton": True}), out=run)
    assert report is not None and not report.verdict.passed
    assert reused(report)["measure"]  # another gate is another judgement, not another measurement
    assert exit_code(report) == 4
    assert report.verdict.summary.startswith("FAILED")
    assert "speedup" in report.verdict.summary
    assert not (run / "triton").exists()
    assert not json.loads((run / "manifest.json").read_text())["passed"]


def test_failed_parity_is_exit_code_3_and_nothing_is_timed(
    tmp_path: Path, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.TOLERANCES, "fp32", parity.Tolerance(0.0, 1.0, 1.0))
    monkeypatch.setattr(parity, "MOST_ROUNDING", 0.0)
    report = optin_export.run(vit_recipe(gates={"speedup": 0.01}), out=tmp_path / "run")
    assert report is not None and not report.verdict.passed
    assert exit_code(report) == 3
    assert report.latency == ()
    assert report.accuracy is None
    speedup = next(gate for gate in report.verdict.gates if gate.name == "speedup")
    assert speedup.measured is None and not speedup.passed


def test_the_resolved_recipe_runs_from_the_run_folder(tmp_path: Path, finished_vit: Path) -> None:
    optin_export.run(load_recipe(finished_vit / "recipe.yaml"), out=tmp_path / "other", stop_after="search")
    plans = [(run / "plan" / "plan.json").read_bytes() for run in (finished_vit, tmp_path / "other")]
    assert plans[0] == plans[1]


def test_the_plan_and_the_report_say_what_multiples_cost(finished_vit: Path) -> None:
    plan, report = read_plan(finished_vit / "plan" / "plan.json"), read_report(finished_vit)
    found = plan.alignment
    assert found is not None and report.pruning.alignment == found and found.lost is not None and found.lost >= 0
    assert (found.features, found.smaller) == (8, 0) and found.reason == "enough for fp32 on onnxruntime-cpu-1t"
    page = (finished_vit / "report.html").read_text(encoding="utf-8")
    assert "multiples of 8 features (enough for fp32 on onnxruntime-cpu-1t)" in page


def test_a_plan_of_any_numbers_is_smaller_by_what_multiples_cost(tmp_path: Path, vit_recipe: Make) -> None:
    """One that is smaller by `lost` loses no more; one that is smaller still does: exactly, where costs are linear."""
    recipe = validate(vit_recipe(prune={**vit_recipe()["prune"], "units": ["heads", "neurons"]}), tmp_path)
    optin_export.run(recipe, out=tmp_path, stop_after="search")
    work, plan = RunContext(recipe, tmp_path, False), read_plan(tmp_path / "plan" / "plan.json")
    found = plan.alignment
    assert found is not None and found.lost is not None and plan.predicted_loss is not None
    scores = load_file(tmp_path / "scores" / "scores.safetensors")
    curves = repair.combined(load_file(tmp_path / "scores" / "curves.safetensors"), "logits")
    macs = plan.predicted.macs - round(found.lost * work.costs.macs)

    def loss_within(macs: int) -> float:
        budget = Budget(macs=(macs + 0.5) / work.costs.macs)
        loss = find_plan(scores, work.costs, budget, dict.fromkeys(scores, 1), work.least, curves).predicted_loss
        assert loss is not None
        return loss

    assert loss_within(macs) <= plan.predicted_loss * (1 + 1e-9)
    assert loss_within(macs - 1) > plan.predicted_loss


def test_a_python_source_runs_through(tmp_path: Path, vit_recipe: Make) -> None:
    code = tmp_path / "mine.py"
    code.write_text(
        "import timm\nimport numpy as np\n"
        "def model(depth):\n"
        "    return timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, in_chans=1,\n"
        "                             num_classes=5, embed_dim=32, depth=depth, num_heads=4)\n"
        "def rows():\n"
        "    rng = np.random.default_rng(0)\n"
        "    return {'image': rng.integers(0, 255, (24, 32, 32), dtype=np.uint8)}\n"
    )
    model = {**vit_recipe()["model"], "source": f"py:{code}:model", "weights": "pretrained", "args": {"depth": 2}}
    report = optin_export.run(
        vit_recipe(model=model, data={"calibration": {"source": f"py:{code}:rows"}}), out=tmp_path / "run"
    )
    assert report is not None and report.accuracy is None
    assert report.parity.passed
    with torch.no_grad():
        assert optin_export.load_model(tmp_path / "run" / "model", trust_python=True)(
            torch.zeros(1, 1, 32, 32)
        ).shape == (1, 5)


def test_the_smallest_model_that_keeps_the_accuracy(vit_recipe: Make, tmp_path: Path) -> None:
    """Budgets are bisected on one half of the evaluation rows; the gate is judged on the other."""
    recipe = vit_recipe(prune={"budget": {"accuracy_drop": 60.0}, "probes": 4, "rows": 64, "score_samples": 16})
    report = optin_export.run(recipe, out=tmp_path / "run")
    assert report is not None and report.accuracy is not None
    assert report.accuracy.rows == 40  # of 80
    gate = next(gate for gate in report.verdict.gates if gate.name == "budget.accuracy_drop")
    assert gate.measured == report.accuracy.drop
    tried = report.pruning.tried
    assert len(tried) >= 4
    chosen = report.pruning.budget["macs"]
    assert min(one.macs for one in tried if one.drop <= 60.0) == chosen
    assert report.macs.ratio <= chosen
    again = optin_export.run(recipe, out=tmp_path / "run")
    assert again is not None and again.pruning.tried == tried  # nothing is searched twice


def test_gauss_newton_is_a_choice_of_the_recipe(
    vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off for transformers, on where it is asked for; the surgery is done again and nothing before it."""
    monkeypatch.setattr("optin_export.data.batch_size.MOST", 8)
    monkeypatch.setattr("optin_export.repair.gauss_newton.LEAST_HELD", 8)
    prune = vit_recipe()["prune"]
    plain = optin_export.run(vit_recipe(), out=tmp_path / "run", stop_after="surgery")
    assert plain is None
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    report = optin_export.run(vit_recipe(prune={**prune, "gauss_newton": True}), out=tmp_path / "run")
    assert report is not None
    stages = {stage.name: stage.reused for stage in report.stages}
    assert stages["scoring"] and stages["search"] and not stages["surgery"]
    output = report.pruning.output
    assert output is not None and output.before is not None and output.after is not None
    changed = (tmp_path / "run" / "model" / "model.safetensors").read_bytes() != before
    assert changed == (output.fallback is None)


CONVNET = """
from torch import nn

class BasicBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x).relu()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 4, 4)
        self.blocks = nn.Sequential(BasicBlock(16), BasicBlock(16), BasicBlock(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

def net():
    return Net()
"""


@pytest.mark.parametrize(("compensate", "coupled"), [(True, False), ("rescale", False), (True, True)])
def test_a_convolutional_network_of_the_users_own(
    compensate: bool | str, coupled: bool, vit_recipe: Make, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(CONVNET)
    recipe = vit_recipe(
        model={
            "source": f"py:{tmp_path / 'net.py'}:net",
            "task": "image-classification",
            "weights": "random",
            "preprocess": {"size": [32, 32], "mean": [0.5], "std": [0.5]},
        },
        prune={
            "budget": {"macs": 0.7},
            "align": 1,
            "score_samples": 16,
            "curve_samples": 32,
            "compensate": compensate,
            "coupled": coupled,
        },
    )
    report = optin_export.run(recipe, out=tmp_path / "run")
    assert report is not None and report.verdict.passed
    assert report.pruning.family == "resnet"
    streams = [group for group in report.pruning.groups if group.kind.startswith("channels.stream")]
    assert bool(streams) == coupled
    assert all(group.kind == "channels" for group in report.pruning.groups if group not in streams)
    output = report.pruning.output
    assert (output is not None) == (compensate is True)
    assert output is None or "of 48 calibration rows 0 can be held out" in (output.fallback or "")
    assert report.macs.ratio <= 0.7
