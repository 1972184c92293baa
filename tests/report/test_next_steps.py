"""The commands that a run ends with: each is a command line of this program, and fits how the run ended."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from optin_export.cli.run import optin_export as parser
from optin_export.report.next_steps import Command, Step, next_steps, steps_of
from optin_export.report.schema import GateResult, Report, Verdict, read_report

COMMAND = Command("recipe.yaml", Path("my run"), ("seed=1", "prune.budget.macs=0.5"))


@pytest.fixture
def report(finished_vit: Path) -> Report:
    found = read_report(finished_vit)
    return found.model_copy(update={"pruning": found.pruning.model_copy(update={"budget": {"macs": 0.5}})})


def gate(name: str, measured: float | None = 1.0, note: str = "", kind: str = "gate") -> GateResult:
    values = {"relation": ">=", "required": 2.0, "passed": False}
    return GateResult.model_validate({"name": name, "kind": kind, "measured": measured, "note": note, **values})


def ended(report: Report, *gates: GateResult, quick: bool = False) -> Report:
    verdict = Verdict(passed=not gates, summary="", gates=gates)
    return report.model_copy(update={"verdict": verdict, "quick": quick})


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        ([gate("speedup")], ["--set", "prune.budget.macs=0.35"]),
        ([gate("accuracy_drop")], ["--set", "prune.budget.macs=0.75"]),
        ([gate("speedup"), gate("accuracy_drop")], ["--set", "sweep={prune.budget.macs: [0.75, 0.5, 0.35]}"]),
        ([gate("speedup", None, "not evaluated: other work took 50%")], ["--redo", "measure"]),
    ],
)
def test_after_a_missed_gate(gates: list[GateResult], words: list[str], report: Report) -> None:
    (step,) = next_steps(ended(report, *gates), Path("my run"), COMMAND)
    line = step.partition("   (")[0].rpartition("then: ")[2]
    given = shlex.split(line)
    assert given[:2] == ["optin-export", "recipe.yaml"] and given[-2:] == words
    assert parser.make_context("optin-export", given[1:]).params["recipe"] == "recipe.yaml"
    assert ("--out" in given) == ("sweep=" not in line)  # a sweep is no run that could go on in the same folder
    assert given.count("prune.budget.macs=0.5") == (0 if "prune.budget.macs=" in words[-1] else 1)


def test_a_quick_run_that_passed_is_followed_by_a_full_one(report: Report, finished_vit: Path) -> None:
    (step,) = next_steps(ended(report, quick=True), finished_vit, COMMAND)
    assert step.startswith(f"{COMMAND}   (a full measurement") and "--quick" not in step
    (step,) = next_steps(ended(report), finished_vit, COMMAND)
    assert step.startswith(f"optin-export export {finished_vit} --format timm ")


def test_failed_parity_is_looked_into_first(report: Report) -> None:
    failed = ended(report, gate("parity", kind="parity"), gate("speedup"))
    assert next_steps(failed, Path("run"), COMMAND)[0].startswith("optin-export doctor recipe.yaml ")
    int8 = ended(report, gate("parity.int8", kind="parity")).model_copy(update={"precision": "int8"})
    (step,) = next_steps(int8, Path("run"), COMMAND)
    assert shlex.split(step.partition("   (")[0])[-1] == "export.precision=fp32"


def test_the_reports_box_has_code_that_runs_in_the_run_folder(
    report: Report, finished_vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_vit)
    steps: dict[str, Step] = {step.title: step for step in steps_of(ended(report), finished_vit)}
    assert list(steps) == [
        *("Load it in timm", "", "Load it in torch", "Load it in onnxruntime", "Serve it", "Make it smaller")
    ]
    for title in ("Load it in torch", "Load it in onnxruntime"):
        exec(compile(steps[title].code, title, "exec"), {})
    for title in ("Load it in timm", "Serve it", "Make it smaller"):
        for line in steps[title].code.splitlines():
            words = shlex.split(line)
            assert words[0] == "optin-export"
            parser.make_context("optin-export", words[1:])
    assert "export.quantization=static-u8" in steps["Make it smaller"].code  # `static` is for GPUs
    on_gpu = report.engines[0].model_copy(update={"target": "tensorrt-cuda"})
    of_both = ended(report).model_copy(update={"engines": (*report.engines, on_gpu)})
    assert "export.quantization" not in steps_of(of_both, finished_vit)[-1].code
    missed = steps_of(ended(report, gate("speedup")), finished_vit)
    assert missed[0].title == "Meet the limits" and "prune.budget.macs=0.35" in missed[0].code
    assert "Serve it" not in {step.title for step in missed}
    assert steps_of(ended(report, quick=True), finished_vit)[0].title == "Measure it fully"
