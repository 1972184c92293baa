"""The commands that a run ends with: each is a command line of this program, and fits how the run ended."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from optin_export.cli._next import Command, next_steps
from optin_export.cli.run import optin_export as parser
from optin_export.recipe import Recipe
from optin_export.recipe.load import validate
from optin_export.report.schema import GateResult, Report, Verdict, read_report
from tests.conftest import Make

COMMAND = Command("recipe.yaml", Path("my run"), ("seed=1", "prune.budget.macs=0.5"))


@pytest.fixture
def report(finished_vit: Path) -> Report:
    return read_report(finished_vit)


@pytest.fixture
def recipe(vit_recipe: Make) -> Recipe:
    return validate(vit_recipe(prune={"budget": {"macs": 0.5}}), Path.cwd())


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
def test_after_a_missed_gate(gates: list[GateResult], words: list[str], report: Report, recipe: Recipe) -> None:
    (step,) = next_steps(ended(report, *gates), recipe, Path("my run"), COMMAND)
    line = step.partition("   (")[0].rpartition("then: ")[2]
    given = shlex.split(line)
    assert given[:2] == ["optin-export", "recipe.yaml"] and given[-2:] == words
    assert parser.make_context("optin-export", given[1:]).params["recipe"] == "recipe.yaml"
    assert ("--out" in given) == ("sweep=" not in line)  # a sweep is no run that could go on in the same folder
    assert given.count("prune.budget.macs=0.5") == (0 if "prune.budget.macs=" in words[-1] else 1)


def test_a_quick_run_that_passed_is_followed_by_a_full_one(report: Report, recipe: Recipe, finished_vit: Path) -> None:
    (step,) = next_steps(ended(report, quick=True), recipe, finished_vit, COMMAND)
    assert step.startswith(f"{COMMAND}   (a full measurement") and "--quick" not in step
    (step,) = next_steps(ended(report), recipe, finished_vit, COMMAND)
    assert step.startswith(f"optin-export export {finished_vit} --format timm ")


def test_failed_parity_is_looked_into_first(report: Report, recipe: Recipe) -> None:
    failed = ended(report, gate("parity", kind="parity"), gate("speedup"))
    assert next_steps(failed, recipe, Path("run"), COMMAND)[0].startswith("optin-export doctor recipe.yaml ")
    export = recipe.export.model_copy(update={"precision": "int8"})
    int8 = recipe.model_copy(update={"export": export})
    (step,) = next_steps(ended(report, gate("parity.int8", kind="parity")), int8, Path("run"), COMMAND)
    assert shlex.split(step.partition("   (")[0])[-1] == "export.precision=fp32"
