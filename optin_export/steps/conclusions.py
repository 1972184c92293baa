"""Stages `ship` and `report`: the verdict, what is shipped, and the report."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from safetensors.numpy import load_file

from optin_export import measure, ship
from optin_export.files import sha256_file, sha256_json, write_text
from optin_export.report import Report, Size, StageResult, compose, head_repair, prunings, render_html
from optin_export.report.schema import Pruning, Tried
from optin_export.workspace import Facts, Workspace


def gates(work: Workspace, facts: dict[str, Any]) -> list[measure.Gate]:
    """Every gate of the run, from what the stages found."""
    budget = work.recipe.prune.budget
    spent = facts["surgery"][budget.kind] / work.costs.whole(budget.kind)
    return measure.judge(work.recipe.gates, budget, spent, measure.Measured.from_json(facts["measure"]))


def write_report(work: Workspace, facts: Facts, stages: Sequence[StageResult]) -> Report:
    """Write report.json and report.html out of what the stages found."""
    operated = facts["surgery"]
    macs, params = (
        Size(base=base, pruned=operated[kind], ratio=operated[kind] / base)
        for kind, base in ((kind, work.costs.whole(kind)) for kind in ("macs", "params"))
    )
    scores = load_file(work.folder / "scores" / "scores.safetensors")
    report = compose(
        name=work.recipe.name,
        model={"source": work.recipe.model.source, "task": work.recipe.model.task},
        precision=work.recipe.export.precision,
        gates=gates(work, facts),
        macs=macs,
        params=params,
        measured=measure.Measured.from_json(facts["measure"]),
        pruning=Pruning(
            family=work.structure.family,
            method=work.recipe.prune.score,
            info=facts["scoring"],
            budget=dict(work.plan.budget),
            tried=tuple(Tried(macs=macs, drop=drop) for macs, drop in facts["search"].get("tried", ())),
            compensated=bool(work.recipe.prune.compensate),
            masked_difference=operated["masked_difference"],
            optimality_gap=work.plan.optimality_gap,
            merged=work.plan.merged,
            groups=prunings(work.structure, work.plan, scores, operated["repairs"]),
            head=head_repair(operated["repairs"]),
            finetuned=operated.get("finetuned"),
        ),
        engines=facts["engines"],
        stages=stages,
        environment=work.environment,
    )
    write_text(work.folder / "report.json", report.model_dump_json(indent=2) + "\n")
    write_text(work.folder / "report.html", render_html(report, work.folder))
    return report


def ship_run(work: Workspace, facts: Facts) -> None:
    """A model repository only for a run that passed, and a manifest for every run."""
    passed = all(gate.passed for gate in gates(work, facts))
    recipe, repository, onnx = work.recipe, work.folder / "triton", work.onnx(work.shipped)
    if passed and recipe.ship.triton:
        written = [repository / recipe.name / name for name in ("config.pbtxt", "1/model.onnx")]

        def run() -> dict[str, Any]:
            ship.write_repository(onnx, repository, recipe.name, recipe.export.batch)
            return {}

        inputs = {"onnx": sha256_file(onnx), "batch": recipe.export.batch, "name": recipe.name}
        work.ledger.step("ship", "ship.triton", inputs, written, run)
    elif repository.exists():
        shutil.rmtree(repository)
    ship.write_manifest(
        work.folder,
        {
            "recipe": sha256_json(recipe.model_dump(mode="json")),
            "model": recipe.model.source,
            "inputs": work.digest,
            "seed": recipe.seed,
            "passed": passed,
            "environment": work.environment,
        },
    )
